//! The configuration file in TOML, described in `docs/configuration.md`.
//!
//! A file is accepted as a whole or not at all. Its first errors are reported with their positions.

mod document;
mod file;
mod keys;
mod mistake;
mod names;
mod print;
mod syntax;
mod values;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rproxy_mapping::Mapping;
use rproxy_mapping::limits::Limits;
use rproxy_sys::memory::release_unused;

use self::document::find_config;
pub use self::file::{descriptor, open};
use self::mistake::Lines;
pub use self::mistake::Mistake;
pub use self::print::{print, with_interface_name};
use crate::metrics::addr::MetricsAddr;
use crate::plane::{AttachOptions, AttachTable};
use crate::runtime::descriptors::explain;
use rproxy_mapping::escape::escaped;

/// The content of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The mappings.
    pub mappings: Vec<Mapping>,
    /// How ports are attached, if they can be.
    pub attach: Option<AttachTable>,
    /// The limits of `[defaults]`.
    pub defaults: Limits,
    /// Where metrics are served, if they are.
    pub metrics: Option<MetricsAddr>,
}

impl Config {
    /// How ports are attached to a process with this configuration, if they are. `flag` is `--attach`, whose name, if it
    /// has one, takes precedence.
    pub fn attach_options(&self, flag: Option<Option<&str>>) -> Option<AttachOptions> {
        let of_defaults = || AttachTable { name: None, limits: self.defaults.clone() };
        let table = self.attach.clone().or_else(|| flag.map(|_name| of_defaults()));
        AttachOptions::new(flag, table)
    }
}

/// Reads a file or pipe.
///
/// # Errors
/// [`ConfigError`]
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    let text = read_text(path)?;
    content(path, text)
}

/// Reads the text of a file or pipe.
///
/// # Errors
/// [`ConfigError::Read`]
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    open(path).and_then(|opened| file::text(opened, true)).map_err(not_read(path))
}

/// Reads the content for a reload from the file at `path`, which was `opened` for it.
///
/// # Errors
/// [`ConfigError`]
pub fn read_again(path: &Path, opened: io::Result<fs::File>) -> Result<Config, ConfigError> {
    // A descriptor that a shell passed is closed by now.
    let opened = if descriptor(path).is_some_and(|number| number > 2) { file::once() } else { opened };
    let text = opened.and_then(|opened| file::text(opened, false)).map_err(not_read(path))?;
    content(path, text)
}

fn not_read(path: &Path) -> impl FnOnce(io::Error) -> ConfigError {
    move |source| ConfigError::Read { path: path.to_owned(), source }
}

fn content(path: &Path, text: String) -> Result<Config, ConfigError> {
    let config = parse(path, &text);
    drop(text);
    // Reading needs many times the memory of the mappings.
    release_unused();
    config
}

/// Parses the `text` of the file at `path`.
///
/// # Errors
/// [`ConfigError::Wrong`] with the errors found.
pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    find_config(text).map_err(|found| {
        let more = found.more;
        let mistakes = Lines::of(text).locate(found);
        ConfigError::Wrong { path: path.to_owned(), mistakes, more }
    })
}

/// Why a file has no usable mappings; one line for each error.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {}", escaped(path), explain(source, 1))]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the kernel, or that the file is not text.
        source: io::Error,
    },
    /// The content is invalid.
    #[error("{}", lines(path, mistakes, *more).join("\n"))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The first errors, in order.
        mistakes: Vec<Mistake>,
        /// Whether there are further errors.
        more: bool,
    },
}

fn lines(path: &Path, mistakes: &[Mistake], more: bool) -> Vec<String> {
    let lines = mistakes.iter().map(|mistake| format!("{}:{mistake}", escaped(path)));
    let rest = more.then(|| format!("{}: there are more errors than these", escaped(path)));
    lines.chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_nothing_but_mistakes_has_a_short_answer() {
        let longest = usize::try_from(file::LONGEST).unwrap();
        let mapping = "[[mapping]]\nhost = \"[::]:80\"\nto = \"10.0.0.1:80\"\n";
        for junk in [
            "x\n",
            "=\n",
            "[[mapping]]\n",
            "[a]\n",
            "x = 1\n",
            "\\q",
            "{}, ",
            "[",
            "a.",
            mapping,
            "[[mapping]]\nhost = x\n",
            "[[mapping]]\nhots = 1\n",
        ] {
            for start in ["", "x = \"", "mapping = [", "[defaults]\nproto = \"y\"\n"] {
                let text = format!("{start}{}", junk.repeat(longest / junk.len()));
                let error = parse(Path::new("file"), &text).unwrap_err().to_string();
                assert!(error.lines().count() <= mistake::MOST + 1, "{start}{junk}");
                assert!(error.len() < 50_000, "{start}{junk}: {}", error.len());
            }
        }
        let text = "[[mapping]]\nhots = 1\n".repeat(100);
        let error = parse(Path::new("file"), &text).unwrap_err().to_string();
        assert!(error.ends_with("\nfile: there are more errors than these"), "{error}");
    }
}
