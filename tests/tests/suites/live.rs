//! Changes while clients are served: nothing is lost unnecessarily.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use testkit::backend::TcpBackend;
use testkit::client::{self, End, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::eventually;
use testkit::load;
use testkit::netns::Namespace;
use testkit::process;
use testkit::require::{self, Need};
use testkit::suite::Case;
use testkit::udp;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("retarget: new connections use the new backend, old ones continue", retarget_tcp),
        case("retarget: all datagrams use the new backend", retarget_udp),
        case("a removed mapping lets its connections finish", remove_tcp),
        case("a removed mapping lets its flows finish", remove_udp),
        case("an added mapping gets the port of a removed one", ports_go_over),
        case("apply is all or nothing", all_or_nothing),
        case("apply under load loses no connection", apply_under_load),
        case("apply under load loses no datagram", apply_under_load_udp),
        case("retarget under load loses no connection", retarget_under_load),
        case("every byte and datagram is counted", counted),
        case("beyond max_connections clients wait", limit_waits),
        case("beyond max_connections clients are reset", limit_resets),
        case("a higher limit admits waiting clients", limit_raised),
        case("beyond max_connections_per_source clients of a source are reset", source_limit),
        case("max_connections_per_source counts connections that were there before", source_limit_later),
        case("beyond rate clients of a source are reset, and no flows begun", rate),
        case("a rate begins and ends with a change", rate_changed),
        case("keepalive is that of the mapping on both sides", keepalive).needs(&[Need::Program("ss")]),
        case("freebind: an address is bound before it is there", freebind).needs(&[Need::Root]),
        case("idle connections are reset", idle),
        case("clients that are not allowed", denied),
        case("clients that a change denies are reset", denied_later),
        case("failures are counted by kind", troubles),
    ]
}

fn web(address: SocketAddr, backend: &TcpBackend) -> Value {
    mapping("web", "tcp", address, backend.address())
}

fn limited(mut mapping: Value, limits: Value) -> Value {
    mapping["limits"] = limits;
    mapping
}

fn retarget_tcp() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[web(address, &a)]).success();
    let (old, letter) = client::connect_lettered(address);
    assert_eq!(letter, b'a');
    proxy.ctl(&["retarget", "web", "--to", &b.address().to_string()]).success();
    let (new, letter) = client::connect_lettered(address);
    assert_eq!(letter, b'b');
    client::ping(&old);
    client::ping(&new);
    drop(a);
    assert_eq!(client::read_to_end(&old), (vec![], End::Eof), "it was still the old backend's");
    client::ping(&new);
    assert_eq!(proxy.stats("web")["connections_total"], 2);
}

fn udp_backend(letter: u8) -> udp::Backend {
    let socket = udp::local();
    udp::Backend::serve(socket, move |socket, _bytes, from| {
        socket.send_to(&[letter], from).ok();
    })
}

fn letter_of(client: &std::net::UdpSocket, address: SocketAddr) -> u8 {
    udp::ask(client, address, b"who?").0[0]
}

fn retarget_udp() {
    let (a, b) = (udp_backend(b'a'), udp_backend(b'b'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("dns", "udp", address, a.address())]).success();
    let (old, new) = (udp::client(address.ip()), udp::client(address.ip()));
    assert_eq!(letter_of(&old, address), b'a');
    proxy.ctl(&["retarget", "dns", "--to", &b.address().to_string()]).success();
    assert_eq!(letter_of(&new, address), b'b');
    assert_eq!(letter_of(&old, address), b'b');
    eventually("the old flow is over", || proxy.stats("dns")["flows"] == 2);
    assert_eq!(proxy.stats("dns")["flows_total"], 3);
}

