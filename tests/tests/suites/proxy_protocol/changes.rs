//! Limits, access lists, and changes while clients of proxies are served.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use testkit::backend::{TcpBackend, echo};
use testkit::client::{self, End, own_address, own_listener};
use testkit::controlled::Controlled;
use testkit::eventually;
use testkit::process::Stream;
use testkit::require::Need;
use testkit::suite::Case;
use testkit::upgradable::{Program, upgrade, wait_for_end};

use super::{LOOPBACK, Served, accept, assert_tells, both_ways, converse, receives, serve, told, v1, v2};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("bulk both ways", bulk),
        case("access lists are about the client that is told", access),
        case("clients that a change denies are reset", denied_later),
        case("a change while headers are awaited", denied_meanwhile),
        case("another backend while headers are awaited", retargeted_meanwhile).needs(&[Need::Ipv6]),
        case("beyond max_connections clients are reset", limit_resets),
        case("limits of a source are of the clients behind the proxy", limits_of_sources),
        case("beyond max_connections clients wait", limit_waits),
        case("other options apply to new connections", other_options),
        case("a reload", reload),
        case("a removed mapping lets its connections finish", removed),
        case("an upgrade", upgraded),
    ]
}

/// A client at `ip` that a proxy tells.
fn client_at(ip: &str) -> [SocketAddr; 2] {
    let [source, destination] = told();
    [(ip.parse::<IpAddr>().unwrap(), source.port()).into(), destination]
}

/// Checks that a client at `ip` is served.
#[track_caller]
fn admitted(served: &Served, ip: &str) -> [TcpStream; 2] {
    let client = served.send(&v1(client_at(ip)));
    let stream = accept(&served.backend);
    receives(&stream, &v2(client_at(ip)));
    converse(&client, &stream);
    [client, stream]
}

/// The limits of [`both_ways`], and others.
fn with(more: &Value) -> Value {
    let mut limits = both_ways();
    limits.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    limits
}

fn bulk() {
    let header = v2(told()).len();
    let backend = TcpBackend::local(move |mut stream| {
        stream.read_exact(&mut vec![0; header])?;
        echo(stream)
    });
    let served = Served { to: backend.address(), ..serve(&both_ways()) };
    served.change(&both_ways());
    for header in [v1(told()), v2(told())] {
        let client = served.send(&header);
        client::exchange(&client, 1, 32 * 1024 * 1024);
        client::exchange(&client, 2, 100);
    }
}

fn access() {
    let served = serve(&with(&json!({ "allow": ["192.0.2.0/24", "2001:db8::/32"], "deny": ["192.0.2.8"] })));
    let _served = [admitted(&served, "192.0.2.7"), admitted(&served, "192.0.2.9")];
    let refused = [
        v1(client_at("192.0.2.8")),
        v1(client_at("203.0.113.1")),
        // The proxy itself is no client that is allowed.
        b"PROXY UNKNOWN\r\n".to_vec(),
    ];
    for (number, header) in refused.into_iter().enumerate() {
        assert_eq!(client::read_to_end(&served.send(&header)), (vec![], End::Reset));
        assert_eq!(served.errors(), json!({ "denied": number + 1 }));
    }
    served.assert_not_dialled();
    let line = served.proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("client refused"));
    assert!(line.contains("client=192.0.2.8:4711"), "{line}");
    // A header is expected from a proxy whose own address is denied.
    served.change(&with(&json!({ "deny": [LOOPBACK] })));
    admitted(&served, "192.0.2.8");
}

fn denied_later() {
    let served = serve(&both_ways());
    let [cut, _its_backend] = admitted(&served, "192.0.2.7");
    let kept = admitted(&served, "192.0.2.8");
    served.change(&with(&json!({ "deny": ["192.0.2.7"] })));
    assert_eq!(client::read_to_end(&cut), (vec![], End::Reset));
    // A change against the proxy is none against its clients.
    served.change(&with(&json!({ "deny": ["192.0.2.7", LOOPBACK] })));
    converse(&kept[0], &kept[1]);
    served.expect_errors(&json!({ "denied": 1 }));
}

