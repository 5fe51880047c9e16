//! Executes actions on the real system.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use rproxy_mapping::addr::Protocol;
use socket2::Socket;

use crate::action::{Action, NetnsRef};
use crate::executor::{ActionError, Executor};
use crate::firewall::tool::{self};
use crate::host_ip::HostIp;
use crate::model::{MappingKey, Netns};
use crate::name::Name;
use crate::netlink::{Client, NetlinkError, address, link, route, rule, xfrm};
use crate::netns::{self, Handle, NetnsError};
use crate::relay::{RelayError, client, process};
use crate::relayed::{Launch, RelayedPort};
use crate::reserve::{self, ReserveError};
use crate::signals::Signals;
use crate::{persist, stale, sysctl};

/// The system, as seen from the network namespace of the calling thread.
#[derive(Debug, Default)]
pub struct Kernel {
    reserved: BTreeMap<MappingKey, Socket>,
    namespaces: BTreeMap<Name, u64>,
    /// Keeps what was deleted alive until the end: undoing it brings the same namespace back, with its processes.
    deleted: BTreeMap<Name, Handle>,
    /// Created on first use.
    signals: Option<Signals>,
}

impl Executor for Kernel {
    fn run(&mut self, action: &Action) -> Result<(), ActionError> {
        match action {
            Action::AddNetns(name) => self.add_netns(name),
            Action::MountNetns { name, from, cookie } => mount_netns(name, from, *cookie),
            Action::DeleteNetns(name) => self.delete_netns(name),
            Action::SetSysctl { key, value } => {
                sysctl::write(key, value).map_err(|source| ActionError::Sysctl { key: key.clone(), source })
            }
            Action::SetContainerSysctl { netns, key, value } => set_inside(netns, key, value),
            Action::WriteFile { path, text } => {
                persist::write(path, text).map_err(|source| ActionError::File { path: path.clone(), source })
            }
            Action::RemoveFile(path) => {
                std::fs::remove_file(path).map_err(|source| ActionError::File { path: path.clone(), source })
            }
            Action::Nft(script) => Ok(tool::run("nft", &["-f", "-"], script).map(drop)?),
            Action::Iptables { family, variant, script } => {
                Ok(tool::run(family.restore(*variant), &["--noflush", "-w", "5"], script).map(drop)?)
            }
            Action::ServePorts { relay, ports } => self.serve(relay, ports),
            Action::CeasePorts { relay, ports } => {
                let keys: Vec<_> = ports.iter().map(|port| port.key).collect();
                Ok(client::cease(&relay.state_dir, &keys)?)
            }
            Action::EndProcess { process, .. } => Ok(process::stop(*process)?),
            Action::FlushConntrack(stale) => stale::forget_udp(stale).map_err(ActionError::Conntrack),
            Action::Block(block) => Ok(xfrm::block(*block)?),
            Action::Unblock(block) => Ok(xfrm::unblock(*block)?),
            Action::AddBridge { .. }
            | Action::AddVeth(_)
            | Action::DeleteLink(_)
            | Action::SetLink { .. }
            | Action::AddAddress { .. }
            | Action::DeleteAddress { .. }
            | Action::AddDefaultRoute { .. }
            | Action::DeleteDefaultRoute { .. }
            | Action::AddConnectedRoute { .. }
            | Action::DeleteConnectedRoute { .. }
            | Action::AddRule { .. }
            | Action::DeleteRule { .. }
            | Action::AddLocalRoute(_)
            | Action::DeleteLocalRoute(_) => in_place(action),
        }
    }

    fn reserve(&mut self, proto: Protocol, host: HostIp, port: u16) -> Result<u16, ReserveError> {
        let (socket, port) = reserve::bind(proto, host, port)?;
        self.reserved.insert(MappingKey { proto, host, port }, socket);
        Ok(port)
    }

    fn namespaces(&self) -> &BTreeMap<Name, u64> {
        &self.namespaces
    }

    fn interrupted(&mut self) -> Option<Signal> {
        self.signals.get_or_insert_with(Signals::catch).caught()
    }
}

impl Kernel {
    /// The system, for steps that one of these signals ends.
    #[must_use]
    pub fn ended_by(signals: Signals) -> Self {
        Self { signals: Some(signals), ..Self::default() }
    }

    /// Clears a received signal, so that the command that it interrupted can be undone.
    pub fn forget_signal(&mut self) {
        if let Some(signals) = &self.signals {
            signals.forget();
        }
    }

    fn add_netns(&mut self, name: &Name) -> Result<(), ActionError> {
        let cookie = match self.deleted.remove(name) {
            Some(handle) => netns::restore(name, &handle)?,
            None => netns::add(name)?,
        };
        match cookie {
            Some(cookie) => self.namespaces.insert(name.clone(), cookie),
            None => self.namespaces.remove(name),
        };
        Ok(())
    }