fn denied_later() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let other = own_address();
    let with = |limits: Value| {
        let other = mapping("other", "tcp", other, backend.address());
        [limited(web(address, &backend), limits), other]
    };
    let from = |ip: IpAddr, to: SocketAddr| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(ip, 0).into()).unwrap();
        socket.connect(&to.into()).unwrap();
        client::patient(socket.into())
    };
    let [friend, attacker]: [IpAddr; 2] = [client::own_loopback().into(), client::own_loopback().into()];
    for limits in
        [json!({ "deny": [attacker.to_string()] }), json!({ "allow": [format!("{friend}"), "192.0.2.0/24"] })]
    {
        proxy.apply(&with(json!({}))).success();
        // So many that all workers have some.
        let friends: Vec<_> = (0..4).map(|_| from(friend, address)).collect();
        let attackers: Vec<_> = (0..4).map(|_| from(attacker, address)).collect();
        let elsewhere = from(attacker, other);
        friends.iter().chain(&attackers).chain([&elsewhere]).for_each(client::ping);
        let before = proxy.stats("web")["errors"]["denied"].as_u64().unwrap_or(0);
        proxy.apply(&with(limits)).success();
        for attacker in &attackers {
            assert_eq!(client::read_to_end(attacker), (vec![], End::Reset));
        }
        friends.iter().chain([&elsewhere]).for_each(client::ping);
        assert_eq!(proxy.stats("web")["errors"]["denied"], before + 4);
        drop((friends, elsewhere));
        eventually("nobody is left", || proxy.stats("web")["connections"] == 0);
    }
}

fn remove_tcp() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[web(address, &backend)]).success();
    let (client, _letter) = client::connect_lettered(address);
    proxy.ctl(&["remove", "web"]).success();
    TcpStream::connect(address).expect_err("nobody listens any more");
    client::ping(&client);
    let draining = proxy.json(&["list"])["draining"].clone();
    assert_eq!(draining, json!([{ "name": "web", "connections": 1, "flows": 0 }]));
    drop(client);
    eventually("nothing drains any more", || proxy.json(&["list"])["draining"] == json!([]));
}

fn remove_udp() {
    // It answers when the test says so, after the mapping is gone.
    let backend = udp::local();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("dns", "udp", address, backend.local_addr().unwrap())]).success();
    let client = udp::client(address.ip());
    client.send_to(b"question", address).unwrap();
    let (_question, flow) = udp::receive(&backend);
    proxy.ctl(&["remove", "dns"]).success();
    backend.send_to(b"answer", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"answer".to_vec(), address));
    let is_free = || std::net::UdpSocket::bind(address).is_ok();
    eventually("the port is free once the flow is quiet", is_free);
}

fn ports_go_over() {
    let (a, b) = (udp_backend(b'a'), udp_backend(b'b'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let client = udp::client(address.ip());
    proxy.apply(&[mapping("old", "udp", address, a.address())]).success();
    assert_eq!(letter_of(&client, address), b'a');
    // At once, and while flows of a removed one are still being seen off.
    proxy.apply(&[mapping("new", "udp", address, b.address())]).success();
    assert_eq!(letter_of(&client, address), b'b', "the flow was the old mapping's");
    proxy.ctl(&["remove", "new"]).success();
    proxy.apply(&[mapping("third", "udp", address, a.address())]).success();
    assert_eq!(letter_of(&client, address), b'a');
}

fn all_or_nothing() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, kept, new, taken) = (Controlled::start(&[]), own_address(), own_address(), own_address());
    proxy.apply(&[web(kept, &backend)]).success();
    let before = proxy.json(&["list"]);
    let other = TcpListener::bind(taken).unwrap();
    let elsewhere = TcpBackend::lettered(b'b');
    let wanted = [
        web(kept, &elsewhere),
        mapping("new", "tcp", new, backend.address()),
        mapping("taken", "tcp", taken, backend.address()),
    ];
    let output = proxy.apply(&wanted);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("taken: cannot listen on"), "{output:#?}");
    assert_eq!(proxy.json(&["list"]), before);
    assert_eq!(client::connect_lettered(kept).1, b'a');
    drop(TcpListener::bind(new).expect("what was bound is free again"));
    drop(other);
    proxy.apply(&wanted).success();
    assert_eq!([kept, new, taken].map(|address| client::connect_lettered(address).1), [b'b', b'a', b'a']);
}

