//! The control socket and `rproxy ctl`: responses, access, and robustness.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::netns::Namespace;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy;
use testkit::suite::Case;
use testkit::udp;
use testkit::{PATIENCE, eventually};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    let namespace = &[Need::Root, Need::Ipv6, Need::Program("ip")];
    vec![
        case("add, list and remove", add_list_remove),
        case("tables for users", tables),
        case("what is listed can be applied", listed_can_be_applied),
        case("what is listed as TOML can be applied and started with", listed_as_toml),
        case("mistakes exit with 2, refusals with 1", mistakes),
        case("refusals in JSON name their mapping", refusals_in_json),
        case("mistakes in limits and in files are told in one line", mistakes_of_limits),
        case("the protocol's responses", answers),
        case("a range is one mapping", range),
        case("random ports are reported", random_ports),
        case("mappings that claim one port are refused", overlaps).needs(namespace),
        case("mappings that claim one port are refused, random ports too", overlaps_with_chosen_ports)
            .needs(namespace),
        case("a port that is served again stays", served_again),
        case("a signal ends a long change", stopped_change),
        case("only its user and root may connect", strangers).needs(&[Need::Root, Need::Program("setpriv")]),
        case("a socket in use is left alone, a stale one replaced", socket_in_use),
        case("drain ends the process", drain),
        case("clients that send invalid requests", liars),
        case("clients that hang", hangers).deadline(PATIENCE * 4),
        case("clients that flood", flooders),
    ]
}

#[track_caller]
fn is_free(address: SocketAddr) -> bool {
    TcpListener::bind(address).is_ok()
}

fn names(list: &Value) -> Vec<&str> {
    list["mappings"].as_array().unwrap().iter().map(|mapping| mapping["name"].as_str().unwrap()).collect()
}

fn add_list_remove() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    assert_eq!(proxy.json(&["list"])["mappings"], json!([]));
    let (host, to) = (address.to_string(), backend.address().to_string());
    let added = proxy.json(&["add", "--host", &host, "--to", &to, "--name", "web"]);
    assert_eq!(added["added"], 1);
    client::assert_echoes(address);
    let list = proxy.json(&["list"]);
    assert_eq!(list["mappings"][0]["name"], "web");
    assert_eq!(list["mappings"][0]["bound"], "8080");
    proxy.ctl(&["remove", "web"]).success();
    assert!(is_free(address), "removing returns when the port is free");
    proxy.ctl(&["add", "--host", &host, "--to", &to]).success();
    client::assert_echoes(address);
    // Nobody chose its name, which the port is in.
    let again = proxy.ctl(&["add", "--host", &host, "--to", &to]);
    assert!(again.stderr.contains(&format!("port 8080 is taken by the mapping {host}/tcp")), "{again:#?}");
    let random = ["add", "--host", "127.0.0.1:0", "--to", &to];
    proxy.ctl(&random).success();
    let again = proxy.ctl(&random);
    assert!(again.stderr.contains("choose another (--name)"), "{again:#?}");
    proxy.ctl(&["remove", &format!("127.0.0.1:random:{}/tcp", backend.address().port())]).success();
    assert_eq!(names(&proxy.json(&["list"])), [format!("{host}/tcp")]);
}

fn tables() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let (host, to) = (address.to_string(), backend.address().to_string());
    let added = proxy.ctl(&["add", "--host", &host, "--to", &to, "--name", "web"]).success();
    assert_eq!(added, format!("web: {}/tcp -> {host}\n", backend.address().port()));
    client::assert_echoes(address);
    let list = proxy.ctl(&["list"]).success();
    let row: Vec<&str> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["web", &format!("{host}/tcp"), &to]);
    eventually("the connection is over", || proxy.stats("web")["connections"] == 0);
    let stats = proxy.ctl(&["stats"]).success();
    let row: Vec<&str> = stats.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["web", "0/1", "0/0", "5", "5", "0", "0"]);
}

