//! A descriptor in reserve, for a client when none is available.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// A descriptor held in reserve. Clients that look after this process are needed most when there are no others.
#[derive(Clone, Debug)]
pub(crate) struct Spare(Arc<Mutex<Option<OwnedFd>>>);

impl Spare {
    /// A duplicate of `socket`'s descriptor, if there is room for one.
    pub(crate) fn of(socket: &impl AsFd) -> Self {
        Self(Arc::new(Mutex::new(socket.as_fd().try_clone_to_owned().ok())))
    }

    /// Closes the descriptor. Returns whether there was one.
    pub(crate) fn release(&self) -> bool {
        self.slot(|slot| slot.take()).is_some()
    }

    /// Keeps the descriptor that `end` returns as the reserve, if that was used. `end` shuts the connection of a
    /// client down. A descriptor that is closed instead would be taken by something else.
    pub(crate) fn refill(&self, end: impl FnOnce() -> Option<OwnedFd>) {
        self.slot(|slot| {
            if slot.is_none() {
                *slot = end();
            }
        });
    }

    fn slot<T>(&self, change: impl FnOnce(&mut Option<OwnedFd>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_reserve_is_used_once_and_refilled_by_the_next_client_that_leaves() {
        let spare = Spare::of(&UnixStream::pair().unwrap().0);
        spare.refill(|| panic!("it is there"));
        assert!(spare.release() && !spare.release());
        spare.refill(|| None);
        assert!(!spare.release());
        spare.refill(|| Some(UnixStream::pair().unwrap().0.into()));
        assert!(spare.release());
    }
}
