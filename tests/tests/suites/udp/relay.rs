//! What the UDP relay forwards, and from which address: every datagram unchanged, every reply from the address that the
//! request was sent to, whatever the path does to packets.

use std::fs;
use std::iter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use nix::net::if_::if_nametoindex;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::Stream;
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, rproxy};
use testkit::suite::Case;
use testkit::topology::{
    BRIDGE_V4, BRIDGE_V6, CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology,
};
use testkit::udp::{
    self, Backend, LARGEST_V4, LARGEST_V6, Line, assert_all_echo, assert_echoes, bind_in, relay_in,
};

const PORT: u16 = 5300;

pub(crate) fn cases() -> Vec<Case> {
    let wiring = &[Need::Root, Need::Program("ip")];
    let net = |name: &str, body: fn()| Case::new(name, body).needs(wiring);
    vec![
        net("IPv4 answers come from the address asked", answers_over_v4),
        net("IPv6 answers come from the address asked", answers_over_v6),
        net("dual-stack answers come from the address asked", answers_over_both),
        net("link-local answers come from the address and interface asked", answers_over_link_local),
        net("a broadcast is answered from the host's address", broadcast_is_answered),
        net("an answer leaves by the way of the routing table", answer_takes_the_route)
            .needs(&[Need::Program("sysctl")]),
        net("a client's questions to two addresses are two flows", two_addresses_two_flows),
        Case::new("every size of datagram passes over IPv4", every_size_v4),
        Case::new("every size of datagram passes over IPv6", every_size_v6).needs(&[Need::Ipv6]),
        Case::new("every size passes from IPv6 to IPv4", every_size_v6_to_v4).needs(&[Need::Ipv6]),
        net("bursts of any sizes keep their boundaries and order", bursts_of_any_sizes),
        net("datagrams over the MTU pass in fragments", fragments_pass),
        net("a smaller MTU towards the backend is found", smaller_mtu_behind_the_host)
            .needs(&[Need::Program("sysctl")]),
        net("a smaller MTU towards the client is found", smaller_mtu_before_the_host)
            .needs(&[Need::Program("sysctl")]),
        net("without the privilege, that buffers are small is said once", small_buffers_are_told)
            .needs(&[Need::Program("setpriv")]),
        net("bursts pass devices without offloads", no_offloads).needs(&[Need::Program("ethtool")]),
    ]
}

fn echo_in_container(net: &Topology, ip: impl Into<IpAddr>) -> Backend {
    Backend::echo(bind_in(&net.container, (ip.into(), PORT)))
}

/// More addresses for the host, one of which no network of its has, and the client's way to it.
const MORE_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(10, 0, 0, 21), Ipv4Addr::new(10, 0, 0, 31), Ipv4Addr::new(192, 168, 7, 1)];
const MORE_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x21), Ipv6Addr::new(0xfd00, 0x7, 0, 0, 0, 0, 0, 1)];

/// The standard wiring, with a host of many addresses.
fn many_addresses() -> Topology {
    let net = Topology::new();
    net.host.address("eth0", &format!("{}/24", MORE_V4[0]));
    net.host.address("eth0", &format!("{}/24", MORE_V4[1]));
    net.host.address("lo", &format!("{}/32", MORE_V4[2]));
    net.host.address("eth0", &format!("{}/64", MORE_V6[0]));
    net.host.address("lo", &format!("{}/128", MORE_V6[1]));
    net.client.ip(&format!("route add default via {HOST_V4}"));
    net.client.ip(&format!("-6 route add default via {HOST_V6}"));
    net
}

/// Every address of the host, last the first one again.
fn host_v4() -> Vec<IpAddr> {
    [&[HOST_V4, BRIDGE_V4], &MORE_V4[..], &[HOST_V4]].concat().into_iter().map(IpAddr::V4).collect()
}

