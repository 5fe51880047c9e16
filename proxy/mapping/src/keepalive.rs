//! Keepalive probes of TCP connections (tcp(7)), as users write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::duration::parse;

/// The longest time between probes that the kernel takes, in seconds (`MAX_TCP_KEEPIDLE` in include/net/tcp.h).
const LONGEST: u64 = 32_767;

/// The largest number of probes that the kernel takes (`MAX_TCP_KEEPCNT` in include/net/tcp.h).
const MOST: u32 = 127;

/// What precedes the time between probes.
const INTERVAL: &str = " interval ";

/// What precedes their number.
const COUNT: &str = " count ";

/// Whether idle connections are probed: `off`, or when and how, such as `1m`, `1m interval 10s` or `1m interval 10s count 5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keepalive {
    /// They are not.
    Off,
    /// They are.
    On(Probes),
}

/// When a connection is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probes {
    /// How long it is idle before the first probe (`TCP_KEEPIDLE`).
    pub idle: Duration,
    /// The time between probes (`TCP_KEEPINTVL`).
    pub interval: Duration,
    /// The number of probes without an answer after which it is reset (`TCP_KEEPCNT`); `None` for that of the kernel
    /// (`net.ipv4.tcp_keepalive_probes`, 9).
    pub count: Option<u32>,
}

impl Probes {
    /// The time before the first probe and between probes, as Go's net package sets them.
    pub const TIME: Duration = Duration::from_secs(15);
}

impl Default for Keepalive {
    fn default() -> Self {
        Self::On(Probes { idle: Probes::TIME, interval: Probes::TIME, count: None })
    }
}

impl fmt::Display for Keepalive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::On(Probes { idle, interval, count }) = self else { return f.write_str("off") };
        write!(f, "{}", humantime::format_duration(*idle))?;
        if *interval != Probes::TIME {
            write!(f, "{INTERVAL}{}", humantime::format_duration(*interval))?;
        }
        count.map_or(Ok(()), |count| write!(f, "{COUNT}{count}"))
    }
}

impl FromStr for Keepalive {
    type Err = KeepaliveError;

    fn from_str(text: &str) -> Result<Self, KeepaliveError> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let (times, count) = split(text, COUNT);
        let (idle, interval) = split(times, INTERVAL);
        let interval = interval.map_or(Ok(Probes::TIME), time)?;
        let count = match count.map(|count| count.trim().parse()) {
            None => None,
            Some(Ok(count @ 1..=MOST)) => Some(count),
            Some(_) => return Err(KeepaliveError::Count),
        };
        Ok(Self::On(Probes { idle: time(idle)?, interval, count }))
    }
}

fn split<'a>(text: &'a str, word: &str) -> (&'a str, Option<&'a str>) {
    text.split_once(word).map_or((text, None), |(before, after)| (before, Some(after)))
}

fn time(text: &str) -> Result<Duration, KeepaliveError> {
    let time = parse(text.trim()).map_err(|_message| KeepaliveError::Unknown)?;
    match (time.as_secs(), time.subsec_nanos()) {
        (1..=LONGEST, 0) => Ok(time),
        _ => Err(KeepaliveError::Time),
    }
}

/// Why a text is no [`Keepalive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeepaliveError {
    /// It has another form.
    #[error("not a time of idleness; write one such as 1m, 1m interval 10s count 5, or off")]
    Unknown,
    /// A time that the kernel does not take.
    #[error(
        "the kernel takes whole seconds, from 1s to 9h; write one such as 1m interval 10s count 5, or off"
    )]
    Time,
    /// A number of probes that the kernel does not take.
    #[error("count is a number of probes from 1 to 127; write one such as 1m interval 10s count 5, or off")]
    Count,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn probes_begin_after_a_time_and_perhaps_have_another_pace_and_number() {
        for (text, written, seconds, count) in [
            ("15s", "15s", (15, 15), None),
            ("60", "1m", (60, 15), None),
            ("1m 30s interval 10s", "1m 30s interval 10s", (90, 10), None),
            ("2h interval 75s count 9", "2h interval 1m 15s count 9", (7200, 75), Some(9)),
            ("1m count 3", "1m count 3", (60, 15), Some(3)),
        ] {
            let keepalive: Keepalive = text.parse().expect(text);
            assert_eq!(keepalive.to_string(), written);
            let (idle, interval) = (Duration::from_secs(seconds.0), Duration::from_secs(seconds.1));
            assert_eq!(keepalive, Keepalive::On(Probes { idle, interval, count }), "{text}");
        }
        assert_eq!("off".parse(), Ok(Keepalive::Off));
        assert_eq!("15s".parse(), Ok(Keepalive::default()));
    }

    #[test]
    fn what_the_kernel_does_not_take_is_told_with_a_way_out() {
        for (text, part) in [
            ("", "not a time of idleness; write one such as 1m"),
            ("on", "not a time of idleness"),
            ("no", "or off"),
            ("1m interval", "not a time of idleness"),
            ("1m count 3 interval 10s", "count is a number"),
            ("0s", "whole seconds, from 1s to 9h"),
            ("500ms", "whole seconds"),
            ("10h", "whole seconds"),
            ("1m interval 10h", "whole seconds"),
            ("1m count 0", "from 1 to 127"),
            ("1m count 128", "from 1 to 127"),
        ] {
            let message = text.parse::<Keepalive>().expect_err(text).to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(text in "(off|[0-9smh]{1,4}( interval [0-9smh]{1,4})?( count [0-9]{1,3})?)") {
            if let Ok(keepalive) = text.parse::<Keepalive>() {
                prop_assert_eq!(keepalive.to_string().parse(), Ok(keepalive));
            }
        }
    }
}
