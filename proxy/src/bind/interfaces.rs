//! The network interfaces of this machine.

use std::os::fd::OwnedFd;

use nix::net::if_::if_nameindex;
use rproxy_mapping::interfaces::Interfaces;
use rustix::net::netdevice::{index_to_name, name_to_index};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// The interfaces of this process's network namespace.
#[derive(Clone, Copy, Debug)]
pub struct HostInterfaces;

impl HostInterfaces {
    /// The name of the interface with `index`, if it exists (netdevice(7), `SIOCGIFNAME`).
    pub fn name_of(self, index: u32) -> Option<String> {
        index_to_name(any_socket()?, index).ok()
    }
}

impl Interfaces for HostInterfaces {
    fn index_of(&self, name: &str) -> Option<u32> {
        name_to_index(any_socket()?, name).ok()
    }

    fn example(&self) -> Option<String> {
        let all = if_nameindex().ok()?;
        let mut names = all.iter().filter_map(|interface| interface.name().to_str().ok());
        let loopback = "lo";
        Some(names.find(|name| *name != loopback).unwrap_or(loopback).to_owned())
    }
}

/// A socket for interface queries. if_nametoindex(3) opens a socket of a family that a confined process may not use.
fn any_socket() -> Option<OwnedFd> {
    let socket = |family| socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    socket(AddressFamily::INET).or_else(|_no_ipv4| socket(AddressFamily::INET6)).ok()
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::{AddrError, ScopedIp};

    use super::*;

    #[test]
    fn names_are_those_of_this_machine() {
        assert_eq!(HostInterfaces.index_of("lo"), Some(1));
        assert_eq!(HostInterfaces.name_of(1).as_deref(), Some("lo"));
        assert_eq!(HostInterfaces.index_of("nosuchif"), None);
    }

    #[test]
    fn the_interface_that_is_suggested_is_there() {
        let Err(AddrError::NoZone { example, .. }) = ScopedIp::parse("fe80::1", &HostInterfaces) else {
            panic!("it needs one")
        };
        assert!(ScopedIp::parse(&example, &HostInterfaces).is_ok(), "{example}");
    }
}
