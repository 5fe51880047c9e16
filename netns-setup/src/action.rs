//! The changes that this program can make. Each can be printed as the equivalent command.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rproxy_mapping::addr::Protocol;

use crate::addr::{Cidr, Mac};
use crate::block::Block;
use crate::family::{Family, Variant};
use crate::model::{NETNS_DIR, RelayProcess};
use crate::name::CONTAINER_INTERFACE;
use crate::name::{IfName, Name};
use crate::relayed::{CONTROL, Launch, Ranges, RelayedPort};
use crate::stale::Stale;
use crate::transparent::{MARK, PRIORITY, TABLE};

/// The metric of the routes that IPv6 addresses bring with them (`IP6_RT_PRIO_ADDRCONF` of linux/ipv6_route.h).
pub const CONNECTED_METRIC: u32 = 256;

/// The network namespace of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsRef {
    /// The one that this program runs in.
    Host,
    /// A container's, found at this path.
    Container(PathBuf),
}

impl NetnsRef {
    /// The prefix of an `ip` command in this namespace.
    fn ip(&self) -> String {
        match self {
            Self::Host => "ip".to_owned(),
            Self::Container(path) => match netns_name(path) {
                Some(name) => format!("ip -n {name}"),
                None => format!("nsenter --net={} ip", path.display()),
            },
        }
    }

    /// The prefix of any other command in this namespace.
    fn exec(&self) -> String {
        match self {
            Self::Host => String::new(),
            Self::Container(path) => format!("nsenter --net={} ", path.display()),
        }
    }
}

/// The name under which `ip netns` knows the namespace at `path`.
fn netns_name(path: &Path) -> Option<&str> {
    path.strip_prefix(NETNS_DIR).ok()?.to_str().filter(|name| !name.contains('/'))
}

/// One property of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkChange {
    /// Administratively up or down.
    Up(bool),
    /// The hardware address.
    Address(Mac),
    /// The MTU.
    Mtu(u32),
    /// The alias; none if it is empty.
    Alias(String),
    /// The bridge that it is a port of.
    Master(Option<IfName>),
    /// Whether a bridge runs the spanning tree protocol, which keeps a new port silent for half a minute.
    Stp(bool),
    /// Hairpin mode: whether a bridge port sends frames back to where they came from.
    Hairpin(bool),
    /// The largest packets inside the host.
    Offload(OffloadSizes),
}

/// The largest packets that a device accepts from the stack (GSO) and passes to it (GRO), before
/// segmentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OffloadSizes {
    /// Sent, IPv6.
    pub gso: Option<u32>,
    /// Received, IPv6.
    pub gro: Option<u32>,
    /// Sent, IPv4.
    pub gso_ipv4: Option<u32>,
    /// Received, IPv4.
    pub gro_ipv4: Option<u32>,
}

impl OffloadSizes {
    /// The options of `ip link`, and those that it has since iproute2 6.3.
    fn options(&self) -> [String; 2] {
        let texts = |sizes: [(&str, Option<u32>); 2]| {
            sizes.iter().filter_map(|(name, size)| size.map(|size| format!(" {name} {size}"))).collect()
        };
        [
            texts([("gso_max_size", self.gso), ("gro_max_size", self.gro)]),
            texts([("gso_ipv4_max_size", self.gso_ipv4), ("gro_ipv4_max_size", self.gro_ipv4)]),
        ]
    }
}

