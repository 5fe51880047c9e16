//! `netns-setup`, in network and mount namespaces of each case: what it creates, which traffic passes, what is left
//! when it fails, and how it scales.

pub(crate) mod faults;
mod firewall_managers;
mod hindered;
mod host;
mod identity;
mod lost_state;
mod persist;
mod ports;
mod refused;
mod relay;
mod relay_life;
mod relay_process;
mod rules;
mod scale;
pub(crate) mod stage;
mod state;
mod story;
mod traffic;
mod transparent;
mod usage;
mod watch;
mod watch_ends;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![
        story,
        usage,
        rules,
        host,
        traffic,
        transparent,
        faults,
        hindered,
        identity,
        persist,
        ports,
        relay,
        refused,
        relay_life,
        relay_process,
        scale,
        state,
        watch,
        watch_ends,
        lost_state
    ]
}
