//! A short comparison with every peer: the relayed data is correct, and nothing is left behind. Performance
//! is not checked.

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use testkit::process::{Process, Stream, run};
use testkit::require::Need;
use testkit::suite::{self, Case};

/// Every kind of workload, in the sizes that are most likely to fail.
const WORKLOADS: &str = "tcp-bulk-8-up,tcp-bulk-8-down,tcp-rr-64,tcp-crr-64,tcp-get-256k-4,tcp-idle-200,udp-rr-64x8-64B,\
                         udp-rr-1x64-1400B,udp-bulk-1400B-gso,udp-bulk-8-down,quic-down-2,quic-rr-4x8,\
                         start,footprint,scale-tcp-500,scale-udp-500,scale-mappings-100";

fn main() -> ExitCode {
    let peers = ["ip", "docker-proxy", "haproxy", "nginx", "socat", "nft"].map(Need::Program);
    let needs = [&[Need::Root][..], &peers].concat();
    suite::run(vec![
        Case::new("a short comparison finds nothing wrong", nothing_is_wrong)
            .needs(&needs)
            .deadline(Duration::from_secs(300)),
        Case::new("load finds a wrong answer", wrong_answers_are_found),
        Case::new("load by the backend's own port works", loads_of_the_backend_work),
        Case::new("load of a peer that loses everything ends", silence_ends)
            .deadline(Duration::from_secs(60)),
        Case::new("what a killed run started ends", killed_run_leaves_nothing).needs(&needs),
    ])
}

fn benches(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_benches"));
    command.args(arguments);
    command
}

fn nothing_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let (json, svg) = (directory.path().join("out.json"), directory.path().join("out.svg"));
    let mut command = benches(&["compare", "--rounds", "1", "--duration", "200ms", "--starts", "10"]);
    command.args(["--only", WORKLOADS]).arg("--json").arg(&json).arg("--svg").arg(&svg);
    let process = Process::spawn(command);
    let status = process.wait_within(Duration::from_secs(290));
    let (stdout, stderr) = (process.captured(Stream::Stdout), process.captured(Stream::Stderr));
    assert!(status.success(), "{stdout}\n{stderr}");
    for workload in WORKLOADS.split(',') {
        let heading = |line: &str| line.split_whitespace().next() == Some(workload);
        assert!(stdout.lines().any(heading), "{workload} is not in the table:\n{stdout}");
    }
    let result: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert!(result["machine"]["cores"].as_u64() > Some(0), "{:#}", result["machine"]);
    let samples = result["samples"].as_array().unwrap();
    let ours = samples.iter().filter(|sample| sample["peer"] == "rproxy");
    assert!(ours.clone().count() > 8, "{result:#}");
    for sample in ours {
        assert!(sample["values"].is_object(), "{sample:#}");
    }
    assert!(fs::read_to_string(svg).unwrap().ends_with("</svg>\n"));
}

fn wrong_answers_are_found() {
    // A peer that replies with zeros, and more of them than requested.
    let zeros = testkit::backend::TcpBackend::local(|mut stream| {
        use std::io::{Read, Write};
        let mut buffer = [0; 1024];
        while let len @ 1.. = stream.read(&mut buffer)? {
            stream.write_all(&vec![0; 100 * len])?;
        }
        Ok(())
    });
    let address = zeros.address().to_string();
    for workload in ["tcp-rr-1", "tcp-crr-1", "tcp-bulk-1-down"] {
        let output = run(benches(&["load", workload, "--to", &address, "--duration", "100ms"]));
        assert_eq!(output.status.code(), Some(1), "{workload}: {output:?}");
        assert!(output.stderr.contains("wrong data"), "{workload}: {output:?}");
    }
}

/// Loads that need nothing but the backend, and what they report first.
const ALONE: [(&str, &str); 5] = [
    ("tcp-bulk-1-down", "throughput_gbit_per_s"),
    ("udp-rr-1x8-64B", "replies_per_s"),
    ("udp-bulk-2-down", "throughput_gbit_per_s"),
    ("quic-down-2", "throughput_gbit_per_s"),
    ("quic-rr-2x8", "requests_per_s"),
];

fn loads_of_the_backend_work() {
    let backend = Process::spawn(benches(&["serve", "127.0.0.1:0"]));
    let printed = backend.wait_for_lines(Stream::Stdout, 2, |line| line.contains(':'));
    let [plain, quic] = printed.iter().map(|line| line.split(' ').next()).collect::<Vec<_>>()[..] else {
        panic!("{printed:?}");
    };
    for (workload, metric) in ALONE {
        let address = if workload.starts_with("quic") { quic } else { plain };
        let to = address.unwrap();
        let output = run(benches(&["load", workload, "--to", to, "--duration", "100ms", "--json"]));
        assert!(output.status.success(), "{workload}: {output:?}");
        let values: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
        assert!(values[metric].as_f64() > Some(0.0), "{workload}: {values}");
    }
}

fn silence_ends() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        for workload in ["udp-bulk-2-down", "quic-down-2", "quic-rr-2x8"] {
            let load = benches(&["load", workload, "--to", &address, "--duration", "100ms"]);
            scope.spawn(move || {
                let output = run(load);
                assert_eq!(output.status.code(), Some(1), "{workload}: {output:?}");
                assert!(output.stderr.contains("no answer for 10s: "), "{workload}: {output:?}");
            });
        }
    });
}

fn killed_run_leaves_nothing() {
    let command =
        benches(&["compare", "--only", "tcp-rr-1", "--duration", "60s", "--peers", "nginx,docker-proxy"]);
    let process = Process::spawn(command);
    process.wait_for_line(Stream::Stderr, |line| line.starts_with("[1/"));
    let before = descendants(process.pid().as_raw());
    assert!(before.len() > 3, "the harness and its peers: {before:?}");
    // Kills it, and returns when it is gone; the kernel then ends the others.
    drop(process);
    while before.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {}
}

/// The descendants of a process, according to /proc.
fn descendants(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        let children = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent_field = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
            (parent_field == parent.to_string()).then_some(pid)
        });
        found.extend(children.collect::<Vec<_>>());
    }
    found
}
