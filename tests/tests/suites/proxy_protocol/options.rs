//! The options have the same effect wherever they are written, and mistakes are reported.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};

use testkit::client::{own_address, own_listener};
use testkit::controlled::Controlled;
use testkit::process;
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;

use super::{LOOPBACK, assert_tells};
use crate::attach::scene::{Plane, Port};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("flags, and a file that they print", flags_and_file),
        case("the control socket, and a configuration that it prints", control),
        case("defaults", defaults),
        case("attached ports", attached),
        case("mistakes", mistakes),
    ]
}

const FLAGS: [&str; 8] = [
    "--send-proxy",
    "v2",
    "--send-proxy-udp",
    "first",
    "--accept-proxy",
    "127.0.0.0/8,fd00::/8",
    "--proxy-timeout",
    "2s",
];

/// The same as keys of a configuration.
const KEYS: &str = "send_proxy = \"v2\"\nsend_proxy_udp = \"first\"\naccept_proxy = [\"127.0.0.0/8\", \"fd00::/8\"]\n\
                    proxy_timeout = \"2s\"\n";

/// The same in the control protocol.
fn limits() -> Value {
    json!({
        "send_proxy": "v2", "send_proxy_udp": "first",
        "accept_proxy": [LOOPBACK, "fd00::/8"], "proxy_timeout": "2s",
    })
}

/// The flags of a mapping.
fn ends(host: SocketAddr, to: SocketAddr) -> [String; 4] {
    ["--host".to_owned(), host.to_string(), "--to".to_owned(), to.to_string()]
}

fn flags_and_file() {
    let (address, (backend, to), dir) = (own_address(), own_listener(), tempfile::tempdir().unwrap());
    let ends = ends(address, to);
    let arguments = [&ends.each_ref().map(String::as_str)[..], &FLAGS].concat();
    let proxy = Standalone::start(&[&arguments[..], &["--sandbox", "strict"]].concat());
    assert_tells(address, &backend);
    drop(proxy);
    let text = process::run(rproxy::command(&[&arguments[..], &["--print-config"]].concat())).success();
    assert!(KEYS.lines().all(|line| text.lines().any(|printed| printed == line)), "{text}");
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, &text).unwrap();
    let from_file = ["--config", file.to_str().unwrap()];
    let again = rproxy::command(&[&from_file[..], &["--print-config"]].concat());
    assert_eq!(process::run(again).success(), text);
    let proxy = Controlled::start(&from_file);
    assert_tells(address, &backend);
    assert_eq!(proxy.json(&["list"])["mappings"][0]["limits"], limits());
}

fn control() {
    let (proxy, address, (backend, to)) =
        (Controlled::start(&["--sandbox", "strict"]), own_address(), own_listener());
    let ends = ends(address, to);
    proxy
        .ctl(&[&["add", "--name", "web"], &ends.each_ref().map(String::as_str)[..], &FLAGS].concat())
        .success();
    assert_tells(address, &backend);
    assert_eq!(proxy.json(&["list"])["mappings"][0]["limits"], limits());
    let text = proxy.ctl(&["list", "--toml"]).success();
    assert!(KEYS.lines().all(|line| text.lines().any(|printed| printed == line)), "{text}");
    let other = Controlled::start(&[]);
    proxy.ctl(&["remove", "web"]).success();
    let file = other.file("rproxy.toml", &text);
    other.ctl(&["apply", file.to_str().unwrap()]).success();
    assert_tells(address, &backend);
}

fn defaults() {
    let (address, (backend, to), dir) = (own_address(), own_listener(), tempfile::tempdir().unwrap());
    let (other, (of_other, to_other)) = (own_address(), own_listener());
    let file = dir.path().join("rproxy.toml");
    let text = format!(
        "[defaults]\n{KEYS}\n[[mapping]]\nhost = '{address}'\nto = '{to}'\n\n\
         [[mapping]]\nhost = '{other}'\nto = '{to_other}'\nsend_proxy = 'v1'\naccept_proxy = []\n"
    );
    fs::write(&file, text).unwrap();
    let _proxy = Controlled::start(&["--config", file.to_str().unwrap()]);
    assert_tells(address, &backend);
    let client = testkit::client::connect(other);
    let told = super::v1([client.local_addr().unwrap(), other]);
    super::receives(&super::accept(&of_other), &told);
}

fn attached() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    for text in [format!("[attach]\n{KEYS}"), format!("attach = true\n[defaults]\n{KEYS}")] {
        fs::write(&file, text).unwrap();
        let mut plane = Plane::start(&["--config", file.to_str().unwrap(), "--sandbox", "strict"]);
        let (backend, to) = own_listener();
        let port = Port::tcp(own_address(), to);
        let old = assert_tells(port.address(), &backend);
        plane.upgrade();
        assert_tells(port.address(), &backend);
        super::converse(&old[0], &old[1]);
    }
}

fn mistakes() {
    let (dir, to) = (tempfile::tempdir().unwrap(), "192.0.2.1:80");
    for (flag, value, says) in [
        ("--send-proxy", "v3", "[possible values: v1, v2]"),
        ("--send-proxy-udp", "all", "[possible values: each, first]"),
        ("--accept-proxy", "10.0.0.1/8", "it has host bits set; write 10.0.0.0/8"),
        ("--accept-proxy", "proxies", "not a network"),
        ("--proxy-timeout", "0", "everything would be over at once"),
        ("--proxy-timeout", "unlimited", "not a duration"),
        ("--proxy-timeout", "1s", "--accept-proxy"),
        ("--send-proxy-udp", "first", "--send-proxy v2"),
        ("--source", "fe80::1%lo", "fe80::1 is link-local"),
    ] {
        let output = process::run(rproxy::command(&["--host", "127.0.0.1:0", "--to", to, flag, value]));
        assert_eq!(output.status.code(), Some(2), "{output:#?}");
        assert!(output.stderr.contains(flag) && output.stderr.contains(says), "{output:#?}");
        assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    }
    let file = dir.path().join("rproxy.toml");
    for (line, says) in [
        ("send_proxy = 'v3'", ":4:14: send_proxy: write \"v1\", \"v2\" or \"off\""),
        ("send_proxy = 2", ":4:14: send_proxy: "),
        ("send_proxy_udp = 'all'", ":4:18: send_proxy_udp: write \"each\" or \"first\""),
        ("accept_proxy = '10.0.0.0/8'", ":4:16: accept_proxy: "),
        ("accept_proxy = ['10.0.0.1/8']", ":4:16: accept_proxy: "),
        ("proxy_timeout = 'unlimited'", ":4:17: proxy_timeout: a header needs one, such as \"5s\""),
        ("proxy_timeout = '0s'", ":4:17: proxy_timeout: everything would be over at once"),
        ("proxy_protocol = 'v2'", "send_proxy"),
    ] {
        fs::write(&file, format!("[[mapping]]\nhost = '127.0.0.1:8080'\nto = '{to}'\n{line}\n")).unwrap();
        let output = process::run(rproxy::command(&["check-config", file.to_str().unwrap()]));
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stderr.contains(says), "{says}: {output:#?}");
        assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    }
    let proxy = Controlled::start(&[]);
    let mut web = testkit::controlled::mapping("web", "tcp", own_address(), to.parse().unwrap());
    web["limits"] = json!({ "send_proxy": "v3" });
    let output = proxy.apply(&[web]);
    assert!(!output.status.success() && output.stderr.contains("limits.send_proxy"), "{output:#?}");
    assert_eq!(proxy.json(&["list"])["mappings"], json!([]));
}
