//! Changes what is published, so that a call that is killed at any point leaves nothing that the next one does not see.
//!
//! The state is written before anything is set up and after anything is taken away, so nothing is there that the state
//! does not have. While a change is made, it says so: the next call then loads the rules anew, whatever they are. What the
//! relay serves is asked each time, so a call also restores what a relay has lost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use rproxy_mapping::addr::Protocol;
use socket2::Socket;

use super::attachment::AttachmentId;
use super::error::CniError;
use super::state::{Node, Store};
use super::{holder, localnet, return_path, rules};
use crate::model::{MappingKey, Via};
use crate::registry::Registry;
use crate::relay::message::Status;
use crate::relay::{client, find, process};
use crate::relayed::{Launch, RelayedPort};
use crate::reserve::{self, ReserveError};
use crate::shared::Shared;
use crate::stale::{self, Stale};
use crate::taken::Taken;

/// What the relay has to do: serve the ports of `add`, for which there are these sockets unless it has them, and those
/// of `remove` no more.
#[derive(Default)]
struct Relayed {
    remove: Vec<MappingKey>,
    add: Vec<RelayedPort>,
    sockets: Vec<Socket>,
}

/// Publishes the ports that `after` has beyond `before` for the attachment `own`, and withdraws those that it lacks.
/// Returns what other attachments have lost and do not get back.
///
/// # Errors
/// If a port of `own` cannot be had, the rules cannot be changed or the relay cannot serve. Nothing is changed then.
pub(super) fn publish(
    store: &Store,
    before: &Node,
    after: Node,
    own: &AttachmentId,
    launch: &Launch,
) -> Result<Vec<String>, CniError> {
    check_alone(before, store)?;
    check_attachments(before, &after, own)?;
    check_networks(before, &after, store)?;
    // What is in the way of the new ports is gone by then.
    let planned = plan(before, &after, Some(own), launch).inspect_err(|_| restore(before, launch));
    let (relayed, lost) = planned?;
    let wanted = after.wanted_localnet();
    let allowed = localnet::to_allow(&before.localnet, &wanted)?;
    store.save(&after.changing(allowed.clone()))?;
    let set_up = || {
        let localnet = localnet::settle(&allowed, &wanted)?;
        // Whoever adds what is there already may want it mended.
        let known = known(before).filter(|before| before.attachment(own).is_none());
        rules::change(known, &after)?;
        let return_path = after.return_path();
        return_path::change(store.path(), &known.map(Node::return_path).unwrap_or_default(), &return_path)?;
        return_path::change(store.path(), &before.return_path(), &return_path)?;
        // All or nothing, and last.
        relay(&relayed, launch)?;
        Ok(localnet)
    };
    match set_up() {
        Ok(localnet) => {
            forget_udp(before, &after)?;
            store.save(&after.settled(localnet))?;
            Ok(lost)
        }
        Err(error) => {
            undo(store, before, &after, &allowed)?;
            drop(relayed);
            restore(before, launch);
            clean(store);
            Err(error)
        }
    }
}

/// Sets up what was there before a change that failed. If that fails too, the next call does it.
fn undo(store: &Store, before: &Node, after: &Node, allowed: &[String]) -> Result<(), CniError> {
    let return_path = return_path::change(store.path(), &after.return_path(), &before.return_path());
    let rules = rules::change(None, before);
    let localnet = localnet::settle(allowed, &before.wanted_localnet());
    match (rules, return_path, localnet) {
        (Ok(()), Ok(()), Ok(localnet)) => store.save(&before.clone().settled(localnet)),
        _ => store.save(&before.changing(allowed.to_vec())),
    }
}

/// Has the relay serve what it did, if it does not. If that fails, the next call tries again.
fn restore(before: &Node, launch: &Launch) {
    drop(plan(before, before, None, launch).and_then(|(relayed, _lost)| relay(&relayed, launch)));
}

