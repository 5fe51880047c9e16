//! All suites of the project, each a module: the behaviour of the programs, observed from outside.
//!
//! Each case runs in a process of its own, see [`testkit::suite`].

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

mod attach;
mod attached;
mod cni;
mod config;
mod control;
mod control_sockets;
mod docker;
mod faults;
mod harness;
mod hostile;
mod interfaces;
mod live;
mod logs;
mod metrics;
mod names;
mod netns_setup;
mod nginx;
mod packages;
mod promises;
mod proxy_protocol;
mod records;
mod relay;
mod rootlessport;
mod sandbox;
mod sctp;
mod service;
mod shim;
mod soak;
mod source;
mod standalone;
mod status_page;
mod system_calls;
mod traffic_class;
mod udp;
mod unix;
mod unix_hosts;
mod upgrade;
mod vm;
mod watch;

use std::process::ExitCode;

use testkit::{role, suite};

fn main() -> ExitCode {
    if let Some(code) = played() {
        return code;
    }
    suite::run(testkit::modules![
        harness,
        standalone,
        relay,
        records,
        docker,
        rootlessport,
        cni,
        udp,
        unix,
        unix_hosts,
        traffic_class,
        nginx,
        config,
        control,
        control_sockets,
        names,
        interfaces,
        attached,
        live,
        logs,
        watch,
        metrics,
        service,
        upgrade,
        attach,
        sandbox,
        sctp,
        hostile,
        faults,
        netns_setup,
        system_calls,
        packages,
        promises,
        proxy_protocol,
        source,
        status_page,
        shim,
        vm,
        soak,
    ])
}

/// Plays a role of a suite to its end, if this process was started to play one.
fn played() -> Option<ExitCode> {
    let words = role::asked()?;
    let role: Vec<&str> = words.iter().map(String::as_str).collect();
    [harness::play, faults::roles::play, netns_setup::faults::play, sandbox::play]
        .iter()
        .find_map(|play| play(&role))
}
