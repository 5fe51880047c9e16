//! What runtimes ask, and what they are answered.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use testkit::eventually;
use testkit::process::Process;
use testkit::require;
use testkit::rproxy::{netns_setup, portmap};
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::node::{Called, NETWORK, Node, Pod, case, configuration};
use crate::netns_setup::stage::{assert_reaches, assert_reaches_udp, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("each version passes the result on as it came", versions),
        case("what is wrong is answered by its code", mistakes),
        case("a port that another container has is refused", taken_by_container),
        case("a port that another program has is refused", taken_by_program),
        case("a port that a network of netns-setup has is refused", taken_by_network),
        case("ports of nerdctl are taken over", nerdctl),
        case("a container that comes again keeps its port", again),
        case("a container in two networks has its port in both", two_networks),
        case("other addresses for a port replace the old ones", other_addresses),
        case("deleting needs nothing and can be repeated", deleted),
        case("deleting takes away what it can", deleted_all_the_same),
        case("a state that is lost is made good for", lost),
        case("a second state directory is refused while the first has ports", second_directory),
        case("checks see what is missing", checked),
        case("what no valid attachment has is collected", collected),
        case("the status says what is missing", status),
        case("a program that hangs is killed and holds up nothing", hanging)
            .deadline(Duration::from_secs(120)),
        case("rules that are flushed come back with the next call", flushed),
        case("without a command it says what it is", people),
        case("two hundred containers at once leave nothing", many),
    ]
}

fn tcp(port: u16) -> Value {
    json!([{ "hostPort": port, "containerPort": 80, "protocol": "tcp" }])
}

fn call(node: &Node, command: &str, with: &Value) -> Called {
    node.call(command, "c1", &configuration(with, &json!({})))
}

