//! The configuration file: `[[mapping]]` tables in TOML, described in `docs/configuration.md`.
//!
//! It is read as a whole or not at all, and every mistake is reported with its place.

mod file;
mod keys;
mod mistake;
mod print;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rproxy_sys::memory::release_unused;
use serde::Deserialize;
use toml::Spanned;

pub use self::file::{descriptor, open};
use self::keys::Keys;
pub use self::mistake::Mistake;
use self::mistake::{Found, Lines};
pub use self::print::print;
use crate::loops::refuse_loops_among;
use crate::mapping::Mapping;
use crate::overlap::{Overlap, OverlapError, overlaps};

/// A whole file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// What holds for each mapping that does not say otherwise.
    #[serde(default)]
    defaults: Keys,
    #[serde(default)]
    mapping: Vec<Spanned<Keys>>,
}

/// Reads the mappings of a file, or of a pipe.
///
/// # Errors
/// [`ConfigError`]
pub fn read(path: &Path) -> Result<Vec<Mapping>, ConfigError> {
    let text = read_text(path)?;
    mappings(path, text)
}

/// Reads the text of a file, or of a pipe.
///
/// # Errors
/// [`ConfigError::Read`]
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    open(path).and_then(|opened| file::text(opened, true)).map_err(not_read(path))
}

/// Reads the mappings of the file at `path` again, which has been `opened`.
///
/// # Errors
/// [`ConfigError`]
pub fn read_again(path: &Path, opened: io::Result<fs::File>) -> Result<Vec<Mapping>, ConfigError> {
    // One that a shell passed is closed by now.
    let opened = if descriptor(path).is_some_and(|number| number > 2) { file::once() } else { opened };
    let text = opened.and_then(|opened| file::text(opened, false)).map_err(not_read(path))?;
    mappings(path, text)
}

fn not_read(path: &Path) -> impl FnOnce(io::Error) -> ConfigError {
    move |source| ConfigError::Read { path: path.to_owned(), source }
}

fn mappings(path: &Path, text: String) -> Result<Vec<Mapping>, ConfigError> {
    let mappings = parse(path, &text);
    drop(text);
    // What reading took is many times what the mappings take.
    release_unused();
    mappings
}

/// Reads mappings from the `text` of the file at `path`.
///
/// # Errors
/// [`ConfigError::Wrong`] with all mistakes that are in it.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Mapping>, ConfigError> {
    find_mappings(text).map_err(|found| {
        let mistakes = Lines::of(text).locate(found);
        ConfigError::Wrong { path: path.to_owned(), mistakes }
    })
}

fn find_mappings(text: &str) -> Result<Vec<Mapping>, Vec<Found>> {
    let file: File = toml::from_str(text).map_err(|error| vec![Found::from(error)])?;
    let wrong_defaults = file.defaults.refuse_those_of_one();
    let (mut mappings, mut found) = (Vec::with_capacity(file.mapping.len()), wrong_defaults);
    for table in &file.mapping {
        match table.get_ref().or(&file.defaults).mapping(table.span()) {
            Ok(mapping) => mappings.push(mapping),
            Err(wrong) => found.push(wrong),
        }
    }
    if found.is_empty() && mappings.is_empty() {
        // A file that is being written would end everything.
        found.push(Found::at(0..0, "there is no [[mapping]] in it"));
    }
    if found.is_empty() {
        found.extend(same_names(&file.mapping, &mappings));
        found.extend(same_ports(&file.mapping, &mappings));
    }
    if found.is_empty() {
        found.extend(loops(&file.mapping, &mappings));
    }
    if found.is_empty() { Ok(mappings) } else { Err(found) }
}