fn host_v6() -> Vec<IpAddr> {
    [&[HOST_V6, BRIDGE_V6], &MORE_V6[..], &[HOST_V6]].concat().into_iter().map(IpAddr::V6).collect()
}

/// One client asks all of the addresses, by the same socket.
#[track_caller]
fn assert_answered_at(net: &Topology, from: impl Into<IpAddr>, addresses: &[IpAddr]) {
    let client = bind_in(&net.client, (from.into(), 0));
    for ip in addresses {
        assert_echoes(&client, (*ip, PORT).into(), ip.to_string().as_bytes());
    }
}

fn answers_over_v4() {
    let net = many_addresses();
    let backend = echo_in_container(&net, CONTAINER_V4);
    let _proxy = relay_in(&net.host, "0.0.0.0:5300", backend.address(), &[]);
    assert_answered_at(&net, Ipv4Addr::UNSPECIFIED, &host_v4());
    assert_answered_at(&net, CLIENT_V4, &host_v4());
}

fn answers_over_v6() {
    let net = many_addresses();
    let backend = echo_in_container(&net, CONTAINER_V6);
    let _proxy = relay_in(&net.host, "[::]:5300", backend.address(), &["--v6only"]);
    assert_answered_at(&net, Ipv6Addr::UNSPECIFIED, &host_v6());
    assert_answered_at(&net, CLIENT_V6, &host_v6());
}

fn answers_over_both() {
    let net = many_addresses();
    let backend = echo_in_container(&net, CONTAINER_V4);
    let _proxy = relay_in(&net.host, "[::]:5300", backend.address(), &[]);
    assert_answered_at(&net, CLIENT_V4, &host_v4());
    assert_answered_at(&net, CLIENT_V6, &host_v6());
}

/// The host has the same address on both of its links, which only the scope tells apart.
fn answers_over_link_local() {
    let net = Topology::new();
    let ip = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x11);
    let neighbours = [(&net.client, "eth0"), (&net.container, "docker0")];
    for (number, (neighbour, link)) in (0x21..).zip(neighbours) {
        net.host.address(link, &format!("{ip}/64"));
        neighbour.address("eth0", &format!("fe80::{number:x}/64"));
    }
    let backend = echo_in_container(&net, CONTAINER_V6);
    let _proxy = relay_in(&net.host, "[::]:5300", backend.address(), &[]);
    let clients = neighbours.map(|(neighbour, _)| {
        let scope = neighbour.run(|| if_nametoindex("eth0").unwrap());
        let asked = SocketAddr::from(SocketAddrV6::new(ip, PORT, 0, scope));
        (bind_in(neighbour, (Ipv6Addr::UNSPECIFIED, 4000)), asked)
    });
    for _ in 0..3 {
        for (client, asked) in &clients {
            assert_echoes(client, *asked, b"over this link");
            assert_echoes(client, *asked, b"and again");
        }
    }
}

fn broadcast_is_answered() {
    let net = Topology::new();
    let backend = echo_in_container(&net, CONTAINER_V4);
    let client = bind_in(&net.client, (Ipv4Addr::UNSPECIFIED, 0));
    client.set_broadcast(true).unwrap();
    for host in ["0.0.0.0:5300", "[::]:5300"] {
        let _proxy = relay_in(&net.host, host, backend.address(), &[]);
        let (answer, from) = udp::ask(&client, "10.0.0.255:5300".parse().unwrap(), b"anyone?");
        assert_eq!((&answer[..], from), (&b"anyone?"[..], (HOST_V4, PORT).into()), "{host}");
    }
}

