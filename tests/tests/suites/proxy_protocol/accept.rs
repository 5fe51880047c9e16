//! `accept_proxy`: which headers of proxies are accepted, and what becomes of the others.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::json;
use socket2::SockRef;

use testkit::backend::{TcpBackend, echo};
use testkit::client::{self, End, own_loopback};
use testkit::holdings::{Holdings, wait_until_idle};
use testkit::load;
use testkit::process::Stream;
use testkit::suite::Case;
use testkit::{eventually, eventually_equal};

use super::{
    LOOPBACK, Served, accept, assert_tells, both_ways, connect_from, converse, raw_v2, receives, serve, tlv,
    told, told_v6, v1, v2, v2_with,
};

/// The longest header that is accepted.
const LONGEST: usize = 536;

/// The bytes before the addresses of version 2, and those of IPv4.
const FIXED: usize = 16;
const V4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0x12, 0x67, 0x01, 0xbb];

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("headers of both versions and families", accepted),
        case("a header byte by byte", byte_by_byte),
        case("some headers leave the client to the connection", of_the_proxy_itself),
        case("wrong headers", wrong),
        case("a header that is late", late),
        case("a header that is cut", cut),
        case("urgent data", urgent),
        case("connections that end before their first byte", empty),
        case("other peers are served without a header", others),
        case("half-closed connections", half_closed),
        case("resets in both directions", resets),
        case("a flood of wrong headers", flood),
        case("many proxies at once, some of which are cut", many).deadline(Duration::from_secs(120)),
    ]
}

fn accepted() {
    let served = serve(&both_ways());
    let longest = v2_with(told(), &tlv(4, &vec![0; LONGEST - FIXED - V4.len() - 3]));
    assert_eq!(longest.len(), LONGEST);
    let tlvs = [tlv(3, &[0xfd, 0x16, 0xee, 0x60]), tlv(5, b"unique-7")].concat();
    let mapped = "PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 4711 443\r\n";
    for (header, client) in [
        (v1(told()), told()),
        (v2(told()), told()),
        (v1(told_v6()), told_v6()),
        (v2(told_v6()), told_v6()),
        (v2_with(told(), &tlvs), told()),
        (v2_with(told_v6(), &tlvs), told_v6()),
        (longest, told()),
        (mapped.into(), told()),
    ] {
        // One segment, two, and the server speaks first.
        let together = served.send(&[&header, &b"hello"[..]].concat());
        let stream = accept(&served.backend);
        receives(&stream, &[&v2(client), &b"hello"[..]].concat());
        converse(&together, &stream);
        let mut apart = served.send(&header);
        let mut stream = accept(&served.backend);
        receives(&stream, &v2(client));
        stream.write_all(b"220 ready\r\n").unwrap();
        receives(&apart, b"220 ready\r\n");
        apart.write_all(&header).unwrap();
        receives(&stream, &header);
        converse(&apart, &stream);
    }
    assert_eq!(served.errors(), json!({}));
}

fn byte_by_byte() {
    let served = serve(&json!({ "accept_proxy": [LOOPBACK], "proxy_timeout": "1h", "send_proxy": "v1" }));
    for header in [v1(told_v6()), v2_with(told_v6(), &tlv(5, b"unique-7"))] {
        let mut client = client::connect(served.address);
        client.set_nodelay(true).unwrap();
        let (first, second) = header.split_at(header.len() / 2);
        first.iter().for_each(|byte| client.write_all(&[*byte]).unwrap());
        // It waits for more, and does not look for it again and again.
        wait_until_idle(served.proxy.process.pid());
        served.assert_not_dialled();
        second.iter().for_each(|byte| client.write_all(&[*byte]).unwrap());
        client.write_all(b"hello").unwrap();
        let stream = accept(&served.backend);
        receives(&stream, &[v1(told_v6()), b"hello".to_vec()].concat());
        converse(&client, &stream);
    }
    assert_eq!(served.errors(), json!({}));
}

fn of_the_proxy_itself() {
    let served = serve(&both_ways());
    let unix = [b"/run/client".as_slice(), &[0; 205]].concat();
    for header in [
        b"PROXY UNKNOWN\r\n".to_vec(),
        b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(),
        b"PROXY UNKNOWN \xff\0\r\n".to_vec(),
        raw_v2(0x20, 0x00, &[]),
        raw_v2(0x20, 0x11, &V4),
        raw_v2(0x21, 0x00, &[]),
        raw_v2(0x21, 0x00, &V4),
        raw_v2(0x21, 0x31, &unix),
        // That of a datagram.
        raw_v2(0x21, 0x12, &V4),
    ] {
        let client = served.send(&[&header, &b"hello"[..]].concat());
        let ends = [client.local_addr().unwrap(), served.address];
        let stream = accept(&served.backend);
        receives(&stream, &[&v2(ends), &b"hello"[..]].concat());
        converse(&client, &stream);
    }
    assert_eq!(served.errors(), json!({}));
}

