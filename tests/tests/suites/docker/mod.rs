//! `rproxy` as the userland proxy of dockerd.

mod contract;
mod dockerd;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![contract, dockerd]
}
