use std::path::Path;

use super::*;
use crate::addr::Mac;
use crate::block::Block;
use crate::family::Family;
use crate::firewall::iptables::SavedTables;
use crate::model::{Endpoint, Firewall, Network, RelayProcess, SysctlChange, Topology, Via};
use crate::name::Id;
use crate::observed::{Link, Route, Rules, Side};
use crate::testdata;
use rproxy_mapping::addr::Protocol;

fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
    let kind = kind.map(str::to_owned);
    Link { index, name: name.to_owned(), kind, mtu: 1500, up: true, ..Link::default() }
}

/// A host without anything of ours.
fn bare() -> Observed {
    let host = Side { links: vec![link(1, "lo", None), link(2, "eth0", None)], ..Side::default() };
    let sysctls = [(parameters::HAS_IPV6.to_owned(), "1".to_owned())].into();
    let (rules, blocked) = (Rules::Nft { listing: None, wanted: None }, Some(vec![]));
    Observed { host, rules, blocked, sysctls, ..Observed::default() }
}

fn plan_for(owned: &Topology, desired: &Topology, observed: &Observed) -> Result<Plan, PlanError> {
    plan_in(&Scope::All, owned, desired, observed)
}

fn plan_in(
    scope: &Scope,
    owned: &Topology,
    desired: &Topology,
    observed: &Observed,
) -> Result<Plan, PlanError> {
    let (rproxy, state_dir) = (Path::new("rproxy"), Path::new("/run/netns-setup"));
    plan(Inputs { owned, desired, observed, scope, rproxy, state_dir, is_repair: false })
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
    // Also when one of ours was there, and somebody made another one in its place.
    let story = testdata::story();
    let error = plan_for(&story, &story, &observed).unwrap_err();
    assert_eq!(error, PlanError::BridgeReplaced("docker0".parse().unwrap()));
    let down = commands(&plan_for(&story, &Topology::default(), &observed).unwrap());
    assert!(!down.iter().any(|command| command.contains("docker0")), "{down:?}");
}

#[test]
fn a_bridge_is_ours_by_its_tag_or_else_by_its_address() {
    let network = testdata::network();
    let (tag, other) = (network.tag(), Network { id: Id::from_bytes([7; 32]), ..network.clone() }.tag());
    assert!(network.is_bridge(Some(&tag), Some(OTHER)));
    assert!(network.is_bridge(None, Some(network.mac())));
    assert!(network.is_bridge(Some("uplink"), Some(network.mac())));
    assert!(!network.is_bridge(Some("uplink"), Some(OTHER)));
    assert!(!network.is_bridge(Some(&other), Some(network.mac())), "it is another network's");
}

#[test]
fn a_bridge_without_its_tag_gets_it() {
    let tag = "ip link set dev docker0 alias 'netns-setup:";
    let mended = mended(&testdata::story(), |observed| of_host(observed, "docker0").alias = None);
    let [(step, undo)] = &mended[..] else { panic!("{mended:?}") };
    assert!(step.starts_with(tag), "{step}");
    assert_eq!(undo, &["ip link set dev docker0 alias ''"]);
}

#[test]
fn a_namespace_that_somebody_else_made_again_is_left_alone() {
    let story = testdata::story();
    let mut observed = in_place(&story);
    let name: Name = "web".parse().unwrap();
    observed.containers.insert(name.clone(), None);
    observed.host.links.retain(|link| !link.name.starts_with("veth"));
    observed.namespace_files.insert(name.clone());
    observed.replaced.insert(name.clone());
    let plan = plan_for(&story, &story, &observed).unwrap();
    assert_eq!(commands(&plan), Vec::<String>::new());
    assert!(plan.problems[0].contains("is not the one that netns-setup made"), "{:?}", plan.problems);
    let mut without = story.clone();
    without.endpoints.clear();
    let detach = commands(&plan_for(&story, &without, &observed).unwrap());
    assert!(!detach.iter().any(|command| command.contains("netns delete")), "{detach:?}");
}

