//! `rproxy` as the userland proxy of dockerd.

mod client_address;
mod contract;
mod daemon;
mod dockerd;
mod rootless;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![contract, dockerd, client_address, rootless]
}