fn listed_can_be_applied() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let mut web = mapping("web", "tcp", address, backend.address());
    web["limits"] = json!({ "idle_timeout": "1m", "deny": ["192.0.2.0/24"], "on_limit": "reset" });
    web["limits"]["dscp"] = "0x2e".into();
    web["limits"]["udp_any_port"] = true.into();
    proxy.apply(&[web]).success();
    let file = proxy.file("saved.json", &proxy.json(&["list"]).to_string());
    let again = proxy.json(&["apply", file.to_str().unwrap()]);
    assert_eq!(again, json!({ "added": 0, "changed": 0, "removed": 0, "unchanged": 1 }));
    client::assert_echoes(address);
}

fn listed_as_toml() {
    let proxy = Controlled::start(&[]);
    let host = client::own_loopback();
    let to = "192.0.2.1:80-89";
    let ports = format!("{host}:8000-8009");
    let limits =
        ["--idle-timeout", "1m", "--deny", "192.0.2.0/24", "--max-connections", "7", "--name", "range"];
    proxy
        .ctl(&[&["add", "--host", &ports, "--to", to, "--proto", "tcp+udp"], &limits[..]].concat())
        .success();
    // One whose name follows from its ports.
    proxy.ctl(&["add", "--host", &format!("{host}:8080"), "--to", "192.0.2.1:80"]).success();
    let text = proxy.ctl(&["list", "--toml"]).success();
    let file = proxy.file("saved.toml", &text);
    let saved = file.to_str().unwrap();
    let unchanged = json!({ "added": 0, "changed": 0, "removed": 0, "unchanged": 2 });
    assert_eq!(proxy.json(&["apply", saved]), unchanged, "{text}");
    let json = proxy.file("saved.json", &proxy.json(&["list"]).to_string());
    for input in [saved, json.to_str().unwrap()] {
        let mut command = require::command("sh");
        command.args(["-c", "\"$1\" ctl --json --control \"$2\" apply - < \"$3\"", "sh"]);
        command.arg(rproxy::rproxy()).arg(proxy.socket()).arg(input);
        let answer: Value = serde_json::from_str(&process::run(command).success()).unwrap();
        assert_eq!(answer, unchanged, "{input}");
    }
    let list = proxy.json(&["list"]);
    proxy.apply(&[]).success();
    let is_free = || UdpSocket::bind((host, 8000)).is_ok();
    eventually("the ports are free", is_free);
    assert_eq!(Controlled::start(&["--config", saved]).json(&["list"]), list);
}

