//! What is written, as Prometheus reads it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::{Controlled, mapping};
use testkit::holdings::private_memory;
use testkit::process::{self, Process};
use testkit::{eventually, eventually_within, require, udp};

use super::http::{address, get, get_with};
use super::scrape::Scrape;

const ACCEPT_OPEN_METRICS: &str = "Accept: application/openmetrics-text\r\n";

/// A proxy with traffic over both protocols, and failures, that serves metrics.
pub(super) struct Scene {
    pub(super) proxy: Controlled,
    pub(super) metrics: SocketAddr,
    web: SocketAddr,
    _backends: (TcpBackend, udp::Backend),
}

impl Scene {
    #[track_caller]
    pub(super) fn start() -> Self {
        let proxy = Controlled::start(&["--metrics", "127.0.0.1:0"]);
        let metrics = address(&proxy.process);
        let tcp = TcpBackend::echo();
        let dns = udp::Backend::echo(udp::client(client::own_loopback()));
        let at = |port| SocketAddr::from((client::own_loopback(), port));
        let (web, both, nowhere) = (at(8080), at(8081), at(8082));
        let refused = client::own_address();
        let mut denied = mapping("denied", "tcp+udp", at(8083), tcp.address());
        denied["limits"] = json!({ "deny": ["127.0.0.0/8"] });
        proxy
            .apply(&[
                mapping("web", "tcp", web, tcp.address()),
                mapping("both", "tcp+udp", both, dns.address()),
                mapping("nowhere", "tcp", nowhere, refused),
                denied.clone(),
            ])
            .success();
        client::ask(web, b"hello").unwrap();
        udp::assert_echoes(&udp::client(both.ip()), both, b"question");
        knock(nowhere);
        let denied = SocketAddr::new(denied["host"].as_str().unwrap().parse().unwrap(), 8083);
        knock(denied);
        udp::client(denied.ip()).send_to(b"question", denied).unwrap();
        let scene = Self { proxy, metrics, web, _backends: (tcp, dns) };
        eventually("all is counted", || {
            scene.proxy.stats("denied")["errors"]["denied"] == 2
                && scene.proxy.stats("nowhere")["errors"]["connect_refused"] == 1
                && scene.proxy.stats("web")["connections"] == 0
        });
        scene
    }
}

/// Connects to a mapping that resets its clients, perhaps before the connection is there.
fn knock(address: SocketAddr) {
    drop(TcpStream::connect(address));
}

pub(super) fn promtool() {
    let scene = Scene::start();
    // Some series have values of both logs, and of mappings with names that need quotes.
    for headers in ["", "Accept: text/plain;version=0.0.4\r\n"] {
        let text = get_with(scene.metrics, "/metrics", headers).body;
        let file = scene.proxy.file("metrics", &text);
        let mut shell = require::command("sh");
        shell.args(["-c", "exec promtool check metrics <\"$0\""]).arg(file);
        let output = process::run(shell);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:#?}");
    }
}

pub(super) fn scraped() {
    let scene = Scene::start();
    let at = SocketAddr::from((client::own_loopback(), client::free_port(client::own_loopback())));
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("prometheus.yml");
    let target = scene.metrics;
    let job = format!(
        "global:\n  scrape_interval: 200ms\nscrape_configs:\n  - job_name: rproxy\n    static_configs:\n      - targets: ['{target}']\n"
    );
    fs::write(&config, job).unwrap();
    let mut command = require::command("prometheus");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .arg(format!("--web.listen-address={at}"));
    let prometheus = Process::spawn(command);
    let query = |query: &str| -> Option<Value> {
        assert!(prometheus.is_running(), "Prometheus has ended");
        let stream = TcpStream::connect(at).ok()?;
        drop(stream);
        let response = get(at, &format!("/api/v1/query?query={query}"));
        let answer: Value = serde_json::from_str(&response.body).ok()?;
        let results = answer["data"]["result"].as_array()?;
        Some(results.first()?["value"][1].clone())
    };
    let patience = std::time::Duration::from_secs(60);
    let assert_seen = |series: &str, value: &str| {
        eventually_within(patience, &format!("Prometheus has {series} {value}"), || {
            query(series).is_some_and(|seen| seen == value)
        });
    };
    assert_seen("up", "1");
    assert_seen("rproxy_mapping_connections_total%7Bmapping=%22web%22%7D", "1");
    assert_seen("rproxy_mapping_errors_total%7Bmapping=%22nowhere%22,reason=%22connect_refused%22%7D", "1");
    client::ask(scene.web, b"hello").unwrap();
    assert_seen("rproxy_mapping_connections_total%7Bmapping=%22web%22%7D", "2");
    assert_seen("rproxy_mapping_connect_duration_seconds_count%7Bmapping=%22web%22%7D", "2");
    assert_seen("rproxy_mapping_relayed_bytes_total%7Bmapping=%22web%22,direction=%22in%22%7D", "10");
}

