//! Names with an address at which nobody answered: what they stand for may have changed.
//!
//! There is one list for the process. Whoever connects adds to it, and [`Names`](super::Names) waits for it.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use rproxy_mapping::backend::HostName;
use tokio::sync::Notify;

static SUSPECTS: LazyLock<Mutex<HashSet<HostName>>> = LazyLock::new(Mutex::default);
static ADDED: Notify = Notify::const_new();

/// Reports that an address of `name` could not be reached.
pub(crate) fn report(name: &HostName) {
    let is_new = SUSPECTS.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
    if is_new {
        ADDED.notify_one();
    }
}

/// Waits until there are some.
pub(super) async fn added() {
    ADDED.notified().await;
}

/// Takes all.
pub(super) fn take() -> HashSet<HostName> {
    std::mem::take(&mut *SUSPECTS.lock().unwrap_or_else(PoisonError::into_inner))
}