/// Lets clients connect and exchange until `changes` are through; returns how many connections there
/// were, all of which did what they should.
fn under_load(address: SocketAddr, changes: impl FnOnce()) -> usize {
    let connect = |_| {
        let (client, letter) = client::connect_lettered(address);
        assert!(letter.is_ascii_lowercase());
        client::ping(&client);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
    };
    load::meanwhile(2, connect, |_connections| changes())
}

fn apply_under_load() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let (proxy, address, other) = (Controlled::start(&[]), own_address(), own_address());
    let sets = [
        vec![web(address, &a)],
        // The port goes over to a mapping of another name, and back.
        vec![mapping("web2", "tcp", address, b.address()), mapping("other", "tcp", other, a.address())],
        vec![
            limited(web(address, &b), json!({ "max_connections": 100 })),
            mapping("x", "tcp", other, b.address()),
        ],
    ];
    proxy.apply(&sets[0]).success();
    // A connection from before all changes goes on through all of them.
    let (old, _letter) = client::connect_lettered(address);
    let connections = under_load(address, || {
        for round in 1..40 {
            proxy.apply(&sets[round % sets.len()]).success();
            client::ping(&old);
        }
    });
    assert!(connections > 0);
}

fn apply_under_load_udp() {
    let backend = udp::Backend::echo(udp::local());
    let (proxy, address, other) = (Controlled::start(&[]), own_address(), own_address());
    let dns = mapping("dns", "udp", address, backend.address());
    let sets = [
        vec![dns.clone()],
        vec![dns.clone(), mapping("other", "udp", other, backend.address())],
        vec![limited(dns, json!({ "udp_max_flows": 9 })), mapping("third", "tcp", other, backend.address())],
    ];
    proxy.apply(&sets[0]).success();
    let client = udp::client(address.ip());
    let ask = |_| udp::assert_all_echo(&client, address, [0, 1, 1400, 9000]);
    let change = |round: usize| drop(proxy.apply(&sets[round % sets.len()]).success());
    let sent = 4 * load::meanwhile(1, ask, |_questions| (1..40).for_each(change));
    proxy.apply(&sets[0]).success();
    let stats = proxy.stats("dns");
    assert_eq!((&stats["datagrams_in"], &stats["datagrams_out"]), (&json!(sent), &json!(sent)));
    assert_eq!(stats["flows_total"], 1, "it was one flow all the time");
}

fn retarget_under_load() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[web(address, &a)]).success();
    let targets = [&a, &b].map(|backend| backend.address().to_string());
    let connections = under_load(address, || {
        (1..60)
            .for_each(|round| drop(proxy.ctl(&["retarget", "web", "--to", &targets[round % 2]]).success()));
    });
    eventually("all connections are over", || proxy.stats("web")["connections"] == 0);
    let stats = proxy.stats("web");
    assert_eq!(stats["connections_total"], connections);
    // Four bytes each way, and a letter.
    assert_eq!((&stats["bytes_in"], &stats["bytes_out"]), (&json!(connections * 4), &json!(connections * 5)));
    assert_eq!(stats["errors"], json!({}));
}