/// A question comes in by one link while the route to the client leads over another.
fn answer_takes_the_route() {
    let net = Topology::new();
    net.host.veth("eth1", &net.client, "eth1");
    net.host.address("eth1", "10.1.0.11/24");
    net.client.address("eth1", "10.1.0.12/24");
    // The client's source address is that of its first link, also over the second.
    net.client.ip("route change 10.1.0.0/24 dev eth1 src 10.0.0.12");
    for namespace in [&net.client, &net.host] {
        for link in ["all", "eth0", "eth1"] {
            namespace.command(&format!("sysctl -qw net.ipv4.conf.{link}.rp_filter=0")).success();
        }
    }
    let backend = echo_in_container(&net, CONTAINER_V4);
    let _proxy = relay_in(&net.host, "0.0.0.0:5300", backend.address(), &[]);
    assert_answered_at(&net, CLIENT_V4, &["10.1.0.11".parse().unwrap(), HOST_V4.into()]);
}

fn two_addresses_two_flows() {
    let net = many_addresses();
    let backend = Backend::naming(bind_in(&net.container, (CONTAINER_V4, PORT)));
    let _proxy = relay_in(&net.host, "[::]:5300", backend.address(), &[]);
    for (client, addresses) in [(IpAddr::V4(CLIENT_V4), host_v4()), (CLIENT_V6.into(), host_v6())] {
        let client = bind_in(&net.client, (client, 0));
        let flows =
            || -> Vec<_> { addresses.iter().map(|ip| udp::flow_of(&client, (*ip, PORT).into())).collect() };
        let mut first = flows();
        assert_eq!(flows(), first, "a flow keeps its port");
        assert_eq!(first.pop(), first.first().copied(), "the last address asked is the first one again");
        let count = first.len();
        first.sort();
        first.dedup();
        assert_eq!(first.len(), count, "each address has a flow of its own");
    }
}

/// Sizes around every limit there is, then thousands of others: some in runs, which may travel together.
fn all_sizes(largest: usize) -> impl Iterator<Item = usize> {
    let edges = [254, 1_231, 1_451, 1_471, 4_095, 8_191, 8_971, 16_383, 32_767, 65_506];
    let edges = edges.into_iter().flat_map(|edge| edge..edge + 4).filter(move |size| *size <= largest);
    let mixed = (0..3_000).map(|number: usize| number * 7_919 % 1_601);
    let large = (0..150).map(move |number: usize| number * 7_919 % (largest + 1));
    let runs = (0..60).flat_map(|run: usize| iter::repeat_n(run * 23 % 1_473, 40).chain(iter::once(run)));
    (0..70).chain(edges).chain([largest, 0, largest, 0, 0]).chain(mixed).chain(large).chain(runs)
}

#[track_caller]
fn assert_every_size(host: IpAddr, container: IpAddr, largest: usize) {
    let backend = Backend::echo(udp::client(container));
    let proxy = udp::relay(host, backend.address(), &[]);
    let client = udp::client(proxy.address().ip());
    assert_all_echo(&client, proxy.address(), all_sizes(largest));
}

fn every_size_v4() {
    assert_every_size(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into(), LARGEST_V4);
}

fn every_size_v6() {
    assert_every_size(Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), LARGEST_V6);
}

/// What is too large for IPv4 is lost, and nothing else is.
fn every_size_v6_to_v4() {
    assert_every_size(Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into(), LARGEST_V4);
    let backend = Backend::echo(udp::local());
    let proxy = udp::relay(Ipv6Addr::LOCALHOST, backend.address(), &[]);
    let client = udp::client(Ipv6Addr::LOCALHOST);
    for _ in 0..3 {
        client.send_to(&udp::pattern(1, LARGEST_V4 + 1), proxy.address()).unwrap();
        assert_echoes(&client, proxy.address(), b"this one fits");
    }
}

/// The client's and the backend's side of a relay over the standard wiring, in one family.
fn line<'a>(net: &Topology, proxy: &'a Standalone, family: Family) -> Line<'a> {
    let (client, asked, container): (IpAddr, IpAddr, IpAddr) = match family {
        Family::V4 => (CLIENT_V4.into(), HOST_V4.into(), CONTAINER_V4.into()),
        Family::V6 => (CLIENT_V6.into(), HOST_V6.into(), CONTAINER_V6.into()),
    };
    let client = bind_in(&net.client, (client, 0));
    let backend = bind_in(&net.container, (container, PORT));
    Line::open(&proxy.process, client, (asked, PORT).into(), backend)
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