/// Mappings that have the name of an earlier one.
fn same_names(tables: &[Spanned<Keys>], mappings: &[Mapping]) -> Vec<Found> {
    let mut seen = HashSet::with_capacity(mappings.len());
    let mut found = Vec::new();
    for (table, mapping) in tables.iter().zip(mappings) {
        let name = mapping.name();
        if !seen.insert(name.clone()) {
            let message = format!("name: {name} is the name of another mapping; give it one of its own");
            found.push(Found::at(table.get_ref().place_of("name", table.span()), message));
        }
    }
    found
}

/// Mappings that want a port of an earlier one.
fn same_ports(tables: &[Spanned<Keys>], mappings: &[Mapping]) -> Vec<Found> {
    let error = |overlap: Overlap| {
        let (mapping, other) = (&mappings[overlap.second], &mappings[overlap.first]);
        let error =
            OverlapError { mapping: mapping.clone().into(), other: other.clone().into(), port: overlap.port };
        let table = &tables[overlap.second];
        Found::at(table.get_ref().place_of("host", table.span()), format!("host: {error}"))
    };
    overlaps(mappings).into_iter().map(error).collect()
}

/// A mapping that leads back to itself.
fn loops(tables: &[Spanned<Keys>], mappings: &[Mapping]) -> Option<Found> {
    let error = refuse_loops_among(mappings).err()?;
    let table = &tables[error.mapping];
    Some(Found::at(table.get_ref().place_of("to", table.span()), format!("to: {error}")))
}