/// A veth pair from the host into a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPair {
    /// The host's end.
    pub host: IfName,
    /// Its hardware address.
    pub host_mac: Mac,
    /// The hardware address of the container's end.
    pub container_mac: Mac,
    /// The MTU of both ends.
    pub mtu: u32,
    /// The container's namespace.
    pub netns: PathBuf,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Creates a named network namespace.
    AddNetns(Name),
    /// Gives one that lives on its name again.
    MountNetns {
        /// The name.
        name: Name,
        /// Where it is.
        from: PathBuf,
        /// Its cookie, by which it is recognised there.
        cookie: u64,
    },
    /// Deletes one.
    DeleteNetns(Name),
    /// Creates a bridge.
    AddBridge {
        /// Its name.
        name: IfName,
        /// Its hardware address.
        mac: Mac,
        /// Its MTU.
        mtu: u32,
    },
    /// Creates a veth pair, with the container's end directly in its namespace.
    AddVeth(VethPair),
    /// Deletes an interface of the host.
    DeleteLink(IfName),
    /// Changes a property of an interface.
    SetLink {
        /// Its namespace.
        place: NetnsRef,
        /// Its name.
        name: IfName,
        /// What changes.
        change: LinkChange,
    },
    /// Adds an address to an interface.
    AddAddress {
        /// Its namespace.
        place: NetnsRef,
        /// Its name.
        name: IfName,
        /// The address.
        address: Cidr,
    },
    /// Removes an address.
    DeleteAddress {
        /// The namespace of the interface.
        place: NetnsRef,
        /// Its name.
        name: IfName,
        /// The address.
        address: Cidr,
    },
    /// Adds a container's default route.
    AddDefaultRoute {
        /// The namespace of the container.
        place: NetnsRef,
        /// The router.
        gateway: IpAddr,
    },
    /// Removes a container's default route.
    DeleteDefaultRoute {
        /// The namespace of the container.
        place: NetnsRef,
        /// The router.
        gateway: IpAddr,
    },
    /// Adds the route that an address of an interface brings with it, to the other addresses of its network.
    AddConnectedRoute {
        /// The namespace of the interface.
        place: NetnsRef,
        /// Its name.
        name: IfName,
        /// The address.
        address: Cidr,
    },
    /// Removes it.
    DeleteConnectedRoute {
        /// The namespace of the interface.
        place: NetnsRef,
        /// Its name.
        name: IfName,
        /// The address.
        address: Cidr,
    },
    /// Adds a policy routing rule: marked packets that came in by an interface belong to this host's sockets.
    AddRule {
        /// The address family.
        family: Family,
        /// The interface.
        iif: IfName,
    },
    /// Removes one.
    DeleteRule {
        /// The address family.
        family: Family,
        /// The interface.
        iif: IfName,
    },
    /// Adds the route that those rules lead to.
    AddLocalRoute(Family),
    /// Removes it.
    DeleteLocalRoute(Family),
    /// Blocks a way, whatever becomes of the firewall.
    Block(Block),
    /// Opens it again.
    Unblock(Block),
    /// Sets a kernel parameter of the host.
    SetSysctl {
        /// Its name.
        key: String,
        /// Its new value.
        value: String,
    },
    /// Sets a kernel parameter of a container, if this kernel has it.
    SetContainerSysctl {
        /// The path of its namespace.
        netns: PathBuf,
        /// The parameter's name.
        key: String,
        /// Its new value.
        value: String,
    },
    /// Writes a whole file.
    WriteFile {
        /// Its path.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// Removes a file.
    RemoveFile(PathBuf),
    /// Runs a script with `nft`, as one transaction.
    Nft(String),
    /// Runs a script with `iptables-restore`, as one transaction per table.
    Iptables {
        /// The program.
        family: Family,
        /// Which tables it changes.
        variant: Variant,
        /// The script.
        script: String,
    },
    /// Has the relay of the network serve more ports, on sockets that are bound already. Starts it if it does not run.
    ServePorts {
        /// The relay.
        relay: Launch,
        /// The ports.
        ports: Vec<RelayedPort>,
    },
    /// Has the relay serve some ports no more, and ends their connections. It ends with its last port.
    CeasePorts {
        /// The relay.
        relay: Launch,
        /// The ports.
        ports: Vec<RelayedPort>,
    },
    /// Ends a process that the state does not know any more, or that serves one port for an earlier version.
    EndProcess {
        /// What it is.
        what: String,
        /// The process.
        process: RelayProcess,
    },
    /// Forgets stale UDP flows: they would keep to their old translation, or go on without one. One action for all ports of
    /// a change, because the kernel's whole table has to be searched.
    FlushConntrack(Stale),
}

