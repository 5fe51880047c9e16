//! What two state directories on one host cannot both have.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::model::{Firewall, MappingKey, Topology};
use crate::name::{IfName, Name};
use crate::taken::Taken;

/// What two state directories cannot both have.
#[derive(Debug, thiserror::Error)]
pub struct Shared {
    pub(crate) what: What,
    state_dir: PathBuf,
}

/// The part of a network.
#[derive(Debug)]
pub(crate) enum What {
    /// The bridge.
    Bridge(IfName),
    /// Docker's chains.
    Chains,
    /// A published port, and the container that has it.
    Port(MappingKey, Name),
    /// What transparent sockets need.
    Transparent,
}

impl Shared {
    /// The first thing that `desired` adds to `before` and that `other` has, the network of another state directory.
    #[must_use]
    pub fn between(
        before: &Topology,
        desired: &Topology,
        other: &Topology,
        state_dir: &Path,
    ) -> Option<Self> {
        let what = what_is_shared(before, desired, other)?;
        Some(Self { what, state_dir: state_dir.to_owned() })
    }

    /// A port that a container of the network with another directory has.
    #[must_use]
    pub fn port(key: MappingKey, owner: &Name, state_dir: &Path) -> Self {
        Self { what: What::Port(key, owner.clone()), state_dir: state_dir.to_owned() }
    }
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dir = self.state_dir.display();
        match &self.what {
            What::Bridge(bridge) => write!(
                f,
                "the bridge {bridge} belongs to the network with --state-dir {dir}: use that, or choose another name with --bridge"
            ),
            What::Chains => write!(
                f,
                "Docker's chains belong to the network with --state-dir {dir}: use that, or --firewall nft"
            ),
            What::Port(key, owner) => write!(
                f,
                "host port {key} is published by {owner} of the network with --state-dir {dir}: unpublish it there, or choose another"
            ),
            What::Transparent => write!(
                f,
                "what transparent sockets need is set up with --state-dir {dir}: use that, or take it down there first"
            ),
        }
    }
}

fn what_is_shared(before: &Topology, desired: &Topology, other: &Topology) -> Option<What> {
    if let (None, Some(ours), Some(theirs)) = (&before.network, &desired.network, &other.network) {
        if ours.bridge == theirs.bridge {
            return Some(What::Bridge(ours.bridge));
        }
        // Docker's chains have names that are not a network's.
        if ours.firewall == Firewall::Iptables && theirs.firewall == Firewall::Iptables {
            return Some(What::Chains);
        }
    }
    if before.transparent.is_none() && desired.transparent.is_some() && other.transparent.is_some() {
        return Some(What::Transparent);
    }
    let known: BTreeSet<_> = before.mappings().map(|(_, _, known)| known.key()).collect();
    let new = desired.mappings().map(|(_, _, mapping)| mapping.key());
    let mut new = new.filter(|key| !known.contains(key));
    let taken = Taken::of(other);
    new.find_map(|key| Some(What::Port(key, taken.owner_of(key)?.clone())))
}