fn counted() {
    let (tcp, dgram) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (proxy, address, other) = (Controlled::start(&[]), own_address(), own_address());
    proxy.apply(&[web(address, &tcp), mapping("dns", "udp", other, dgram.address())]).success();
    let megabytes = vec![7; 20_000_000];
    let echoed = thread::scope(|scope| {
        let mut client = client::connect(address);
        let mut sender = client.try_clone().unwrap();
        scope.spawn(move || {
            sender.write_all(&megabytes).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        received.len()
    });
    assert_eq!(echoed, 20_000_000);
    let client = client::connect(address);
    client::ping(&client);
    eventually("the counters of a connection that goes on", || proxy.stats("web")["bytes_in"] == 20_000_004);
    let stats = proxy.stats("web");
    assert_eq!((&stats["bytes_out"], &stats["connections"]), (&json!(20_000_004), &json!(1)));

    let sizes = [0, 1, 100, 100, 100, 1400, 60_000];
    udp::assert_all_echo(&udp::client(other.ip()), other, sizes);
    let stats = proxy.stats("dns");
    let bytes = json!(sizes.iter().sum::<usize>());
    assert_eq!([&stats["bytes_in"], &stats["bytes_out"]], [&bytes, &bytes]);
    assert_eq!([&stats["datagrams_in"], &stats["datagrams_out"]], [7, 7]);
    assert_eq!([&stats["flows"], &stats["flows_total"]], [1, 1]);
}

fn limit_waits() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[limited(web(address, &backend), json!({ "max_connections": 2 }))]).success();
    let served = [client::connect_lettered(address), client::connect_lettered(address)];
    // The kernel connects these; the proxy leaves them in the backlog.
    let mut waiting: Vec<_> = (0..3).map(|_| client::connect(address)).collect();
    let [(first, _), second] = served;
    client::ping(&first);
    assert_eq!(proxy.stats("web")["connections"], 2);
    drop(first);
    // One gets the place, and another one when that is over, until all were served.
    let mut letter = [0];
    for mut client in waiting.drain(..) {
        client.read_exact(&mut letter).unwrap();
        client::ping(&client);
    }
    client::ping(&second.0);
    assert_eq!(proxy.stats("web")["connections_total"], 5);
    assert_eq!(proxy.stats("web")["errors"], json!({}));
}

fn limit_resets() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let limits = json!({ "max_connections": 1, "on_limit": "reset" });
    proxy.apply(&[limited(web(address, &backend), limits)]).success();
    let (served, _letter) = client::connect_lettered(address);
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    client::ping(&served);
    drop(served);
    eventually("there is room again", || proxy.stats("web")["connections"] == 0);
    assert_eq!(client::connect_lettered(address).1, b'a');
    assert_eq!(proxy.stats("web")["errors"], json!({ "over_limit": 1 }));
}

/// Connects from an address of the host.
fn connect_from(source: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&address.into()).unwrap();
    socket.into()
}

const OTHER_SOURCE: [u8; 4] = [127, 0, 0, 2];

fn source_limit() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let limits = json!({ "max_connections_per_source": 2 });
    proxy.apply(&[limited(web(address, &backend), limits)]).success();
    let served = [client::connect_lettered(address), client::connect_lettered(address)];
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    let mut other = connect_from(OTHER_SOURCE, address);
    other.read_exact(&mut [0]).unwrap();
    served.iter().for_each(|(served, _letter)| client::ping(served));
    drop(served);
    eventually("there is room again", || proxy.stats("web")["connections"] == 1);
    assert_eq!(client::connect_lettered(address).1, b'a');
    client::ping(&other);
    assert_eq!(proxy.stats("web")["errors"], json!({ "over_source_limit": 1 }));
}

fn source_limit_later() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let apply = |limits: Value| proxy.apply(&[limited(web(address, &backend), limits)]).success();
    apply(json!({}));
    let (before, _letter) = client::connect_lettered(address);
    apply(json!({ "max_connections_per_source": 1 }));
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    client::ping(&before);
    apply(json!({ "max_connections_per_source": 2 }));
    let (second, _letter) = client::connect_lettered(address);
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    apply(json!({}));
    let (third, _letter) = client::connect_lettered(address);
    [before, second, third].iter().for_each(client::ping);
    assert_eq!(proxy.stats("web")["errors"], json!({ "over_source_limit": 2 }));
}