impl Action {
    /// Whether it gives something that exists another value, so that the old one can be set again whatever has happened.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        matches!(self, Self::SetLink { .. } | Self::SetSysctl { .. } | Self::SetContainerSysctl { .. })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddNetns(name) => write!(f, "ip netns add {name}"),
            Self::MountNetns { name, from, .. } => {
                let path = Path::new(NETNS_DIR).join(name.as_str());
                write!(f, "touch {0} && mount --bind {1} {0}", path.display(), from.display())
            }
            Self::DeleteNetns(name) => write!(f, "ip netns delete {name}"),
            Self::AddBridge { name, mac, mtu } => {
                write!(f, "ip link add name {name} address {mac} mtu {mtu} type bridge stp_state 0")
            }
            Self::AddVeth(pair) => fmt_veth(f, pair),
            Self::DeleteLink(name) => write!(f, "ip link delete dev {name}"),
            Self::SetLink { place, name, change } => fmt_link(f, place, name, change),
            Self::AddAddress { place, name, address } => fmt_add_address(f, place, name, *address),
            Self::DeleteAddress { place, name, address } => {
                write!(f, "{} address delete {address} dev {name}", place.ip())
            }
            Self::AddDefaultRoute { place, gateway } => fmt_route(f, place, "add", *gateway),
            Self::DeleteDefaultRoute { place, gateway } => fmt_route(f, place, "delete", *gateway),
            Self::AddConnectedRoute { place, name, address } => {
                fmt_connected(f, place, "add", name, *address)
            }
            Self::DeleteConnectedRoute { place, name, address } => {
                fmt_connected(f, place, "delete", name, *address)
            }
            Self::AddRule { family, iif } => fmt_rule(f, *family, "add", iif),
            Self::DeleteRule { family, iif } => fmt_rule(f, *family, "delete", iif),
            Self::AddLocalRoute(family) => fmt_local_route(f, *family, "add"),
            Self::DeleteLocalRoute(family) => fmt_local_route(f, *family, "delete"),
            Self::Block(block) => {
                let action = if block.is_exception() { "allow" } else { "block" };
                write!(f, "ip xfrm policy add {block} action {action} priority {}", block.priority())
            }
            Self::Unblock(block) => write!(f, "ip xfrm policy delete {block}"),
            Self::SetSysctl { key, value } => write!(f, "sysctl -w {key}={value}"),
            Self::SetContainerSysctl { netns, key, value } => {
                write!(f, "nsenter --net={} sysctl -w {key}={value}", netns.display())
            }
            Self::WriteFile { path, text } => fmt_input(f, &format!("cat > {}", path.display()), text),
            Self::RemoveFile(path) => write!(f, "rm {}", path.display()),
            Self::Nft(script) => fmt_input(f, "nft -f -", script),
            Self::Iptables { family, variant, script } => {
                fmt_input(f, &format!("{} --noflush -w 5", family.restore(*variant)), script)
            }
            Self::ServePorts { relay, ports } => fmt_serve(f, relay, ports),
            Self::CeasePorts { relay, ports } => fmt_cease(f, relay, ports),
            Self::EndProcess { process, .. } => write!(f, "kill {}", process.pid),
            Self::FlushConntrack(stale) => fmt_flush(f, stale),
        }
    }
}

/// A command with what it reads.
fn fmt_input(f: &mut fmt::Formatter<'_>, command: &str, input: &str) -> fmt::Result {
    write!(f, "{command} <<'EOF'\n{}\nEOF", input.trim_end())
}

/// The control socket of a relay.
fn control(relay: &Launch) -> String {
    relay.state_dir.join(CONTROL).display().to_string()
}

fn fmt_serve(f: &mut fmt::Formatter<'_>, relay: &Launch, ports: &[RelayedPort]) -> fmt::Result {
    write!(f, "{} ctl --control {} add", relay.program.display(), control(relay))?;
    Ranges::of(ports).options().try_for_each(|options| write!(f, " {options}"))
}

fn fmt_cease(f: &mut fmt::Formatter<'_>, relay: &Launch, ports: &[RelayedPort]) -> fmt::Result {
    let (program, control) = (relay.program.display(), control(relay));
    let remove = |name| format!("{program} ctl --control {control} remove --cut {name}");
    f.write_str(&Ranges::of(ports).names().map(remove).collect::<Vec<_>>().join("\n"))
}

fn fmt_veth(f: &mut fmt::Formatter<'_>, pair: &VethPair) -> fmt::Result {
    let VethPair { host, host_mac, container_mac, mtu, netns } = pair;
    let netns = netns_name(netns).map_or_else(|| netns.display().to_string(), str::to_owned);
    write!(f, "ip link add name {host} address {host_mac} mtu {mtu} type veth ")?;
    write!(f, "peer name {CONTAINER_INTERFACE} address {container_mac} mtu {mtu} netns {netns}")
}