/// Why there are no mappings in a file; one line for each mistake.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel answered, or that it is no text.
        source: io::Error,
    },
    /// What it says makes no sense.
    #[error("{}", mistakes.iter().map(|mistake| format!("{}:{mistake}", path.display())).collect::<Vec<_>>().join("\n"))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        mistakes: Vec<Mistake>,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testdata::any_mapping;

    fn mistakes(text: &str) -> Vec<String> {
        let found = find_mappings(text).expect_err(text);
        Lines::of(text).locate(found).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_file_is_read() {
        let text = r#"
            # What holds for all.
            [defaults]
            idle_timeout = "1h"
            deny = ["192.0.2.0/24"]

            [[mapping]]
            host = "[::]:8080"
            to = "172.17.0.2:80"

            [[mapping]]
            name = "many"
            host = "10.0.0.11:8000-8010"
            to = "[fd00::2]:80-90"
            proto = "tcp+udp"
            idle_timeout = "unlimited"
            max_connections = 100

            [[mapping]]
            host = "127.0.0.1:0"
            to = "172.17.0.2:81"
        "#;
        let mappings = find_mappings(text).unwrap();
        let shown: Vec<_> = mappings.iter().map(|mapping| format!("{} {mapping}", mapping.name())).collect();
        assert_eq!(
            shown,
            [
                "8080/tcp [::]:8080:80/tcp",
                "many 10.0.0.11:8000-8010:80-90/tcp+udp",
                "127.0.0.1:random:81/tcp 127.0.0.1::81/tcp"
            ]
        );
        let idle: Vec<_> = mappings.iter().map(|mapping| mapping.limits().idle_timeout).collect();
        let hour = Some(std::time::Duration::from_secs(3600));
        assert_eq!(idle, [hour, None, hour]);
        assert!(mappings.iter().all(|mapping| mapping.limits().access.deny.len() == 1));
        assert_eq!(mappings[1].limits().max_connections, Some(100));
    }

    #[track_caller]
    fn assert_found(text: &str, expected: &str) {
        let found = mistakes(text);
        assert!(found[0].starts_with(expected), "{text}: {found:?}");
        assert!(!found[0].contains('\n'), "{text}: {found:?}");
    }

    #[test]
    fn mistakes_in_tables_have_a_place() {
        let missing = "host: it is missing; write the address and port to listen on, as in \"[::]:80\"";
        for (text, expected) in [
            ("", "1:1: there is no [[mapping]] in it"),
            ("[[mapping]\n", "1:11: "),
            ("[[mapping]]\nhots = 1", "2:1: unknown field `hots`"),
            ("[mapping]\nhost = \"1\"", "1:1: invalid type: map, expected a sequence"),
            ("[[mapping]]\nhost = 80", "2:8: invalid type: integer `80`, expected a string"),
            ("[[mapping]]\nhost = \"a\"\nhost = \"b\"", "3:1: duplicate key"),
            ("[[mapping]]\nmax_connections = -1", "2:19: invalid value: integer `-1`"),
            ("[[mapping]]", &format!("1:1: {missing}")),
            ("[[mapping]]\nhost = \"[::]:80\"", "1:1: to: it is missing"),
            ("[defaults]\nname = \"x\"", "2:8: name: it is for one mapping"),
        ] {
            assert_found(text, expected);
        }
    }

    #[test]
    fn mistakes_in_values_have_a_place_and_a_way_out() {
        for (host, to, more, expected) in [
            ("0.0.0.0", "10.0.0.1:80", "", "2:8: host: the port is missing; write it as 0.0.0.0:80"),
            ("10.0.0.256:80", "10.0.0.1:80", "", "2:8: host: '10.0.0.256' is not an IP address"),
            ("[::]:80-x", "10.0.0.1:80", "", "2:8: host: 'x' is not a port"),
            ("[::]:80-82", "10.0.0.1:80-81", "", "2:8: host: 3 host ports"),
            ("[::]:80", "10.0.0.1", "", "3:6: to: the port is missing"),
            ("[::]:80", "127.0.0.1:80", "", "3:6: to: 80/tcp would forward to itself"),
            ("[::]:80", "10.0.0.1:80", "proto = 'sctp'", "4:9: proto: 'sctp' is not a protocol"),
            ("1.2.3.4:80", "10.0.0.1:80", "v6only = true", "4:10: v6only: 1.2.3.4 has no IPv4 clients"),
            ("[::]:80", "10.0.0.1:80", "idle_timeout = 'soon'", "4:16: idle_timeout: not a duration"),
            ("[::]:80", "10.0.0.1:80", "allow = ['lan']", "4:9: allow: not a network"),
            ("[::]:80", "10.0.0.1:80", "name = 'a b'", "4:8: name: \"a b\" is not a name"),
        ] {
            assert_found(&format!("[[mapping]]\nhost = \"{host}\"\nto = \"{to}\"\n{more}\n"), expected);
        }
    }

    #[test]
    fn all_mistakes_are_found_at_once() {
        let text =
            "[[mapping]]\nhost = \"x\"\nto = \"10.0.0.1:80\"\n[[mapping]]\nhost = \"[::]:80\"\nto = \"y\"\n";
        assert_eq!(mistakes(text).len(), 2);
        let text = "[[mapping]]\nhost = \"[::]:80\"\nto = \"10.0.0.1:80\"\n";
        let found = mistakes(&text.repeat(3));
        assert!(found[0].starts_with("4:1: name: 80/tcp is the name of another mapping"), "{found:?}");
        assert!(found.iter().any(|mistake| mistake.starts_with("5:8: host: port 80 is taken")), "{found:?}");
    }

    proptest! {
        #[test]
        fn what_is_printed_can_be_read_again(mapping in any_mapping()) {
            let text = print([&mapping]);
            prop_assert_eq!(find_mappings(&text).ok(), Some(vec![mapping]), "{}", text);
        }

        #[test]
        fn no_damage_to_a_file_does_harm(
            mapping in any_mapping(), at in any::<prop::sample::Index>(), junk in ".{0,4}", skip in 0..8_usize,
        ) {
            let text = print([&mapping]);
            let mut chars: Vec<char> = text.chars().collect();
            let at = at.index(chars.len());
            let end = chars.len().min(at + skip);
            chars.splice(at..end, junk.chars());
            let text: String = chars.into_iter().collect();
            if let Err(found) = find_mappings(&text) {
                prop_assert!(!Lines::of(&text).locate(found).is_empty());
            }
        }
    }
}
