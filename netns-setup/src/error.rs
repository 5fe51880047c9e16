//! The errors of commands, as one line for the user.

use std::io;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::action::{Action, LinkChange, NetnsRef};
use crate::apply::ApplyError;
use crate::block::Block;
use crate::events::WatchError;
use crate::executor::ActionError;
use crate::firewall::detect::DetectError;
use crate::firewall::nft;
use crate::firewall::transparent::ProbeError;
use crate::ipam::IpamError;
use crate::model::{Firewall, MappingKey, Via};
use crate::name::{IfName, Name};
use crate::netlink::NetlinkError;
use crate::netns::NetnsError;
use crate::observe::ObserveError;
use crate::plan::PlanError;
use crate::registry::ClaimError;
use crate::relayed::Listed;
use crate::reserve::ReserveError;
use crate::shared::Shared;
use crate::state::{COPIES, StateError};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Only the administrator can change interfaces and rules.
    #[error("this needs root: run it with sudo, or as root in a user namespace of its own")]
    NotRoot,
    /// Root lacks the privilege, as in a container, or in a user namespace without a network namespace of its own.
    #[error(transparent)]
    NotAllowed(NetlinkError),
    /// The arguments contradict each other or the network.
    #[error("{0}")]
    Usage(String),
    /// There is no network yet.
    #[error("there is no network: run `netns-setup up` first")]
    NoNetwork,
    /// There is a network, and nobody knows any more what is on it.
    #[error(
        "netns-setup made the bridge {bridge}, but the state of its network and the copy in {COPIES} are gone, and with them \
         which containers and ports it has: name its --state-dir if there is another one; else {}",
        way_out(*.is_removable)
    )]
    Orphaned {
        /// The bridge.
        bridge: IfName,
        /// Whether `down` removes it.
        is_removable: bool,
    },
    /// It cannot be told whether anybody knows a network.
    #[error(
        "netns-setup made a bridge of which no state is known, and it may be that of the copy {}, which cannot be read: \
         `netns-setup repair` with the --state-dir of the network writes it again; remove it if there is none",
        .0.display()
    )]
    UnreadableCopy(PathBuf),
    /// Another network is up than the one requested.
    #[error("the network is up with {is}, not {wanted}: run `netns-setup down` first")]
    OtherNetwork {
        /// Its properties.
        is: String,
        /// The requested properties.
        wanted: String,
    },
    /// Another firewall is in use than the one requested.
    #[error("the network is up with --firewall {0}: run `netns-setup down` first to change it")]
    OtherFirewall(Firewall),
    /// Another firewall marks packets of transparent sockets than the one requested.
    #[error(
        "packets of transparent sockets are marked with --firewall {0}: run `netns-setup transparent down` first to change it"
    )]
    OtherMarking(Firewall),
    /// What transparent sockets need is not set up.
    #[error("{} found: run `netns-setup transparent up{options}`{}", differences(.found.len()), except(.found.len(), *.unmendable))]
    NotTransparent {
        /// The differences, those last that it cannot repair.
        found: Vec<String>,
        /// How many it cannot repair.
        unmendable: usize,
        /// The options that set it up.
        options: String,
    },
    /// Packets of transparent sockets cannot be marked.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// An earlier command did not finish.
    #[error(
        "an earlier command was interrupted: run `netns-setup repair` to finish it, or `netns-setup down`"
    )]
    Unfinished,
    /// A signal arrived before any change.
    #[error("ended by {0}; nothing was changed")]
    Interrupted(Signal),
    /// No such container.
    #[error("there is no container {0}: `netns-setup list` shows them")]
    NoContainer(Name),
    /// Several containers are meant.
    #[error("the identifiers of {one} and {another} begin with {text}: write more digits, or the name")]
    Ambiguous {
        /// What was given.
        text: Name,
        /// A container.
        one: Name,
        /// Another one.
        another: Name,
    },
    /// Another container has the name.
    #[error("the name {0} is taken: choose another, or detach it first")]
    NameTaken(Name),
    /// Two containers cannot use the same host port.
    #[error("host port {key} is published by {owner} already: unpublish it there, or choose another")]
    PortTaken {
        /// The port.
        key: MappingKey,
        /// The container that has it.
        owner: Name,
    },
    /// The port is published with another `--via`.
    #[error("{0} is published with --via {1} already: unpublish it first to change that")]
    OtherVia(MappingKey, Via),
    /// None of the ports of a range is free.
    #[error("none of the host ports of the range is free: {0}")]
    NoFreePort(#[source] ReserveError),
    /// The container does not publish that.
    #[error("{name} does not publish {what}: `netns-setup list` shows what it does")]
    NotPublished {
        /// The container.
        name: Name,
        /// What was to be unpublished.
        what: String,
    },
    /// No container publishes that.
    #[error("no container publishes {0}: `netns-setup list` shows what they do")]
    NotPublishedAtAll(String),
    /// `-P` without ports.
    #[error("{0} exposes no ports: name them with --expose when attaching, or publish with -p")]
    NothingExposed(Name),
    /// The relay's program is missing.
    #[error("rproxy is neither beside netns-setup nor in PATH: name it with --rproxy, or use --via dnat")]
    NoRelay,
    /// The system differs from the state.
    #[error("{} found: run `netns-setup repair`{}", differences(.found.len()), except(.found.len(), *.unmendable))]
    Differs {
        /// The differences, those last that cannot be repaired.
        found: Vec<String>,
        /// How many cannot be repaired.
        unmendable: usize,
    },
    /// Some differences cannot be repaired by this program.
    #[error("{} found that netns-setup cannot repair, see above", differences(.0.len()))]
    Unmendable(Vec<String>),
    /// Changes cannot be noticed.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Signals cannot be awaited.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] io::Error),
    /// The network namespace could not be told from others.
    #[error("cannot tell which network namespace this is: {0}")]
    Namespace(#[source] io::Error),
    /// A kernel parameter could not be read.
    #[error("cannot read {key}: {source}")]
    Sysctl {
        /// The parameter.
        key: String,
        /// The cause.
        source: io::Error,
    },
    /// The kernel lacks a required parameter.
    #[error("this kernel has no {0}: leave out --subnet6, or enable IPv6")]
    NoSysctl(String),
    /// No random bits.
    #[error("cannot read /dev/urandom: {0}")]
    Random(#[source] io::Error),
    /// The output could not be written.
    #[error("cannot write the output: {0}")]
    Output(#[source] io::Error),
    /// A step of the demonstration failed.
    #[error("demo: {0}")]
    Demo(String),
    /// What an earlier network left could not be removed.
    #[error("everything else is removed, but: {0}")]
    Leftover(#[source] ActionError),
    /// The plan could not be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The plan could not be carried out.
    #[error(transparent)]
    Apply(#[from] Box<ApplyError>),
    /// The system could not be observed.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// Another state directory of the same host has it.
    #[error(transparent)]
    Shared(#[from] Shared),
    /// The state could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// No address is available.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// No firewall is available.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// The given namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A host port could not be bound.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
}

impl From<ClaimError> for Error {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Shared(shared) => shared.into(),
            ClaimError::State(state) => state.into(),
        }
    }
}

impl Error {
    /// The differences, if that is the error.
    #[must_use]
    pub fn differences(&self) -> &[String] {
        match self {
            Self::Unmendable(found) | Self::Differs { found, .. } | Self::NotTransparent { found, .. } => {
                found
            }
            _ => &[],
        }
    }

    /// The exit status: 2 for a mistake in the arguments, 128 plus the number of a signal, 1 for everything
    /// else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        // As a shell reports it.
        let ended_by = |signal: Signal| u8::try_from(128 + signal as i32).unwrap_or(1);
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted(signal) => ended_by(*signal),
            Self::Apply(error) => match error.failed.source {
                ActionError::Interrupted(signal) => ended_by(signal),
                _ => 1,
            },
            _ => 1,
        }
    }
}

fn way_out(is_removable: bool) -> &'static str {
    match is_removable {
        true => "run `netns-setup down`, which removes all but the namespaces, and then `netns-setup up`",
        false => {
            "remove it, its veth pairs and what `iptables-save` shows of it, and then run `netns-setup up`"
        }
    }
}

fn differences(count: usize) -> String {
    if count == 1 { "1 difference".to_owned() } else { format!("{count} differences") }
}

/// What a command that repairs leaves of `count` differences.
fn except(count: usize, unmendable: usize) -> String {
    match (count - unmendable, unmendable) {
        (_, 0) => String::new(),
        (mendable, 1) => format!(" for {mendable} of them; the last one is not for netns-setup to repair"),
        (mendable, rest) => {
            format!(" for {mendable} of them; the last {rest} are not for netns-setup to repair")
        }
    }
}

/// Describes the difference that `action` would repair.
#[must_use]
pub fn finding(action: &Action) -> String {
    match action {
        Action::AddNetns(name) => format!("the network namespace {name} is missing"),
        Action::MountNetns { name, .. } => {
            format!("the network namespace {name} has lost its name, and lives on")
        }
        Action::DeleteNetns(name) => format!("the network namespace {name} is left over"),
        Action::AddBridge { name, .. } => format!("the bridge {name} is missing"),
        Action::AddVeth(pair) => format!("the veth pair {} is missing", pair.host),
        Action::DeleteLink(name) => format!("the interface {name} is left over"),
        Action::SetLink { place, name, change } => link_finding(&format!("{name}{}", inside(place)), change),
        Action::AddAddress { place, name, address } => format!("{name}{} lacks {address}", inside(place)),
        Action::AddRule { .. } | Action::AddLocalRoute(_) => format!("missing: {}", added(action)),
        Action::DeleteRule { .. } | Action::DeleteLocalRoute(_) => format!("left over: {}", added(action)),
        Action::AddDefaultRoute { place, gateway } => {
            format!("the default route by {gateway}{} is missing", inside(place))
        }
        Action::AddConnectedRoute { place, name, address } => {
            format!("the route to {} by {name}{} is missing", address.network(), inside(place))
        }
        Action::Block(block) => format!("the IPsec policy that {} is missing", purpose(*block)),
        Action::Unblock(block) => format!("the IPsec policy that {} is left over", purpose(*block)),
        Action::SetSysctl { key, value } => format!("{key} is not {value}"),
        Action::SetContainerSysctl { netns, key, value } => {
            format!("{key} in {} is not {value}", netns.display())
        }
        Action::WriteFile { path, .. } => format!("{} differs", path.display()),
        Action::RemoveFile(path) => format!("{} is left over", path.display()),
        Action::Nft(script) => format!("the nft table {} differs", nft::table_of(script)),
        Action::Iptables { family, variant, .. } => {
            format!("the rules that {} lists differ", family.save(*variant))
        }
        Action::ServePorts { ports, .. } => format!("the relay does not serve {}", Listed(ports)),
        Action::CeasePorts { ports, .. } => format!("the relay still serves {}", Listed(ports)),
        Action::EndProcess { what, .. } => format!("{what} is left over"),
        Action::FlushConntrack(_) => "UDP flows may have begun without the rules".to_owned(),
        Action::DeleteAddress { .. }
        | Action::DeleteDefaultRoute { .. }
        | Action::DeleteConnectedRoute { .. } => format!("to do: {action}"),
    }
}

fn purpose(block: Block) -> String {
    match block {
        Block::Routed(subnet) => format!("blocks packets routed to {subnet}"),
        Block::ToLoopback(subnet) => format!("blocks packets of {subnet} to the host's loopback addresses"),
        Block::Reply(ip) => format!("lets replies to {ip} pass"),
    }
}

/// A rule or route as `ip` lists it.
fn added(action: &Action) -> String {
    let command = action.to_string();
    let listed = command.replace(" add ", " ").replace(" delete ", " ");
    listed.strip_prefix("ip ").unwrap_or(&listed).to_owned()
}

fn link_finding(link: &str, change: &LinkChange) -> String {
    match change {
        LinkChange::Up(_) => format!("{link} is down"),
        LinkChange::Address(mac) => format!("the address of {link} is not {mac}"),
        LinkChange::Mtu(mtu) => format!("the MTU of {link} is not {mtu}"),
        LinkChange::Alias(alias) => format!("the alias of {link} is not {alias}"),
        LinkChange::Master(Some(bridge)) => format!("{link} is not a port of {bridge}"),
        LinkChange::Master(None) => format!("{link} is a port of a bridge"),
        LinkChange::Stp(on) => {
            format!("the spanning tree protocol of {link} is {}", if *on { "off" } else { "on" })
        }
        LinkChange::Hairpin(on) => {
            format!("hairpin of {link} is {}", if *on { "off" } else { "on" })
        }
        LinkChange::Offload(_) => format!("{link} takes smaller packets than it could"),
    }
}

fn inside(place: &NetnsRef) -> String {
    match place {
        NetnsRef::Host => String::new(),
        NetnsRef::Container(path) => format!(" in {}", path.display()),
    }
}
