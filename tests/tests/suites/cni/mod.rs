//! The CNI plugin `rproxy-portmap`, called as runtimes call it, behind Debian's plugins `bridge` and `host-local`.

mod calls;
mod containerd;
mod crash;
mod node;
mod podman;
mod refused;
mod traffic;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![traffic, calls, refused, crash, podman, containerd]
}