/// A relay for each family, on the same port.
fn start_both(net: &Topology) -> [(Family, Standalone); 2] {
    [
        (Family::V4, relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[])),
        (Family::V6, relay_in(&net.host, "[::]:5300", (CONTAINER_V6, PORT), &["--v6only"])),
    ]
}

/// Runs of sizes, so that there is something to travel together, and boundaries to lose.
fn any_burst() -> impl Strategy<Value = Vec<usize>> {
    let size =
        prop_oneof![1 => Just(0_usize), 2 => 1..40_usize, 4 => 40..1_500_usize, 1 => 1_500..9_000_usize];
    let run = (size, 1..70_usize, any::<bool>()).prop_map(|(size, count, is_short_at_end)| {
        // By what sockets hold, fewer of the large ones.
        let count = count.min(200_000 / (size + 1));
        let mut run = vec![size; count];
        run.extend(is_short_at_end.then_some(size / 2));
        run
    });
    vec(run, 1..5).prop_map(|runs| runs.concat())
}

fn bursts_of_any_sizes() {
    let net = Topology::new();
    for (family, proxy) in &start_both(&net) {
        let line = line(&net, proxy, *family);
        let config =
            Config { cases: 40, max_shrink_iters: 8, failure_persistence: None, ..Config::default() };
        let result = TestRunner::new(config).run(&(any_burst(), any_burst()), |(up, down)| {
            line.burst_up(&up);
            line.burst_down(&down);
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
    }
}

/// Over the MTU of 1,500 by a little, as jumbo frames, and nearly as much as there can be.
const LARGE: [usize; 5] = [1_453, 1_473, 3_000, 9_000, 60_000];

fn fragments_pass() {
    let net = Topology::new();
    for (family, proxy) in &start_both(&net) {
        let line = line(&net, proxy, *family);
        let largest = match family {
            Family::V4 => LARGEST_V4,
            Family::V6 => LARGEST_V6,
        };
        for size in LARGE.into_iter().chain([largest]) {
            line.burst_up(&[size, 1, size, size, 1]);
            line.burst_down(&[size, 1, size, size, 1]);
        }
    }
}

/// A host on a network with an MTU of 1,280, behind `router`, and the way there from the proxy's host.
fn add_far_host(net: &Topology, router: &Namespace, gateways: [IpAddr; 2]) -> Namespace {
    let far = Namespace::new();
    router.veth("eth1", &far, "eth0");
    router.command("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").success();
    router.ip("link set eth1 mtu 1280");
    far.ip("link set eth0 mtu 1280");
    // A router asks for its neighbours from such an address, and would have to wait for one to be free.
    router.address("eth1", "fe80::1/64");
    for (gateway, near, host, prefix) in [
        (gateways[0], "10.9.0.1/24", FAR[0], "10.9.0.0/24"),
        (gateways[1], "fd00:9::1/64", FAR[1], "fd00:9::/64"),
    ] {
        let (router_ip, len) = near.split_once('/').unwrap();
        router.address("eth1", near);
        far.address("eth0", &format!("{host}/{len}"));
        far.ip(&format!("route add default via {router_ip}"));
        net.host.ip(&format!("route add {prefix} via {gateway}"));
    }
    far
}

const FAR: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2)), IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 2))];

/// The host learns of the MTU from the first datagram that is too large, which is lost, as it is for any
/// sender. It has to be alone, since a GSO batch is too large as a whole if one of its datagrams is.
#[track_caller]
fn learn_mtu(host: &Namespace, far: IpAddr, from: &UdpSocket, to: SocketAddr) {
    from.send_to(&[0; 1_400], to).unwrap();
    eventually("the host knows the MTU", || host.ip(&format!("route get {far}")).contains("mtu 1280"));
}