pub(super) fn values() {
    let scene = Scene::start();
    let _open = client::connect(scene.web);
    eventually("it is accepted", || scene.proxy.stats("web")["connections"] == 1);
    let scrape = Scrape::of(scene.metrics);
    let stats = scene.proxy.json(&["stats"]);
    for mapping in stats["mappings"].as_array().unwrap() {
        let name = mapping["name"].as_str().unwrap();
        let is = |series: &str, key: &str| {
            let series = format!("rproxy_mapping_{series}");
            let found: Vec<f64> = scrape
                .series()
                .filter(|(one, _)| matches(one, &series, name))
                .map(|(_, value)| value)
                .collect();
            let sum: f64 = found.iter().sum();
            assert_eq!(Some(sum), mapping[key].as_f64(), "{name} {series} {key}");
        };
        for (series, key) in [
            ("connections_active", "connections"),
            ("connections_total", "connections_total"),
            ("flows_active", "flows"),
            ("flows_total", "flows_total"),
            ("relayed_bytes_total direction=\"in\"", "bytes_in"),
            ("relayed_bytes_total direction=\"out\"", "bytes_out"),
            ("relayed_datagrams_total direction=\"in\"", "datagrams_in"),
            ("relayed_datagrams_total direction=\"out\"", "datagrams_out"),
        ] {
            is(series, key);
        }
        let errors = mapping["errors"].as_object().unwrap();
        let reasons: BTreeSet<&str> = scrape
            .series()
            .filter(|(series, value)| matches(series, "rproxy_mapping_errors_total", name) && *value > 0.0)
            .map(|(series, _value)| series.split("reason=\"").nth(1).unwrap().trim_end_matches("\"}"))
            .collect();
        assert_eq!(reasons, errors.keys().map(String::as_str).collect(), "{name}");
    }
    assert_by_protocol(&scrape);
    assert_of_process(&scrape, &scene);
}

/// Checks what `rproxy ctl stats` does not tell apart.
#[track_caller]
fn assert_by_protocol(scrape: &Scrape) {
    let denied = |protocol: &str| {
        let labels = format!("mapping=\"denied\",protocol=\"{protocol}\",reason=\"denied\"");
        scrape.value(&format!("rproxy_mapping_errors_total{{{labels}}}"))
    };
    assert_eq!((denied("tcp"), denied("udp")), (1.0, 1.0));
    let bytes = |protocol: &str| {
        let labels = format!("mapping=\"both\",protocol=\"{protocol}\",direction=\"in\"");
        scrape.value(&format!("rproxy_mapping_relayed_bytes_total{{{labels}}}"))
    };
    assert_eq!((bytes("tcp"), bytes("udp")), (0.0, 8.0));
}

#[track_caller]
fn assert_of_process(scrape: &Scrape, scene: &Scene) {
    assert_eq!(scrape.value("rproxy_mappings"), 4.0);
    assert_eq!(scrape.value("rproxy_udp_flows"), 1.0);
    assert_eq!(scrape.value("rproxy_draining"), 0.0);
    assert!(scrape.value("rproxy_udp_flows_limit") > 0.0);
    assert!(scrape.value("rproxy_workers") <= scrape.value("rproxy_workers_limit"));
    // It was counted while this scrape was connected, by way of a directory, and before the last client's socket was closed.
    let open = scrape.value("rproxy_process_open_fds") - scene.proxy.process.descriptors() as f64;
    assert!((0.0..=3.0).contains(&open), "{open}");
    assert!(scrape.value("rproxy_process_max_fds") > scrape.value("rproxy_process_open_fds"));
    assert_eq!(scrape.get("rproxy_attached_ports"), None, "there is no --attach");
}

