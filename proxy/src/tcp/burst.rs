//! Bursts: what a direction moves without a pause and without an answer, such as a response or an upload.

use std::sync::LazyLock;
use std::time::Instant;

use super::direction::Direction;
use super::fragments::Fragments;
use super::pipe::Capacity;

/// Bytes of a burst from which on it is spliced. Below, copying is as cheap. After a burst of this size, the next one is
/// spliced from its first byte, because the responses of a connection are often alike.
const LARGE: u32 = 16 * 1024;

/// Bytes of a burst from which on the largest pipes serve it: it is rather a transfer than a response.
const LONG: u32 = 1024 * 1024;

/// Bytes of a burst from which on it is [relayed in bulk](super::bulk), so that shorter ones do not end with the delay of
/// a tick.
const SUSTAINED: u32 = 4 * 1024 * 1024;

/// A pause that ends a burst, in milliseconds.
const PAUSE: u32 = 1;

/// The burst of a direction. Each connection has two, so the fields are short: the low 32 bits of counts of bytes. That
/// a burst of 4 GiB is taken for a new one costs nothing but a few copies.
#[derive(Debug, Default)]
pub(super) struct Burst {
    /// What this direction had moved when the burst began.
    start: u32,
    /// What the opposite direction had moved then.
    opposite: u32,
    /// When the burst was last moved on, if it is spliced.
    last: u32,
    /// Whether the burst before it was large.
    follows_large: bool,
    /// The fragments of the source.
    fragments: Fragments,
}

impl Burst {
    /// Whether to splice.
    pub(super) fn is_large(&self, direction: &Direction<'_>) -> bool {
        self.follows_large || self.moved(direction) >= LARGE
    }

    /// The capacity of the pipes to splice through.
    pub(super) fn capacity(&self, direction: &Direction<'_>) -> Capacity {
        if self.moved(direction) >= LONG {
            Capacity::Full
        } else if self.fragments.are_large() {
            Capacity::Medium
        } else {
            Capacity::Default
        }
    }

    /// Records what was spliced through a pipe of this capacity.
    pub(super) fn note_spliced(&mut self, capacity: Capacity, moved: usize) {
        if capacity == Capacity::Default {
            self.fragments.note(moved);
        }
    }

    /// Whether to relay in bulk.
    pub(super) fn is_sustained(&self, direction: &Direction<'_>) -> bool {
        self.moved(direction) >= SUSTAINED
    }

    /// Records that bytes may have been moved.
    pub(super) fn note_progress(&mut self, direction: &Direction<'_>) {
        if self.is_large(direction) {
            self.last = now();
        }
    }

    /// Begins another burst if the opposite direction has moved something since, or if there was a pause.
    pub(super) fn begin_next_if_over(&mut self, direction: &Direction<'_>) {
        let is_answered = low(direction.opposite.moved()) != self.opposite;
        let has_begun = self.moved(direction) > 0;
        let paused = || has_begun && self.is_large(direction) && now().wrapping_sub(self.last) > PAUSE;
        if is_answered || paused() {
            self.restart(direction);
        }
    }

    /// Begins another burst.
    fn restart(&mut self, direction: &Direction<'_>) {
        self.follows_large = self.moved(direction) >= LARGE;
        (self.start, self.opposite) = (low(direction.meter.moved()), low(direction.opposite.moved()));
        self.fragments.begin_next();
    }

    /// Begins another burst after one that was relayed in bulk, which is long from its start.
    pub(super) fn restart_long(&mut self, direction: &Direction<'_>) {
        self.restart(direction);
        self.start = self.start.wrapping_sub(LONG);
        self.last = now();
    }

    fn moved(&self, direction: &Direction<'_>) -> u32 {
        low(direction.meter.moved()).wrapping_sub(self.start)
    }
}