#[track_caller]
fn assert_bursts_pass(line: &Line<'_>) {
    for size in [1_400, 1_453, 9_000, 60_000] {
        line.burst_up(&[size, 1, size, 1]);
        line.burst_down(&[size, 1, size, 1]);
    }
    line.burst_up(&[1_400; 100]);
    line.burst_down(&[1_400; 100]);
}

fn smaller_mtu_behind_the_host() {
    let net = Topology::new();
    let far = add_far_host(&net, &net.container, [CONTAINER_V4.into(), CONTAINER_V6.into()]);
    for ip in FAR {
        let backend = bind_in(&far, (ip, PORT));
        let proxy = relay_in(&net.host, "[::]:5300", (ip, PORT), &[]);
        let client = bind_in(&net.client, (CLIENT_V6, 0));
        let asked = (HOST_V6, PORT).into();
        learn_mtu(&net.host, ip, &client, asked);
        assert_bursts_pass(&Line::open(&proxy.process, client, asked, backend));
    }
}

fn smaller_mtu_before_the_host() {
    let net = Topology::new();
    let far = add_far_host(&net, &net.client, [CLIENT_V4.into(), CLIENT_V6.into()]);
    for (ip, host) in [(FAR[0], IpAddr::from(HOST_V4)), (FAR[1], HOST_V6.into())] {
        let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
        let proxy = relay_in(&net.host, "[::]:5300", (CONTAINER_V4, PORT), &[]);
        let client = bind_in(&far, (ip, 0));
        let asked = (host, PORT).into();
        client.send_to(b"hello", asked).unwrap();
        let (_, flow) = udp::receive(&backend);
        learn_mtu(&net.host, ip, &backend, flow);
        assert_bursts_pass(&Line::open(&proxy.process, client, asked, backend));
    }
}

/// What `ethtool -K` takes away. Where segmentation, checksums or scattered pages are not to be had from a
/// device, kernels refuse GSO batches at different points, or cut them in software.
const WITHOUT: &[&str] = &["tx off", "tso off gso off", "sg off", "tx off sg off tso off gso off gro off"];

fn no_offloads() {
    for without in WITHOUT {
        let net = Topology::new();
        for device in ["eth0", "docker0", "veth0002"] {
            // Not every kind of device lets every feature be changed.
            net.host.command(&format!("ethtool -K {device} {without}"));
        }
        let features = net.host.command("ethtool -k eth0").success();
        assert!(features.contains("tx-checksumming: off") || !without.contains("tx off"), "{features}");
        for (family, proxy) in &start_both(&net) {
            let line = line(&net, proxy, *family);
            // In GSO batches; one at a time; in GSO batches whose datagrams are larger than the MTU.
            for sizes in [vec![1_200; 200], vec![1; 200], vec![1_472; 70], vec![3_000; 70]] {
                line.burst_up(&sizes);
                line.burst_down(&sizes);
            }
        }
    }
}

fn small_buffers_are_told() {
    /// What a listener asks for.
    const WANTED: usize = 8 * 1024 * 1024;
    let allowed = fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap().trim().parse::<usize>().unwrap();
    let mapping = |host| ["--proto", "udp", "--host", host, "--to", "127.0.0.1:5300"];
    let arguments = [mapping("127.0.0.1:5301"), mapping("127.0.0.1:5302")].concat();
    let mut command = require::command("setpriv");
    command.arg("--bounding-set=-net_admin").arg(rproxy()).args(&arguments);
    let proxy = Standalone::ready(Namespace::new().spawn(command), &arguments);
    proxy.process.wait_for_lines(Stream::Stderr, 2, |line| line.contains("serving"));
    let log = proxy.process.captured(Stream::Stderr);
    assert_eq!(log.matches("rmem_max").count(), usize::from(allowed < WANTED), "{log}");
}
