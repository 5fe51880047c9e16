//! `netns-setup` sets up the container network around `rproxy`: a bridge, veth pairs, addresses and the
//! firewall.
//!
//! A pure function ([`plan`]) compares the wanted state ([`model`]) with the observed one ([`observed`]) and
//! returns an ordered list of steps. Each step can be printed as the equivalent command ([`action`]),
//! applied, and undone ([`apply`]). The intent is written to the state directory before the first change and
//! confirmed after the last ([`state`]).

#![forbid(unsafe_code)]

pub mod action;
pub mod addr;
pub mod apply;
pub mod block;
pub mod cli;
pub mod cni;
pub mod commands;
pub mod demo;
pub mod descriptors;
pub mod error;
pub mod events;
pub mod executor;
pub mod family;
pub mod firewall;
pub mod hints;
pub mod host_ip;
pub mod interfaces;
pub mod ipam;
pub mod kernel;
pub mod living;
pub mod model;
pub mod name;
pub mod netlink;
pub mod netns;
mod notifications;
pub mod observe;
pub mod observed;
pub mod parameters;
pub mod persist;
pub mod plan;
pub mod private_dir;
pub mod publish;
pub mod registry;
pub mod relay;
pub mod relayed;
pub mod reserve;
pub mod shared;
pub mod signals;
pub mod stale;
pub mod state;
pub mod sysctl;
pub mod taken;
pub mod transparent;
pub mod watch;

#[cfg(test)]
mod testdata;
