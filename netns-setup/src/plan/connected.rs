//! The routes that the kernel adds with the addresses of an interface, and somebody may have removed.

use super::{Plan, Step};
use crate::action::{Action, NetnsRef};
use crate::addr::Cidr;
use crate::name::IfName;
use crate::observed::{Link, Side};

/// Adds those of `addresses` that are missing. An interface that is down, or lacks the address, gets them with that.
pub(super) fn mend(
    (place, name): (&NetnsRef, IfName),
    side: &Side,
    link: &Link,
    addresses: impl IntoIterator<Item = Cidr>,
    plan: &mut Plan,
) {
    // In a VRF, they are in its table.
    if !link.up || link.master.is_some() {
        return;
    }
    for address in addresses.into_iter().filter(|address| side.has_address(link, *address)) {
        if !side.is_connected(link, address.network()) {
            let place = place.clone();
            let delete = Action::DeleteConnectedRoute { place: place.clone(), name, address };
            plan.push(Step::new(Action::AddConnectedRoute { place, name, address }, [delete]));
        }
    }
}