#[test]
fn an_interface_with_the_name_of_a_veth_is_left_alone() {
    let story = testdata::story();
    let veth = story.endpoints.values().next().unwrap().id.veth();
    let mut observed = in_place(&story);
    of_host(&mut observed, veth.as_str()).kind = Some("dummy".to_owned());
    let plan = plan_for(&story, &story, &observed).unwrap();
    assert_eq!((commands(&plan), plan.problems.len()), (vec![], 1));
    let down = commands(&plan_for(&story, &Topology::default(), &observed).unwrap());
    assert!(!down.iter().any(|command| command.contains(veth.as_str())), "{down:?}");
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
fn a_namespace_that_would_not_last_is_not_made() {
    let (none, story) = (Topology::default(), testdata::story());
    let name: Name = "web".parse().unwrap();
    let hidden = Observed { mounts_are_hidden: true, ..bare() };
    assert_eq!(plan_for(&none, &story, &hidden).unwrap_err(), PlanError::Hidden(name.clone()));
    // The rest is mended all the same.
    let mut observed = in_place(&story);
    observed.mounts_are_hidden = true;
    observed.containers.insert(name, None);
    of_host(&mut observed, "docker0").up = false;
    let plan = plan_for(&story, &story, &observed).unwrap();
    assert_eq!(commands(&plan), ["ip link set dev docker0 up"]);
    assert!(plan.problems[0].contains("would end with this process"), "{:?}", plan.problems);
}

#[test]
fn a_port_on_an_interface_that_is_gone_keeps_nothing_else_from_being_mended() {
    let mut topology = testdata::story();
    let web = topology.endpoints.values_mut().next().unwrap();
    web.mappings.push(testdata::mapping(Protocol::Tcp, "[fe80::1%gone0]", 90, 80, Via::Both));
    let mut observed = in_place(&topology);
    observed.relay.served.clear();
    let plan = plan_for(&topology, &topology, &observed).unwrap();
    let [command] = &commands(&plan)[..] else { panic!("{:?}", plan.steps) };
    assert!(command.ends_with("add --host [::]:80 --to 172.17.0.2:80 --proto tcp"), "{command}");
    let way_out = "run `netns-setup unpublish web -p [fe80::1%gone0]:90:80/tcp`";
    assert!(plan.problems[0].contains(way_out), "{:?}", plan.problems);
}

#[test]
fn ipv6_is_switched_off_in_containers_on_request() {
    let mut topology = testdata::story();
    topology.network.as_mut().unwrap().disable_ipv6 = true;
    let set = "nsenter --net=/run/netns/web sysctl -w net.ipv6.conf.all.disable_ipv6=";
    let first = commands(&plan_for(&Topology::default(), &topology, &bare()).unwrap());
    let at = |part: &str| first.iter().position(|command| command.starts_with(part)).unwrap();
    assert!(at(&format!("{set}1")) < at("ip -n web link set dev eth0 up"), "{first:?}");
    let key = "net.ipv6.conf.all.disable_ipv6".to_owned();
    let value = |value: &'static str, key: String| {
        mended(&topology, |observed| drop(of_web(observed).sysctls.insert(key, value.to_owned())))
    };
    assert_eq!(value("1", key.clone()), []);
    assert_eq!(value("0", key), [(format!("{set}1"), vec![format!("{set}0")])]);
    // Without IPv6 in the kernel, there is nothing to switch off.
    assert_eq!(mended(&topology, |_observed| ()), []);
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
        sizes_of(
            "ip link set dev x",
            "gso_max_size 100000 gro_max_size 100000",
            "gso_ipv4_max_size 100000 gro_ipv4_max_size 100000"
        )
    );
    assert_eq!(
        wish(all(65_536), 65_536).unwrap(),
        sizes_of("ip link set dev x", "gro_max_size 100000", "gro_ipv4_max_size 100000")
    );
    assert_eq!(wish(all(200_000), 524_280), None);
    // A kernel before 6.3 has no sizes for IPv4.
    let old = OffloadSizes { gso_ipv4: None, gro_ipv4: None, ..all(65_536) };
    assert_eq!(wish(old, 524_280).unwrap(), "ip link set dev x gso_max_size 100000 gro_max_size 100000");
    // One before 5.19 has none for received packets, and refuses larger ones.
    let older = OffloadSizes { gso: Some(65_536), ..OffloadSizes::default() };
    assert_eq!(wish(older, u32::MAX), None);
}

/// The command for packet sizes, whose second part an older `ip` may refuse.
fn sizes_of(set: &str, sizes: &str, ipv4: &str) -> String {
    format!("{set} {sizes}; {set} {ipv4} 2>/dev/null || true")
}

/// The route that an address brings with it.
fn connected_route(oif: u32, address: crate::addr::Cidr) -> Route {
    Route { destination: Some(address.network()), gateway: None, oif: Some(oif) }
}

