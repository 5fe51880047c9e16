//! How many names are looked up at the same time: those that are answered quickly do not wait for others.
//!
//! There are several shares, the first for look-ups that take a moment. One that takes longer moves on to the next share. If
//! that is full, it ends, and begins again there in its turn. Whoever asks again begins where the name's last look-up belonged,
//! so that names whose servers are silent leave the first share alone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

/// Look-ups at the same time, and for how long each may be one of them. Each takes two sockets, and four if it takes long.
const SHARES: [(usize, Option<Duration>); 3] =
    [(64, Some(Duration::from_millis(250))), (32, Some(Duration::from_secs(1))), (64, None)];

/// The share of names of which nothing is known.
pub(super) const FIRST: usize = 0;

/// The turns of each share, first come, first served.
pub(super) struct Shares([Arc<Semaphore>; SHARES.len()]);

impl Shares {
    pub(super) fn new() -> Self {
        Self(SHARES.map(|(turns, _longest)| Arc::new(Semaphore::new(turns))))
    }

    /// Looks up with `begin`, from the share `first` on. Returns the result, and the share that the time which it took belongs to.
    pub(super) async fn look_up<F: Future>(&self, first: usize, begin: impl Fn() -> F) -> (F::Output, usize) {
        let mut share = first.min(SHARES.len() - 1);
        let mut turn = self.turn(share).await;
        let (mut since, mut answer) = (Instant::now(), Box::pin(begin()));
        while let (_turns, Some(longest)) = SHARES[share] {
            if let Ok(answer) = timeout(longest, &mut answer).await {
                return (answer, share_of(since.elapsed()));
            }
            share += 1;
            if let Ok(next) = self.0[share].clone().try_acquire_owned() {
                turn = Some(next);
                continue;
            }
            // Its sockets are closed while it waits.
            drop((answer, turn));
            turn = self.turn(share).await;
            (since, answer) = (Instant::now(), Box::pin(begin()));
        }
        let answer = answer.await;
        drop(turn);
        (answer, share_of(since.elapsed()))
    }

    /// Waits for a turn. There is one in any event: no share is ever closed.
    async fn turn(&self, share: usize) -> Option<OwnedSemaphorePermit> {
        self.0[share].clone().acquire_owned().await.ok()
    }
}

/// The first share whose look-ups may take this long.
fn share_of(time: Duration) -> usize {
    let fits = |(_turns, longest): &(usize, Option<Duration>)| longest.is_none_or(|longest| time <= longest);
    SHARES.iter().position(fits).unwrap_or(SHARES.len() - 1)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{pending, ready};
    use std::rc::Rc;

    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;
    use crate::runtime::new_runtime;

    #[test]
    fn what_is_never_answered_leaves_the_first_share_to_others() {
        let runtime = new_runtime().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let shares = Rc::new(Shares::new());
            let queued = Rc::new(Cell::new(0));
            let all: usize = SHARES.iter().map(|(turns, _longest)| turns).sum();
            for _ in 0..2 * all {
                let (shares, queued) = (shares.clone(), queued.clone());
                spawn_local(async move {
                    queued.set(queued.get() + 1);
                    shares.look_up(FIRST, pending::<()>).await
                });
            }
            while queued.get() < 2 * all {
                yield_now().await;
            }
            // It is answered although all the others, which were there first, never are.
            assert_eq!(shares.look_up(FIRST, || ready(7)).await, (7, FIRST));
        });
    }

    #[test]
    fn a_look_up_begins_where_the_last_one_belonged() {
        let runtime = new_runtime().unwrap();
        runtime.block_on(async {
            let shares = Shares::new();
            let last = SHARES.len() - 1;
            let (turns, _longest) = SHARES[last];
            let taken = shares.0[last].clone().try_acquire_many_owned(turns.try_into().unwrap()).unwrap();
            let waits = timeout(Duration::ZERO, shares.look_up(last, || ready(1))).await;
            assert!(waits.is_err(), "its share is full");
            drop(taken);
            // What is quick belongs to the first one from then on.
            assert_eq!(shares.look_up(usize::MAX, || ready(1)).await, (1, FIRST));
        });
        let just = SHARES[0].1.unwrap();
        assert_eq!([just, just * 2, just * 100].map(share_of), [0, 1, 2]);
    }
}
