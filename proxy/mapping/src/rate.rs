//! Rates of new connections and flows, as a token bucket allows them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::duration::{LONGEST, parse_limit};

/// What separates the rate from the burst.
const BURST: &str = " burst ";

/// So many new connections in a period of time, and so many at once: `10/s`, `100/m`, `10/s burst 50`.
///
/// It is a token bucket, as of iptables-extensions(8), hashlimit. It holds `burst` tokens, and gets `count` of them in each
/// period, evenly. Each connection takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    count: u32,
    period: Duration,
    burst: u32,
}

impl Rate {
    /// `count` per `period`, and `burst` at once.
    ///
    /// # Errors
    /// [`RateError`] if the numbers are 0, or if the bucket is too fast or too slow to compute with.
    pub fn new(count: u32, period: Duration, burst: u32) -> Result<Self, RateError> {
        if count == 0 || burst == 0 {
            return Err(RateError::Zero);
        }
        let rate = Self { count, period, burst };
        if rate.interval().is_zero() {
            return Err(RateError::TooFast);
        }
        match rate.interval().checked_mul(burst) {
            Some(filled) if filled <= LONGEST => Ok(rate),
            _ => Err(RateError::TooSlow),
        }
    }

    /// The time in which the bucket gets one token, at least a nanosecond.
    pub fn interval(self) -> Duration {
        self.period / self.count
    }

    /// The time in which an empty bucket becomes full, at most a year.
    pub fn time_to_fill(self) -> Duration {
        self.interval() * self.burst
    }
}

/// Writes the period as `parse` reads it, without the 1 before a unit.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let period = humantime::format_duration(self.period).to_string();
        let unit =
            period.strip_prefix('1').filter(|unit| unit.bytes().all(|byte| byte.is_ascii_alphabetic()));
        write!(f, "{}/{}", self.count, unit.unwrap_or(&period))?;
        if self.burst == self.count { Ok(()) } else { write!(f, "{BURST}{}", self.burst) }
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let (rate, burst) = match text.split_once(BURST) {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let Some((count, period)) = rate.split_once('/') else {
            return Err(count_of(rate).map_or(RateError::Unknown, RateError::NoPeriod));
        };
        let count = count_of(count).ok_or(RateError::Unknown)?;
        let burst = burst.map_or(Some(count), count_of).ok_or(RateError::Unknown)?;
        Self::new(count, period_of(period).ok_or(RateError::Unknown)?, burst)
    }
}

fn count_of(text: &str) -> Option<u32> {
    text.trim().parse().ok()
}

/// Parses a duration, or the unit of one.
fn period_of(text: &str) -> Option<Duration> {
    let text = text.trim();
    let is_unit = text.starts_with(|first: char| first.is_ascii_alphabetic());
    parse_limit(&if is_unit { format!("1{text}") } else { text.to_owned() }).ok()
}

/// Why a text is not a [`Rate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// It has another form.
    #[error("not a rate; write one such as 10/s, 100/m or 10/s burst 50")]
    Unknown,
    /// A number alone.
    #[error("in which time? write {0}/s or {0}/m")]
    NoPeriod(u32),
    /// It would admit nobody.
    #[error("0 would admit nobody; write one such as 10/s, or leave it out")]
    Zero,
    /// More than one in a nanosecond.
    #[error("more than one in a nanosecond; write one such as 1000/s")]
    TooFast,
    /// It takes too long until all of the burst is possible again.
    #[error("the burst would take more than a year to be possible again; write one such as 10/m burst 20")]
    TooSlow,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_is_a_number_in_a_time_and_perhaps_a_burst() {
        for (text, written, interval, filled) in [
            ("10/s", "10/s", 100, 1_000),
            ("10/1s", "10/s", 100, 1_000),
            ("60/m", "60/m", 1_000, 60_000),
            ("60 / minute", "60/m", 1_000, 60_000),
            ("100/10s", "100/10s", 100, 10_000),
            ("1/h burst 2", "1/h burst 2", 3_600_000, 7_200_000),
            ("10/s burst 50", "10/s burst 50", 100, 5_000),
            ("10/s burst 10", "10/s", 100, 1_000),
            ("3/1s 500ms", "3/1s 500ms", 500, 1_500),
            ("5/10", "5/10s", 2_000, 10_000),
        ] {
            let rate: Rate = text.parse().expect(text);
            assert_eq!(rate.to_string(), written);
            assert_eq!(rate.interval(), Duration::from_millis(interval), "{text}");
            assert_eq!(rate.time_to_fill(), Duration::from_millis(filled), "{text}");
        }
    }

    #[test]
    fn what_is_no_rate_is_told_with_a_way_out() {
        for (text, part) in [
            ("", "not a rate; write one such as 10/s"),
            ("10", "in which time? write 10/s or 10/m"),
            ("fast", "not a rate"),
            ("10r/s", "not a rate"),
            ("10/", "not a rate"),
            ("/s", "not a rate"),
            ("10/0s", "not a rate"),
            ("10/s burst", "not a rate"),
            ("10/s burst x", "not a rate"),
            ("-1/s", "not a rate"),
            ("0/s", "0 would admit nobody"),
            ("1/s burst 0", "0 would admit nobody"),
            ("4000000000/s", "more than one in a nanosecond"),
            ("1/1day burst 1000", "more than a year"),
        ] {
            let message = text.parse::<Rate>().expect_err(text).to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(count in 1..u32::MAX, millis in 1..100_000_000_u64, burst in 1..u32::MAX) {
            if let Ok(rate) = Rate::new(count, Duration::from_millis(millis), burst) {
                prop_assert_eq!(rate.to_string().parse(), Ok(rate));
                prop_assert!(!rate.interval().is_zero() && rate.time_to_fill() <= LONGEST);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9/smhburst .-]{0,24}") {
            if let Ok(rate) = text.parse::<Rate>() {
                prop_assert_eq!(rate.to_string().parse(), Ok(rate));
            }
        }
    }
}
