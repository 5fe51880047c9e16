//! What a command can fail with, as one line for the user.

use std::io;

use nix::sys::signal::Signal;

use crate::action::{Action, LinkChange, NetnsRef};
use crate::apply::ApplyError;
use crate::executor::ActionError;
use crate::firewall::detect::DetectError;
use crate::ipam::IpamError;
use crate::model::{Firewall, MappingKey, Via};
use crate::name::Name;
use crate::netns::NetnsError;
use crate::observe::ObserveError;
use crate::plan::PlanError;
use crate::reserve::ReserveError;
use crate::state::StateError;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Only the administrator can change interfaces and rules.
    #[error("this needs root: run it with sudo, or as root in a user namespace of its own")]
    NotRoot,
    /// The arguments contradict each other or the network.
    #[error("{0}")]
    Usage(String),
    /// There is no network yet.
    #[error("there is no network: run `netns-setup up` first")]
    NoNetwork,
    /// The network is there, but another one was asked for.
    #[error("the network is up with {is}, not {wanted}: run `netns-setup down` first")]
    OtherNetwork {
        /// What it has.
        is: String,
        /// What was asked for.
        wanted: String,
    },
    /// Another firewall was asked for than the network has.
    #[error("the network is up with --firewall {0}: run `netns-setup down` first to change it")]
    OtherFirewall(Firewall),
    /// An earlier command did not finish.
    #[error(
        "an earlier command was interrupted: run `netns-setup repair` to finish it, or `netns-setup down`"
    )]
    Unfinished,
    /// A signal came before anything was done.
    #[error("ended by {0}; nothing was changed")]
    Interrupted(Signal),
    /// No such container.
    #[error("there is no container {0}: `netns-setup list` shows them")]
    NoContainer(Name),
    /// The name has a container already.
    #[error("the name {0} is taken: choose another, or detach it first")]
    NameTaken(Name),
    /// Two containers cannot have one host port.
    #[error("host port {key} is published by {owner} already: unpublish it there, or choose another")]
    PortTaken {
        /// The port.
        key: MappingKey,
        /// The container that has it.
        owner: Name,
    },
    /// The same port, carried in another way.
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
    /// `-P` without ports.
    #[error("{0} exposes no ports: name them with --expose when attaching, or publish with -p")]
    NothingExposed(Name),
    /// The relay's program is missing.
    #[error("rproxy is neither beside netns-setup nor in PATH: name it with --rproxy, or use --via dnat")]
    NoRelay,
    /// What is there differs from the state.
    #[error("{} found: run `netns-setup repair`", differences(.0.len()))]
    Differs(Vec<String>),
    /// What differs is not ours to change.
    #[error("{} found that only you can mend, as the lines above say", differences(.0.len()))]
    Unmendable(Vec<String>),
    /// A kernel parameter could not be read.
    #[error("cannot read {key}: {source}")]
    Sysctl {
        /// Which.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not have what is asked of it.
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
    /// The plan could not be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The plan could not be carried out.
    #[error(transparent)]
    Apply(#[from] Box<ApplyError>),
    /// The system could not be looked at.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// The state could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no address to give.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// There is no firewall to use.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// A namespace that was given is no good.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A host port could not be bound.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
}

impl Error {
    /// What was found to differ, if that is the error.
    #[must_use]
    pub fn differences(&self) -> &[String] {
        match self {
            Self::Differs(differences) | Self::Unmendable(differences) => differences,
            _ => &[],
        }
    }

    /// The status that the process ends with: 2 for a mistake in the arguments, 128 and the number of a signal that
    /// came, 1 for everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        // As a shell reports the end by a signal.
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

fn differences(count: usize) -> String {
    if count == 1 { "1 difference".to_owned() } else { format!("{count} differences") }
}

/// Says what is wrong when `action` is what would mend it.
#[must_use]
pub fn finding(action: &Action) -> String {
    match action {
        Action::AddNetns(name) => format!("the network namespace {name} is missing"),
        Action::DeleteNetns(name) => format!("the network namespace {name} is left over"),
        Action::AddBridge { name, .. } => format!("the bridge {name} is missing"),
        Action::AddVeth(pair) => format!("the veth pair {} is missing", pair.host),
        Action::DeleteLink(name) => format!("the interface {name} is left over"),
        Action::SetLink { place, name, change } => link_finding(&format!("{name}{}", inside(place)), change),
        Action::AddAddress { place, name, address } => format!("{name}{} lacks {address}", inside(place)),
        Action::AddDefaultRoute { place, gateway } => {
            format!("the default route by {gateway}{} is missing", inside(place))
        }
        Action::SetSysctl { key, value } => format!("{key} is not {value}"),
        Action::WriteFile { path, .. } => format!("{} differs", path.display()),
        Action::RemoveFile(path) => format!("{} is left over", path.display()),
        Action::Nft(_) => "the nft table differs".to_owned(),
        Action::Iptables { family, .. } => format!("the rules that {} lists differ", family.save()),
        Action::StartRelay(relay) => format!("the relay of {} does not run", relay.key),
        Action::StopRelay { relay, .. } => format!("the relay of {} is left over", relay.key),
        Action::DeleteAddress { .. } | Action::DeleteDefaultRoute { .. } | Action::FlushConntrack { .. } => {
            format!("to do: {action}")
        }
    }
}

fn link_finding(link: &str, change: &LinkChange) -> String {
    match change {
        LinkChange::Up(_) => format!("{link} is down"),
        LinkChange::Address(mac) => format!("the address of {link} is not {mac}"),
        LinkChange::Mtu(mtu) => format!("the MTU of {link} is not {mtu}"),
        LinkChange::Master(Some(bridge)) => format!("{link} is not a port of {bridge}"),
        LinkChange::Master(None) => format!("{link} is a port of a bridge"),
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
