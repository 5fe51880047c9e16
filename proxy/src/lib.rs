//! `rproxy` publishes container ports: it listens on host addresses and relays to backends.
//!
//! One [`engine`] serves [`Mapping`](rproxy_mapping::Mapping)s. Three front ends start it: [`docker`], the userland proxy
//! of dockerd, [`rootlessport`], that of rootless Podman, and [`standalone`], for people and scripts. The rooms are listed from the top down: none uses one above it.

pub mod standalone;

pub mod cli;
pub mod config;
pub mod ctl;
pub mod upgrade;

pub mod control;
pub mod docker;
pub mod metrics;
pub mod plane;
pub mod rootlessport;

pub mod engine;

mod tcp;
mod udp;

pub mod bind;
pub(crate) mod links;
pub mod names;
pub mod runtime;
pub mod sandbox;
pub mod state;
pub mod systemd;

pub(crate) mod accounts;
pub mod log;
pub mod loops;
pub mod proxy_protocol;
