//! Workers: threads with a single-threaded runtime each, started on demand.
//!
//! A connection is served by one worker from accept to close, so threads share nothing on the data path. The
//! main thread is the first worker. Another worker is started when a connection arrives and all running
//! workers are serving one, up to one worker per processor. A mapping that is idle, or serves one client at a
//! time, therefore needs one thread.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Notify, oneshot};
use tracing::warn;

use crate::log::limit::LogLimit;
use crate::runtime::{new_runtime, start_thread};

/// Stack of a worker's thread. The deepest calls are those of the log; connections are on the heap.
const STACK_SIZE: usize = 256 * 1024;

/// How long to wait before trying again to start a worker. A failed attempt costs ten system calls, which
/// every connection would otherwise pay.
const RETRY: Duration = Duration::from_secs(5);

/// The workers of a process.
#[derive(Debug)]
pub(crate) struct Workers {
    running: Mutex<Running>,
    /// Notified when a worker has served its last connection.
    idle: Arc<Notify>,
    /// The maximum: one worker per processor available to the process (sched_getaffinity(2), and its cgroup's
    /// quota).
    most: OnceLock<usize>,
}

#[derive(Debug)]
struct Running {
    workers: Vec<Worker>,
    /// When the last attempt to start a worker failed, if it did.
    failed: Option<Instant>,
}

#[derive(Debug)]
struct Worker {
    slots: Arc<Slots>,
    /// Tasks that relay datagrams now. Each counts as one connection.
    relays: Arc<AtomicUsize>,
    /// Dropping it ends the worker's own thread, if it has one.
    _stop: Option<oneshot::Sender<()>>,
}

/// The connections of a worker.
#[derive(Debug)]
struct Slots {
    /// That of the worker.
    number: usize,
    taken: AtomicUsize,
    runtime: Handle,
    /// As in [`Workers`].
    idle: Arc<Notify>,
}

impl Worker {
    fn new(number: usize, runtime: Handle, idle: Arc<Notify>, stop: Option<oneshot::Sender<()>>) -> Self {
        let slots = Arc::new(Slots { number, taken: AtomicUsize::new(0), runtime, idle });
        Self { slots, relays: Arc::default(), _stop: stop }
    }

    fn start(number: usize, idle: Arc<Notify>) -> io::Result<Self> {
        let runtime = new_runtime()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let serve = |runtime: Runtime| drop(runtime.block_on(stopped));
        match start_thread(&format!("rproxy-{number}"), STACK_SIZE, runtime, serve) {
            Ok(()) => Ok(Self::new(number, handle, idle, Some(stop))),
            Err((error, runtime)) => {
                // Dropping it inside another runtime would panic.
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    fn connections(&self) -> usize {
        self.slots.taken.load(Ordering::Relaxed)
    }

    fn runtime(&self) -> &Handle {
        &self.slots.runtime
    }

    fn load(&self) -> usize {
        self.connections() + self.relays.load(Ordering::Relaxed)
    }
}

impl Workers {
    /// Makes the runtime of the calling thread the first worker.
    pub(crate) fn new(first: Handle) -> Self {
        let idle = Arc::<Notify>::default();
        let workers = vec![Worker::new(0, first, idle.clone(), None)];
        Self { running: Mutex::new(Running { workers, failed: None }), idle, most: OnceLock::new() }
    }

    /// Counts the processors before confinement blocks the files with the quota.
    pub(crate) fn look_at_processors(&self) {
        self.most();
    }

    /// The maximum number of workers.
    pub(crate) fn most(&self) -> usize {
        *self.most.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
    }

    /// Reserves a slot for a connection on the worker with the fewest.
    pub(crate) fn slot(&self) -> WorkerSlot {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (_number, idlest) = self.idlest(&mut running);
        idlest.slots.taken.fetch_add(1, Ordering::Relaxed);
        WorkerSlot(idlest.slots.clone())
    }

    /// Reserves a slot for a task that begins to relay datagrams: on the worker `home` where it runs, unless that is
    /// busy, another one is not, and the task `may_move`.
    pub(crate) fn relay_slot(&self, home: usize, may_move: bool) -> RelaySlot {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let load = running.workers[home].load();
        let (idlest, _worker) =
            if may_move && load > 0 { self.idlest(&mut running) } else { (home, &running.workers[home]) };
        let worker = if running.workers[idlest].load() < load { idlest } else { home };
        let chosen = &running.workers[worker];
        chosen.relays.fetch_add(1, Ordering::Relaxed);
        RelaySlot { worker, runtime: chosen.runtime().clone(), relays: chosen.relays.clone() }
    }

    /// The worker with the least to do, a new one if all have something.
    fn idlest<'a>(&self, running: &'a mut Running) -> (usize, &'a Worker) {
        if running.workers.iter().all(|worker| worker.load() > 0) {
            self.grow(running);
        }
        // Of equals the last one, because the first also accepts connections.
        let workers = running.workers.iter().enumerate().rev();
        workers.min_by_key(|(_number, worker)| worker.load()).expect("the first worker is always there")
    }

    /// Starts another worker if there is a processor for it. If that fails, the running workers serve
    /// everything, and it is tried again later.
    fn grow(&self, Running { workers, failed }: &mut Running) {
        static FAILED: LogLimit = LogLimit::new();

        if workers.len() >= self.most() || failed.is_some_and(|at| at.elapsed() < RETRY) {
            return;
        }
        match Worker::start(workers.len(), self.idle.clone()) {
            Ok(worker) => {
                *failed = None;
                workers.push(worker);
            }
            Err(error) => {
                // Repeated failures say nothing new.
                if failed.replace(Instant::now()).is_none()
                    && let Some(suppressed) = FAILED.permit()
                {
                    let running = workers.len();
                    warn!(%error, suppressed, running, "cannot start another worker; the running ones serve all");
                }
            }
        }
    }

    /// The runtimes of all running workers.
    pub(crate) fn runtimes(&self) -> Vec<Handle> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.workers.iter().map(|worker| worker.runtime().clone()).collect()
    }

    /// The number of running workers.
    pub(crate) fn running(&self) -> usize {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).workers.len()
    }