fn rate() {
    let (tcp, backend) = (TcpBackend::lettered(b'a'), udp_backend(b'u'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let other = own_address();
    let limits = json!({ "rate": "1/h burst 2" });
    let dns = limited(mapping("dns", "udp", other, backend.address()), limits.clone());
    proxy.apply(&[limited(web(address, &tcp), limits), dns]).success();
    let served = [client::connect_lettered(address), client::connect_lettered(address)];
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    served.iter().for_each(|(served, _letter)| client::ping(served));
    connect_from(OTHER_SOURCE, address).read_exact(&mut [0]).unwrap();
    assert_eq!(proxy.stats("web")["errors"], json!({ "over_rate": 1 }));

    let clients = [udp::local(), udp::local(), udp::local()];
    assert_eq!([letter_of(&clients[0], other), letter_of(&clients[1], other)], [b'u'; 2]);
    clients[2].send_to(b"who?", other).unwrap();
    eventually("it is dropped", || proxy.stats("dns")["errors"] == json!({ "over_rate": 1 }));
    assert_eq!([letter_of(&clients[0], other), letter_of(&clients[1], other)], [b'u'; 2], "flows go on");
    assert_eq!(proxy.stats("dns")["flows_total"], 2);
}

fn rate_changed() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let apply = |limits: Value| proxy.apply(&[limited(web(address, &backend), limits)]).success();
    apply(json!({ "rate": "1/h" }));
    let list = proxy.json(&["list"]);
    assert_eq!(list["mappings"][0]["limits"], json!({ "rate": "1/h" }));
    client::connect_lettered(address);
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    apply(json!({}));
    client::connect_lettered(address);
    apply(json!({ "rate": "1/h burst 3" }));
    // Without a rate in between, nothing is kept of what was used.
    assert_eq!([(); 3].map(|()| client::connect_lettered(address).1), [b'a'; 3]);
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    assert_eq!(proxy.stats("web")["errors"], json!({ "over_rate": 2 }));
}

/// The timers of the sockets that are connected from or to a port, as ss(8) shows them.
fn timers(ports: [u16; 2]) -> Vec<String> {
    let mut ss = require::command("ss");
    let [host, backend] = ports.map(|port| format!(":{port}"));
    ss.args(["-tnoH", "state", "established", "(", "sport", "=", &host, "or", "dport", "=", &backend, ")"]);
    let lines = process::run(ss).success();
    lines.lines().map(|line| line.split("timer:(").nth(1).unwrap_or_default().to_owned()).collect()
}

fn keepalive() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&["--sandbox", "strict"]), own_address());
    let ports = [address.port(), backend.address().port()];
    for (limits, timer) in [
        (json!({}), Some("keepalive,1")),
        (json!({ "keepalive": "2h interval 1m count 3", "tcp_user_timeout": "1m" }), Some("keepalive,1")),
        (json!({ "keepalive": "off" }), None),
    ] {
        let is_long = limits["keepalive"].is_string();
        proxy.apply(&[limited(web(address, &backend), limits)]).success();
        let (served, _letter) = client::connect_lettered(address);
        client::ping(&served);
        let is_as_asked = |shown: &String| match timer {
            Some(timer) => shown.starts_with(timer) && shown.contains("min") == is_long,
            None => !shown.starts_with("keepalive"),
        };
        // Other timers come first until everything is acknowledged.
        eventually("both sides have it", || {
            let shown = timers(ports);
            shown.len() == 2 && shown.iter().all(is_as_asked)
        });
        drop(served);
        eventually("it ends", || proxy.stats("web")["connections"] == 0);
    }
}

fn freebind() {
    let host = Namespace::new();
    let backend = host.run(|| TcpBackend::lettered(b'a'));
    let proxy = Controlled::start_in(&host, &["--sandbox", "strict"]);
    let later: [SocketAddr; 2] =
        ["203.0.113.77:8080", "[2001:db8::77]:8080"].map(|addr| addr.parse().unwrap());
    let mappings = |limits: Value| {
        later.map(|addr| {
            let mapping = mapping(
                &format!("at {addr}").replace([' ', '[', ']'], "_"),
                "tcp+udp",
                addr,
                backend.address(),
            );
            limited(mapping, limits.clone())
        })
    };
    let refused = proxy.apply(&mappings(json!({})));
    assert!(refused.stderr.contains("; freebind (--freebind) binds it before it is there"), "{refused:#?}");
    proxy.apply(&mappings(json!({ "freebind": true }))).success();
    let list = proxy.json(&["list"]);
    assert_eq!(list["mappings"][0]["limits"], json!({ "freebind": true }));
    host.ip("address add 203.0.113.77/32 dev lo");
    host.ip("address add 2001:db8::77/128 dev lo nodad");
    for addr in later {
        eventually("the machine has it", || host.run(|| TcpStream::connect(addr).is_ok()));
        assert_eq!(host.run(|| client::connect_lettered(addr).1), b'a', "{addr}");
    }
}