/// A command fails with one line, which has these words.
#[track_caller]
fn assert_refused(proxy: &Controlled, arguments: &[&str], (code, words): (i32, &str)) {
    let output = proxy.ctl(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:#?}");
    assert!(output.stderr.contains(words), "no {words:?}: {output:#?}");
    assert_eq!((output.stderr.lines().count(), &*output.stdout), (1, ""), "{output:#?}");
}

fn mistakes_of_limits() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let (host, to) = (address.to_string(), backend.address().to_string());
    let of_limits =
        r#"{"mappings":[{"name":"web","to":"10.0.0.1","to_ports":"80","limits":{"max_conections":1}}]}"#;
    let misspelt = proxy.file("misspelt.json", of_limits).display().to_string();
    let list = proxy.file("list.json", r#"[{"to":"10.0.0.1","to_ports":"80"}]"#).display().to_string();
    let twice = r#"{"mappings":[{"to":"10.0.0.1","to":"10.0.0.2","to_ports":"80"}]}"#;
    let twice = proxy.file("twice.json", twice).display().to_string();
    for (arguments, code, words) in [
        (
            &["add", "--host", "192.0.2.1:80", "--to", &to][..],
            1,
            "; freebind (--freebind) binds it before it is there",
        ),
        (&["apply", &misspelt], 1, "misspelt.json: mapping web: limits.max_conections: unknown field"),
        (&["apply", &list], 1, "list.json: a list of JSON; write {\"mappings\":[…]} around it"),
        (&["apply", &twice], 1, "twice.json: duplicate field `to` at line 1 column"),
        (&["add", "--host", &host, "--to", &to, "--rate", "10"], 2, "in which time? write 10/s or 10/m"),
        (&["add", "--host", &host, "--to", &to, "--keepalive", "10h"], 2, "whole seconds, from 1s to 9h"),
        (&["add", "--host", &host, "--to", &to, "--tcp-user-timeout", "0"], 2, "--tcp-user-timeout"),
    ] {
        assert_refused(&proxy, arguments, (code, words));
    }
}

fn refusals_in_json() {
    let proxy = Controlled::start(&[]);
    let (web, host) = (own_address().to_string(), own_address().to_string());
    proxy.ctl(&["add", "--name", "web", "--host", &web, "--to", "192.0.2.1:80"]).success();
    let add = |name: &'static str, host, to| vec!["add", "--name", name, "--host", host, "--to", to];
    let nobodys = "192.0.2.9:80";
    for (arguments, kind, mapping) in [
        (vec!["remove", "nobody"], "unknown_name", Some("nobody")),
        (add("other", &web, "192.0.2.1:80"), "overlap", Some("other")),
        (add("web", &host, "192.0.2.1:80"), "name_taken", Some("web")),
        (vec!["retarget", "web", "--to", &web], "loop", Some("web")),
        (add("away", nobodys, "192.0.2.1:80"), "bind", Some("away")),
        (vec!["stats", "--mapping", "nobody"], "unknown_name", None),
        (vec!["apply", "/nonexistent"], "file", None),
    ] {
        let output = proxy.ctl(&[&["--json"], &arguments[..]].concat());
        let error = serde_json::from_str::<Value>(&output.stdout).unwrap()["error"].clone();
        let (is, expected) =
            ((&error["kind"], error.get("mapping")), (&json!(kind), mapping.map(|name| json!(name))));
        assert_eq!(is, (expected.0, expected.1.as_ref()), "{arguments:?}: {output:#?}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{output:#?}");
        assert_eq!((output.status.code(), output.stderr.as_str()), (Some(1), ""), "{output:#?}");
    }
}

fn mistakes() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let (host, to) = (address.to_string(), backend.address().to_string());
    proxy.ctl(&["add", "--host", &host, "--to", &to, "--name", "web"]).success();
    let missing = proxy.file("x", "").with_file_name("missing").display().to_string();
    let not_json = proxy.file("not.json", "mappings: none").display().to_string();
    for (arguments, code, words) in [
        (&["add"][..], 2, "nothing to forward"),
        (&["fly"], 2, "fly"),
        (&["remove", "a b"], 2, "is not a name"),
        (&["retarget", "web"], 2, "--to"),
        (&["retarget", "web", "--to", "127.0.0.1:0"], 2, "port 0"),
        (&["stats", "--watch", "0"], 2, "--watch"),
        (&["stats", "--sort", "rate-in"], 2, "add --watch"),
        (&["stats", "--sort", "beauty"], 2, "bytes-in"),
        (&["stats", "--mapping", "a b*"], 2, "is not a name"),
        (&["stats", "--mapping", "nobody", "--watch"], 1, "--mapping nobody: there is no such mapping"),
        (&["remove", "nobody"], 1, "there is no mapping nobody"),
        (&["retarget", "nobody", "--to", "127.0.0.1:9"], 1, "there is no mapping nobody"),
        (&["retarget", "web", "--to", &host], 1, "would forward to itself"),
        (&["add", "--host", &host, "--to", &to], 1, "port 8080 is taken by the mapping web"),
        (&["add", "--host", "127.0.0.1:0", "--to", &to, "--name", "web"], 1, "the name web is taken"),
        (
            &["add", "--host", "192.0.2.1:80", "--to", &to],
            1,
            "rproxy: cannot listen on 192.0.2.1:80/tcp: this machine has no such address",
        ),
        (&["apply", &missing], 1, "No such file"),
        (&["apply", &not_json], 1, "not.json:1:1"),
        (&["apply", "-"], 1, "standard input:1:1: there is no [[mapping]] in it"),
        (&["list", "--toml", "--json"], 2, "cannot be used with"),
    ] {
        assert_refused(&proxy, arguments, (code, words));
    }
    assert_eq!(names(&proxy.json(&["list"])), ["web"]);
    let nobody = process::run(rproxy::command(&["ctl", "--control", &missing, "list"]));
    assert_eq!(nobody.status.code(), Some(1));
    assert!(nobody.stderr.contains("no rproxy listens there"), "{nobody:#?}");
    let foreign = proxy.socket().with_file_name("foreign");
    let listener = UnixListener::bind(&foreign).unwrap();
    let answering =
        thread::spawn(move || listener.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request\r\n"));
    let output = process::run(rproxy::command(&["ctl", "--control", foreign.to_str().unwrap(), "list"]));
    answering.join().unwrap().unwrap();
    assert!(output.stderr.contains("another program listens there"), "{output:#?}");
}

fn answers() {
    let proxy = Controlled::start(&[]);
    let mut client = proxy.connect();
    let list = client.ask(&json!({ "v": 1, "id": 7, "do": "list" }));
    assert_eq!(list, json!({ "v": 1, "id": 7, "ok": { "mappings": [], "draining": [] } }));
    let refused = client.ask(&json!({ "v": 1, "id": 8, "do": { "remove": { "name": "web" } } }));
    assert_eq!((&refused["id"], &refused["error"]["kind"]), (&json!(8), &json!("unknown_name")));
    let version = client.ask(&json!({ "v": 9, "id": 9, "do": "list" }));
    assert_eq!(version["error"]["kind"], "version");
    // Several requests in one write are answered one by one.
    client.send(b"{\"v\":1,\"id\":1,\"do\":\"list\"}\n{\"v\":1,\"id\":2,\"do\":\"stats\"}\n").unwrap();
    let ids = [client.answer(), client.answer()].map(|answer| answer.unwrap()["id"].clone());
    assert_eq!(ids, [1, 2]);
}

fn range() {
    let backends: Vec<_> = (0..2).map(|_| TcpBackend::echo()).collect();
    let proxy = Controlled::start(&[]);
    let host = client::own_loopback().to_string();
    let first = backends[0].address().port();
    let range = json!({ "name": "r", "host": host, "host_ports": "8000-8999", "to": "127.0.0.1",
                        "to_ports": format!("{first}-{}", first.checked_add(999).unwrap_or(first)) });
    if first.checked_add(999).is_none() {
        // The backend got one of the last ports; another run will not.
        return;
    }
    proxy.apply(std::slice::from_ref(&range)).success();
    assert_eq!(proxy.json(&["list"])["mappings"][0]["bound"], "8000-8999");
    client::assert_echoes(format!("{host}:8000").parse().unwrap());
    let last: SocketAddr = format!("{host}:8999").parse().unwrap();
    let second = backends[1].address();
    let Some(first) = second.port().checked_sub(999) else { return };
    proxy.ctl(&["retarget", "r", "--to", &format!("127.0.0.1:{first}")]).success();
    client::assert_echoes(last);
    proxy.ctl(&["remove", "r"]).success();
    assert!(is_free(last));
}

fn random_ports() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let mut random = mapping("web", "tcp+udp", own_address(), backend.address());
    let host = random["host"].as_str().unwrap().to_owned();
    random.as_object_mut().unwrap().remove("host_ports");
    proxy.apply(std::slice::from_ref(&random)).success();
    let bound = proxy.json(&["list"])["mappings"][0]["bound"].as_str().unwrap().to_owned();
    client::assert_echoes(format!("{host}:{bound}").parse().unwrap());
    let serving =
        format!("serving mapping=web host={host}:{bound} backend={} protocol=tcp+udp", backend.address());
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(&serving));
    // The port that was chosen stays, also when the mapping leads elsewhere.
    let other = TcpBackend::echo();
    random["to_ports"] = other.address().port().to_string().into();
    proxy.apply(&[random]).success();
    assert_eq!(proxy.json(&["list"])["mappings"][0]["bound"], bound);
    client::assert_echoes(format!("{host}:{bound}").parse().unwrap());
}