/// A host and containers on which all of `topology` is in place.
fn in_place(topology: &Topology) -> Observed {
    const BRIDGE: u32 = 10;
    let mut observed = bare();
    let network = topology.network.as_ref().unwrap();
    let bridge = link(BRIDGE, network.bridge.as_str(), Some("bridge"));
    observed.host.links.push(Link { mac: Some(network.mac()), alias: Some(network.tag()), ..bridge });
    observed.host.addresses = network.addresses().into_iter().map(|address| (BRIDGE, address)).collect();
    observed.host.routes =
        network.addresses().into_iter().map(|address| connected_route(BRIDGE, address)).collect();
    observed.rules = Rules::Nft { listing: Some("table".to_owned()), wanted: Some("table".to_owned()) };
    for ((name, endpoint), index) in topology.endpoints.iter().zip(20..) {
        let host_end = link(index, endpoint.id.veth().as_str(), Some("veth"));
        let hairpin = endpoint.needs_hairpin();
        let mac = Some(endpoint.id.veth_mac());
        observed.host.links.push(Link { mac, master: Some(BRIDGE), hairpin, ..host_end });
        let eth0 = Link { mac: Some(endpoint.mac()), ..link(2, "eth0", Some("veth")) };
        let default = |gateway| Route { destination: None, gateway: Some(gateway), oif: Some(2) };
        let subnets = endpoint.addresses(network).into_iter().map(|address| connected_route(2, address));
        let side = Side {
            links: vec![link(1, "lo", None), eth0],
            addresses: endpoint.addresses(network).into_iter().map(|address| (2, address)).collect(),
            routes: network.gateways().into_iter().map(default).chain(subnets).collect(),
            ..Side::default()
        };
        observed.containers.insert(name.clone(), Some(side));
    }
    observed.relay.served = relayed_ports(topology).into_iter().map(|port| (port.key, port)).collect();
    let routes = if crate::firewall::needs_route_localnet(topology) { "1" } else { "0" };
    let key = crate::sysctl::of_interface("ipv4", network.bridge.as_str(), "route_localnet");
    observed.sysctls.insert(key, routes.to_owned());
    let subnets = [Some(network.subnet.cidr()), network.subnet6.map(|subnet| subnet.cidr())];
    let routed = subnets.into_iter().flatten().map(Block::Routed);
    let is_open = crate::firewall::needs_route_localnet(topology);
    let to_loopback = is_open.then(|| Block::ToLoopback(network.subnet.cidr()));
    let replies = network.gateways().into_iter().filter(|_| is_open).map(Block::Reply);
    observed.blocked = Some(routed.chain(to_loopback).chain(replies).collect());
    let ports = topology.endpoints.values().flat_map(|endpoint| parameters::port(&endpoint.id.veth()));
    let needed = [parameters::forwarding, parameters::bridge, parameters::bridge_forwarding];
    let needed = needed.into_iter().flat_map(|of| of(network)).chain(ports);
    observed.sysctls.extend(needed.map(|needed| (needed.key, needed.value.to_owned())));
    observed
}

/// Each step of the plan that mends what somebody did to an interface, and what takes the step back.
fn mended(topology: &Topology, spoil: impl FnOnce(&mut Observed)) -> Vec<(String, Vec<String>)> {
    let mut observed = in_place(topology);
    spoil(&mut observed);
    let plan = plan_for(topology, topology, &observed).unwrap();
    assert_eq!(plan.problems, Vec::<String>::new());
    let texts = |step: Step| (step.to_string(), step.undo.iter().map(ToString::to_string).collect());
    plan.steps.into_iter().map(texts).collect()
}

fn of_host<'a>(observed: &'a mut Observed, name: &str) -> &'a mut Link {
    observed.host.links.iter_mut().find(|link| link.name == name).unwrap()
}

fn of_web(observed: &mut Observed) -> &mut Side {
    observed.containers.get_mut(&"web".parse().unwrap()).unwrap().as_mut().unwrap()
}

#[test]
fn what_is_in_place_is_left_alone() {
    for topology in [testdata::story(), testdata::everything()] {
        assert_eq!(mended(&topology, |_observed| ()), []);
    }
}

/// What somebody does to an interface, the only step that mends it, and what takes that back.
type Case = (fn(&mut Observed), &'static str, &'static str);

const OTHER: Mac = Mac([2, 0, 0, 0, 0, 9]);

#[track_caller]
fn assert_mended<const N: usize>(cases: [Case; N]) {
    for (spoil, step, undo) in cases {
        assert_eq!(mended(&testdata::story(), spoil), [(step.to_owned(), vec![undo.to_owned()])]);
    }
}

#[test]
fn each_property_of_the_bridge_is_mended_alone_and_can_be_put_back() {
    fn bridge(observed: &mut Observed) -> &mut Link {
        of_host(observed, "docker0")
    }
    assert_mended([
        (
            |observed| bridge(observed).mtu = 9000,
            "ip link set dev docker0 mtu 1500",
            "ip link set dev docker0 mtu 9000",
        ),
        (
            |observed| bridge(observed).mac = Some(OTHER),
            "ip link set dev docker0 address 02:42:ac:11:00:01",
            "ip link set dev docker0 address 02:00:00:00:00:09",
        ),
        (
            |observed| bridge(observed).stp = true,
            "ip link set dev docker0 type bridge stp_state 0",
            "ip link set dev docker0 type bridge stp_state 1",
        ),
        (
            |observed| bridge(observed).up = false,
            "ip link set dev docker0 up",
            "ip link set dev docker0 down",
        ),
        (
            |observed| observed.host.addresses.clear(),
            "ip address add 172.17.0.1/16 broadcast + dev docker0",
            "ip address delete 172.17.0.1/16 dev docker0",
        ),
    ]);
}

#[test]
fn each_property_of_a_port_of_the_bridge_is_mended_alone_and_can_be_put_back() {
    fn port(observed: &mut Observed) -> &mut Link {
        of_host(observed, "veth0202020")
    }
    let (join, leave) =
        ("ip link set dev veth0202020 master docker0", "ip link set dev veth0202020 nomaster");
    assert_mended([
        (
            |observed| port(observed).mtu = 1400,
            "ip link set dev veth0202020 mtu 1500",
            "ip link set dev veth0202020 mtu 1400",
        ),
        (
            |observed| port(observed).mac = Some(OTHER),
            "ip link set dev veth0202020 address 02:02:02:02:02:02",
            "ip link set dev veth0202020 address 02:00:00:00:00:09",
        ),
        (|observed| port(observed).master = None, join, leave),
        (|observed| port(observed).master = Some(2), join, leave),
        (
            |observed| port(observed).hairpin = true,
            "bridge link set dev veth0202020 hairpin off",
            "bridge link set dev veth0202020 hairpin on",
        ),
        (
            |observed| port(observed).up = false,
            "ip link set dev veth0202020 up",
            "ip link set dev veth0202020 down",
        ),
    ]);
}