fn limit_raised() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[limited(web(address, &backend), json!({ "max_connections": 1 }))]).success();
    let (served, _letter) = client::connect_lettered(address);
    let mut waiting = client::connect(address);
    proxy.apply(&[limited(web(address, &backend), json!({ "max_connections": 2 }))]).success();
    let mut letter = [0];
    waiting.read_exact(&mut letter).unwrap();
    client::ping(&served);
    client::ping(&waiting);
}

fn idle() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[limited(web(address, &backend), json!({ "idle_timeout": "400ms" }))]).success();
    let ((idle, _), (busy, _)) = (client::connect_lettered(address), client::connect_lettered(address));
    let ended = thread::scope(|scope| {
        let ended = scope.spawn(|| client::read_to_end(&idle));
        while !ended.is_finished() {
            client::ping(&busy);
        }
        ended.join().unwrap()
    });
    assert_eq!(ended, (vec![], End::Reset));
    client::ping(&busy);
    assert_eq!(proxy.stats("web")["errors"], json!({ "idle": 1 }));
}

fn denied() {
    let (tcp, dgram) = (TcpBackend::lettered(b'a'), udp_backend(b'a'));
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let allow_none = json!({ "allow": ["192.0.2.0/24"] });
    let dns = mapping("dns", "udp", address, dgram.address());
    proxy
        .apply(&[limited(web(address, &tcp), allow_none.clone()), limited(dns.clone(), allow_none)])
        .success();
    assert_eq!(client::end_of(address), (vec![], End::Reset));
    let client = udp::client(address.ip());
    client.send_to(b"let me in", address).unwrap();
    assert!(udp::is_silent(&client));
    for name in ["web", "dns"] {
        assert_eq!(proxy.stats(name)["errors"], json!({ "denied": 1 }));
        assert_eq!(proxy.stats(name)["flows_total"], 0);
    }
    let allow = json!({ "allow": [format!("{}/32", address.ip())] });
    let allow_loopback = json!({ "allow": ["127.0.0.0/8"] });
    proxy.apply(&[limited(web(address, &tcp), allow_loopback), limited(dns, allow)]).success();
    assert_eq!(client::connect_lettered(address).1, b'a');
    assert_eq!(letter_of(&client, address), b'a');
}

fn troubles() {
    let (proxy, address, backend) = (Controlled::start(&[]), own_address(), TcpBackend::echo());
    let nobody = (client::own_loopback(), 80).into();
    let no_route = "[2001:db8::1]:80".parse().unwrap();
    proxy
        .apply(&[
            web(address, &backend),
            mapping("refused", "tcp", own_address(), nobody),
            limited(mapping("failed", "tcp", own_address(), no_route), json!({ "connect_timeout": "1s" })),
        ])
        .success();
    let list = proxy.json(&["list"]);
    let address_of = |name: &str| -> SocketAddr {
        let mapping =
            list["mappings"].as_array().unwrap().iter().find(|mapping| mapping["name"] == name).unwrap();
        format!("{}:8080", mapping["host"].as_str().unwrap()).parse().unwrap()
    };
    assert_eq!(client::end_of(address_of("refused")), (vec![], End::Reset));
    assert_eq!(client::end_of(address_of("failed")), (vec![], End::Reset));
    let client = client::connect(address);
    client::ping(&client);
    client::reset(client);
    eventually("the reset is counted", || proxy.stats("web")["errors"] == json!({ "reset": 1 }));
    assert_eq!(proxy.stats("refused")["errors"], json!({ "connect_refused": 1 }));
    let failed = proxy.stats("failed")["errors"].clone();
    assert!(
        failed == json!({ "connect_failed": 1 }) || failed == json!({ "connect_timeout": 1 }),
        "{failed}"
    );
}