fn versions(node: &Node) {
    let pod = node.pod("c1", 2);
    let prev = r#"{ "ips": [{"address":"10.88.0.2/16",  "version":"4"}], "x": 1, "dns": {} }"#;
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let conf = configuration(
            &json!({ "cniVersion": version, "runtimeConfig": { "portMappings": tcp(8080) }, "prevResult": "HERE" }),
            &json!({}),
        );
        let added = node.call("ADD", &pod.id, &conf.replace("\"HERE\"", prev)).success();
        assert_eq!(added, prev, "{version}");
        node.delete(&pod);
        // Without ports nothing is done.
        let conf = configuration(&json!({ "cniVersion": version, "prevResult": "HERE" }), &json!({}));
        assert_eq!(node.call("ADD", &pod.id, &conf.replace("\"HERE\"", prev)).success(), prev);
        let check = node.call("CHECK", &pod.id, &conf.replace("\"HERE\"", prev));
        if version < "0.4.0" {
            assert_eq!(check.error().0, 1);
        } else {
            assert_eq!(check.success(), "");
        }
    }
    node.assert_clean();
    let answer: Value =
        serde_json::from_str(&node.call("VERSION", "", r#"{"cniVersion":"0.4.0"}"#).success()).unwrap();
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

fn mistakes(node: &Node) {
    let pod = node.pod("c1", 1);
    let prev: Value = serde_json::from_str(&pod.result).unwrap();
    let with = |more: Value| {
        let mut all = json!({ "runtimeConfig": { "portMappings": tcp(8080) }, "prevResult": prev });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let sctp = json!([{ "hostPort": 80, "containerPort": 80, "protocol": "sctp" }]);
    let mut wrong = vec![
        (with(json!({ "cniVersion": "0.2.0" })), 1, "\"0.2.0\" is unknown"),
        (with(json!({ "conditionsV4": ["-d", "10.0.0.0/8"] })), 2, "conditionsV4 is not supported"),
        (with(json!({ "prevResult": null })), 7, "prevResult is missing"),
        (with(json!({ "prevResult": { "ips": [] } })), 7, "no address of eth0"),
        (with(json!({ "name": "" })), 7, "name, that of the network, is missing"),
        (with(json!({ "policy": "nat" })), 7, "policy: unknown variant `nat`"),
        (with(json!({ "runtimeConfig": { "portMappings": tcp(0) } })), 7, "portMappings[0].hostPort 0"),
        (with(json!({ "rproxy": "/nonexistent/rproxy" })), 50, "there is no rproxy at /nonexistent/rproxy"),
        (with(json!({ "stateDir": "/proc/x" })), 104, "/proc/x"),
    ];
    if !Path::new("/proc/sys/net/sctp").exists() {
        wrong.push((with(json!({ "runtimeConfig": { "portMappings": sctp } })), 101, "modprobe sctp"));
    }
    for (conf, code, message) in wrong {
        let (was, said) = call(node, "ADD", &conf).error();
        assert_eq!(was, code, "{said}");
        assert!(said.contains(message) && !said.contains('\n'), "{said}");
        assert!(!Path::new("/run/rproxy-portmap").exists(), "{said}");
    }
    assert_eq!(node.call("ADD", "c1", "{").error().0, 6);
    assert_eq!(node.call("ADD", "a/b", &configuration(&with(json!({})), &json!({}))).error().0, 4);
    assert_eq!(node.call("JUMP", "c1", "{}").error().0, 4);
    assert!(node.served().is_empty());
    assert_eq!(node.rules(), "");
}

/// Tries to publish for `pod` and expects that nothing changes; returns the message.
#[track_caller]
fn refused(node: &Node, pod: &Pod, ports: &Value, code: u64) -> String {
    let before = (node.rules(), node.served());
    let (was, message) = node.call("ADD", &pod.id, &Node::conf(pod, ports, &json!({}))).error();
    assert_eq!(was, code, "{message}");
    assert_eq!((node.rules(), node.served()), before);
    message
}

fn taken_by_container(node: &Node) {
    let (one, other) = (node.pod("c1", 2), node.pod("c2", 2));
    node.add(&one, &json!([{ "hostPort": 8080, "containerPort": 80, "range": 3 }]), &json!({}));
    let both = json!([{ "hostPort": 9000, "containerPort": 80 }, { "hostPort": 8082, "containerPort": 80, "hostIP": "127.0.0.1" }]);
    let message = refused(node, &other, &both, 100);
    let taken = "host port 127.0.0.1:8082/tcp for container c2 is taken by container c1 (eth0, network pods)";
    assert_eq!(message, taken);
    node.add(&other, &tcp(8083), &json!({}));
}

fn taken_by_program(node: &Node) {
    let pod = node.pod("c1", 2);
    let own = std::process::id();
    let tcp_listener = node.host.run(|| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    let udp_socket = node.host.run(|| UdpSocket::bind(("::", 0)).unwrap());
    for (protocol, address) in [("tcp", tcp_listener.local_addr()), ("udp", udp_socket.local_addr())] {
        let port = address.unwrap().port();
        let wanted = json!([{ "hostPort": 9000, "containerPort": 80 }, { "hostPort": port, "containerPort": 80, "protocol": protocol }]);
        let message = refused(node, &pod, &wanted, 100);
        assert!(message.contains(&format!("{port}/{protocol} for container c1 is taken by ")), "{message}");
        assert!(message.ends_with(&format!("(process {own})")), "{message}");
    }
}

fn taken_by_network(node: &Node) {
    let state = tempfile::tempdir().unwrap();
    let setup = |arguments: &str| {
        let mut command = Command::new(netns_setup());
        command.arg("--state-dir").arg(state.path().join("state")).args(arguments.split_whitespace());
        node.host.spawn(command).into_output().success()
    };
    setup("up");
    setup("attach web");
    // The kernel alone serves it: nobody has the port bound.
    setup("publish web -p 8080:80 --via dnat");
    let pod = node.pod("c1", 1);
    let message = refused(node, &pod, &tcp(8080), 100);
    setup("down");
    assert!(message.contains("8080/tcp is published by web of the network with --state-dir"), "{message}");
    node.add(&pod, &tcp(8080), &json!({}));
}

/// nerdctl has a process hold the IPv4 ports of a container until it has its network.
fn nerdctl(node: &Node) {
    let pod = node.pod("default-4f2d", 1);
    let _server = serve(&pod.netns, 80);
    let held: [OwnedFd; 2] = node.host.run(|| {
        [
            TcpListener::bind(("0.0.0.0", 8080)).unwrap().into(),
            UdpSocket::bind(("0.0.0.0", 8080)).unwrap().into(),
        ]
    });
    let mut sleep = require::command("sleep");
    sleep.arg("infinity");
    let mapped = held.iter().zip(3..).map(|(socket, child_fd)| FdMapping {
        parent_fd: socket.as_fd().try_clone_to_owned().unwrap(),
        child_fd,
    });
    sleep.fd_mappings(mapped.collect()).unwrap();
    let holder = Process::spawn(sleep);
    drop(held);
    let port = |protocol: &str| json!({ "hostPort": 8080, "containerPort": 80, "protocol": protocol, "hostIP": "0.0.0.0" });
    let ports = json!([port("tcp"), port("udp")]);
    // Another container's process keeps its port.
    let dir = Path::new("/run/nerdctl/default/4f2d");
    fs::create_dir_all(dir).unwrap();
    let message = refused(node, &pod, &ports, 100);
    assert!(message.ends_with(&format!("is taken by sleep (process {})", holder.pid())), "{message}");
    fs::write(dir.join("port-reserver.pid"), holder.pid().to_string()).unwrap();
    for policy in ["relay", "both"] {
        node.add(&pod, &ports, &json!({ "policy": policy }));
        assert_reaches(&node.client, HOST_V4, 8080);
        assert_reaches_udp(&node.client, HOST_V4, 8080);
        assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
        assert_reaches_udp(&node.host, Ipv4Addr::LOCALHOST, 8080);
        node.delete(&pod);
    }
}

/// A container that is started again has another address; nothing has to be deleted before.
fn again(node: &Node) {
    let (old, mut new) = (node.pod("c1", 2), node.pod("c2", 2));
    let _server = serve(&new.netns, 80);
    for policy in ["relay", "dnat", "both"] {
        node.add(&old, &tcp(8080), &json!({ "policy": policy }));
        "c1".clone_into(&mut new.id);
        node.add(&new, &tcp(8080), &json!({ "policy": policy }));
        assert_reaches(&node.client, HOST_V4, 8080);
        assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
        // With other ports, the old ones are free.
        node.add(&new, &tcp(8081), &json!({ "policy": policy }));
        assert_reaches(&node.client, HOST_V4, 8081);
        drop(node.host.run(|| TcpListener::bind(("::", 8080)).unwrap()));
        // Without ports nothing is published.
        node.add(&new, &json!([]), &json!({}));
        node.assert_clean();
    }
}

/// Runtimes pass the same ports to the plugin in each network of a container.
fn two_networks(node: &Node) {
    let (one, mut other, third) = (node.pod("c1", 2), node.pod("c2", 1), node.pod("c3", 1));
    let _servers = [serve(&one.netns, 80), serve(&other.netns, 80)];
    "c1".clone_into(&mut other.id);
    for policy in ["relay", "dnat", "both"] {
        let in_network = |network: &str| json!({ "policy": policy, "name": network });
        node.add(&one, &tcp(8080), &in_network(NETWORK));
        node.add(&other, &tcp(8080), &in_network("others"));
        assert_eq!(refused(node, &third, &tcp(8080), 100).matches("container c1").count(), 1);
        assert_reaches(&node.client, HOST_V4, 8080);
        for (pod, name) in [(&one, NETWORK), (&other, "others")] {
            let check = Node::conf(pod, &tcp(8080), &in_network(name));
            node.call("CHECK", "c1", &check).success();
        }
        // The other one takes over.
        node.delete(&one);
        assert_eq!(node.served(), ["c1/tcp/[::]:8080"]);
        assert_reaches(&node.client, HOST_V4, 8080);
        assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
        node.call("DEL", "c1", &configuration(&json!({}), &in_network("others"))).success();
        node.assert_clean();
    }
}

fn other_addresses(node: &Node) {
    let (mut single, dual) = (node.pod("c2", 1), node.pod("c1", 2));
    let _servers = [serve(&single.netns, 80), serve(&dual.netns, 80)];
    "c1".clone_into(&mut single.id);
    let on_loopback = json!([{ "hostPort": 8080, "containerPort": 80, "hostIP": "127.0.0.1" }]);
    for (pod, ports) in
        [(&single, &tcp(8080)), (&dual, &tcp(8080)), (&dual, &on_loopback), (&single, &tcp(8080))]
    {
        node.add(pod, ports, &json!({}));
        assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
    }
    assert_eq!(node.served(), ["c1/tcp/[::]:8080"]);
    // If the new ones cannot be had, the old ones stay.
    let holder = node.host.run(|| TcpListener::bind("127.0.0.1:8081").unwrap());
    let more = json!([{ "hostPort": 8080, "containerPort": 80 }, { "hostPort": 8081, "containerPort": 80 }]);
    refused(node, &Pod { id: "c1".to_owned(), ..dual }, &more, 100);
    drop(holder);
}

/// What an `ADD` refuses, its `DEL` does not; and others have no part in it.
fn deleted_all_the_same(node: &Node) {
    let (pod, other) = (node.pod("c1", 2), node.pod("c2", 2));
    node.add(&pod, &tcp(8080), &json!({}));
    node.add(&other, &tcp(8081), &json!({}));
    let wrong = json!({
        "policy": "nat", "polcy": 1, "rproxy": "here", "masqAll": true, "prevResult": 7,
        "runtimeConfig": { "portMappings": tcp(0) }
    });
    node.call("DEL", "c1", &configuration(&wrong, &json!({}))).success();
    assert_eq!(node.served(), ["c2/tcp/0.0.0.0:8081", "c2/tcp/[::]:8081"]);
    node.add(&pod, &tcp(8080), &json!({}));
    // Nobody can restore the ports of the other.
    end_supervisor(node);
    let gone = node.call("DEL", "c1", &configuration(&json!({ "rproxy": "/nonexistent" }), &json!({})));
    assert_eq!(gone.status, Some(0), "{gone:?}");
    assert!(gone.stderr.contains("the relay does not serve the ports of others"), "{gone:?}");
    assert!(!node.rules().contains("tcp . 8080"));
    node.add(&pod, &tcp(8080), &json!({}));
    assert_eq!(node.served().len(), 4);
}

fn lost(node: &Node) {
    let (one, other) = (node.pod("c1", 1), node.pod("c2", 1));
    let _server = serve(&other.netns, 80);
    let state = Path::new("/run/rproxy-portmap/attachments.json");
    for removed in [state, state.parent().unwrap()] {
        node.add(&one, &tcp(8080), &json!({}));
        if removed.is_dir() {
            fs::remove_dir_all(removed).unwrap();
        } else {
            fs::remove_file(removed).unwrap();
        }
        node.add(&other, &tcp(8081), &json!({}));
        assert_eq!(node.rules().matches(" : 10.88.").count(), 1, "{}", removed.display());
        assert_eq!(node.served(), ["c2/tcp/[::]:8081"]);
        node.add(&other, &tcp(8080), &json!({}));
        assert_reaches(&node.client, HOST_V4, 8080);
        node.delete(&other);
        node.assert_clean();
    }
    // Damaged, and of a newer version.
    node.add(&one, &tcp(8080), &json!({}));
    let text = fs::read_to_string(state).unwrap();
    for (wrong, message) in [("{", "cannot read"), (&text.replacen(":1,", ":99,", 1), "has the version 99")] {
        fs::write(state, wrong).unwrap();
        let (code, said) = node.call("DEL", "c1", &configuration(&json!({}), &json!({}))).error();
        assert_eq!((code, said.contains(message)), (104, true), "{said}");
    }
    fs::write(state, text).unwrap();
}

/// Kills the supervisor of the relay, which takes the relay along.
fn end_supervisor(node: &Node) {
    kill(node.process("supervise-relay"), Signal::SIGKILL).unwrap();
    eventually("the relay has ended", || node.served().is_empty());
}

fn second_directory(node: &Node) {
    let pods = ["c1", "c2"].map(|id| node.pod(id, 1));
    let other = json!({ "stateDir": "/run/other" });
    node.add(&pods[0], &tcp(8080), &json!({}));
    let before = (node.rules(), node.served());
    let conf = Node::conf(&pods[1], &tcp(8081), &other);
    let (code, said) = node.call("ADD", "c2", &conf).error();
    assert!(code == 104 && said.contains("/run/rproxy-portmap already has the ports"), "{code} {said}");
    assert!(!Path::new("/run/other").exists(), "the directory that the call has made is gone again");
    assert_eq!((node.rules(), node.served()), before);
    // A DEL of what was refused is no error, and changes nothing.
    let delete = |id: &str, more: &Value| node.call("DEL", id, &configuration(&json!({}), more)).success();
    delete("c2", &other);
    assert_eq!((node.rules(), node.served()), before);
    node.delete(&pods[0]);
    node.call("ADD", "c2", &conf).success();
    delete("c2", &other);
    node.assert_clean();
}

fn deleted(node: &Node) {
    let pod = node.pod("c1", 1);
    // Before anything was added.
    node.call("DEL", "c1", r#"{"cniVersion":"0.4.0","name":"pods","type":"portmap"}"#).success();
    assert!(!Path::new("/run/rproxy-portmap").exists());
    node.add(&pod, &tcp(8080), &json!({}));
    let mut bare = Command::new(portmap());
    bare.env_remove("CNI_NETNS");
    // A runtime that has forgotten the ports, and lacks rproxy by now.
    let conf = json!({ "cniVersion": "0.4.0", "name": NETWORK, "rproxy": "/nonexistent" });
    node.run(bare, "DEL", "c1", &conf.to_string()).success();
    node.assert_clean();
    node.delete(&pod);
    // The attachment of another network is another one.
    node.add(&pod, &tcp(8080), &json!({}));
    node.call("DEL", "c1", r#"{"cniVersion":"1.0.0","name":"others"}"#).success();
    assert_eq!(node.served(), ["c1/tcp/[::]:8080"]);
}

fn checked(node: &Node) {
    let pod = node.pod("c1", 2);
    let conf = Node::conf(&pod, &tcp(8080), &json!({}));
    let check = || node.call("CHECK", "c1", &conf);
    let (code, message) = check().error();
    assert_eq!(
        (code, message.starts_with("host port 0.0.0.0:8080/tcp was not published for c1")),
        (105, true)
    );
    node.call("ADD", "c1", &conf).success();
    check().success();
    let moved = conf.replace(&pod.v4.to_string(), "10.88.9.9");
    assert!(
        node.call("CHECK", "c1", &moved)
            .error()
            .1
            .contains(&format!("leads to {}:80, not to 10.88.9.9:80", pod.v4))
    );
    assert!(
        node.call("CHECK", "c1", &conf.replace("8080", "8081")).error().1.contains("which is not asked for")
    );
    for (change, message) in [
        ("nft delete element inet rproxy-portmap published6 { tcp . 8080 }", "published6 of the nft table"),
        (
            "nft flush chain inet rproxy-portmap nat-prerouting",
            "the chain nat-prerouting of the nft table inet rproxy-portmap has other rules",
        ),
        (
            "nft flush set inet rproxy-portmap local4",
            "local4 of the nft table inet rproxy-portmap lacks 10.88.0.0/16",
        ),
        ("nft flush chain inet rproxy-portmap published", "the chain published of"),
        ("nft flush ruleset", "the nft table inet rproxy-portmap is missing"),
    ] {
        node.host.command(change).success();
        let (code, said) = check().error();
        assert_eq!(code, 105);
        assert!(said.contains(message), "{said}");
        // An ADD that is repeated mends it.
        node.host.command("nft flush ruleset").success();
        node.call("ADD", "c1", &conf).success();
        check().success();
    }
}

fn collected(node: &Node) {
    let pods = ["c1", "c2", "c3"].map(|id| node.pod(id, 1));
    for (pod, port) in pods.iter().zip(8080..) {
        node.add(pod, &tcp(port), &json!({}));
    }
    node.add(&pods[2], &tcp(9000), &json!({ "name": "others" }));
    let (code, message) = call(node, "GC", &json!({})).error();
    assert_eq!((code, message.starts_with("cni.dev/valid-attachments is missing")), (7, true));
    assert_eq!(call(node, "GC", &json!({ "cniVersion": "1.0.0" })).error().0, 1);
    let valid = json!([{ "containerID": "c2", "ifname": "eth0" }, { "containerID": "c3", "ifname": "eth1" }]);
    call(node, "GC", &json!({ "cni.dev/valid-attachments": valid })).success();
    assert_eq!(node.served(), ["c2/tcp/[::]:8081", "c3/tcp/[::]:9000"]);
    assert_eq!(node.rules().matches(" : 10.88.").count(), 2);
    call(node, "GC", &json!({ "cni.dev/valid-attachments": valid })).success();
}

fn status(node: &Node) {
    assert_eq!(call(node, "STATUS", &json!({})).success(), "");
    assert_eq!(call(node, "STATUS", &json!({ "rproxy": "/nonexistent" })).error().0, 50);
    let broken = call(node, "STATUS", &json!({ "rproxy": require::find("false").unwrap() })).error();
    assert_eq!((broken.0, broken.1.contains("does not run: exit status: 1")), (50, true), "{broken:?}");
    assert_eq!(call(node, "STATUS", &json!({ "cniVersion": "0.4.0" })).error().0, 1);
    // The usual directories are looked at, whatever PATH is; so nft is hidden.
    let (nothing, nft) =
        (tempfile::tempdir().unwrap(), require::find("nft").unwrap().canonicalize().unwrap());
    let flags = nix::mount::MsFlags::MS_BIND;
    let file = nothing.path().join("none");
    fs::write(&file, "").unwrap();
    let none = None::<&str>;
    for dir in ["/usr/sbin", "/sbin", "/usr/bin"] {
        if Path::new(dir).join("nft").exists() {
            nix::mount::mount(Some(nothing.path()), nft.parent().unwrap(), none, flags, none).unwrap();
        }
    }
    let plugin = || {
        let mut plugin = Command::new(portmap());
        plugin.env("PATH", nothing.path());
        plugin
    };
    let asked = |conf: Value| node.run(plugin(), "STATUS", "c1", &configuration(&conf, &json!({})));
    let (code, message) = asked(json!({})).error();
    assert_eq!(
        (code, message.as_str()),
        (50, "nft is not installed: install nftables, or choose \"policy\": \"relay\"")
    );
    asked(json!({ "policy": "relay" })).success();
    nix::mount::umount(nft.parent().unwrap()).unwrap();
}

/// An `nft` that does not end: the call fails and names it, and a later one does what was asked for.
fn hanging(node: &Node) {
    let pods = ["c1", "c2"].map(|id| node.pod(id, 1));
    node.add(&pods[0], &tcp(8080), &json!({}));
    let before = node.rules();
    let (dir, nft) = (tempfile::tempdir().unwrap(), require::find("nft").unwrap().canonicalize().unwrap());
    let fake = dir.path().join("nft");
    fs::write(&fake, "#!/bin/sh\nsleep 600\n").unwrap();
    fs::set_permissions(&fake, PermissionsExt::from_mode(0o755)).unwrap();
    let none = None::<&str>;
    nix::mount::mount(Some(&fake), &nft, none, nix::mount::MsFlags::MS_BIND, none).unwrap();
    let (code, said) = node.call("ADD", "c2", &Node::conf(&pods[1], &tcp(8081), &json!({}))).error();
    assert!(code == 102 && said.contains("`nft -f -` did not end within "), "{code} {said}");
    let (code, said) = node.call("DEL", "c1", &configuration(&json!({}), &json!({}))).error();
    assert!(code == 102 && said.contains("was killed"), "{code} {said}");
    nix::mount::umount(&nft).unwrap();
    // The relay has closed the port all the same.
    assert!(node.served().is_empty());
    node.add(&pods[0], &tcp(8080), &json!({}));
    assert_eq!((node.rules(), node.served()), (before, vec!["c1/tcp/[::]:8080".to_owned()]));
    node.add(&pods[1], &tcp(8081), &json!({}));
    pods.iter().for_each(|pod| node.delete(pod));
    node.assert_clean();
}

fn flushed(node: &Node) {
    let pods = ["c1", "c2"].map(|id| node.pod(id, 2));
    let _server = serve(&pods[0].netns, 80);
    node.add(&pods[0], &tcp(8080), &json!({}));
    node.add(&pods[1], &tcp(8081), &json!({}));
    let before = node.rules();
    node.host.command("nft flush ruleset").success();
    // Meanwhile the relay serves everybody.
    assert_reaches(&node.client, HOST_V4, 8080);
    node.delete(&pods[1]);
    node.add(&pods[1], &tcp(8081), &json!({}));
    assert_eq!(node.rules(), before);
    // A supervisor that was killed takes its relay along; the next call brings both back, with all ports.
    end_supervisor(node);
    node.delete(&pods[1]);
    assert_eq!(node.served(), ["c1/tcp/0.0.0.0:8080", "c1/tcp/[::]:8080"]);
    assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
}

fn people(node: &Node) {
    let asked = |arguments: &[&str]| {
        let mut command = Command::new(portmap());
        command.args(arguments);
        node.host.spawn(command).into_output()
    };
    let nothing = asked(&[]);
    assert!(nothing.status.success() && nothing.stdout.is_empty(), "{nothing:?}");
    assert!(nothing.stderr.contains("CNI protocol versions supported: 0.3.0, "), "{nothing:?}");
    assert!(asked(&["--help"]).stdout.contains("CNI_COMMAND"));
    assert!(asked(&["--version"]).stdout.starts_with("rproxy-portmap "));
    assert_eq!(asked(&["--nonsense"]).status.code(), Some(2));
}

/// Containers that come and go at once, as when a node starts. Their networks need not be real.
fn many(node: &Node) {
    const THREADS: usize = 8;
    const PODS: usize = 200;
    let in_parallel = |work: &(dyn Fn(usize) + Sync)| {
        thread::scope(|scope| {
            for first in 0..THREADS {
                scope.spawn(move || (first..PODS).step_by(THREADS).for_each(work));
            }
        });
    };
    let conf = |index: usize| {
        let prev = json!({ "ips": [{ "address": format!("10.88.1.{index}/16") }] });
        configuration(
            &json!({ "runtimeConfig": { "portMappings": tcp(u16::try_from(20_000 + index).unwrap()) }, "prevResult": prev }),
            &json!({}),
        )
    };
    in_parallel(&|index| drop(node.call("ADD", &format!("c{index}"), &conf(index)).success()));
    assert_eq!(node.served().len(), PODS);
    assert_eq!(node.rules().matches(" : 10.88.1.").count(), PODS);
    in_parallel(&|index| drop(node.call("DEL", &format!("c{index}"), &conf(index)).success()));
    node.assert_clean();
}
