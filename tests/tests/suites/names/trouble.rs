//! Name servers that never answer, resolvers that hang, and what others notice of that.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use testkit::controlled::Controlled;
use testkit::eventually;
use testkit::process::Stream;
use testkit::rproxy;
use testkit::topology::{CONTAINER_V4, HOST_V4};

use super::{SECOND_V4, SILENT_DOMAIN, SILENT_SERVER, Stage, TO_NAME, at, list, resolver_of};

/// More names than are looked up at the same time.
const MANY: u16 = 300;

/// A name server that reads nothing, at the address where that of the stage asks for the silent domain.
fn silent_server(stage: &Stage) -> UdpSocket {
    stage.net.host.run(|| UdpSocket::bind(SILENT_SERVER).unwrap())
}

/// Mappings to names of the silent domain, in a configuration with this mapping.
fn among_silent_ones(stage: &Stage, mapping: &str) -> String {
    let silent = (1..=MANY).map(|number| {
        let port = 20_000 + number;
        format!("[[mapping]]\nhost = \"127.0.0.1:{port}\"\nto = \"host-{number}.{SILENT_DOMAIN}.:80\"\n")
    });
    let text: String = silent.chain([mapping.to_owned()]).collect();
    let file = stage.dir.path().join("rproxy.toml");
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

pub(super) fn among_silent() {
    let stage = Stage::new(&format!("{CONTAINER_V4} web.internal\n{SECOND_V4} other.internal\n"), 1);
    let _letters = stage.letters();
    let _silent = silent_server(&stage);
    let web = "[[mapping]]\nname = \"web\"\nhost = \"0.0.0.0:80\"\nto = \"web.internal:80\"\n";
    let server = stage.control(&["--config", &among_silent_ones(&stage, web)]);
    assert_eq!(stage.letter(), Some(b'a'), "the start did not wait for it in vain");
    // A change does not, either.
    server.ctl(&["add", "--name", "other", "--host", "0.0.0.0:81", "--to", "other.internal:80"]).success();
    assert_eq!(resolved(&server, "other"), json!([SECOND_V4.to_string()]));
    server.ctl(&["retarget", "other", "--to", "web.internal:80"]).success();
    assert_eq!(resolved(&server, "other"), json!([CONTAINER_V4.to_string()]));
    stage.rename(&at(SECOND_V4));
    stage.leads_to(b'b');
}

/// What the name of a mapping stands for.
fn resolved(server: &Controlled, name: &str) -> serde_json::Value {
    member(server, name, "resolved")
}

fn member(server: &Controlled, name: &str, member: &str) -> serde_json::Value {
    let list = list(server);
    let mappings = list["mappings"].as_array().unwrap();
    mappings.iter().find(|mapping| mapping["name"] == name).unwrap()[member].clone()
}

pub(super) fn required_loop() {
    let stage = Stage::new(&at(HOST_V4), 1);
    let arguments = [&TO_NAME[..], &["--require-resolved"]].concat();
    let output = stage.net.host.spawn(stage.command(&rproxy::command(&arguments))).into_output();
    let lines: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with("rproxy: ")).collect();
    assert!(output.status.code() == Some(1) && lines.len() == 1 && output.stdout.is_empty(), "{output:#?}");
    let why = "80/tcp: the name web.internal has only addresses that lead back to the mapping";
    assert!(lines[0].contains(why), "{output:#?}");
    // A change says the same.
    let server = stage.control(&[]);
    let output = server.ctl(&[&["add"], &arguments[..]].concat());
    assert!(output.status.code() == Some(1) && output.stderr.contains(why), "{output:#?}");
}

/// A stopped process, which continues in the end.
struct Stopped(Pid);

impl Stopped {
    fn new(pid: Pid) -> Self {
        kill(pid, Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It is gone, unless the test has failed.
        kill(self.0, Signal::SIGCONT).ok();
    }
}

pub(super) fn resolver_stopped() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let proxy = stage.start(&[&TO_NAME[..], &["--sandbox", "strict"]].concat());
    for (ip, letter) in [(SECOND_V4, b'b'), (CONTAINER_V4, b'a')] {
        let stopped = Stopped::new(resolver_of(&proxy.process));
        stage.rename(&at(ip));
        stage.leads_to(letter);
        eventually("it has ended", || !Path::new(&format!("/proc/{}", stopped.0)).exists());
    }
    let said = proxy.process.captured(Stream::Stderr);
    assert!(said.contains("another process looks names up from now on"), "{said}");
}

