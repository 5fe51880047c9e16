//! Ports that other processes attach to `rproxy --attach`, as `rproxy-shim` does for a container runtime.

mod ends;
mod hostile;
mod limits;
pub(crate) mod scene;
mod served;
mod stop;
mod upgrade;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![served, ends, stop, upgrade, limits, hostile]
}