/// Asks to serve these mappings, and gives the kind of the error and its message.
#[track_caller]
fn refused(proxy: &Controlled, how: &str, mappings: &[Value]) -> (String, String) {
    let answer = proxy.connect().ask(&json!({ "v": 1, "do": { how: { "mappings": mappings } } }));
    let text = |key: &str| answer["error"][key].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
    (text("kind"), text("message"))
}

/// A mapping of some ports of `host` to the same ports of a backend.
fn of_ports(name: &str, host: &str, ports: &str, proto: &str) -> Value {
    json!({ "name": name, "host": host, "host_ports": ports, "to": "192.0.2.1", "to_ports": ports, "proto": proto })
}

fn overlaps() {
    // Where all ports are free.
    let proxy = Controlled::start_in(&Namespace::new(), &[]);
    let host = "127.0.0.2";
    let only_v6 = json!({ "name": "b", "host": "[::]", "host_ports": "80", "v6only": true, "to": "192.0.2.1", "to_ports": "80" });
    for (a, b) in [
        (of_ports("a", host, "80", "tcp"), of_ports("b", host, "80", "tcp")),
        (of_ports("a", "0.0.0.0", "80", "udp"), of_ports("b", host, "80", "udp")),
        (of_ports("a", host, "80", "tcp"), of_ports("b", "[::]", "80", "tcp")),
        (of_ports("a", "0.0.0.0", "80", "tcp"), of_ports("b", "[::]", "80", "tcp")),
        (of_ports("a", host, "70-90", "tcp"), of_ports("b", host, "80-99", "tcp")),
        (of_ports("a", host, "80", "tcp+udp"), of_ports("b", host, "80", "udp")),
        (of_ports("a", "[::1]", "80", "tcp"), only_v6),
    ] {
        for how in ["add", "apply"] {
            let (kind, message) = refused(&proxy, how, &[a.clone(), b.clone()]);
            assert_eq!(kind, "overlap", "{message}");
            assert!(message.starts_with("b: port 80 is taken by the mapping a ("), "{message}");
        }
    }
    assert_eq!(proxy.json(&["list"])["mappings"], json!([]));
}

