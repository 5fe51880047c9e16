//! Ports that other programs have taken when they are to be restored.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use testkit::netns::Namespace;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::stage::{
    Backend, Stage, assert_reaches, assert_reaches_udp, assert_same, case, for_each_firewall, serve,
};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = for_each_firewall("after a reboot, a port that is taken keeps nothing else away", reboot);
    cases.extend(for_each_firewall("a port that was taken after an interruption is given up", interrupted));
    cases.push(case("the same without a firewall", |stage| {
        reboot_with(stage, "--firewall none", "proxy");
        stage.ok("down");
        interrupted_with(stage, "--firewall none", "proxy");
    }));
    cases
}

/// A program of the host that has taken a port.
enum Taken {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

fn take(host: &Namespace, protocol: &str, port: u16) -> Taken {
    let address: SocketAddr = (Ipv6Addr::UNSPECIFIED, port).into();
    host.run(|| match protocol {
        "tcp" => Taken::Tcp(TcpListener::bind(address).unwrap()),
        _ => Taken::Udp(UdpSocket::bind(address).unwrap()),
    })
}

fn release(taken: Taken) {
    match taken {
        Taken::Tcp(listener) => drop(listener),
        Taken::Udp(socket) => drop(socket),
    }
}

/// What a reboot leaves: the state, and nothing that it describes.
fn lose_all(stage: &Stage) {
    let file = stage.state_dir().join("state.json");
    let state = fs::read_to_string(&file).unwrap();
    stage.ok("down");
    let mut state: serde_json::Value = serde_json::from_str(&state).unwrap();
    state["boot"] = "another".into();
    fs::write(&file, state.to_string()).unwrap();
}

fn reboot(stage: &Stage, backend: Backend) {
    for via in ["both", "proxy"] {
        reboot_with(stage, backend.option(), via);
        stage.ok("down");
    }
}

fn reboot_with(stage: &Stage, options: &str, via: &str) {
    stage.ok(&format!("up {options}"));
    stage.ok("attach web");
    stage.ok(&format!("publish web -p 80:80 -p 81:80 -p 53:80/udp -p 54:80/udp --via {via}"));
    let intact = stage.dump();
    for (protocol, port) in [("tcp", 80), ("udp", 53)] {
        lose_all(stage);
        let taken = take(&stage.host, protocol, port);
        for _again in 0..2 {
            let output = stage.run("repair");
            assert_eq!(output.status.code(), Some(1), "{output:#?}");
            let told = format!(
                "*:{port}/{protocol} of web is not published: host port {port}/{protocol} on * is in use"
            );
            assert!(output.stdout.contains(&told) && output.stdout.lines().count() == 1, "{output:#?}");
        }
        let output = stage.run("check");
        assert!(output.status.code() == Some(1) && output.stdout.lines().count() == 1, "{output:#?}");
        let web = Namespace::open("/run/netns/web");
        let _echo = serve(&web, 80);
        assert_reaches(&stage.client, HOST_V4, 81);
        assert_reaches_udp(&stage.client, HOST_V4, 54);
        let (own, there) = ("suspended", stage.ok("list"));
        assert_eq!(there.matches(own).count(), 1, "{there}");
        // Everything else works as usual.
        stage.ok(&format!("publish web -p 90:80 --via {via}"));
        stage.ok("unpublish web -p 90:80");
        let (_, said) = stage.fails(&format!("publish web -p {port}:80/{protocol} --via {via}"));
        assert!(said.contains("is in use"), "{said}");
        release(taken);
        let output = stage.run("check");
        assert!(output.stderr.contains("run `netns-setup repair"), "{output:#?}");
        if protocol == "tcp" {
            stage.ok("repair");
        } else {
            stage.ok(&format!("publish web -p {port}:80/{protocol} --via {via}"));
        }
        assert_eq!(stage.ok("check"), "everything is as it should be\n");
        assert_same(&stage.dump(), &intact, &format!("{protocol} {via}"));
        assert_reaches(&stage.client, HOST_V4, 80);
        assert_reaches_udp(&stage.client, HOST_V4, 53);
    }
}

fn interrupted(stage: &Stage, backend: Backend) {
    for via in ["both", "proxy", "dnat"] {
        interrupted_with(stage, backend.option(), via);
    }
}

fn interrupted_with(stage: &Stage, options: &str, via: &str) {
    stage.ok(&format!("up {options}"));
    stage.ok("attach web");
    stage.ok(&format!("publish web -p 70:80 --via {via}"));
    let before = stage.dump();
    let command = format!("publish web -p 80:80 -p 53:80/udp -p 81:80 --via {via}");
    let steps = super::faults::steps(stage, &command);
    for step in 1..=steps + 1 {
        let output = super::faults::run_broken(stage, super::faults::DIE, &command, step);
        assert_eq!(output.status.code(), None, "{command} should have died: {output:#?}");
        // The relay of the interrupted command may serve the ports already.
        let is_served = stage.host("ss -Hlntu").contains(":80 ");
        let taken = (!is_served)
            .then(|| [("tcp", 80), ("udp", 53)].map(|(protocol, port)| take(&stage.host, protocol, port)));
        let output = stage.run("repair");
        assert_eq!(output.status.code(), Some(0), "{command}, step {step}: {output:#?}");
        let given_up = output.stderr.matches("which an earlier command had begun").count();
        assert_eq!(given_up, if is_served { 0 } else { 2 }, "{command}, step {step}: {output:#?}");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{command}, step {step}");
        assert!(stage.ok("list").contains("*:81->80/tcp"), "{command}, step {step}");
        taken.into_iter().flatten().for_each(release);
        for port in ["80:80", "81:80", "53:80/udp"] {
            // What was given up is not there.
            stage.run(&format!("unpublish web -p {port}"));
        }
        assert_same(&stage.dump(), &before, &format!("{command}, step {step}"));
    }
    stage.ok("down");
}