/// Whether a series has a name, a label (after a space), and is of a mapping.
fn matches(series: &str, wanted: &str, mapping: &str) -> bool {
    let (name, label) = wanted.split_once(' ').unwrap_or((wanted, ""));
    series.starts_with(&format!("{name}{{"))
        && series.contains(&format!("mapping=\"{mapping}\""))
        && series.contains(label)
}

pub(super) fn formats() {
    let scene = Scene::start();
    let text = get(scene.metrics, "/metrics");
    let open = get_with(scene.metrics, "/metrics", ACCEPT_OPEN_METRICS);
    assert!(text.headers.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{text:?}");
    let open_metrics = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(open.headers.contains(open_metrics), "{open:?}");
    assert!(open.headers.contains("vary: accept") && text.headers.contains("vary: accept"));
    assert!(open.body.ends_with("\n# EOF\n") && !text.body.contains("# EOF"));
    assert!(text.body.contains("# TYPE rproxy_mapping_connections_total counter\n"));
    assert!(open.body.contains("# TYPE rproxy_mapping_connections counter\n"));
    assert!(open.body.contains("# UNIT rproxy_mapping_relayed_bytes bytes\n"));
    let (text, open) = (Scrape::parse(&text.body), Scrape::parse(&open.body));
    for (series, value) in text.series() {
        let other = open.value(series);
        assert!(
            value == other || series.starts_with("rproxy_process_open_fds"),
            "{series}: {value}, {other}"
        );
    }
    assert_eq!(text.series().count(), open.series().count());
}

pub(super) fn documented() {
    let text = include_str!("../../../../docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `rproxy_"));
    let documented: BTreeSet<String> =
        rows.map(|row| format!("rproxy_{}", row.split(['`', '{']).next().unwrap())).collect();
    let dir = tempfile::tempdir().unwrap();
    let (config, log) = (dir.path().join("rproxy.toml"), dir.path().join("access"));
    let backend = TcpBackend::echo();
    let front = client::own_address();
    let mapping = format!(
        "[[mapping]]\nhost = \"{front}\"\nto = \"localhost:{}\"\nproto = \"tcp+udp\"\n",
        backend.address().port()
    );
    fs::write(&config, mapping).unwrap();
    let attach = format!("--attach=rproxy-tests/metrics/{}", std::process::id());
    let (config, log) = (config.to_str().unwrap(), log.to_str().unwrap());
    let arguments = ["--config", config, "--metrics", "127.0.0.1:0", "--access-log", log, &attach];
    let process = Process::spawn(testkit::rproxy::command(&arguments));
    let metrics = address(&process);
    client::ask(front, b"hello").unwrap();
    let text = get_with(metrics, "/metrics", "").body;
    let scrape = Scrape::parse(&text);
    // A histogram is one metric.
    let parts = ["_bucket", "_sum", "_count"];
    let whole = |name: &str| parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name).to_owned();
    let written: BTreeSet<String> = scrape.names().into_iter().map(whole).collect();
    assert_eq!(written, documented);
    assert_number_of_series(&scrape);
    for kind in rproxy::state::stats::FailureKind::ALL {
        let name = kind.as_str();
        assert!(text.contains(&format!("reason=\"{name}\"")));
        let alert = format!("reason=\"{name}\"");
        let is_there = include_str!("../../../../docs/metrics.md").contains(&alert);
        assert!(is_there, "{name} has an example of an alert");
    }
}

/// Of a mapping of TCP and UDP with a connection and a name, which is the only one.
fn assert_number_of_series(scrape: &Scrape) {
    let of_mapping =
        scrape.series().map(|(series, _value)| series).filter(|series| series.contains("mapping=\""));
    let (mut counts, mut others) = ([0; 4], Vec::new());
    for series in of_mapping {
        let is_about = |words: [&str; 2]| words.iter().any(|word| series.contains(word));
        match () {
            () if series.contains("_connect_duration_") => counts[2] += 1,
            () if is_about(["_mapping_connections", "protocol=\"tcp\""]) => counts[0] += 1,
            () if is_about(["_mapping_flows", "protocol=\"udp\""]) || series.contains("_datagrams_total") => {
                counts[1] += 1
            }
            () if series.contains("_mapping_name_") => counts[3] += 1,
            () => others.push(series),
        }
    }
    assert!(others.is_empty(), "{others:?}");
    let [tcp, udp, connected, named] = counts;
    let sentence = format!(
        "{tcp} for TCP, {udp} for UDP, {named} for a name, and {connected} more once a connection was made"
    );
    assert!(include_str!("../../../../docs/metrics.md").contains(&sentence), "{sentence}");
}