pub(super) fn stopped_while_waiting() {
    const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

    let stage = Stage::new("", 1);
    fs::write(stage.dir.path().join("resolv.conf"), format!("nameserver {SERVER}\n")).unwrap();
    let dns = stage.net.host.run(|| UdpSocket::bind((SERVER, 53)).unwrap());
    dns.set_read_timeout(Some(testkit::PATIENCE)).unwrap();
    let is_asked = || {
        let mut question = [0; 512];
        dns.recv(&mut question).expect("a question");
    };
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let control = stage.dir.path().join("control");
        let arguments = [&TO_NAME[..], &["--control", control.to_str().unwrap()]].concat();
        let process = stage.net.host.spawn(stage.command(&rproxy::command(&arguments)));
        is_asked();
        process.signal(signal);
        let output = process.into_output();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:#?}");
        assert!(output.stderr.contains("before anything was served"), "{output:#?}");
        assert!(!output.stderr.contains("serving "), "{output:#?}");
        assert!(!control.exists(), "its socket is removed");
        drain(&dns);
    }
    // A change is not waited for, either.
    let server = stage.control(&[]);
    let mut client = server.connect();
    let mapping = json!({ "host_ports": "80", "to": "web.internal", "to_ports": "80" });
    let add = json!({ "v": 1, "id": 1, "do": { "add": { "mappings": [mapping] } } });
    client.send(format!("{add}\n").as_bytes()).unwrap();
    is_asked();
    server.process.signal(Signal::SIGTERM);
    assert!(server.process.wait().success());
    let said = server.process.captured(Stream::Stderr);
    assert!(said.contains("ending, nothing was changed") && !said.contains("web.internal"), "{said}");
}

/// Reads the questions of a process that has ended.
fn drain(dns: &UdpSocket) {
    dns.set_nonblocking(true).unwrap();
    while dns.recv(&mut [0; 512]).is_ok() {}
    dns.set_nonblocking(false).unwrap();
}

pub(super) fn added_again() {
    // Valid for an hour.
    let stage = Stage::new(&at(CONTAINER_V4), 3600);
    let server = stage.control(&["--host", "0.0.0.0:80", "--to", "web.internal:80", "--name", "web"]);
    stage.rename(&at(SECOND_V4));
    server.ctl(&["add", "--name", "same", "--host", "0.0.0.0:81", "--to", "web.internal:80"]).success();
    let second = json!([SECOND_V4.to_string()]);
    assert_eq!(resolved(&server, "same"), second, "it is looked up before the answer");
    eventually("the other one leads there, too", || resolved(&server, "web") == second);
}

pub(super) fn measured() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let metrics = stage.dir.path().join("metrics");
    let option = format!("unix:{}", metrics.display());
    let server = stage.control(&[
        "--host",
        "0.0.0.0:80",
        "--to",
        "web.internal:80",
        "--name",
        "web",
        "--metrics",
        &option,
    ]);
    server.ctl(&["add", "--name", "address", "--host", "0.0.0.0:81", "--to", "172.17.0.2:80"]).success();
    let value = |name: &str| {
        let series = format!("rproxy_mapping_name_resolved{{mapping=\"{name}\"}} ");
        let text = scrape(&metrics);
        text.lines().find_map(|line| Some(line.strip_prefix(&series)?.to_owned()))
    };
    assert_eq!((value("web").as_deref(), value("address")), (Some("1"), None));
    assert_eq!(member(&server, "web", "lookup_error"), json!(null));
    stage.rename("");
    eventually("the failure is measured", || value("web").as_deref() == Some("0"));
    assert_eq!(member(&server, "web", "lookup_error"), "there is no such name");
    assert_eq!(resolved(&server, "web"), json!([CONTAINER_V4.to_string()]), "it keeps its address");
    // What `list` prints can be applied.
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    server.ctl(&["apply", file.to_str().unwrap()]).success();
    stage.rename(&at(SECOND_V4));
    eventually("it resolves again", || value("web").as_deref() == Some("1"));
    // It resolves, but to nothing that can be used.
    stage.rename(&at(HOST_V4));
    eventually("a loop is measured", || value("web").as_deref() == Some("0"));
    assert_eq!(member(&server, "web", "lookup_error"), json!(null));
}

/// What is served at `/metrics`.
fn scrape(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}
