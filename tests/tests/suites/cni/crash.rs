//! Calls that are killed: what they leave, the next ones mend.

use std::process::Command;

use serde_json::{Value, json};
use testkit::require::{self, Need};
use testkit::rproxy::portmap;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::node::{Node, Pod, case, configuration};
use crate::netns_setup::stage::{assert_reaches, serve};

pub(crate) fn cases() -> Vec<Case> {
    let needs = &[Need::Program("strace")];
    let killed = |name: &str, play: fn(&Node)| case(name, play).needs(needs);
    vec![
        killed("an ADD that is killed at any step leaves nothing after its DEL", killed_adds),
        killed("a DEL that is killed at any step can be repeated", killed_deletes),
    ]
}

/// The system calls at which a call is killed: they change files, make sockets and other programs, or talk to the relay.
const STEPS: [&str; 10] =
    ["mkdir", "openat", "write", "fsync", "renameat", "unlinkat", "bind", "connect", "sendmsg", "clone3"];

/// The most times that a call may use one of them.
const MOST: usize = 200;

/// Calls the plugin, which is killed when it enters a system call for the `count`th time. Returns whether it was.
fn killed_at(node: &Node, (step, count): (&str, usize), command: &str, pod: &Pod, conf: &str) -> bool {
    let mut strace = Command::new(require::find("strace").unwrap());
    strace.args(["-qq", "-o", "/dev/null", "-e", &format!("trace=?{step}")]);
    strace.args(["-e", &format!("inject=?{step}:signal=KILL:when={count}")]);
    strace.arg(portmap()).env("CNI_NETNS", "/run/netns/is-not-entered");
    let called = node.run(strace, command, &pod.id, conf);
    assert!(matches!(called.status, Some(0) | None), "{called:?}");
    called.status.is_none()
}

/// Kills a call at each of its steps, until it is not killed any more. Returns how many there were.
fn at_each_step(mut killed_at: impl FnMut((&str, usize)) -> bool) -> usize {
    let of_call = |step| (1..MOST).take_while(|count| killed_at((step, *count))).count();
    STEPS.map(of_call).iter().sum()
}

fn ports() -> Value {
    let one = |protocol: &str| json!({ "hostPort": 8080, "containerPort": 80, "protocol": protocol });
    json!([one("tcp"), one("udp")])
}

/// A node where another container has a port, which must not suffer.
fn with_other(node: &Node) -> (Pod, Pod) {
    let (pod, other) = (node.pod("c1", 2), node.pod("c2", 2));
    node.add(&other, &json!([{ "hostPort": 9000, "containerPort": 80 }]), &json!({}));
    (pod, other)
}

/// All that the plugin changes in the kernel, and what the relay serves.
fn everything(node: &Node) -> [String; 4] {
    let show = |line: &str| node.host.command(line).success();
    let localnet = show("sysctl -n net.ipv4.conf.cni0.route_localnet");
    [show("nft -s list ruleset"), show("ip rule"), localnet, node.served().join(", ")]
}

fn killed_adds(node: &Node) {
    let (pod, other) = with_other(node);
    let _server = serve(&other.netns, 80);
    let before = everything(node);
    let conf = Node::conf(&pod, &ports(), &json!({ "policy": "dnat", "source": "client" }));
    let steps = at_each_step(|step| {
        let was_killed = killed_at(node, step, "ADD", &pod, &conf);
        node.delete(&pod);
        assert_eq!(everything(node), before, "after {step:?}");
        assert_reaches(&node.client, HOST_V4, 9000);
        was_killed
    });
    assert!(steps > 20, "an ADD has more than {steps} steps");
}

fn killed_deletes(node: &Node) {
    let (pod, other) = with_other(node);
    let _server = serve(&other.netns, 80);
    let before = everything(node);
    let conf = configuration(&json!({}), &json!({}));
    let steps = at_each_step(|step| {
        node.add(&pod, &ports(), &json!({ "policy": "dnat", "source": "client" }));
        let was_killed = killed_at(node, step, "DEL", &pod, &conf);
        node.delete(&pod);
        assert_eq!(everything(node), before, "after {step:?}");
        assert_reaches(&node.client, HOST_V4, 9000);
        was_killed
    });
    assert!(steps > 20, "a DEL has more than {steps} steps");
}