fn wrong() {
    let served = serve(&both_ways());
    let mut reset = 0;
    for start in [
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(),
        b"\r\n\r\n\0\r\nQUIP\n".to_vec(),
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711\r\n".to_vec(),
        b"PROXY TCP4 2001:db8::7 2001:db8::1 4711 443\r\n".to_vec(),
        b"PROXY UDP4 192.0.2.7 198.51.100.1 4711 443\r\n".to_vec(),
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\nhello\r\n".to_vec(),
        [b"PROXY UNKNOWN ", &[b'x'; 200][..]].concat(),
        raw_v2(0x11, 0x11, &V4),
        raw_v2(0x22, 0x11, &V4),
        raw_v2(0x21, 0x41, &V4),
        raw_v2(0x21, 0x13, &V4),
        raw_v2(0x21, 0x11, &V4[..11]),
        raw_v2(0x21, 0x21, &V4),
        v2_with(told(), &[0; LONGEST]),
        // Its length is enough: the rest is not waited for.
        raw_v2(0x20, 0x00, &[0; 60_000])[..FIXED].to_vec(),
    ] {
        let client = served.send(&start);
        let text = start.escape_ascii();
        assert_eq!(client::read_to_end(&client), (vec![], End::Reset), "{text}");
        reset += 1;
        assert_eq!(served.errors(), json!({ "bad_proxy_header": reset }), "{text}");
    }
    served.assert_not_dialled();
    let told =
        served.proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("no header of its proxy"));
    for part in
        ["WARN", "client=127.0.0.1:", "mapping=web ", "it does not begin with a header of the PROXY protocol"]
    {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert_tells(served.address, &served.backend);
}

fn late() {
    let served = serve(&json!({ "accept_proxy": [LOOPBACK], "proxy_timeout": "200ms" }));
    for (reset, start) in [&b""[..], b"P", &v1(told())[..20], &v2(told())[..20]].into_iter().enumerate() {
        let client = served.send(start);
        assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
        assert_eq!(served.errors(), json!({ "bad_proxy_header": reset + 1 }));
    }
    served.assert_not_dialled();
    // It is a limit for the header alone.
    let client = served.send(&v1(told()));
    let stream = accept(&served.backend);
    let next = served.send(b"");
    assert_eq!(client::read_to_end(&next).1, End::Reset);
    converse(&client, &stream);
}

fn cut() {
    let served = serve(&json!({ "accept_proxy": [LOOPBACK], "proxy_timeout": "1h" }));
    let mut count = 0;
    let starts = [b"P".to_vec(), v1(told())[..20].to_vec(), v2(told())[..20].to_vec()];
    for start in &starts {
        let ended = served.send(start);
        ended.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&ended), (vec![], End::Reset));
        client::reset(served.send(start));
        count += 2;
        served.expect_errors(&json!({ "bad_proxy_header": count }));
    }
    // The same when the start has been seen before.
    for start in &starts {
        let [ended, reset] = [served.send(start), served.send(start)];
        wait_until_idle(served.proxy.process.pid());
        ended.shutdown(Shutdown::Write).unwrap();
        client::reset(reset);
        assert_eq!(client::read_to_end(&ended), (vec![], End::Reset));
        count += 2;
        served.expect_errors(&json!({ "bad_proxy_header": count }));
    }
    served.assert_not_dialled();
}

fn send_urgent(client: &TcpStream, bytes: &[u8]) {
    assert_eq!(SockRef::from(client).send_out_of_band(bytes).unwrap(), bytes.len());
}

fn urgent() {
    let served = serve(&json!({ "accept_proxy": [LOOPBACK], "proxy_timeout": "1h", "send_proxy": "v2" }));
    for (number, start) in [&b""[..], b"PROXY TCP4 ", &v2(told())[..20]].into_iter().enumerate() {
        let client = served.send(start);
        // As the first byte, and within: a read does not go beyond it.
        send_urgent(&client, b"P");
        assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
        served.expect_errors(&json!({ "bad_proxy_header": number + 1 }));
    }
    served.assert_not_dialled();
    // Behind the header it is relayed as any other.
    for header in [v1(told()), v2(told())] {
        let client = served.send(&header);
        send_urgent(&client, b"!");
        let stream = accept(&served.backend);
        receives(&stream, &[&v2(told()), &b"!"[..]].concat());
        converse(&client, &stream);
    }
    wait_until_idle(served.proxy.process.pid());
}

fn empty() {
    let served = serve(&both_ways());
    let ended = served.send(b"");
    ended.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&ended), (vec![], End::Eof), "it may be a check whether the port is open");
    eventually("it is over", || served.proxy.stats("web")["connections"] == 0);
    assert_eq!(served.errors(), json!({}));
    client::reset(served.send(b""));
    served.expect_errors(&json!({ "reset": 1 }));
    served.assert_not_dialled();
    // A header without anything behind it is a connection.
    let client = served.send(&v1(told()));
    client.shutdown(Shutdown::Write).unwrap();
    let stream = accept(&served.backend);
    assert_eq!(client::read_to_end(&stream), (v2(told()), End::Eof));
    drop(stream);
    assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
}

