//! A container that the relay cannot serve any more: calls for others go on.

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use testkit::eventually;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::node::{Node, case};
use crate::netns_setup::stage::{assert_reaches, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![case(
        "a container whose address the host has got keeps no call for others from its end",
        own_address,
    )]
}

/// A port of the host that leads to the same one of the container.
fn same(port: u16) -> Value {
    json!([{ "hostPort": port, "containerPort": port, "protocol": "tcp" }])
}

fn own_address(node: &Node) {
    let policy = json!({ "policy": "relay" });
    let pods = [1, 2, 3].map(|number| node.pod(&format!("c{number}"), 1));
    let _servers =
        [(0, 8081), (1, 8082), (2, 8083)].map(|(index, port): (usize, u16)| serve(&pods[index].netns, port));
    node.add(&pods[0], &same(8081), &policy);
    node.add(&pods[1], &same(8082), &policy);
    let check = |index: usize, port| {
        node.call("CHECK", &pods[index].id, &Node::conf(&pods[index], &same(port), &policy))
    };
    let address = format!("{}/32 dev lo", pods[0].v4);
    node.host.ip(&format!("address add {address}"));
    let first = node.process("--control");
    kill(first, Signal::SIGKILL).unwrap();
    eventually("the others are served again", || node.served().iter().any(|name| name.starts_with("c2/")));
    let (code, said) = check(0, 8081).error();
    assert_eq!(code, 105, "{said}");
    assert!(
        said.contains("the relay does not serve host port ") && said.contains("would forward to itself"),
        "{said}"
    );
    check(1, 8082).success();
    assert_reaches(&node.client, HOST_V4, 8082);
    // Calls for others.
    node.add(&pods[2], &same(8083), &policy);
    assert_reaches(&node.client, HOST_V4, 8083);
    node.delete(&pods[1]);
    // What an ADD asks for is served, or it fails: also what is there already.
    let before = node.served();
    for port in [8081, 8085] {
        let (code, said) = node.call("ADD", "c1", &Node::conf(&pods[0], &same(port), &policy)).error();
        assert!(code == 103 && said.contains("would forward to itself"), "{code} {said}");
        assert_eq!(node.served(), before);
    }
    node.call("STATUS", "", &super::node::configuration(&json!({}), &policy)).success();
    node.host.ip(&format!("address del {address}"));
    eventually("it is served again", || check(0, 8081).status == Some(0));
    assert_reaches(&node.client, HOST_V4, 8081);
    // Refused once more, it is deleted like any other.
    node.host.ip(&format!("address add {address}"));
    kill(node.process("--control"), Signal::SIGKILL).unwrap();
    eventually("it is refused", || check(0, 8081).status == Some(1));
    node.delete(&pods[0]);
    node.delete(&pods[2]);
    node.assert_clean();
}