pub(super) fn draining() {
    let scene = Scene::start();
    let total = || Scrape::of(scene.metrics).get("rproxy_mapping_connections_total{mapping=\"web\"}");
    let bytes = || {
        let series = "rproxy_mapping_relayed_bytes_total{mapping=\"web\",protocol=\"tcp\",direction=\"in\"}";
        Scrape::of(scene.metrics).value(series)
    };
    let long = client::connect(scene.web);
    client::ping(&long);
    let before = bytes();
    assert_eq!(total(), Some(2.0));
    scene.proxy.ctl(&["remove", "web"]).success();
    assert_eq!(total(), Some(2.0), "it drains");
    client::ping(&long);
    eventually("what is drained is counted", || bytes() > before);
    let backend = scene._backends.0.address().to_string();
    let again = format!("{}", scene.web);
    scene.proxy.ctl(&["add", "--name", "web", "--host", &again, "--to", &backend]).success();
    assert_eq!(total(), Some(2.0), "with those of the one before");
    client::ask(scene.web, b"hello").unwrap();
    assert_eq!(total(), Some(3.0));
    drop(long);
    eventually("it has drained", || scene.proxy.json(&["stats"])["draining"] == json!([]));
    assert_eq!(total(), Some(3.0));
    // Removed mappings are forgotten from time to time.
    for _ in 0..70 {
        let extra = client::own_address().to_string();
        scene.proxy.ctl(&["add", "--name", "extra", "--host", &extra, "--to", &backend]).success();
        scene.proxy.ctl(&["remove", "extra"]).success();
    }
    assert_eq!(total(), Some(3.0));
    scene.proxy.ctl(&["remove", "web"]).success();
    eventually("nothing is left", || total().is_none());
}

/// Clients that ask for megabytes and do not read hold little of them, and leave nothing behind.
fn stalled_scrapers(scene: &Scene) {
    const CLIENTS: usize = 60;

    let memory = || private_memory(scene.proxy.process.pid());
    let before = memory();
    let stalled: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            socket.connect(&scene.metrics.into()).unwrap();
            let stream = client::patient(socket.into());
            (&stream).write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            (&stream).read_exact(&mut [0; 64]).unwrap();
            stream
        })
        .collect();
    let held = memory().saturating_sub(before);
    assert!(held < CLIENTS * 500, "{held} kB");
    drop(stalled);
    eventually("the memory is released", || memory() < before + 8_000);
}

pub(super) fn many_mappings() {
    let scene = Scene::start();
    let at = |number: usize| {
        let host = client::own_loopback().to_string();
        json!({ "name": format!("m{number}"), "host": host, "host_ports": format!("{}", 10_000 + number),
                "to": "192.0.2.1", "to_ports": "80" })
    };
    let mappings: Vec<Value> = (0..10_000).map(at).collect();
    scene.proxy.apply(&mappings).success();
    let scrape = Scrape::of(scene.metrics);
    assert_eq!(scrape.value("rproxy_mappings"), 10_000.0);
    for name in ["m0", "m4999", "m9999"] {
        assert_eq!(scrape.value(&format!("rproxy_mapping_connections_total{{mapping=\"{name}\"}}")), 0.0);
    }
    for accept in ["", ACCEPT_OPEN_METRICS] {
        let text = get_with(scene.metrics, "/metrics", accept).body;
        let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let families: BTreeSet<&str> = types.iter().copied().collect();
        assert_eq!(families.len(), types.len(), "each family is described once");
    }
    stalled_scrapers(&scene);
    assert_eq!(get(scene.metrics, "/readyz").code(), "200");
    // A range is one mapping.
    let range = json!({ "name": "range", "host": client::own_loopback().to_string(), "host_ports": "20001-22000",
                        "to": "192.0.2.1", "to_ports": "80" });
    scene.proxy.apply(&[range]).success();
    let scrape = Scrape::of(scene.metrics);
    let ranges =
        scrape.series().filter(|(series, _)| matches(series, "rproxy_mapping_connections_total", "range"));
    assert_eq!(ranges.count(), 1);
}