#[test]
fn each_property_of_a_container_is_mended_alone_and_can_be_put_back() {
    fn eth0(observed: &mut Observed) -> &mut Link {
        &mut of_web(observed).links[1]
    }
    assert_mended([
        (
            |observed| eth0(observed).mtu = 1400,
            "ip -n web link set dev eth0 mtu 1500",
            "ip -n web link set dev eth0 mtu 1400",
        ),
        (
            |observed| eth0(observed).mac = Some(OTHER),
            "ip -n web link set dev eth0 address 02:42:ac:11:00:02",
            "ip -n web link set dev eth0 address 02:00:00:00:00:09",
        ),
        (
            |observed| of_web(observed).addresses.clear(),
            "ip -n web address add 172.17.0.2/16 broadcast + dev eth0",
            "ip -n web address delete 172.17.0.2/16 dev eth0",
        ),
        (
            |observed| of_web(observed).routes.retain(|route| route.gateway.is_some()),
            "ip -n web route add 172.17.0.0/16 dev eth0 proto kernel scope link src 172.17.0.2",
            "ip -n web route delete 172.17.0.0/16 dev eth0 proto kernel scope link src 172.17.0.2",
        ),
        (
            |observed| of_web(observed).routes.retain(|route| route.gateway.is_none()),
            "ip -n web route add default via 172.17.0.1 dev eth0",
            "ip -n web route delete default via 172.17.0.1 dev eth0",
        ),
        (
            |observed| of_web(observed).links[0].up = false,
            "ip -n web link set dev lo up",
            "ip -n web link set dev lo down",
        ),
    ]);
}

#[test]
fn an_interface_that_is_down_gets_its_routes_again() {
    let steps = mended(&testdata::everything(), |observed| {
        let web = of_web(observed);
        web.links[1].up = false;
        web.routes.clear();
    });
    let steps: Vec<_> = steps.iter().map(|(step, undo)| (step.as_str(), undo.len())).collect();
    // What was down had no route of IPv6 to be taken away again.
    let wanted = [
        ("ip -n web link set dev eth0 up", 1),
        ("ip -n web route add default via 172.17.0.1 dev eth0", 1),
        ("ip -n web -6 route add default via fd00:d0c::1 dev eth0", 0),
    ];
    assert_eq!(steps, wanted);
}

#[test]
fn a_plan_for_one_container_leaves_others_alone() {
    let topology = testdata::everything();
    let mut observed = in_place(&topology);
    observed.containers.clear();
    let scope = Scope::one(&"web".parse().unwrap());
    let commands = commands(&plan_in(&scope, &topology, &topology, &observed).unwrap());
    assert!(commands.iter().any(|command| command == "ip netns add web"), "{commands:?}");
    assert!(!commands.iter().any(|command| command.contains("dns")), "{commands:?}");
}

#[test]
fn a_container_that_is_removed_can_be_connected_again() {
    let (owned, mut desired) = (testdata::story(), testdata::story());
    desired.endpoints.clear();
    let undo_of_link = |observed: &Observed| {
        let plan = plan_for(&owned, &desired, observed).unwrap();
        let link = plan.steps.iter().find(|step| step.to_string() == "ip link delete dev veth0202020");
        link.unwrap().undo.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let mut observed = in_place(&owned);
    let undo = undo_of_link(&observed);
    assert_eq!(undo, commands(&connected(&owned)));
    // What took its end of the pair along cannot be connected again.
    observed.containers.insert("web".parse().unwrap(), None);
    assert_eq!(undo_of_link(&observed), Vec::<String>::new());
}

/// The steps from a namespace without an interface to a connected container.
fn connected(topology: &Topology) -> Plan {
    let mut observed = in_place(topology);
    of_web(&mut observed).links.truncate(1);
    observed.host.links.retain(|link| link.kind.as_deref() != Some("veth"));
    plan_for(topology, topology, &observed).unwrap()
}

#[test]
fn a_setting_of_ours_is_mended_and_can_be_put_back() {
    let mut topology = testdata::story();
    let key = "net.ipv4.ip_forward".to_owned();
    let change = SysctlChange { key: key.clone(), before: "0".to_owned(), after: "1".to_owned() };
    topology.network.as_mut().unwrap().sysctls.push(change);
    let set = |value: &str| format!("sysctl -w net.ipv4.ip_forward={value}");
    let is = |value: &'static str| {
        let key = key.clone();
        mended(&topology, move |observed| drop(observed.sysctls.insert(key, value.to_owned())))
    };
    assert_eq!(is("1"), []);
    assert_eq!(is("7"), [(set("1"), vec![set("7")])]);
}

