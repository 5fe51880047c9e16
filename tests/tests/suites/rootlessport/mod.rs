//! `rproxy` as the program `rootlessport` of rootless Podman.

mod contract;
mod podman;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![contract, podman]
}
