//! Log lines: what they say about mappings, clients and backends, as text and as JSON.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address, own_listener};
use testkit::controlled::{Controlled, mapping};
use testkit::process::{Process, Stream};
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::udp;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a mapping that is served: its addresses and ports", serving),
        case("many mappings do not flood the log", many),
        case("the end of a connection: its bytes, time and reason", connection),
        case("a reset: its time, and the bytes that were not delivered", reset),
        case("a refused client, with its mapping", refused),
        case("a backend that refuses connections, with its mapping", no_backend),
        case("a backend that refuses datagrams, with its mapping", refused_datagrams),
    ]
}

/// Starts a server whose log is JSON.
fn start(more: &[&str]) -> Controlled {
    Controlled::start(&[&["--log-format", "json", "--log-level", "debug"], more].concat())
}

/// Waits for a line with a message, and returns its level and fields.
#[track_caller]
fn line(process: &Process, message: &str) -> (String, Value) {
    let read =
        |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    let line = process.wait_for_line(Stream::Stderr, |line| read(line)["fields"]["message"] == message);
    let line = read(&line);
    (line["level"].as_str().unwrap().to_owned(), line["fields"].clone())
}

fn own_mapping(proto: &str, to: SocketAddr) -> (Value, SocketAddr) {
    let host = own_address();
    (mapping("web", proto, host, to), host)
}

fn serving() {
    let proxy = start(&[]);
    let (mut web, host) = own_mapping("tcp+udp", "192.0.2.1:80".parse().unwrap());
    web.as_object_mut().unwrap().remove("host_ports");
    proxy.apply(&[web]).success();
    let bound = proxy.json(&["list"])["mappings"][0]["bound"].clone();
    let host = format!("{}:{}", host.ip(), bound.as_str().unwrap());
    let expected = json!({ "message": "serving", "mapping": "web", "host": host, "backend": "192.0.2.1:80", "protocol": "tcp+udp" });
    assert_eq!(line(&proxy.process, "serving"), ("INFO".to_owned(), expected));
    proxy.apply(&[]).success();
    let expected = json!({ "message": "no longer serving", "mapping": "web" });
    assert_eq!(line(&proxy.process, "no longer serving"), ("INFO".to_owned(), expected));
}

fn many() {
    let proxy = start(&[]);
    let host = client::own_loopback();
    let all: Vec<Value> = (0..150)
        .map(|port| {
            mapping(&format!("m{port}"), "tcp", (host, 20_000 + port).into(), "192.0.2.1:80".parse().unwrap())
        })
        .collect();
    proxy.apply(&all).success();
    assert_eq!(line(&proxy.process, "serving more; rproxy ctl list has all").1["mappings"], 50);
    proxy.apply(&[]).success();
    assert_eq!(line(&proxy.process, "no longer serving more").1["mappings"], 50);
    let log = proxy.process.captured(Stream::Stderr);
    let count = |message: &str| log.matches(&format!("\"message\":\"{message}\"")).count();
    assert_eq!([count("serving"), count("no longer serving")], [100, 100], "{log}");
}

fn connection() {
    let (backend, proxy) = (TcpBackend::echo(), start(&[]));
    let (web, host) = own_mapping("tcp", backend.address());
    proxy.apply(&[web]).success();
    client::assert_echoes(host);
    let (level, fields) = line(&proxy.process, "connection ended");
    assert_eq!(
        (&*level, &fields["mapping"], &fields["bytes_in"], &fields["bytes_out"]),
        ("DEBUG", &json!("web"), &json!(5), &json!(5))
    );
    assert!(
        fields["duration_ms"].is_u64() && fields["client"].as_str().unwrap().starts_with("127."),
        "{fields}"
    );
    assert!(matches!(fields["reason"].as_str(), Some("client_closed" | "backend_closed")), "{fields}");
}

fn reset() {
    // Connections stay in its queue: nobody reads.
    let (_backend, to) = own_listener();
    let (host, to) = (own_address(), to.to_string());
    let log = ["--log-format", "json", "--log-level", "debug"];
    let proxy = Standalone::start(&[&["--host", &host.to_string(), "--to", &to][..], &log].concat());
    let client = client::connect(host);
    client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    while (&client).write(&[0; 65536]).is_ok() {}
    client::reset(client);
    let (_level, fields) = line(&proxy.process, "connection ended");
    assert_eq!(fields["reason"], "client_reset", "{fields}");
    assert!(fields["duration_ms"].is_u64(), "without --control, --metrics and --access-log, too: {fields}");
    assert!(fields["undelivered_in"].as_u64() > Some(0) && fields["undelivered_out"] == 0, "{fields}");
}

fn refused() {
    let (backend, proxy) = (TcpBackend::echo(), start(&[]));
    let (mut web, host) = own_mapping("tcp", backend.address());
    web["limits"] = json!({ "deny": ["127.0.0.0/8"] });
    proxy.apply(&[web]).success();
    let client = TcpStream::connect(host).unwrap();
    let (level, fields) = line(&proxy.process, "client refused");
    let expected = json!({
        "message": "client refused", "mapping": "web", "client": client.local_addr().unwrap().to_string(),
        "reason": "deny has it", "suppressed": 0,
    });
    assert_eq!((&*level, fields), ("INFO", expected));
}

fn no_backend() {
    let proxy = start(&[]);
    let nobody = own_address();
    let (web, host) = own_mapping("tcp", nobody);
    proxy.apply(&[web]).success();
    let _client = TcpStream::connect(host);
    let (level, fields) = line(&proxy.process, "connection reset: no backend");
    assert_eq!(
        (&*level, &fields["mapping"], &fields["reason"]),
        ("WARN", &json!("web"), &json!("connect_refused"))
    );
    assert_eq!(fields["backend"], nobody.to_string());
}

fn refused_datagrams() {
    let proxy = start(&[]);
    let nobody = own_address();
    let (web, host) = own_mapping("udp", nobody);
    proxy.apply(&[web]).success();
    // One is enough: the refusal (ICMP) comes later.
    udp::local().send_to(b"hello", host).unwrap();
    let (level, fields) = line(&proxy.process, "datagrams lost");
    assert_eq!((&*level, &fields["mapping"], &fields["refused"]), ("WARN", &json!("web"), &json!(1)));
    assert_eq!((&fields["to"], &fields["backend"]), (&json!("backend"), &json!(nobody.to_string())));
    assert_eq!(proxy.stats("web")["errors"]["datagram_refused"], 1);
    let table = proxy.ctl(&["stats"]).success();
    assert!(table.ends_with("datagram_refused 1\n"), "{table}");
}