fn overlaps_with_chosen_ports() {
    let namespace = Namespace::new();
    let proxy = Controlled::start_in(&namespace, &[]);
    let host = "127.0.0.2";
    // The first free one of two ports, which others of the same change have.
    let choose = |name: &str| json!({ "name": name, "host": host, "host_ports": "80-81", "to": "192.0.2.1", "to_ports": "80" });
    let (kind, message) = refused(&proxy, "add", &[choose("c"), choose("d"), choose("e")]);
    assert_eq!(kind, "overlap", "{message}");
    assert!(message.starts_with("e: port 80 is taken by the mapping c ("), "{message}");
    // One that was chosen before.
    let random = json!({ "name": "r", "host": host, "to": "192.0.2.1", "to_ports": "80", "proto": "udp" });
    proxy.apply(std::slice::from_ref(&random)).success();
    let port = proxy.json(&["list"])["mappings"][0]["bound"].as_str().unwrap().to_owned();
    let wanted = of_ports("x", "0.0.0.0", &port, "tcp+udp");
    for (how, mappings) in [("add", vec![wanted.clone()]), ("apply", vec![random, wanted])] {
        let (kind, message) = refused(&proxy, how, &mappings);
        assert_eq!(kind, "overlap", "{message}");
        assert!(message.starts_with(&format!("x: port {port} is taken by the mapping r (")), "{message}");
    }
    // A mapping that goes in the same change, but is bound until then; it may have the same name.
    proxy.apply(&[of_ports("a", "0.0.0.0", "80", "tcp")]).success();
    for name in ["a", "b"] {
        let (kind, message) = refused(&proxy, "apply", &[of_ports(name, host, "80", "tcp")]);
        assert_eq!(kind, "overlap", "{message}");
        let words = format!("{name}: port 80 is still bound by the mapping a, which this change removes");
        assert!(message.starts_with(&words) && message.ends_with("remove a first"), "{message}");
    }
    // Another program is none of them.
    proxy.apply(&[]).success();
    let _taken = namespace.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    assert_eq!(refused(&proxy, "add", &[of_ports("x", host, "80", "tcp")]).0, "bind");
}