fn denied_meanwhile() {
    let served = serve(&with(&json!({ "proxy_timeout": "1h" })));
    let headers = ["192.0.2.7", "192.0.2.8"].map(|ip| v1(client_at(ip)));
    let [mut denied, mut allowed] = headers.each_ref().map(|header| served.send(&header[..9]));
    eventually("both are accepted", || served.proxy.stats("web")["connections"] == 2);
    // The proxy is not allowed either.
    served.change(&with(&json!({ "proxy_timeout": "1h", "allow": ["192.0.2.8"] })));
    denied.write_all(&headers[0][9..]).unwrap();
    assert_eq!(client::read_to_end(&denied), (vec![], End::Reset));
    allowed.write_all(&headers[1][9..]).unwrap();
    let stream = accept(&served.backend);
    receives(&stream, &v2(client_at("192.0.2.8")));
    converse(&allowed, &stream);
    assert_eq!(served.errors(), json!({ "denied": 1 }));
}

fn retargeted_meanwhile() {
    let mut served = serve(&with(&json!({ "proxy_timeout": "1h" })));
    let header = v1(told());
    let mut waiting: Vec<_> = (0..3).map(|_| served.send(&header[..9])).collect();
    let is_accepted = |served: &Served, count| served.proxy.stats("web")["connections"] == count;
    eventually("they are accepted", || is_accepted(&served, 3));
    // Not those that have dialled.
    let before = admitted(&served, "192.0.2.7");
    for (address, send_proxy) in [("127.0.0.1:0", "v2"), ("[::1]:0", "v1"), ("127.0.0.1:0", "v2")] {
        served.backend = TcpListener::bind(address).unwrap();
        served.to = served.backend.local_addr().unwrap();
        let limits = json!({ "proxy_timeout": "1h", "send_proxy": send_proxy });
        served.change(&with(&limits));
        let mut client = waiting.pop().unwrap();
        client.write_all(&header[9..]).unwrap();
        let stream = accept(&served.backend);
        receives(&stream, &if send_proxy == "v1" { v1(told()) } else { v2(told()) });
        converse(&client, &stream);
        let live = served.proxy.json(&["connections"])["connections"].clone();
        let shown: Vec<_> = live.as_array().unwrap().iter().map(|one| &one["backend"]).collect();
        assert!(shown.contains(&&json!(served.to)), "{live}");
    }
    converse(&before[0], &before[1]);
    assert_eq!(served.errors(), json!({}));
}

fn limit_resets() {
    let limits = json!({ "proxy_timeout": "1h", "max_connections": 1, "on_limit": "reset" });
    let served = serve(&with(&limits));
    let mut first = served.send(&v1(told())[..9]);
    eventually("it is accepted", || served.proxy.stats("web")["connections"] == 1);
    assert_eq!(client::end_of(served.address), (vec![], End::Reset));
    first.write_all(&v1(told())[9..]).unwrap();
    let stream = accept(&served.backend);
    receives(&stream, &v2(told()));
    converse(&first, &stream);
    assert_eq!(served.errors(), json!({ "over_limit": 1 }));
    drop((first, stream));
    eventually("there is room again", || served.proxy.stats("web")["connections"] == 0);
    assert_tells(served.address, &served.backend);
}

fn limits_of_sources() {
    let limits = json!({ "max_connections_per_source": 1, "rate": "1/h burst 2" });
    let served = serve(&with(&limits));
    let first = admitted(&served, "192.0.2.7");
    let _other = admitted(&served, "192.0.2.8");
    let over = served.send(&v1(client_at("192.0.2.7")));
    assert_eq!(client::read_to_end(&over), (vec![], End::Reset));
    served.expect_errors(&json!({ "over_source_limit": 1 }));
    drop(first);
    eventually("there is room again", || served.proxy.stats("web")["connections"] == 1);
    drop(admitted(&served, "192.0.2.7"));
    eventually("it has ended", || served.proxy.stats("web")["connections"] == 1);
    let over = served.send(&v1(client_at("192.0.2.7")));
    assert_eq!(client::read_to_end(&over), (vec![], End::Reset));
    served.expect_errors(&json!({ "over_source_limit": 1, "over_rate": 1 }));
}

