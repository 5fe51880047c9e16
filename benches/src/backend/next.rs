//! What follows a step of a connection.

use crate::sock::Interest;

/// The result of a step.
#[derive(Clone, Copy)]
pub(super) enum Next {
    /// The connection continues unchanged.
    Stay,
    /// The connection continues once this event occurs.
    Wait(Interest),
    /// The connection has ended.
    Close,
}