    /// The number of connections being served.
    pub(crate) fn connections(&self) -> usize {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.workers.iter().map(Worker::connections).sum()
    }

    /// Waits until no connection is being served.
    pub(crate) async fn until_idle(&self) {
        loop {
            let mut notified = std::pin::pin!(self.idle.notified());
            // From here on no notification is missed.
            notified.as_mut().enable();
            if self.connections() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// The slot on a worker of a task that relays datagrams, released when dropped.
#[derive(Debug)]
pub(crate) struct RelaySlot {
    worker: usize,
    runtime: Handle,
    relays: Arc<AtomicUsize>,
}

impl RelaySlot {
    /// The number of the worker.
    pub(crate) fn worker(&self) -> usize {
        self.worker
    }

    /// The runtime of the worker.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for RelaySlot {
    fn drop(&mut self) {
        self.relays.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's slot on a worker, released when dropped.
#[derive(Debug)]
pub(crate) struct WorkerSlot(Arc<Slots>);

impl WorkerSlot {
    /// The number of the worker.
    pub(crate) fn worker(&self) -> usize {
        self.0.number
    }

    /// The runtime that serves the connection.
    pub(crate) fn runtime(&self) -> Handle {
        self.0.runtime.clone()
    }
}

impl Drop for WorkerSlot {
    fn drop(&mut self) {
        if self.0.taken.fetch_sub(1, Ordering::Release) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_does_not_go_where_datagrams_are_relayed() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone());
        let most = thread::available_parallelism().map_or(1, usize::from);
        let relay = workers.relay_slot(0, false);
        assert_eq!((relay.worker(), workers.slot().worker()), (0, 1.min(most - 1)));
        assert_eq!(workers.connections(), 0);
        drop(relay);
        let slots: Vec<_> = (0..most).map(|_| workers.slot()).collect();
        assert!(slots.iter().any(|slot| slot.worker() == 0));
    }

    #[test]
    fn a_task_that_relays_datagrams_leaves_a_busy_worker_if_it_may() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone());
        let most = thread::available_parallelism().map_or(1, usize::from);
        let first = workers.relay_slot(0, true);
        assert_eq!(first.worker(), 0, "its own worker is idle");
        assert_eq!(workers.relay_slot(0, false).worker(), 0);
        let second = workers.relay_slot(0, true);
        assert_eq!(second.worker(), 1.min(most - 1));
        drop(first);
        assert_eq!(workers.relay_slot(0, true).worker(), 0);
        assert_eq!(workers.relay_slot(second.worker(), true).worker(), 0);
    }

    #[test]
    fn connections_spread_over_workers_that_start_on_demand() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone());
        let most = thread::available_parallelism().map_or(1, usize::from);
        let running = || workers.running.lock().unwrap().workers.len();

        drop(workers.slot());
        drop(workers.slot());
        assert_eq!(running(), 1, "one connection at a time needs one worker");

        let slots: Vec<_> = (0..most * 3).map(|_| workers.slot()).collect();
        assert_eq!(running(), most);
        assert_eq!(workers.connections(), most * 3);
        for worker in &workers.running.lock().unwrap().workers {
            assert_eq!(worker.load(), 3);
        }
        let other = thread::spawn(move || drop(slots));
        runtime.block_on(workers.until_idle());
        other.join().unwrap();
        assert_eq!(workers.connections(), 0);
    }
}