fn limit_waits() {
    let served = serve(&with(&json!({ "proxy_timeout": "300ms", "max_connections": 1 })));
    let silent = served.send(b"");
    let waiting = served.send(&v1(told()));
    // Its place is free when it is late.
    assert_eq!(client::read_to_end(&silent).1, End::Reset);
    let stream = accept(&served.backend);
    receives(&stream, &v2(told()));
    converse(&waiting, &stream);
    assert_eq!(served.errors(), json!({ "bad_proxy_header": 1 }));
}

fn other_options() {
    let served = serve(&both_ways());
    let old = assert_tells(served.address, &served.backend);
    served.change(&json!({ "accept_proxy": [LOOPBACK], "send_proxy": "v1" }));
    let client = served.send(&v2(told()));
    let stream = accept(&served.backend);
    receives(&stream, &v1(told()));
    served.change(&json!({ "accept_proxy": [LOOPBACK] }));
    let without = served.send(&[v2(told()), b"hello".to_vec()].concat());
    let its_backend = accept(&served.backend);
    receives(&its_backend, b"hello");
    served.change(&json!({}));
    let plain = served.send(&v2(told()));
    let behind = accept(&served.backend);
    receives(&behind, &v2(told()));
    for (client, stream) in
        [(&old[0], &old[1]), (&client, &stream), (&without, &its_backend), (&plain, &behind)]
    {
        converse(client, stream);
    }
}

fn reload() {
    let (address, (backend, to), dir) = (own_address(), own_listener(), tempfile::tempdir().unwrap());
    let file = dir.path().join("rproxy.toml");
    let write = |more: &str| {
        let text = format!("[[mapping]]\nname = 'web'\nhost = '{address}'\nto = '{to}'\n{more}\n");
        std::fs::write(&file, text).unwrap();
    };
    write("send_proxy = 'v1'");
    let proxy = Controlled::start(&["--config", file.to_str().unwrap()]);
    let old = client::connect(address);
    let of_old = accept(&backend);
    receives(&of_old, &v1([old.local_addr().unwrap(), address]));
    write(&format!("send_proxy = 'v2'\naccept_proxy = ['{LOOPBACK}']"));
    proxy.process.signal(Signal::SIGHUP);
    let reloaded = |line: &str| line.contains("configuration reloaded");
    proxy.process.wait_for_line(Stream::Stderr, reloaded);
    let new = assert_tells(address, &backend);
    converse(&old, &of_old);
    write("send_proxy = 'v3'");
    proxy.process.signal(Signal::SIGHUP);
    let line = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("not reloaded"));
    assert!(line.contains(":5:14: send_proxy: "), "{line}");
    assert_tells(address, &backend);
    converse(&new[0], &new[1]);
}

fn removed() {
    let served = serve(&with(&json!({ "proxy_timeout": "1h" })));
    let [client, stream] = assert_tells(served.address, &served.backend);
    let mut half = served.send(&v1(told())[..9]);
    eventually("both are accepted", || served.proxy.stats("web")["connections"] == 2);
    served.proxy.ctl(&["remove", "web"]).success();
    converse(&client, &stream);
    half.write_all(&v1(told())[9..]).unwrap();
    let stream = accept(&served.backend);
    receives(&stream, &v2(told()));
    converse(&half, &stream);
}

fn upgraded() {
    let (program, address, (backend, to)) = (Program::new(), own_address(), own_listener());
    let (host, to) = (address.to_string(), to.to_string());
    let options = ["--accept-proxy", LOOPBACK, "--proxy-timeout", "1h", "--send-proxy", "v2"];
    let rest = ["--host", &*host, "--to", &to, "--sandbox", "strict"];
    let first = program.start(&[&options[..], &rest].concat());
    let old = assert_tells(address, &backend);
    let mut half = client::connect(address);
    half.write_all(&v1(told())[..9]).unwrap();
    testkit::holdings::wait_until_idle(first.pid());
    let second = upgrade(&first, 0, first.pid());
    let new = assert_tells(address, &backend);
    half.write_all(&v1(told())[9..]).unwrap();
    let of_half = accept(&backend);
    receives(&of_half, &v2(told()));
    for (client, stream) in [(&old[0], &old[1]), (&new[0], &new[1]), (&half, &of_half)] {
        converse(client, stream);
    }
    assert!(first.is_running(), "it has connections");
    drop((old, half, of_half));
    wait_for_end(first.pid());
    converse(&new[0], &new[1]);
    assert!(nix::sys::signal::kill(second, None).is_ok());
}