fn fmt_link(f: &mut fmt::Formatter<'_>, place: &NetnsRef, name: &IfName, change: &LinkChange) -> fmt::Result {
    if let LinkChange::Hairpin(on) = change {
        let state = if *on { "on" } else { "off" };
        return write!(f, "{}bridge link set dev {name} hairpin {state}", place.exec());
    }
    let set = format!("{} link set dev {name}", place.ip());
    if let LinkChange::Offload(sizes) = change {
        return fmt_offload(f, &set, sizes);
    }
    f.write_str(&set)?;
    match change {
        LinkChange::Up(true) => write!(f, " up"),
        LinkChange::Up(false) => write!(f, " down"),
        LinkChange::Address(mac) => write!(f, " address {mac}"),
        LinkChange::Mtu(mtu) => write!(f, " mtu {mtu}"),
        LinkChange::Alias(alias) => write!(f, " alias '{}'", alias.replace('\'', r"'\''")),
        LinkChange::Master(Some(bridge)) => write!(f, " master {bridge}"),
        LinkChange::Master(None) => write!(f, " nomaster"),
        LinkChange::Stp(on) => write!(f, " type bridge stp_state {}", u8::from(*on)),
        LinkChange::Hairpin(_) | LinkChange::Offload(_) => Ok(()),
    }
}

/// An older `ip` is not told the sizes for IPv4, on which nothing depends.
fn fmt_offload(f: &mut fmt::Formatter<'_>, set: &str, sizes: &OffloadSizes) -> fmt::Result {
    let [options, newer] = sizes.options();
    let newer = if newer.is_empty() { newer } else { format!("{set}{newer} 2>/dev/null || true") };
    let options = if options.is_empty() { options } else { format!("{set}{options}") };
    let line_break = if options.is_empty() || newer.is_empty() { "" } else { "; " };
    write!(f, "{options}{line_break}{newer}")
}

fn fmt_add_address(
    f: &mut fmt::Formatter<'_>,
    place: &NetnsRef,
    name: &IfName,
    address: Cidr,
) -> fmt::Result {
    write!(f, "{} address add {address}", place.ip())?;
    // An address that only this program gives out needs no duplicate detection, and is usable at once without.
    f.write_str(if address.ip.is_ipv4() { " broadcast +" } else { " nodad" })?;
    write!(f, " dev {name}")
}

fn fmt_route(f: &mut fmt::Formatter<'_>, place: &NetnsRef, verb: &str, gateway: IpAddr) -> fmt::Result {
    let family = if gateway.is_ipv6() { " -6" } else { "" };
    write!(f, "{}{family} route {verb} default via {gateway} dev {CONTAINER_INTERFACE}", place.ip())
}

/// As the kernel itself adds it.
fn fmt_connected(
    f: &mut fmt::Formatter<'_>,
    place: &NetnsRef,
    verb: &str,
    name: &IfName,
    address: Cidr,
) -> fmt::Result {
    let (ip, network) = (place.ip(), address.network());
    match address.ip {
        IpAddr::V4(source) => {
            write!(f, "{ip} route {verb} {network} dev {name} proto kernel scope link src {source}")
        }
        IpAddr::V6(_) => {
            write!(f, "{ip} -6 route {verb} {network} dev {name} proto kernel metric {CONNECTED_METRIC}")
        }
    }
}

fn fmt_rule(f: &mut fmt::Formatter<'_>, family: Family, verb: &str, iif: &IfName) -> fmt::Result {
    let ip = family.ip();
    write!(f, "{ip} rule {verb} priority {PRIORITY} iif {iif} fwmark {MARK:#x}/{MARK:#x} lookup {TABLE}")
}

fn fmt_local_route(f: &mut fmt::Formatter<'_>, family: Family, verb: &str) -> fmt::Result {
    write!(f, "{} route {verb} local default dev lo table {TABLE}", family.ip())
}

