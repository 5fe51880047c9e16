//! The log, on standard error.

pub mod access;
pub mod console;
pub mod destination;
pub(crate) mod limit;
pub(crate) mod sink;
mod spanless;
mod writer;

use std::str::FromStr;
use std::sync::Mutex;

use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::log::spanless::Spanless;
pub use crate::log::writer::Format;
use crate::log::writer::LogWriter;
pub(crate) use crate::log::writer::lost_lines;

/// What is logged and how.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// The format of the lines.
    pub format: Format,
    /// Which lines are written. With `None`, `RUST_LOG` decides. It may be meant for other programs, so an
    /// invalid value is only a warning.
    pub filter: Option<Targets>,
}

impl LogConfig {
    /// The log of the docker-proxy front end, which is configured by `RUST_LOG` alone.
    pub fn from_env() -> Self {
        Self { format: Format::Text, filter: None }
    }
}

/// Everything from [`Level::INFO`] up.
pub fn default_filter() -> Targets {
    Targets::new().with_default(Level::INFO)
}

/// Parses `info`, or a list such as `warn,rproxy::tcp=debug`; an empty text is the default filter.
///
/// # Errors
/// A message that suggests a valid value.
pub fn parse_filter(text: &str) -> Result<Targets, String> {
    if text.is_empty() {
        return Ok(default_filter());
    }
    let known = |level: &str| !level.is_empty() && LevelFilter::from_str(level).is_ok();
    let unknown = |directive: &&str| !known(directive.rsplit('=').next().unwrap_or_default());
    if let Some(directive) = text.split(',').find(unknown) {
        return Err(format!(
            "'{directive}' names no level; levels are off, error, warn, info, debug and trace, \
             as in 'debug' or 'warn,rproxy::tcp=debug'"
        ));
    }
    Targets::from_str(text).map_err(|error| error.to_string())
}

/// Installs the log of the process as `config` says. A second call changes nothing. Opens a file if standard
/// error is a terminal.
pub fn init(config: LogConfig) {
    let from_env = || parse_filter(&std::env::var("RUST_LOG").unwrap_or_default());
    let filter = config.filter.map_or_else(from_env, Ok);
    let mistake = filter.as_ref().err().cloned();
    let filter = filter.unwrap_or_else(|_mistake| default_filter());
    let lines = fmt::layer().with_writer(Mutex::new(LogWriter::new(config.format)));
    let lines = match config.format {
        Format::Text => lines.with_target(false).boxed(),
        Format::Json => lines.json().boxed(),
    };
    if Spanless.with(lines).with(filter).try_init().is_err() {
        tracing::debug!("the log is set up already");
    }
    if let Some(mistake) = mistake {
        tracing::warn!("RUST_LOG is ignored: {mistake}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_level_or_a_list_and_anything_else_is_refused() {
        assert!(parse_filter("debug").is_ok());
        assert!(parse_filter("warn,rproxy::tcp=debug").is_ok());
        for wrong in [",", "loud", "rproxy=loud", "info,"] {
            let message = parse_filter(wrong).expect_err(wrong);
            assert!(message.contains("names no level"), "{wrong}: {message}");
        }
    }
}
