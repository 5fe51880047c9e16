//! Clients that wait until a connection to their backend can begin: for a local port while connections use all of them, or
//! for room in the backlog of a Unix socket.
//!
//! There is a queue per backend, because a port in use towards one backend is free towards others. It is
//! served in order: new clients do not try while others wait. Only the first client retries,
//! whenever a connection to the backend has ended, because each attempt makes the kernel search all ports.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rproxy_mapping::addr::BackendAddr;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::tcp::backoff::Backoff;

/// The number of waiting clients. While it is 0, nobody needs to lock [`QUEUES`].
static WAITING: AtomicUsize = AtomicUsize::new(0);

static QUEUES: LazyLock<Mutex<HashMap<BackendAddr, Arc<Queue>>>> = LazyLock::new(Mutex::default);

/// The clients that wait for one backend.
#[derive(Default)]
struct Queue {
    /// Held by the first client in the queue.
    turn: tokio::sync::Mutex<()>,
    /// Notified when a connection to the backend has ended.
    freed: Notify,
}

/// The longest delay between two attempts for a Unix socket. One costs little, and only the first client makes any.
const LONGEST_FOR_UNIX: Duration = Duration::from_millis(40);

/// Whether a client waits for `backend`.
pub(super) fn is_awaited(backend: &BackendAddr) -> bool {
    WAITING.load(Ordering::SeqCst) > 0 && queues().contains_key(backend)
}

/// A connection to `backend` has ended, so its port may be free, and the server may accept another one.
pub(super) fn freed(backend: &BackendAddr) {
    if WAITING.load(Ordering::SeqCst) > 0
        && let Some(queue) = queues().get(backend)
    {
        queue.freed.notify_one();
    }
}

/// Calls `attempt` when it is this client's turn, and repeats it until it returns `Some`, which means that the connection
/// has begun.
pub(super) async fn wait<T>(backend: &BackendAddr, mut attempt: impl FnMut() -> Option<T>) -> T {
    let waiting = Waiting::new(backend.clone());
    let _turn = waiting.queue.turn.lock().await;
    let mut backoff = match backend.unix_addr() {
        None => Backoff::default(),
        Some(_) => Backoff::up_to(LONGEST_FOR_UNIX),
    };
    loop {
        if let Some(begun) = attempt() {
            // The next client may succeed, too.
            waiting.queue.freed.notify_one();
            return begun;
        }
        // Other programs use ports, too, and do not notify us when they release one. Nor does a server that accepts from
        // its backlog.
        timeout(backoff.next_delay(), waiting.queue.freed.notified()).await.ok();
    }
}

fn queues() -> MutexGuard<'static, HashMap<BackendAddr, Arc<Queue>>> {
    QUEUES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in a queue, released when dropped.
struct Waiting {
    backend: BackendAddr,
    queue: Arc<Queue>,
}

impl Waiting {
    fn new(backend: BackendAddr) -> Self {
        WAITING.fetch_add(1, Ordering::SeqCst);
        let queue = queues().entry(backend.clone()).or_default().clone();
        Self { backend, queue }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITING.fetch_sub(1, Ordering::SeqCst);
        let mut queues = queues();
        // The references of the map and of this value.
        if Arc::strong_count(&self.queue) == 2 {
            queues.remove(&self.backend);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::atomic::AtomicU32;
    use std::task::Poll;

    use super::*;
    use crate::runtime::new_runtime;

    /// Held by a test that has clients waiting, as all share the queues.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn ports_are_given_in_order_and_towards_each_backend_apart() {
        let _alone = ALONE.lock().unwrap();
        new_runtime().unwrap().block_on(async {
            let [one, other]: [BackendAddr; 2] =
                ["192.0.2.1:80", "192.0.2.2:80"].map(|addr| addr.parse().unwrap());
            let free = Arc::new(AtomicU32::new(0));
            let (got, mut gets) = tokio::sync::mpsc::unbounded_channel();
            let take = |free: &AtomicU32| {
                free.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |free| free.checked_sub(1)).ok()
            };
            for client in 0..3 {
                let (free, got, one) = (free.clone(), got.clone(), one.clone());
                tokio::spawn(async move {
                    wait(&one, || take(&free)).await;
                    got.send(client).unwrap();
                });
                tokio::task::yield_now().await;
            }
            assert!(is_awaited(&one) && !is_awaited(&other));
            timeout(Duration::from_secs(9), wait(&other, || Some(())))
                .await
                .expect("nobody else waits for it");
            for client in 0..3 {
                free.store(1, Ordering::SeqCst);
                freed(&one);
                assert_eq!(gets.recv().await, Some(client));
            }
            tokio::task::yield_now().await;
            assert!(!is_awaited(&one) && queues().is_empty() && WAITING.load(Ordering::SeqCst) == 0);
        });
    }

    #[test]
    fn the_first_client_tries_again_at_once_when_a_port_is_freed() {
        const TRIES: u32 = 20;
        let _alone = ALONE.lock().unwrap();
        new_runtime().unwrap().block_on(async {
            let backend = "192.0.2.3:80".parse().unwrap();
            let tries = Cell::new(0);
            let attempt = || {
                tries.set(tries.get() + 1);
                (tries.get() > TRIES).then_some(())
            };
            let mut waits = pin!(wait(&backend, attempt));
            for earlier in 0..TRIES {
                assert!(poll_fn(|cx| Poll::Ready(waits.as_mut().poll(cx))).await.is_pending());
                // Timers, which also make it try again, take much longer for so many.
                assert!(tries.get() > earlier, "{} tries after {earlier} ports", tries.get());
                freed(&backend);
            }
            waits.await;
        });
    }
}