#[test]
fn a_parameter_that_the_network_needs_is_mended_and_can_be_put_back() {
    let topology = testdata::everything();
    let ports = topology.endpoints.values().flat_map(|endpoint| parameters::port(&endpoint.id.veth()));
    let network = topology.network.as_ref().unwrap();
    let needed = [parameters::forwarding, parameters::bridge, parameters::bridge_forwarding];
    for Parameter { key, value } in needed.into_iter().flat_map(|of| of(network)).chain(ports) {
        let spoilt = mended(&topology, |observed| drop(observed.sysctls.insert(key.clone(), "7".to_owned())));
        assert_eq!(spoilt, [(format!("sysctl -w {key}={value}"), vec![format!("sysctl -w {key}=7")])]);
    }
}

#[test]
fn a_kernel_without_ipv6_is_not_asked_for_its_parameters() {
    let plan = plan_for(&Topology::default(), &testdata::story(), &Observed { sysctls: [].into(), ..bare() });
    let commands = commands(&plan.unwrap());
    assert!(!commands.iter().any(|command| command.contains("ipv6")), "{commands:?}");
}

#[test]
fn flows_of_all_ports_are_forgotten_at_once_and_before_a_relay_receives() {
    let mut topology = testdata::story();
    let ports = 1000..1200;
    let udp = |port| testdata::mapping(Protocol::Udp, "*", port, 80, Via::Both);
    topology.endpoints.values_mut().for_each(|web| web.mappings = ports.clone().map(udp).collect());
    let plan = plan_for(&Topology::default(), &topology, &bare()).unwrap();
    let is_flush = |step: &Step| matches!(&step.action, Action::FlushConntrack(stale) if stale.ports.len() == ports.len());
    let flushes: Vec<_> =
        (0..).zip(&plan.steps).filter(|(_, step)| is_flush(step)).map(|(at, _)| at).collect();
    let first_of = |is: fn(&Action) -> bool| plan.steps.iter().position(|step| is(&step.action)).unwrap();
    let (rules, relay) = (
        first_of(|action| matches!(action, Action::Nft(_))),
        first_of(|action| matches!(action, Action::ServePorts { .. })),
    );
    assert!(matches!(flushes[..], [at] if rules < at && at < relay), "{rules} {flushes:?} {relay}");
}

#[test]
fn what_is_routed_to_the_containers_is_blocked_again() {
    let topology = testdata::everything();
    let steps = mended(&topology, |observed| observed.blocked = Some(vec![]));
    let [v4, v6] = [0, 1].map(|family: usize| steps[family].clone());
    assert_eq!(v4.0, "ip xfrm policy add dst 172.17.0.0/16 dir fwd action block priority 4000000000");
    assert_eq!(v4.1, ["ip xfrm policy delete dst 172.17.0.0/16 dir fwd"]);
    assert!(v6.0.contains("dst fd00:d0c::/64") && steps.len() == 5, "{steps:?}");
    assert!(steps[2].0.contains("src 172.17.0.0/16 dst 127.0.0.0/8 dir in"), "{steps:?}");
    assert!(steps[3].0.ends_with("dst 172.17.0.1/32 dir fwd action allow priority 3999999999"), "{steps:?}");
    assert!(steps[4].0.contains("dst fd00:d0c::1/128 dir fwd action allow"), "{steps:?}");
    let without_dnat = mended(&testdata::story(), |observed| observed.blocked = Some(vec![]));
    assert_eq!(without_dnat.len(), 1, "nothing opens the loopback addresses");
    assert_eq!(mended(&topology, |observed| observed.blocked = None), [], "this kernel has no such policies");
    let mut unguarded = testdata::story();
    unguarded.network.as_mut().unwrap().firewall = Firewall::None;
    let plan = plan_for(&Topology::default(), &unguarded, &bare()).unwrap();
    assert!(!plan.steps.iter().any(|step| matches!(step.action, Action::Block(_))));
}

#[test]
fn packet_sizes_are_mended_on_every_interface_and_can_be_put_back() {
    const WANTED: u32 = 200_000;
    let mut topology = testdata::story();
    let sizes = |gso, gro, v4| OffloadSizes {
        gso: Some(gso),
        gro: Some(gro),
        gso_ipv4: Some(v4),
        gro_ipv4: Some(v4),
    };
    let all = |observed: &mut Observed, sizes| {
        let web = observed.containers.values_mut().flatten().flat_map(|side| &mut side.links);
        for link in observed.host.links.iter_mut().chain(web) {
            (link.offload, link.tso_max_size) = (sizes, Some(524_280));
        }
    };
    let untouched = sizes(65_536, 65_536, 65_536);
    assert_eq!(mended(&topology, |observed| all(observed, untouched)), [], "none are asked for");
    topology.network.as_mut().unwrap().gso_max_size = WANTED;
    assert_eq!(mended(&topology, |observed| all(observed, sizes(WANTED, WANTED, WANTED))), []);

    let steps = mended(&topology, |observed| all(observed, untouched));
    let steps: Vec<_> = steps.iter().map(|(step, undo)| (step.as_str(), undo.join("; "))).collect();
    let ipv4 = "gso_ipv4_max_size 200000 gro_ipv4_max_size 200000";
    // What comes from a container over IPv6 may have to be forwarded (`enlarge_packets`).
    let wanted = [
        sizes_of("ip link set dev veth0202020", "gso_max_size 200000", ipv4),
        sizes_of("ip -n web link set dev eth0", "gro_max_size 200000", ipv4),
        sizes_of("ip link set dev docker0", "gso_max_size 200000 gro_max_size 200000", ipv4),
    ];
    assert_eq!(steps.len(), wanted.len());
    for ((step, undo), wanted) in steps.iter().zip(wanted) {
        assert_eq!(*step, wanted);
        assert_eq!(*undo, wanted.replace("200000", "65536"));
    }
}

