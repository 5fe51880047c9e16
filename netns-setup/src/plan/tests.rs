use std::path::Path;

use super::*;
use crate::model::Topology;
use crate::observed::{Link, Route, Rules, Side};
use crate::testdata;

fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
    let kind = kind.map(str::to_owned);
    Link { index, name: name.to_owned(), kind, mtu: 1500, up: true, ..Link::default() }
}

/// A host without anything of ours.
fn bare() -> Observed {
    let host = Side { links: vec![link(1, "lo", None), link(2, "eth0", None)], ..Side::default() };
    Observed { host, rules: Rules::Nft { listing: None, as_wanted: None }, ..Observed::default() }
}

fn plan_for(owned: &Topology, desired: &Topology, observed: &Observed) -> Result<Plan, PlanError> {
    let rproxy = Path::new("rproxy");
    plan(Inputs { owned, desired, observed, scope: &Scope::All, rproxy })
}

/// The commands of a plan, with scripts cut to their first line.
fn commands(plan: &Plan) -> Vec<String> {
    let first_line = |step: &Step| step.to_string().lines().next().unwrap().to_owned();
    plan.steps.iter().map(first_line).collect()
}

#[test]
fn the_plan_of_the_story_is_the_golden_one() {
    let plan = plan_for(&Topology::default(), &testdata::story(), &bare()).unwrap();
    testdata::golden("story.plan", &(commands(&plan).join("\n") + "\n"));
    let plan = plan_for(&Topology::default(), &testdata::everything(), &bare()).unwrap();
    testdata::golden("everything.plan", &(commands(&plan).join("\n") + "\n"));
}

#[test]
fn rules_come_before_what_they_guard() {
    let plan = plan_for(&Topology::default(), &testdata::story(), &bare()).unwrap();
    let commands = commands(&plan);
    let at = |part: &str| commands.iter().position(|command| command.contains(part)).unwrap();
    assert!(at("nft -f") < at("type bridge"));
    assert!(at("nft -f") < at("type veth"));
    assert!(at("type veth") < at("-proto tcp"));
}

#[test]
fn a_bridge_of_somebody_else_is_in_the_way() {
    let mut observed = bare();
    observed.host.links.push(link(3, "docker0", Some("bridge")));
    let error = plan_for(&Topology::default(), &testdata::story(), &observed).unwrap_err();
    assert_eq!(error, PlanError::BridgeTaken("docker0".parse().unwrap()));
    assert!(plan_for(&testdata::story(), &testdata::story(), &observed).is_ok());
}

#[test]
fn an_overlapping_route_is_named() {
    let mut observed = bare();
    let destination = Some(crate::addr::Cidr { ip: [172, 17, 4, 0].into(), prefix: 24 });
    observed.host.routes.push(Route { destination, gateway: None, oif: Some(2) });
    let error = plan_for(&Topology::default(), &testdata::story(), &observed).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the subnet 172.17.0.0/16 overlaps the route to 172.17.4.0/24 by eth0: choose another with --subnet"
    );
    let mut default_only = bare();
    default_only.host.routes.push(Route { destination: None, gateway: None, oif: Some(2) });
    assert!(plan_for(&Topology::default(), &testdata::story(), &default_only).is_ok());
}

#[test]
fn a_namespace_of_that_name_is_not_taken_over() {
    let mut observed = bare();
    observed.containers.insert("web".parse().unwrap(), Some(Side::default()));
    let error = plan_for(&Topology::default(), &testdata::story(), &observed).unwrap_err();
    assert_eq!(error, PlanError::NetnsTaken("web".parse().unwrap()));
}

#[test]
fn what_is_not_there_is_not_removed() {
    let plan = plan_for(&testdata::story(), &Topology::default(), &bare()).unwrap();
    assert_eq!(commands(&plan), Vec::<String>::new());
}

#[test]
fn a_setting_that_somebody_changed_since_is_left_alone() {
    use crate::model::SysctlChange;
    let mut owned = testdata::story();
    let key = "net.ipv4.ip_forward".to_owned();
    let change = SysctlChange { key: key.clone(), before: "0".to_owned(), after: "1".to_owned() };
    owned.network.as_mut().unwrap().sysctls.push(change);
    let mut observed = bare();
    observed.sysctls.insert(key.clone(), "1".to_owned());
    let plan = plan_for(&owned, &Topology::default(), &observed).unwrap();
    assert_eq!(commands(&plan), ["sysctl -w net.ipv4.ip_forward=0"]);
    observed.sysctls.insert(key, "0".to_owned());
    assert!(plan_for(&owned, &Topology::default(), &observed).unwrap().is_empty());
}

#[test]
fn packet_sizes_are_raised_as_far_as_they_go_and_never_lowered() {
    let wish = |is: OffloadSizes, limit| {
        let link = Link { offload: is, tso_max_size: Some(limit), ..link(3, "x", None) };
        let (name, mut plan) = ("x".parse().unwrap(), Plan::default());
        let wish = LinkWish { place: NetnsRef::Host, name: &name, is: Some(&link) };
        wish.offload(&mut plan, 100_000, OffloadLimits::of_driver(wish.is), OffloadSizes::default());
        commands(&plan).pop()
    };
    let all =
        |size| OffloadSizes { gso: Some(size), gro: Some(size), gso_ipv4: Some(size), gro_ipv4: Some(size) };
    assert_eq!(
        wish(all(65_536), 524_280).unwrap(),
        "ip link set dev x gso_max_size 100000 gro_max_size 100000 gso_ipv4_max_size 100000 gro_ipv4_max_size 100000"
    );
    assert_eq!(
        wish(all(65_536), 65_536).unwrap(),
        "ip link set dev x gro_max_size 100000 gro_ipv4_max_size 100000"
    );
    assert_eq!(wish(all(200_000), 524_280), None);
    // A kernel before 6.3 has no sizes for IPv4.
    let old = OffloadSizes { gso_ipv4: None, gro_ipv4: None, ..all(65_536) };
    assert_eq!(wish(old, 524_280).unwrap(), "ip link set dev x gso_max_size 100000 gro_max_size 100000");
}