    fn delete_netns(&mut self, name: &Name) -> Result<(), ActionError> {
        let handle = Handle::open_path(&Netns::made(name).path)?;
        // Only a file is left of one whose creation was interrupted.
        let is_one = handle.run(|| ()).is_ok();
        netns::delete(name)?;
        if is_one {
            self.deleted.insert(name.clone(), handle);
        }
        Ok(())
    }

    /// Passes the sockets of ports to the relay. Those that are not reserved are bound first.
    fn serve(&mut self, relay: &Launch, ports: &[RelayedPort]) -> Result<(), ActionError> {
        let mut sockets = Vec::with_capacity(ports.len());
        for port in ports {
            let MappingKey { proto, host, port: number } = port.key;
            let socket = match self.reserved.remove(&port.key) {
                Some(socket) => socket,
                None => reserve::bind(proto, host, number)?.0,
            };
            sockets.push(socket);
        }
        sockets.iter().try_for_each(reserve::open).map_err(RelayError::Socket)?;
        Ok(client::serve(relay, ports, &sockets)?)
    }
}

fn mount_netns(name: &Name, from: &Path, cookie: u64) -> Result<(), ActionError> {
    let handle = Handle::open_path(from)?;
    // The number of a process may be another one's by now.
    match handle.cookie()? {
        Some(is) if is == cookie => Ok(netns::restore(name, &handle).map(drop)?),
        _ => Err(NetnsError::Replaced(from.to_owned()).into()),
    }
}

fn set_inside(netns: &Path, key: &str, value: &str) -> Result<(), ActionError> {
    let set = Handle::open_path(netns)?.run(|| sysctl::write(key, value))?;
    // A kernel without IPv6 has none to switch off.
    let set = set.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    });
    set.map_err(|source| ActionError::Sysctl { key: key.to_owned(), source })
}

/// Executes a netlink action in its namespace.
fn in_place(action: &Action) -> Result<(), ActionError> {
    match action {
        Action::SetLink { place: NetnsRef::Container(path), .. }
        | Action::AddAddress { place: NetnsRef::Container(path), .. }
        | Action::DeleteAddress { place: NetnsRef::Container(path), .. }
        | Action::AddDefaultRoute { place: NetnsRef::Container(path), .. }
        | Action::DeleteDefaultRoute { place: NetnsRef::Container(path), .. }
        | Action::AddConnectedRoute { place: NetnsRef::Container(path), .. }
        | Action::DeleteConnectedRoute { place: NetnsRef::Container(path), .. } => {
            Ok(Handle::open_path(path)?.run(|| request(action))??)
        }
        Action::AddVeth(pair) => {
            let netns = Handle::open_path(&pair.netns)?;
            let mut client = Client::open(NETLINK_ROUTE)?;
            Ok(link::add_veth(&mut client, pair, std::os::fd::AsFd::as_fd(&netns))?)
        }
        _ => Ok(request(action)?),
    }
}

fn request(action: &Action) -> Result<(), NetlinkError> {
    let mut client = Client::open(NETLINK_ROUTE)?;
    let client = &mut client;
    match action {
        Action::AddBridge { name, mac, mtu } => link::add_bridge(client, name, *mac, *mtu),
        Action::DeleteLink(name) => match link::delete(client, name) {
            // The peer may be gone already, with its namespace.
            Err(error) if error.is(Errno::ENODEV) => Ok(()),
            other => other,
        },
        Action::SetLink { name, change, .. } => link::set(client, name.as_str(), change),
        Action::AddAddress { name, address, .. } => address::add(client, name.as_str(), *address),
        Action::DeleteAddress { name, address, .. } => address::delete(client, name.as_str(), *address),
        Action::AddDefaultRoute { gateway, .. } => route::add_default(client, *gateway),
        Action::DeleteDefaultRoute { gateway, .. } => route::delete_default(client, *gateway),
        Action::AddConnectedRoute { name, address, .. } => {
            route::add_connected(client, name.as_str(), *address)
        }
        Action::DeleteConnectedRoute { name, address, .. } => {
            route::delete_connected(client, name.as_str(), *address)
        }
        Action::AddRule { family, iif } => rule::add(client, *family, iif),
        Action::DeleteRule { family, iif } => rule::delete(client, *family, iif),
        Action::AddLocalRoute(family) => route::add_local(client, *family),
        Action::DeleteLocalRoute(family) => route::delete_local(client, *family),
        // Not netlink actions, so they are not passed here.
        Action::AddNetns(_)
        | Action::MountNetns { .. }
        | Action::DeleteNetns(_)
        | Action::Block(_)
        | Action::Unblock(_)
        | Action::SetSysctl { .. }
        | Action::SetContainerSysctl { .. }
        | Action::WriteFile { .. }
        | Action::RemoveFile(_)
        | Action::Nft(_)
        | Action::Iptables { .. }
        | Action::ServePorts { .. }
        | Action::CeasePorts { .. }
        | Action::EndProcess { .. }
        | Action::FlushConntrack(_)
        | Action::AddVeth(_) => Ok(()),
    }
}