fn served_again() {
    let backend = udp::Backend::echo(udp::local());
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let dns = mapping("dns", "udp", address, backend.address());
    let client = udp::local();
    proxy.apply(std::slice::from_ref(&dns)).success();
    udp::assert_echoes(&client, address, b"hello");
    // With a flow that is not quiet yet, the socket stays, and is given to the next mapping for it.
    proxy.ctl(&["remove", "dns"]).success();
    proxy.apply(std::slice::from_ref(&dns)).success();
    udp::assert_echoes(&udp::local(), address, b"hello");
    // It is nobody's but that one's from then on.
    let other = mapping("other", "udp", own_address(), backend.address());
    proxy.apply(&[dns, other]).success();
    for _ in 0..3 {
        udp::assert_echoes(&udp::local(), address, b"hello");
    }
}

fn stopped_change() {
    const MAPPINGS: u16 = 10_000;
    let proxy = Controlled::start(&[]);
    let host = client::own_loopback();
    let mappings: Vec<Value> = (0..MAPPINGS)
        .map(|index| {
            let address = (host, 10_000 + index).into();
            mapping(&format!("m{index}"), "tcp", address, "192.0.2.1:80".parse().unwrap())
        })
        .collect();
    let idle = proxy.process.descriptors();
    let mut client = proxy.connect();
    client
        .send(format!("{}\n", json!({ "v": 1, "do": { "add": { "mappings": mappings } } })).as_bytes())
        .unwrap();
    eventually("some of them are bound", || proxy.process.descriptors() > idle + 100);
    proxy.process.signal(Signal::SIGTERM);
    assert_eq!(proxy.process.wait().code(), Some(0));
    let answer = client.answer();
    assert!(answer.as_ref().is_none_or(|answer| answer["error"]["kind"] == "failed"), "{answer:?}");
    let log = proxy.process.captured(Stream::Stderr);
    assert!(log.contains("ending, nothing was changed"), "{log}");
}

fn strangers() {
    let proxy = Controlled::start(&[]);
    let mode = fs::metadata(proxy.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let list_as_nobody = || {
        let mut command = require::command("setpriv");
        let socket = proxy.socket();
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(rproxy::rproxy());
        command.args(["ctl", "list", "--control"]).arg(socket);
        process::run(command)
    };
    let output = list_as_nobody();
    assert_eq!((output.status.code(), output.stderr.lines().count()), (Some(1), 1), "{output:#?}");
    assert!(output.stderr.contains("permission denied: the socket belongs to root; use sudo"), "{output:#?}");
    let directory = proxy.socket().parent().unwrap().to_owned();
    let set_mode = |mode: u32| fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o700);
    let output = list_as_nobody();
    let closed = format!("the directory {} belongs to root; use sudo", directory.display());
    assert!(output.stderr.contains(&closed), "{output:#?}");
    set_mode(0o755);
    // Even if someone opens the file for all: the process itself looks at who asks.
    fs::set_permissions(proxy.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let output = list_as_nobody();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("user 65534 may not control this process"), "{output:#?}");
}