/// Withdraws the ports that `after` lacks. Goes on after failures; what could not be taken away stays in the state.
/// Returns what other attachments have lost and do not get back.
///
/// # Errors
/// If something could not be taken away.
pub(super) fn withdraw(
    store: &Store,
    before: &Node,
    after: Node,
    launch: &Launch,
) -> Result<Vec<String>, CniError> {
    let mut failed = Vec::new();
    // A full disk keeps nothing from being taken away.
    drop(store.save(&before.changing(before.localnet.clone())));
    failed.extend(rules::change(known(before), &after).err().map(CniError::from));
    let lost = withdraw_from_relay(before, &after, launch).unwrap_or_else(|error| {
        failed.push(error);
        Vec::new()
    });
    failed.extend(return_path::change(store.path(), &before.return_path(), &after.return_path()).err());
    failed.extend(forget_udp(before, &after).err());
    let localnet = localnet::settle(&before.localnet, &after.wanted_localnet());
    let localnet = localnet.unwrap_or_else(|error| {
        failed.push(error);
        Vec::new()
    });
    if failed.is_empty() {
        store.save(&after.settled(localnet))?;
        clean(store);
        return Ok(lost);
    }
    Err(if failed.len() == 1 { failed.remove(0) } else { CniError::Several(failed) })
}

/// Has the relay serve what is left. If it cannot serve what others have lost, it at least serves no more than that.
fn withdraw_from_relay(before: &Node, after: &Node, launch: &Launch) -> Result<Vec<String>, CniError> {
    let (relayed, mut lost) = plan(before, after, None, launch)?;
    if let Err(error) = relay(&relayed, launch) {
        client::cease(&launch.state_dir, &relayed.remove)?;
        lost.push(format!("the relay does not serve the ports of others: {error}"));
    }
    Ok(lost)
}

/// Removes what a relay that was killed has left, if none runs.
fn clean(store: &Store) {
    if matches!(client::status(store.path()), Ok(None)) {
        store.remove_relay_files();
    }
}

/// What the rules are now, if that is certain.
fn known(before: &Node) -> Option<&Node> {
    (!before.is_changing).then_some(before)
}

/// Refuses a second state directory.
fn check_alone(before: &Node, store: &Store) -> Result<(), CniError> {
    let own = store.path().to_owned();
    other_directory(before, store).map_or(Ok(()), |other| Err(CniError::SecondDirectory { own, other }))
}

/// Another state directory with ports in this network namespace: both would have one table of rules, and each would take away
/// what the other has in it. It is only looked for while this one has none; afterwards there cannot be another one.
pub(super) fn other_directory(before: &Node, store: &Store) -> Option<PathBuf> {
    let own = store.path().canonicalize().unwrap_or_else(|_| store.path().to_owned());
    let is_first = before.attachments.is_empty();
    let dirs = if is_first { find::state_dirs() } else { Vec::new() };
    dirs.into_iter().find(|dir| *dir != own && Store::is_at(dir))
}

/// Refuses a port of another attachment.
fn check_attachments(before: &Node, after: &Node, own: &AttachmentId) -> Result<(), CniError> {
    let mut ports = after.attachment(own).into_iter().flat_map(|attachment| &attachment.ports);
    let held = ports.find_map(|port| Some((port.key, before.holder(port.key, own)?)));
    held.map_or(Ok(()), |(key, holder)| Err(taken(own, key, format!("container {}", holder.id))))
}

/// Refuses a port of a network of `netns-setup`, which the kernel alone may serve.
fn check_networks(before: &Node, after: &Node, store: &Store) -> Result<(), CniError> {
    let registry = Registry::of(store.path()).map_err(CniError::Namespace)?;
    let others = registry.others(&crate::model::Topology::default())?;
    let others: Vec<_> = others.iter().map(|other| (other, Taken::of(&other.state.owned()))).collect();
    let known = before.ports_by_key();
    let new = after.ports().filter(|port| !known.contains_key(&port.key)).map(|port| port.key);
    let published = |key| {
        let mut others = others.iter();
        others.find_map(|(other, taken)| Some(Shared::port(key, taken.owner_of(key)?, &other.state_dir)))
    };
    new.filter_map(published).next().map_or(Ok(()), |shared| Err(shared.into()))
}