fn low(count: u64) -> u32 {
    let [a, b, c, d, ..] = count.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Milliseconds since this was first called.
fn now() -> u32 {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let elapsed = FIRST.elapsed();
    low(elapsed.as_secs().wrapping_mul(1000).wrapping_add(elapsed.subsec_millis().into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread::sleep;
    use std::time::Duration;

    use super::super::meter::Meter;
    use super::super::stream::Stream;
    use super::*;
    use crate::runtime::new_runtime;
    use crate::state::stats::Counter;

    /// A burst in the direction that the first meter counts.
    fn with_burst(check: impl FnOnce(&mut Burst, &Direction<'_>)) {
        new_runtime().unwrap().block_on(async {
            let total = Counter::default();
            let [meter, opposite] = [&total; 2].map(|total| Meter::new(total, None));
            let (one, other) = UnixStream::pair().unwrap();
            let (source, sink) = (Stream::new(one).unwrap(), Stream::new(other).unwrap());
            let direction = Direction { source: &source, sink: &sink, meter: &meter, opposite: &opposite };
            check(&mut Burst::default(), &direction);
        });
    }

    /// Moves this many bytes within a burst that may have begun.
    fn go_on(burst: &mut Burst, direction: &Direction<'_>, bytes: u32) {
        burst.begin_next_if_over(direction);
        direction.meter.add(bytes as usize);
        burst.note_progress(direction);
    }

    #[test]
    fn a_large_response_makes_the_next_one_large_from_its_start() {
        with_burst(|burst, direction| {
            go_on(burst, direction, LARGE - 1);
            assert!(!burst.is_large(direction));
            go_on(burst, direction, 1);
            assert!(burst.is_large(direction));
            for (response, next_is_large) in [(LARGE, true), (LARGE - 1, false)] {
                direction.opposite.add(1);
                go_on(burst, direction, response);
                direction.opposite.add(1);
                burst.begin_next_if_over(direction);
                assert_eq!(burst.is_large(direction), next_is_large, "after {response} bytes");
            }
        });
    }

    #[test]
    fn what_trickles_after_a_large_burst_is_copied() {
        with_burst(|burst, direction| {
            go_on(burst, direction, LARGE);
            for is_large in [true, false, false] {
                sleep(Duration::from_millis(u64::from(PAUSE) + 2));
                burst.begin_next_if_over(direction);
                assert_eq!(burst.is_large(direction), is_large);
                go_on(burst, direction, 1);
            }
        });
    }

    #[test]
    fn what_goes_on_after_bulk_is_long_from_its_start_unless_it_paused() {
        with_burst(|burst, direction| {
            go_on(burst, direction, SUSTAINED);
            // In bulk.
            sleep(Duration::from_millis(u64::from(PAUSE) + 2));
            burst.restart_long(direction);
            assert_eq!(burst.capacity(direction), Capacity::Full);
            assert!(!burst.is_sustained(direction));
            sleep(Duration::from_millis(u64::from(PAUSE) + 2));
            go_on(burst, direction, 1);
            assert_eq!(burst.capacity(direction), Capacity::Default);
        });
    }

    #[test]
    fn only_what_has_no_answer_and_no_pause_is_sustained() {
        with_burst(|burst, direction| {
            for _ in 0..SUSTAINED / LARGE {
                go_on(burst, direction, LARGE);
                direction.opposite.add(1);
            }
            assert!(!burst.is_sustained(direction), "each was answered");
            go_on(burst, direction, SUSTAINED - 1);
            assert!(!burst.is_sustained(direction));
            sleep(Duration::from_millis(u64::from(PAUSE) + 2));
            go_on(burst, direction, SUSTAINED - 1);
            assert!(!burst.is_sustained(direction), "there was a pause");
        });
        // Without a pause, which a slow machine may have by itself.
        let is_sustained = || {
            let mut result = false;
            with_burst(|burst, direction| {
                go_on(burst, direction, SUSTAINED - 1);
                go_on(burst, direction, 1);
                result = burst.is_sustained(direction);
            });
            result
        };
        assert!((0..100).any(|_| is_sustained()));
    }
}