#[test]
fn a_chain_of_somebody_else_is_in_the_way() {
    let mut topology = testdata::story();
    topology.network.as_mut().unwrap().firewall = Firewall::Iptables;
    let mut observed = bare();
    let of = |text: &str| Rules::Iptables([(Family::V4, SavedTables::parse(text))].into());
    observed.rules = of("*nat\n:PREROUTING ACCEPT\nCOMMIT\n");
    assert!(plan_for(&Topology::default(), &topology, &observed).is_ok());
    observed.rules = of("*nat\n:DOCKER - [0:0]\nCOMMIT\n");
    let error = plan_for(&Topology::default(), &topology, &observed).unwrap_err();
    assert_eq!(error, PlanError::ChainTaken { table: "nat", chain: "DOCKER" });
    assert!(plan_for(&topology, &topology, &observed).is_ok(), "it is ours");
}

/// All of `topology` in place, with the files of its namespaces.
fn in_place_with_files(topology: &Topology) -> Observed {
    let namespace_files = topology.endpoints.keys().cloned().collect();
    Observed { namespace_files, ..in_place(topology) }
}

#[test]
fn what_was_set_up_is_taken_down_in_order() {
    for (topology, file) in
        [(testdata::story(), "story.down.plan"), (testdata::everything(), "everything.down.plan")]
    {
        let plan = plan_for(&topology, &Topology::default(), &in_place_with_files(&topology)).unwrap();
        assert!(!plan.is_empty());
        testdata::golden(file, &(commands(&plan).join("\n") + "\n"));
    }
}

#[test]
fn rules_of_iptables_are_set_up() {
    let mut topology = testdata::story();
    topology.network.as_mut().unwrap().firewall = Firewall::Iptables;
    let saved = SavedTables::parse("*nat\n:PREROUTING ACCEPT\nCOMMIT\n");
    let observed = Observed { rules: Rules::Iptables([(Family::V4, saved)].into()), ..bare() };
    let plan = plan_for(&Topology::default(), &topology, &observed).unwrap();
    let of_rules = |step: &&Step| matches!(step.action, Action::Iptables { family: Family::V4, .. });
    let rules = plan.steps.iter().find(of_rules).unwrap();
    assert!(rules.to_string().contains("DOCKER"), "{rules}");
    assert!(matches!(rules.undo[..], [Action::Iptables { .. }]));
}

#[test]
fn without_a_comparison_the_rules_change_when_the_wanted_ones_do() {
    let (story, everything) = (testdata::story(), testdata::everything());
    let mut observed = in_place(&story);
    observed.rules = Rules::Nft { listing: Some("table".to_owned()), wanted: None };
    let changes_rules = |desired: &Topology| {
        let plan = plan_for(&story, desired, &observed).unwrap();
        plan.steps.iter().any(|step| matches!(step.action, Action::Nft(_)))
    };
    assert!(!changes_rules(&story));
    assert!(changes_rules(&everything));
}

#[test]
fn the_route_of_the_own_bridge_is_not_in_the_way_but_another_one_is() {
    let story = testdata::story();
    let with_route_by = |oif| {
        let mut observed = in_place(&story);
        let destination = Some(crate::addr::Cidr { ip: [172, 17, 0, 0].into(), prefix: 16 });
        observed.host.routes.push(Route { destination, gateway: None, oif: Some(oif) });
        plan_for(&story, &story, &observed)
    };
    assert!(with_route_by(10).unwrap().is_empty());
    let others = with_route_by(2).unwrap();
    assert!(others.is_empty(), "a network that is up goes on");
    assert!(others.warnings[0].contains("172.17.0.0/16 by eth0"), "{:?}", others.warnings);
}

#[test]
fn the_file_that_keeps_the_settings_is_written_and_can_be_put_back_unless_it_is_somebody_elses() {
    let (mut topology, path) = (testdata::story(), Path::new("/etc/sysctl.d/x.conf"));
    topology.network.as_mut().unwrap().persist = Some(path.to_owned());
    let text = crate::persist::text(topology.network.as_ref().unwrap());
    let is = |text: Option<&str>| {
        let text = text.map(str::to_owned);
        let mut observed = in_place(&topology);
        observed.files.insert(path.to_owned(), text);
        let plan = plan_for(&topology, &topology, &observed).unwrap();
        let down = plan_for(&topology, &Topology::default(), &observed).unwrap();
        let removes = down.steps.iter().any(|step| matches!(step.action, Action::RemoveFile(_)));
        (plan.steps, plan.problems.len(), removes)
    };
    assert_eq!(is(Some(&text)), (vec![], 0, true));
    let write = |text: &str| Action::WriteFile { path: path.to_owned(), text: text.to_owned() };
    let earlier = format!("{text}net.ipv6.conf.all.forwarding = 1\n");
    assert_eq!(is(Some(&earlier)), (vec![Step::new(write(&text), [write(&earlier)])], 0, true));
    assert_eq!(is(Some("other")), (vec![], 1, false));
    let back = [Action::RemoveFile(path.to_owned())];
    assert_eq!(is(None), (vec![Step::new(write(&text), back)], 0, false));
    // One that is in the way from the start.
    let mut observed = bare();
    observed.files.insert(path.to_owned(), Some("other".to_owned()));
    let error = plan_for(&Topology::default(), &topology, &observed).unwrap_err();
    assert_eq!(error, PlanError::FileTaken(path.to_owned()));
}

