//! Faults under load: of backends, the network, limits, and the process itself. Each is injected in namespaces while
//! other clients are served. Every connection and byte is accounted for, and afterwards nothing is left: no descriptor,
//! pipe, flow or task, and no use of the processor.

mod backends;
mod congestion;
mod families;
mod flows;
mod limits;
mod listeners;
mod loops;
mod network;
mod process;
pub(crate) mod roles;
mod scene;
mod streams;
mod surroundings;

use testkit::require::Need;
use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![
        backends,
        network,
        limits,
        listeners,
        loops,
        streams,
        flows,
        congestion,
        families,
        process,
        surroundings,
    ]
}

fn case(name: &str, body: fn()) -> Case {
    Case::new(name, body).needs(&[Need::Root, Need::Program("ip")])
}
