//! `send_proxy`: what a backend receives.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};

use testkit::backend::{TcpBackend, answer_at_eof, echo};
use testkit::client::{self, End};
use testkit::require::Need;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::trace::Trace;

use super::{accept, converse, receives, relay, serve, v1, v2};

/// The length of a header of version 2 over IPv4.
const V2_LEN: usize = 28;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a server that speaks first gets the header at once", server_first),
        case("one segment has the header and the first bytes", one_segment).needs(&[Need::Program("strace")]),
        case("families, over a dual-stack listener", families).needs(&[Need::Ipv6]),
        case("bulk both ways", bulk),
        case("half-closed connections", half_closed),
        case("resets in both directions", resets),
        case("a backend that refuses", refused),
        case("the header is counted", counted),
    ]
}

/// The addresses of a connection as its client has them.
fn ends(client: &TcpStream) -> [SocketAddr; 2] {
    [client.local_addr().unwrap(), client.peer_addr().unwrap()]
}

fn server_first() {
    for (version, header) in [("v1", v1 as fn(_) -> _), ("v2", v2)] {
        let (proxy, backend) = relay(&["--send-proxy", version]);
        let client = client::connect(proxy.address());
        let mut stream = accept(&backend);
        receives(&stream, &header(ends(&client)));
        stream.write_all(b"220 ready\r\n").unwrap();
        receives(&client, b"220 ready\r\n");
        converse(&client, &stream);
    }
}

fn one_segment() {
    for (version, header) in [("v1", v1 as fn(_) -> _), ("v2", v2)] {
        let (proxy, backend) = relay(&["--send-proxy", version]);
        drop(client::connect(proxy.address()));
        client::read_to_end(&accept(&backend));
        // The bytes are there when it dials.
        proxy.process.pause();
        let mut client = client::connect(proxy.address());
        client.write_all(b"hello").unwrap();
        let trace = Trace::attach(&proxy.process);
        proxy.process.resume();
        let stream = accept(&backend);
        let all = [header(ends(&client)), b"hello".to_vec()].concat();
        receives(&stream, &all);
        let calls = trace.finish();
        let sent: Vec<i64> = calls.named(&["sendto"]).map(|call| call.result).collect();
        assert_eq!(sent, [i64::try_from(all.len()).unwrap()], "{:?}", calls.by_name());
    }
}

fn families() {
    for (version, header) in [("v1", v1 as fn(_) -> _), ("v2", v2)] {
        for backend in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let backend = TcpListener::bind((backend, 0)).unwrap();
            let to = backend.local_addr().unwrap().to_string();
            let proxy = Standalone::start(&["--host", "[::]:0", "--to", &to, "--send-proxy", version]);
            for host in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let client = client::connect((host, proxy.address().port()).into());
                let stream = accept(&backend);
                // A client of the other family than the backend's is told as it is.
                receives(&stream, &header(ends(&client)));
                converse(&client, &stream);
            }
        }
    }
}

fn bulk() {
    let backend = TcpBackend::local(|mut stream| {
        stream.read_exact(&mut [0; V2_LEN])?;
        echo(stream)
    });
    let proxy = Standalone::relay_to(backend.address(), &["--send-proxy", "v2", "--idle-timeout", "1h"]);
    let client = client::connect(proxy.address());
    client::exchange(&client, 1, 100);
    client::exchange(&client, 2, 32 * 1024 * 1024);
    client::exchange(&client, 3, 100);
    let plain = Standalone::relay_to(backend.address(), &["--send-proxy", "v2"]);
    client::exchange(&client::connect(plain.address()), 4, 32 * 1024 * 1024);
}

fn half_closed() {
    let backend = TcpBackend::local(answer_at_eof);
    let proxy = Standalone::relay_to(backend.address(), &["--send-proxy", "v1"]);
    for request in [&b""[..], b"request", &[7; 1_000_000]] {
        let mut client = client::connect(proxy.address());
        let header = v1(ends(&client));
        let answer = std::thread::scope(|scope| {
            let mut sender = client.try_clone().unwrap();
            scope.spawn(move || {
                sender.write_all(request).unwrap();
                sender.shutdown(Shutdown::Write).unwrap();
            });
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            answer
        });
        assert!(answer == [&header, request].concat(), "{} bytes", answer.len());
    }
}

fn resets() {
    let (proxy, backend) = relay(&["--send-proxy", "v2"]);
    let mut client = client::connect(proxy.address());
    let header = v2(ends(&client));
    client.write_all(b"hello").unwrap();
    let stream = accept(&backend);
    receives(&stream, &[&header, &b"hello"[..]].concat());
    client::reset(client);
    assert_eq!(client::read_to_end(&stream), (vec![], End::Reset));

    let client = client::connect(proxy.address());
    let mut stream = accept(&backend);
    receives(&stream, &v2(ends(&client)));
    stream.write_all(b"last words").unwrap();
    receives(&client, b"last words");
    client::reset(stream);
    assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
}

fn refused() {
    let (proxy, backend) = relay(&["--send-proxy", "v2"]);
    drop(backend);
    assert_eq!(client::end_of(proxy.address()), (vec![], End::Reset));
}

fn counted() {
    let served = serve(&serde_json::json!({ "send_proxy": "v2" }));
    let client = served.send(b"hello");
    let stream = accept(&served.backend);
    receives(&stream, &[&v2(ends(&client)), &b"hello"[..]].concat());
    converse(&client, &stream);
    drop((client, stream));
    testkit::eventually("the connection is over", || served.proxy.stats("web")["connections"] == 0);
    let stats = served.proxy.stats("web");
    assert_eq!((&stats["bytes_in"], &stats["bytes_out"]), (&(V2_LEN + 5 + 4).into(), &4.into()));
}