/// The story with larger packets, and all interfaces with the kernel's defaults. The bridge can send packets of
/// `bridge_limit`, the others any.
fn with_large_packets(bridge_limit: u32) -> (Topology, Observed) {
    let mut topology = testdata::story();
    topology.network.as_mut().unwrap().gso_max_size = 200_000;
    let mut observed = in_place(&topology);
    let size = Some(65_536);
    let untouched = OffloadSizes { gso: size, gro: size, gso_ipv4: size, gro_ipv4: size };
    let web = observed.containers.values_mut().flatten().flat_map(|side| &mut side.links);
    for link in observed.host.links.iter_mut().chain(web) {
        let limit = if link.name == "docker0" { bridge_limit } else { 524_280 };
        (link.offload, link.tso_max_size) = (untouched, Some(limit));
    }
    (topology, observed)
}

/// What a plan sets the packet sizes of the bridge to.
fn bridge_packets(desired: &Topology, observed: &Observed) -> String {
    let commands = commands(&plan_for(desired, desired, observed).unwrap());
    let of_bridge = |command: &&String| command.contains("dev docker0") && command.contains("max_size");
    commands.iter().find(of_bridge).unwrap().clone()
}

#[test]
fn a_bridge_sends_what_its_ports_can_send() {
    let set = "ip link set dev docker0";
    let ipv4 = "gso_ipv4_max_size 200000 gro_ipv4_max_size 200000";
    let all = sizes_of(set, "gso_max_size 200000 gro_max_size 200000", ipv4);
    let received = sizes_of(set, "gro_max_size 200000", "gro_ipv4_max_size 200000");
    let (topology, observed) = with_large_packets(524_280);
    assert_eq!(bridge_packets(&topology, &observed), all);
    let (topology, mut observed) = with_large_packets(65_536);
    assert_eq!(bridge_packets(&topology, &observed), received);
    of_web(&mut observed).links[0].up = false;
    assert_eq!(bridge_packets(&topology, &observed), received, "no port is added");
    // A port that is added changes the limit.
    of_host(&mut observed, "veth0202020").master = None;
    assert_eq!(bridge_packets(&topology, &observed), all);
    // Without ports, it does not say whether it ever had one.
    let (mut topology, observed) = with_large_packets(524_280);
    topology.endpoints.clear();
    assert_eq!(bridge_packets(&topology, &observed), received);
}

#[test]
fn a_new_bridge_is_known_to_have_the_sizes_of_the_loopback_interface() {
    let (topology, mut observed) = with_large_packets(524_280);
    observed.host.links.truncate(1);
    observed.host.routes.clear();
    observed.containers.clear();
    let plan = plan_for(&Topology::default(), &topology, &observed).unwrap();
    let commands = commands(&plan);
    let raised = commands.iter().filter(|command| command.contains("max_size 200000"));
    assert_eq!(raised.count(), 3, "both ends of the pair, and the bridge: {commands:#?}");
}

#[test]
fn the_packet_sizes_of_the_bridge_come_back_with_a_removed_container() {
    let (owned, observed) = with_large_packets(524_280);
    let mut desired = owned.clone();
    desired.endpoints.clear();
    let plan = plan_for(&owned, &desired, &observed).unwrap();
    let link = plan.steps.iter().find(|step| step.to_string() == "ip link delete dev veth0202020").unwrap();
    let last = link.undo.last().unwrap().to_string();
    assert!(last.starts_with("ip link set dev docker0 gso_max_size 65536"), "{last}");
}

/// The actions that concern the relay, each with what undoes it.
fn of_relay(plan: &Plan) -> Vec<(String, Vec<String>)> {
    let is_its = |step: &&Step| {
        let Step { action, .. } = step;
        action_serves(action) || matches!(action, Action::CeasePorts { .. } | Action::EndProcess { .. })
    };
    let texts = |step: &Step| (step.to_string(), step.undo.iter().map(ToString::to_string).collect());
    plan.steps.iter().filter(is_its).map(texts).collect()
}

fn action_serves(action: &Action) -> bool {
    matches!(action, Action::ServePorts { .. })
}

const CTL: &str = "rproxy ctl --control /run/netns-setup/relay.sock";

