//! What the UDP tasks of a process share. It is used when flows open and end, not for datagrams.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};

use super::local_ports::LocalPorts;
use super::origin::OwnPorts;
use super::send::BudgetUse;
use super::source::AddrsInUse;

/// Descriptors reserved for other purposes than flows.
pub(super) const RESERVED_DESCRIPTORS: usize = 64;

/// The resources that the UDP tasks of a process share.
#[derive(Debug)]
pub(crate) struct Shared {
    ports: Mutex<LocalPorts>,
    own_ports: Mutex<OwnPorts>,
    /// The addresses of clients that flows use.
    pub(super) client_addrs: Arc<AddrsInUse>,
    /// The flows of all tasks.
    flows: AtomicUsize,
    /// The client sockets of all tasks.
    pub(super) client_sockets: AtomicUsize,
    /// The budgets for queued datagrams: towards backends, and towards clients.
    pub(super) to_backends: Arc<BudgetUse>,
    pub(super) to_clients: Arc<BudgetUse>,
    tasks: AtomicUsize,
    /// The listeners that are served, of all tasks.
    listeners: AtomicUsize,
    /// Descriptors for flows, unless a mapping requests more.
    pub(super) descriptors: usize,
    /// Whether the tasks continue without a listener, because others may be added.
    may_be_idle: bool,
}

impl Shared {
    /// The resources of this host. `beside_tcp` says whether TCP connections need descriptors, too. Unless the tasks
    /// `may_be_idle`, one fails with the last listener of all.
    pub(crate) fn of_this_host(beside_tcp: bool, may_be_idle: bool) -> Self {
        Self {
            ports: Mutex::new(LocalPorts::of_this_host()),
            own_ports: Mutex::default(),
            client_addrs: Arc::default(),
            flows: AtomicUsize::new(0),
            client_sockets: AtomicUsize::new(0),
            to_backends: Arc::default(),
            to_clients: Arc::default(),
            tasks: AtomicUsize::new(0),
            listeners: AtomicUsize::new(0),
            descriptors: descriptors_for_flows(beside_tcp),
            may_be_idle,
        }
    }

    /// Records another task.
    pub(super) fn add_task(&self) {
        self.tasks.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of tasks.
    pub(super) fn tasks(&self) -> usize {
        self.tasks.load(Ordering::Relaxed)
    }

    /// The local ports that flows use.
    pub(super) fn ports(&self) -> MutexGuard<'_, LocalPorts> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that another listener is served.
    pub(super) fn add_listener(&self) {
        self.listeners.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a listener is served no longer.
    pub(super) fn remove_listener(&self) {
        self.listeners.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether there is nothing to serve, now and later.
    pub(super) fn is_over(&self) -> bool {
        !self.may_be_idle && self.listeners.load(Ordering::Relaxed) == 0
    }

    /// The addresses of the listeners of all tasks.
    pub(super) fn own_ports(&self) -> MutexGuard<'_, OwnPorts> {
        self.own_ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Descriptors for flows, unless a mapping requests more.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// The maximum number of flows of all tasks, unless a mapping requests more: as many as there are descriptors for
    /// them, or half of the local ports.
    pub(crate) fn most_flows(&self) -> usize {
        self.descriptors.min(self.ports().count() / 2)
    }

    /// The flows of all tasks.
    pub(crate) fn flows(&self) -> usize {
        self.flows.load(Ordering::Relaxed)
    }

    /// Records that a task has `now` flows and had `before`.
    pub(super) fn count_flows(&self, before: usize, now: usize) {
        self.flows.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }
}

/// The descriptors for flows. TCP connections may need as many.
fn descriptors_for_flows(beside_tcp: bool) -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if beside_tcp { limit / 2 } else { limit.saturating_sub(RESERVED_DESCRIPTORS) }
}
