//! Time.
#![expect(unsafe_code, reason = "the kernel writes through a raw pointer")]

use core::time::Duration;

use crate::arch::number;
use crate::call;

const CLOCK_MONOTONIC: usize = 1;

/// `struct timespec` of 64-bit Linux.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

impl From<Duration> for Timespec {
    fn from(duration: Duration) -> Self {
        let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        Self { seconds, nanoseconds: duration.subsec_nanos().into() }
    }
}

/// The time since an arbitrary moment (clock_gettime(2), `CLOCK_MONOTONIC`).
pub fn now() -> Duration {
    let mut now = Timespec::default();
    let arguments = [CLOCK_MONOTONIC, (&raw mut now).expose_provenance()];
    // SAFETY: the kernel writes a timespec. The call does not fail for this clock.
    let _done = unsafe { call(number::CLOCK_GETTIME, arguments) };
    let nanoseconds = u32::try_from(now.nanoseconds).unwrap_or(0);
    Duration::new(now.seconds.unsigned_abs(), nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_back() {
        let before = now();
        assert!(before > Duration::ZERO && now() >= before);
    }
}
