//! Rate limits for log lines on the data path.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that one call site may write within [`WINDOW`].
const BURST: u32 = 5;

const WINDOW: Duration = Duration::from_secs(1);

/// The limit of one call site, kept in a `static` there.
#[derive(Debug)]
pub(crate) struct LogLimit(Mutex<State>);

#[derive(Debug)]
struct State {
    window_start: Option<Instant>,
    written: u32,
    suppressed: u64,
}

impl LogLimit {
    /// A limit that has not been used yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { window_start: None, written: 0, suppressed: 0 }))
    }

    /// Requests a line: returns the number of lines suppressed since the last one, or `None` if this one is
    /// suppressed.
    pub(crate) fn permit(&self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *state.window_start.get_or_insert(now);
        if now.duration_since(start) >= WINDOW {
            state.window_start = Some(now);
            state.written = 0;
        }
        if state.written == BURST {
            state.suppressed += 1;
            return None;
        }
        state.written += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_next_window_says_what_was_suppressed() {
        let limit = LogLimit::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.permit_at(start), Some(0));
        }
        assert_eq!(limit.permit_at(start), None);
        assert_eq!(limit.permit_at(start + WINDOW / 2), None);
        assert_eq!(limit.permit_at(start + WINDOW), Some(2));
        assert_eq!(limit.permit_at(start + WINDOW), Some(0));
    }
}
