//! `netns-setup`, in network and mount namespaces of each case's own: what it makes, what it lets through,
//! what is left when it fails, and how it grows.

pub(crate) mod faults;
mod persist;
mod rules;
mod scale;
mod stage;
mod story;
mod traffic;
mod usage;

use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![story, usage, rules, traffic, faults, persist, scale]
}
