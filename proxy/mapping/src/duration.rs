//! Durations as users write them, on the command line and in files.

use std::time::Duration;

/// The text for a limit that is not set.
pub const UNLIMITED: &str = "unlimited";

/// A longer duration is almost certainly a mistake, and could overflow the clock.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Parses a number of seconds, such as `10`, or a number with a unit.
///
/// # Errors
/// A message that suggests a valid form.
pub fn parse(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text)
        .map_err(|_err| "not a duration; write one such as 10s, 500ms or 2m".to_owned())
}

/// Parses a limit: more than zero and at most a year.
///
/// # Errors
/// A message that suggests a valid form.
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        Duration::ZERO => Err("everything would be over at once; write one such as 90s".to_owned()),
        limit if limit > LONGEST => Err("longer than a year; write one such as 90s".to_owned()),
        limit => Ok(limit),
    }
}

/// Parses a limit, or [`UNLIMITED`].
///
/// # Errors
/// A message that suggests a valid form.
pub fn parse_optional_limit(text: &str) -> Result<Option<Duration>, String> {
    if text == UNLIMITED {
        return Ok(None);
    }
    parse_limit(text).map(Some).map_err(|message| format!("{message}, or '{UNLIMITED}'"))
}

/// Parses a time for `TCP_USER_TIMEOUT`, which the kernel counts in milliseconds, or [`UNLIMITED`].
///
/// # Errors
/// A message that suggests a valid form.
pub fn parse_user_timeout(text: &str) -> Result<Option<Duration>, String> {
    let wrong = |problem| Err(format!("{problem}; write one such as 90s, or '{UNLIMITED}'"));
    match parse_optional_limit(text)? {
        Some(limit) if limit.as_millis() > i32::MAX.unsigned_abs().into() => {
            wrong("longer than the 24 days that the kernel counts")
        }
        Some(limit) if limit.subsec_nanos() % 1_000_000 != 0 => wrong("the kernel counts whole milliseconds"),
        limit => Ok(limit),
    }
}

/// Writes a limit in the form that [`parse_optional_limit`] reads.
pub fn format_limit(limit: Option<Duration>) -> String {
    limit.map_or_else(|| UNLIMITED.to_owned(), |limit| humantime::format_duration(limit).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_or_have_a_unit() {
        assert_eq!(parse("0"), Ok(Duration::ZERO));
        assert_eq!(parse("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert!(parse("soon").unwrap_err().contains("not a duration"));
        assert!(parse("-1s").unwrap_err().contains("not a duration"));
    }

    #[test]
    fn limits_are_neither_zero_nor_years() {
        assert!(parse_limit("0").unwrap_err().contains("over at once"));
        assert!(parse_limit("18446744073709551615").unwrap_err().contains("longer than a year"));
        assert!(parse_optional_limit("0").unwrap_err().ends_with("or 'unlimited'"));
        assert!(parse_user_timeout("25days").unwrap_err().contains("24 days"));
        assert!(parse_user_timeout("1us").unwrap_err().contains("whole milliseconds"));
        assert_eq!(parse_user_timeout("1500ms"), Ok(Some(Duration::from_millis(1500))));
        for limit in [None, Some(Duration::from_millis(1500)), Some(Duration::from_secs(90))] {
            assert_eq!(parse_optional_limit(&format_limit(limit)), Ok(limit));
        }
    }
}