fn others() {
    let proxy = own_loopback();
    let served = serve(&json!({ "accept_proxy": [proxy.to_string()], "send_proxy": "v1" }));
    let tell = |source: Ipv4Addr| {
        let mut client = connect_from(source.into(), served.address);
        client.write_all(&v1(told())).unwrap();
        client
    };
    // What claims to be a header of somebody else is data.
    let client = tell(Ipv4Addr::LOCALHOST);
    let own = [client.local_addr().unwrap(), served.address];
    let stream = accept(&served.backend);
    receives(&stream, &[v1(own), v1(told())].concat());
    converse(&client, &stream);
    // They need not say anything.
    let silent = client::connect(served.address);
    let own = [silent.local_addr().unwrap(), served.address];
    receives(&accept(&served.backend), &v1(own));
    let client = tell(proxy);
    let stream = accept(&served.backend);
    receives(&stream, &v1(told()));
    converse(&client, &stream);
    assert_eq!(served.errors(), json!({}));
}

fn half_closed() {
    let served = serve(&both_ways());
    let request = vec![7; 300_000];
    let client = served.send(&[v2(told()), request.clone()].concat());
    client.shutdown(Shutdown::Write).unwrap();
    let mut stream = accept(&served.backend);
    let (received, end) = client::read_to_end(&stream);
    assert!(received == [v2(told()), request].concat() && end == End::Eof, "{} bytes", received.len());
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(client::read_to_end(&client), (b"answer".to_vec(), End::Eof));
}

fn resets() {
    let served = serve(&both_ways());
    let [client, stream] = assert_tells(served.address, &served.backend);
    client::reset(client);
    assert_eq!(client::read_to_end(&stream), (vec![], End::Reset));
    let [client, mut stream] = assert_tells(served.address, &served.backend);
    stream.write_all(b"last words").unwrap();
    receives(&client, b"last words");
    client::reset(stream);
    assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
    served.expect_errors(&json!({ "reset": 2 }));
}

/// Each connection is that of the client in its own header, however that comes, and nothing is left of any.
fn many() {
    const THREADS: usize = 8;

    let backend = TcpBackend::local(echo);
    let served = Served { to: backend.address(), ..serve(&json!({})) };
    served.change(&json!({ "accept_proxy": [LOOPBACK], "proxy_timeout": "1h", "send_proxy": "v1" }));
    let pid = served.proxy.process.pid();
    let connect = |number: usize| {
        let [_source, destination] = told();
        let source = SocketAddr::from(([192, 0, 2, 7], 1 + u16::try_from(number % 60_000).unwrap()));
        let told = v1([source, destination]);
        let header = match number % 3 {
            0 => told.clone(),
            1 => v2([source, destination]),
            _ => v2_with([source, destination], &tlv(4, &vec![0; number % 400])),
        };
        let mut client = client::connect(served.address);
        client.set_nodelay(true).unwrap();
        let split = 1 + number * 7 % (header.len() - 1);
        client.write_all(&header[..split]).unwrap();
        match number % 10 {
            0 => return client::reset(client),
            1 => {
                client.shutdown(Shutdown::Write).unwrap();
                return assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
            }
            _ => thread::yield_now(),
        }
        let request = number.to_string().repeat(1 + number % 5_000);
        client.write_all(&[&header[split..], request.as_bytes()].concat()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (answer, end) = client::read_to_end(&client);
        assert!(answer == [&told, request.as_bytes()].concat() && end == End::Eof, "{number}");
    };
    // All workers have started, and their pipes are open.
    load::meanwhile(THREADS, connect, |load| load.wait_for(500));
    eventually("all are over", || served.proxy.stats("web")["connections"] == 0);
    wait_until_idle(pid);
    let before = Holdings::of(pid);
    load::meanwhile(THREADS, connect, |load| load.wait_for(3_000));
    eventually("all are over", || served.proxy.stats("web")["connections"] == 0);
    eventually_equal("what is held", &before, || Holdings::of(pid));
    wait_until_idle(pid);
    let errors = served.errors();
    assert_eq!(errors.as_object().unwrap().keys().collect::<Vec<_>>(), ["bad_proxy_header"], "{errors}");
}

fn flood() {
    const COUNT: usize = 300;

    let served = serve(&both_ways());
    let [client, stream] = assert_tells(served.address, &served.backend);
    let knock = |served: &Served, address: SocketAddr| {
        let mut knocking = connect_from(IpAddr::from(Ipv4Addr::LOCALHOST), address);
        knocking.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(client::read_to_end(&knocking).1, End::Reset);
        assert!(served.proxy.process.is_running());
    };
    (0..COUNT).for_each(|_| knock(&served, served.address));
    eventually_equal("the errors", &json!({ "bad_proxy_header": COUNT }), || served.errors());
    converse(&client, &stream);
    let log = served.proxy.process.captured(Stream::Stderr);
    let lines = log.lines().filter(|line| line.contains("no header of its proxy")).count();
    assert!((1..COUNT / 2).contains(&lines), "{lines} lines");
}