fn fmt_flush(f: &mut fmt::Formatter<'_>, Stale { ports, subnets }: &Stale) -> fmt::Result {
    let lines = ports.iter().flat_map(|(host, port)| {
        // Replies that came too late for their entry have started another one, from the port.
        ["dst", "src"].map(|end| {
            let ip = host.ip().filter(|ip| !ip.is_unspecified());
            let ip = ip.map_or_else(String::new, |ip| format!(" --orig-{end} {ip}"));
            format!("conntrack -D -p {}{ip} --orig-port-{end} {port}", Protocol::Udp)
        })
    });
    // The answers of what is translated go to the host.
    let outgoing = subnets
        .iter()
        .map(|subnet| format!("conntrack -D -p {} --orig-src {subnet} --reply-dst {subnet}", Protocol::Udp));
    f.write_str(&lines.chain(outgoing).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_ip::HostIp;
    use crate::model::MappingKey;
    use crate::name::Id;

    fn web() -> NetnsRef {
        NetnsRef::Container("/run/netns/web".into())
    }

    fn name(text: &str) -> IfName {
        text.parse().unwrap()
    }

    fn set(place: NetnsRef, change: LinkChange) -> String {
        Action::SetLink { place, name: name("eth0"), change }.to_string()
    }

    #[test]
    fn a_change_of_a_link_reads_as_its_command() {
        let elsewhere = NetnsRef::Container("/proc/7/ns/net".into());
        let sizes = OffloadSizes { gso: Some(524_280), gro: None, gso_ipv4: Some(1), gro_ipv4: None };
        let offload = set(NetnsRef::Host, LinkChange::Offload(sizes));
        assert_eq!(set(web(), LinkChange::Up(true)), "ip -n web link set dev eth0 up");
        assert_eq!(
            set(elsewhere, LinkChange::Up(false)),
            "nsenter --net=/proc/7/ns/net ip link set dev eth0 down"
        );
        assert_eq!(set(NetnsRef::Host, LinkChange::Master(None)), "ip link set dev eth0 nomaster");
        assert_eq!(set(NetnsRef::Host, LinkChange::Hairpin(true)), "bridge link set dev eth0 hairpin on");
        let newer = "ip link set dev eth0 gso_ipv4_max_size 1 2>/dev/null || true";
        assert_eq!(offload, format!("ip link set dev eth0 gso_max_size 524280; {newer}"));
    }

    #[test]
    fn an_address_or_route_reads_as_its_command() {
        let add = |ip: &str, prefix| {
            let address = Cidr { ip: ip.parse().unwrap(), prefix };
            Action::AddAddress { place: web(), name: name("eth0"), address }.to_string()
        };
        assert_eq!(add("172.17.0.2", 16), "ip -n web address add 172.17.0.2/16 broadcast + dev eth0");
        assert_eq!(add("fd00::2", 64), "ip -n web address add fd00::2/64 nodad dev eth0");
        let route = Action::AddDefaultRoute { place: web(), gateway: "fd00::1".parse().unwrap() };
        assert_eq!(route.to_string(), "ip -n web -6 route add default via fd00::1 dev eth0");
    }

    #[test]
    fn a_flush_compares_no_address_for_a_wildcard() {
        let flush = |host: &str| {
            let (ports, subnets) = (vec![(host.parse().unwrap(), 53)], Vec::new());
            Action::FlushConntrack(Stale { ports, subnets }).to_string()
        };
        let all = "conntrack -D -p udp --orig-port-dst 53\nconntrack -D -p udp --orig-port-src 53";
        assert_eq!(flush("*"), all);
        assert_eq!(flush("0.0.0.0"), all);
        assert_eq!(
            flush("10.0.0.11"),
            "conntrack -D -p udp --orig-dst 10.0.0.11 --orig-port-dst 53\nconntrack -D -p udp --orig-src 10.0.0.11 --orig-port-src 53"
        );
    }

    #[test]
    fn the_relay_is_told_which_ports_it_serves() {
        let relay = Launch {
            state_dir: "/run/netns-setup".into(),
            network: Id::from_bytes([7; 32]),
            program: "/usr/bin/rproxy".into(),
        };
        let port = |number| RelayedPort {
            key: MappingKey { proto: Protocol::Tcp, host: HostIp::Any, port: number },
            owner: "web".parse().unwrap(),
            to: ([172, 17, 0, 2], number + 8000).into(),
            keeps_source: false,
        };
        let ports = vec![port(80), port(81)];
        assert_eq!(
            Action::ServePorts { relay: relay.clone(), ports: ports.clone() }.to_string(),
            "/usr/bin/rproxy ctl --control /run/netns-setup/relay.sock add --host [::]:80-81 --to 172.17.0.2:8080-8081 --proto tcp"
        );
        assert_eq!(
            Action::CeasePorts { relay, ports }.to_string(),
            "/usr/bin/rproxy ctl --control /run/netns-setup/relay.sock remove --cut web/tcp/[::]:80-81"
        );
    }
}
