//! `rproxy` publishes container ports: it listens on host addresses and relays to backends.
//!
//! One engine, [`server::Server`], serves [`mapping::Mapping`]s. Two front ends start it:
//! [`docker`], the userland proxy of dockerd, and [`standalone`], for people and scripts.

pub mod access;
pub mod activation;
pub mod addr;
mod backoff;
pub mod bound;
pub mod change;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod demo;
mod descriptors;
pub mod docker;
pub mod dscp;
pub mod duration;
pub mod endpoint;
pub mod family;
pub mod limits;
pub mod listen;
mod listening;
mod log_limit;
mod log_writer;
pub mod loops;
pub mod mapping;
pub mod name;
pub mod overlap;
pub mod plan;
mod poll;
pub mod ports;
pub mod publish;
mod refusals;
pub mod registry;
pub mod runtime;
pub mod sandbox;
pub mod server;
mod service;
pub mod signals;
mod sink;
mod spanless;
pub mod standalone;
pub mod stats;
mod sweep;
pub mod systemd;
mod task;
mod tcp;
pub mod telemetry;
#[cfg(test)]
mod testdata;
mod udp;
pub mod upgrade;
pub mod whereabouts;
mod worker;