fn socket_in_use() {
    let proxy = Controlled::start(&[]);
    let path = proxy.socket().display().to_string();
    let second = process::run(rproxy::command(&["--control", &path]));
    assert_eq!(second.status.code(), Some(1));
    assert!(second.stderr.contains("somebody listens there already"), "{second:#?}");
    assert!(proxy.ctl(&["list"]).status.success(), "the first one is undisturbed");
    proxy.process.signal(Signal::SIGKILL);
    proxy.process.wait();
    assert!(proxy.socket().exists(), "nobody could remove it");
    let third = Process::spawn(rproxy::command(&["--control", &path]));
    eventually("the socket is served again", || UnixStream::connect(&path).is_ok());
    third.signal(Signal::SIGTERM);
    assert_eq!(third.wait().code(), Some(0));
    assert!(!proxy.socket().exists(), "it goes with its process");
}

fn drain() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&["--drain-timeout", "1h"]), own_address());
    proxy.apply(&[mapping("web", "tcp", address, backend.address())]).success();
    let client = client::connect(address);
    eventually("the connection is there", || proxy.stats("web")["connections"] == 1);
    proxy.ctl(&["drain"]).success();
    eventually("nobody is let in any more", || is_free(address));
    assert!(proxy.process.is_running(), "a connection goes on");
    drop(client);
    assert_eq!(proxy.process.wait().code(), Some(0));
}

/// Checks that a proxy relays and can be controlled.
#[track_caller]
fn assert_well(proxy: &Controlled, address: SocketAddr) {
    client::assert_echoes(address);
    assert_eq!(names(&proxy.json(&["list"])), ["web"]);
}

fn with_one_mapping() -> (TcpBackend, Controlled, SocketAddr) {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("web", "tcp", address, backend.address())]).success();
    (backend, proxy, address)
}

fn liars() {
    let (_backend, proxy, address) = with_one_mapping();
    let deep = "[".repeat(100_000);
    let huge_name = "x".repeat(1_000_000);
    for line in [
        "",
        "GET / HTTP/1.1",
        "\0\u{1}\u{2}",
        "{\"v\":1,\"do\":{\"add\":{\"mappings\":[{}]}}}",
        "{\"v\":1e999,\"do\":\"list\"}",
        &deep,
        &format!("{{\"v\":1,\"do\":{{\"remove\":{{\"name\":\"{huge_name}\"}}}}}}"),
    ] {
        let mut client = proxy.connect();
        client.send(line.as_bytes()).unwrap();
        client.send(b"\n").unwrap();
        let answer = client.answer().unwrap();
        assert_eq!(answer["error"]["kind"], "bad_request", "{answer}");
        assert!(answer.to_string().len() < 1000, "an answer repeats no nonsense at length");
    }
    // A line without an end is cut off where it gets too long.
    let mut client = proxy.connect();
    let chunk = vec![b' '; 64 * 1024];
    while client.send(&chunk).is_ok() {}
    assert!(client.answer().is_none_or(|answer| answer["error"]["kind"] == "bad_request"));
    // Half a request, and gone.
    proxy.connect().send(b"{\"v\":1,").unwrap();
    assert_well(&proxy, address);
}

fn hangers() {
    let (_backend, proxy, address) = with_one_mapping();
    // They say nothing, half of something, or do not read what they asked for.
    let mut hanging: Vec<_> = (0..16).map(|_| proxy.connect()).collect();
    hanging[1].send(b"{\"v\":1").unwrap();
    // Nobody else gets in, and is told so.
    let refused = || proxy.ctl(&["list"]).stderr.contains("clients are connected already");
    eventually("all places are taken", refused);
    client::assert_echoes(address);
    // The places are free again when they have hung for too long.
    eventually("there is room again", || proxy.ctl(&["list"]).status.success());
    assert_well(&proxy, address);
}

fn flooders() {
    let (_backend, proxy, address) = with_one_mapping();
    let mut clients: Vec<_> = (0..8).map(|_| proxy.connect()).collect();
    let requests = "{\"v\":1,\"do\":\"stats\"}\n".repeat(1000);
    // None of them reads: the process stops to read from them, in turn, and nothing piles up.
    for client in &mut clients {
        client.send(requests.as_bytes()).unwrap();
    }
    assert_well(&proxy, address);
    for mut client in clients {
        assert!(client.answer().unwrap()["ok"].is_object());
    }
    assert_well(&proxy, address);
}
