//! The UDP relay.

mod conntrack;
mod contract;
mod eviction;
mod flows;
mod programs;
mod relay;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![contract, relay, flows, eviction, conntrack, programs]
}