#[test]
fn all_ports_of_a_change_are_served_by_one_step() {
    let (bare_web, mut web) = (testdata::story(), testdata::story());
    let more = (100..200).map(|port| testdata::mapping(Protocol::Tcp, "*", port, port, Via::Both));
    web.endpoints.values_mut().for_each(|web| web.mappings.extend(more.clone()));
    let [(step, undo)] = &of_relay(&plan_for(&bare_web, &web, &in_place(&bare_web)).unwrap())[..] else {
        panic!()
    };
    assert_eq!(*step, format!("{CTL} add --host [::]:100-199 --to 172.17.0.2:100-199 --proto tcp"));
    assert_eq!(undo[..], [format!("{CTL} remove --cut web/tcp/[::]:100-199")]);
    let [(step, undo)] = &of_relay(&plan_for(&web, &bare_web, &in_place(&web)).unwrap())[..] else {
        panic!()
    };
    assert_eq!(*step, format!("{CTL} remove --cut web/tcp/[::]:100-199"));
    assert_eq!(undo[..], [format!("{CTL} add --host [::]:100-199 --to 172.17.0.2:100-199 --proto tcp")]);
}

#[test]
fn a_port_that_leads_to_another_container_is_served_anew() {
    let (name, mut db) = testdata::endpoint("db", 3);
    let mut moved = testdata::story();
    db.mappings = moved.endpoints.values_mut().flat_map(|web| std::mem::take(&mut web.mappings)).collect();
    moved.endpoints.insert(name.clone(), db.clone());
    let mut before = testdata::story();
    before.endpoints.insert(name, Endpoint { mappings: vec![], ..db });
    let steps: Vec<String> = of_relay(&plan_for(&before, &moved, &in_place(&before)).unwrap())
        .into_iter()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(
        steps,
        [
            format!("{CTL} remove --cut web/tcp/[::]:80"),
            format!("{CTL} add --host [::]:80 --to 172.17.0.3:80 --proto tcp"),
        ]
    );
}

#[test]
fn relays_of_an_earlier_version_are_replaced() {
    let story = testdata::story();
    let mut observed = in_place(&story);
    let key = relayed_ports(&story)[0].key;
    observed.relay.served.clear();
    observed.relay.singles.insert(key, RelayProcess { pid: 7, started: 1 });
    let add = format!("{CTL} add --host [::]:80 --to 172.17.0.2:80 --proto tcp");
    let remove = format!("{CTL} remove --cut web/tcp/[::]:80");
    let steps = of_relay(&plan_for(&story, &story, &observed).unwrap());
    assert_eq!(steps, [("kill 7".to_owned(), vec![add.clone()]), (add, vec![remove])]);
    // Another container's is left alone.
    let scope = Scope::one(&"db".parse().unwrap());
    assert_eq!(of_relay(&plan_in(&scope, &story, &story, &observed).unwrap()), []);
}

#[test]
fn a_supervisor_that_nobody_knows_any_more_ends_first() {
    let story = testdata::story();
    let mut observed = in_place(&story);
    observed.relay.served.clear();
    observed.relay.strays.push(RelayProcess { pid: 7, started: 1 });
    let steps = of_relay(&plan_for(&story, &story, &observed).unwrap());
    assert_eq!((steps.len(), steps[0].0.as_str()), (2, "kill 7"));
    let down = of_relay(&plan_for(&story, &Topology::default(), &observed).unwrap());
    assert_eq!((down.len(), down[0].0.as_str()), (1, "kill 7"));
}

#[test]
fn a_suspended_port_is_not_in_place() {
    let (story, mut suspended) = (testdata::story(), testdata::story());
    suspended.endpoints.values_mut().flat_map(|web| &mut web.mappings).for_each(|port| port.suspended = true);
    let away = plan_for(&story, &suspended, &in_place(&story)).unwrap();
    assert_eq!(of_relay(&away).len(), 1);
    let rules = crate::firewall::nft::render;
    assert_ne!(rules(&story), rules(&suspended));
    assert_eq!(plan_for(&suspended, &suspended, &in_place(&suspended)).unwrap().steps, []);
    let back = plan_for(&suspended, &story, &in_place(&suspended)).unwrap();
    assert_eq!(of_relay(&back).len(), 1);
}

#[test]
fn a_namespace_that_lives_on_gets_its_name_again_and_keeps_its_link() {
    let story = testdata::story();
    let mut observed = in_place(&story);
    let web: Name = "web".parse().unwrap();
    observed.living.insert(web.clone(), "/proc/7/ns/net".into());
    observed.cookies.insert(web, 77);
    let plan = plan_for(&story, &story, &observed).unwrap();
    assert_eq!(commands(&plan), ["touch /run/netns/web && mount --bind /proc/7/ns/net /run/netns/web"]);
}

#[test]
fn rules_that_come_back_end_flows_that_began_without_them() {
    let mut story = testdata::story();
    let stale = |topology: &Topology| {
        let mut observed = in_place(topology);
        observed.rules = Rules::Nft { listing: None, wanted: None };
        let plan = plan_for(topology, topology, &observed).unwrap();
        plan.steps.into_iter().find_map(|step| match step.action {
            Action::FlushConntrack(stale) => Some(stale),
            _ => None,
        })
    };
    assert_eq!(stale(&story).unwrap().subnets, [story.network.as_ref().unwrap().subnet.cidr()]);
    story.network.as_mut().unwrap().firewall = Firewall::None;
    assert_eq!(stale(&story).map(|stale| stale.subnets), None);
}
