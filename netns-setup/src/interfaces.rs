//! The network interfaces of the host, by name and by index.

use nix::net::if_::{if_nameindex, if_nametoindex};
use rproxy_mapping::interfaces::Interfaces;

/// The interfaces of this process's network namespace.
#[derive(Debug, Clone, Copy)]
pub struct HostInterfaces;

impl HostInterfaces {
    /// The name of the interface with `index`, if it exists.
    #[must_use]
    pub fn name_of(self, index: u32) -> Option<String> {
        let all = if_nameindex().ok()?;
        let found = all.iter().find(|interface| interface.index() == index)?;
        found.name().to_str().ok().map(str::to_owned)
    }
}

impl Interfaces for HostInterfaces {
    fn index_of(&self, name: &str) -> Option<u32> {
        if_nametoindex(name).ok()
    }

    fn example(&self) -> Option<String> {
        let all = if_nameindex().ok()?;
        let mut names = all.iter().filter_map(|interface| interface.name().to_str().ok());
        let loopback = "lo";
        Some(names.find(|name| *name != loopback).unwrap_or(loopback).to_owned())
    }
}