/// Compares what the relay serves, which is probably that of `before`, with what it has to, and binds what it lacks. What
/// others than `own` have lost and cannot be bound is returned as text.
fn plan(
    before: &Node,
    after: &Node,
    own: Option<&AttachmentId>,
    launch: &Launch,
) -> Result<(Relayed, Vec<String>), CniError> {
    let (before, after) = (before.effective(), after.effective());
    let expected: Vec<_> = before.ports_by_key().into_values().collect();
    let status = match client::compare(&launch.state_dir, &expected)? {
        Some(status) => status,
        None => {
            // One whose directory was removed has its ports for ever.
            find::supervisors_of(&launch.state_dir).into_iter().try_for_each(process::stop)?;
            Status::default()
        }
    };
    let served: BTreeMap<_, _> = status.ports.iter().map(|port| (port.key, port)).collect();
    let refused: BTreeSet<_> = status.unserved.iter().map(|unserved| unserved.key).collect();
    let wanted = after.ports_by_key();
    let new = wanted.keys().filter(|key| !served.contains_key(key));
    let new: BTreeSet<_> = new.map(|key| (key.proto, key.port)).collect();
    let (in_the_way, remove): (Vec<MappingKey>, Vec<_>) = served
        .keys()
        .filter(|key| !wanted.contains_key(key))
        .partition(|key| new.contains(&(key.proto, key.port)));
    if !in_the_way.is_empty() {
        client::cease(&launch.state_dir, &in_the_way)?;
    }
    let mut relayed = Relayed { remove, ..Relayed::default() };
    let mut lost = Vec::new();
    for attachment in &after.attachments {
        let is_own = own == Some(&attachment.id);
        // What the relay cannot serve now is no success for whoever asks for it; for others, it tries again by itself.
        let is_missing = |port: &&RelayedPort| {
            served.get(&port.key) != Some(port) || is_own && refused.contains(&port.key)
        };
        for port in attachment.ports.iter().filter(is_missing) {
            if !served.contains_key(&port.key) {
                match bind(&attachment.id, port.key) {
                    Ok(socket) => relayed.sockets.push(socket),
                    Err(error) if is_own => return Err(error),
                    Err(error) => {
                        lost.push(format!("{error}; it is not served any more"));
                        continue;
                    }
                }
            }
            relayed.add.push(port.clone());
        }
    }
    Ok((relayed, lost))
}

fn relay(relayed: &Relayed, launch: &Launch) -> Result<(), CniError> {
    let Relayed { remove, add, sockets } = relayed;
    if add.is_empty() && remove.is_empty() {
        return Ok(());
    }
    sockets.iter().try_for_each(reserve::open).map_err(crate::relay::RelayError::Socket)?;
    Ok(client::change(launch, remove, add, sockets)?)
}

/// Binds a port for a container, or takes over the socket that its runtime holds for it.
fn bind(id: &AttachmentId, key: MappingKey) -> Result<Socket, CniError> {
    match reserve::bind(key.proto, key.host, key.port) {
        Ok((socket, _port)) => Ok(socket),
        Err(ReserveError::InUse { .. }) => holder::reserved_by_nerdctl(&id.container, key).ok_or_else(|| {
            let holder = holder::describe(key).unwrap_or_else(|| "another program".to_owned());
            taken(id, key, holder)
        }),
        Err(error) => Err(error.into()),
    }
}

fn taken(id: &AttachmentId, key: MappingKey, holder: String) -> CniError {
    CniError::PortTaken { port: key.to_string(), container: id.container.clone(), holder }
}

/// Ends the UDP flows of ports that are translated otherwise from now on.
fn forget_udp(before: &Node, after: &Node) -> Result<(), CniError> {
    let is_udp = |port: &RelayedPort| port.key.proto == Protocol::Udp;
    if !before.ports().chain(after.ports()).any(is_udp) {
        return Ok(());
    }
    let (before, after) = (before.effective(), after.effective());
    fn by_key(
        node: &Node,
        is_udp: impl Fn(&RelayedPort) -> bool,
    ) -> BTreeMap<MappingKey, (Via, &RelayedPort)> {
        let ports = node
            .attachments
            .iter()
            .flat_map(|attachment| attachment.ports.iter().map(|port| (port.key, (attachment.via, port))));
        ports.filter(|(_key, (_via, port))| is_udp(port)).collect()
    }
    let (old, new) = (by_key(&before, is_udp), by_key(&after, is_udp));
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let changed = keys.into_iter().filter(|key| old.get(key) != new.get(key));
    let ports: Vec<_> = changed.map(|key| (key.host, key.port)).collect();
    if ports.is_empty() {
        return Ok(());
    }
    stale::forget_udp(&Stale { ports, ..Stale::default() }).map_err(CniError::Conntrack)
}
