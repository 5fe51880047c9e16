//! Errors in a file, and their positions.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use rproxy_mapping::escape::escaped;

/// The maximum number of errors that are reported. With more, the cause is probably another one, such as the
/// wrong file.
pub(super) const MOST: usize = 50;

/// The maximum length of a message, in characters, because the value it quotes may be as long as the file.
const LONGEST_MESSAGE: usize = 400;

/// An error at a position in bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    start: usize,
    message: String,
}

impl Found {
    /// An error at `place`. The message is shortened to one line of limited length.
    pub(super) fn at(place: Range<usize>, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if let Some((cut, _char)) = message.char_indices().nth(LONGEST_MESSAGE) {
            message.truncate(cut);
            message.push('…');
        }
        Self { start: place.start, message: escaped(&message).to_string() }
    }

    /// The start position, in bytes.
    pub(super) fn start(&self) -> usize {
        self.start
    }
}

impl From<toml::de::Error> for Found {
    fn from(error: toml::de::Error) -> Self {
        Self::at(error.span().unwrap_or_default(), error.message().replace('\n', "; "))
    }
}

/// The first [`MOST`] errors of a file, in order and without duplicates: an error in `[defaults]` is found
/// once for each mapping.
#[derive(Debug, Default)]
pub(super) struct Mistakes {
    first: BTreeSet<Found>,
    seen: usize,
    /// Whether there are more than these.
    pub(super) more: bool,
}

impl Mistakes {
    /// An empty collection. With `more`, there are further errors that will not be added.
    pub(super) fn with_more(more: bool) -> Self {
        Self { more, ..Self::default() }
    }

    /// Adds an error, and drops the last one if that exceeds the limit.
    pub(super) fn push(&mut self, found: Found) {
        self.seen += 1;
        self.first.insert(found);
        if self.first.len() > MOST {
            self.first.pop_last();
            self.more = true;
        }
    }

    /// Adds an error at `start` whose message is expensive to build, only if it is one of the first.
    pub(super) fn push_with(&mut self, start: usize, found: impl FnOnce() -> Found) {
        if self.first.len() == MOST && self.first.last().is_some_and(|last| last.start < start) {
            self.seen += 1;
            self.more = true;
        } else {
            self.push(found());
        }
    }

    /// The number of errors so far, including those that were dropped.
    pub(super) fn seen(&self) -> usize {
        self.seen
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seen == 0
    }
}

impl Extend<Found> for Mistakes {
    fn extend<T: IntoIterator<Item = Found>>(&mut self, found: T) {
        found.into_iter().for_each(|found| self.push(found));
    }
}

impl IntoIterator for Mistakes {
    type Item = Found;
    type IntoIter = std::collections::btree_set::IntoIter<Found>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter()
    }
}

/// An error in a file. Its text starts with line and column, like those of compilers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
    /// What is wrong, and what would work.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// The lines of a text.
pub(super) struct Lines<'a> {
    text: &'a str,
    /// Where each line starts.
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_at, byte)| *byte == b'\n');
        Self { text, starts: [0].into_iter().chain(ends.map(|(at, _byte)| at + 1)).collect() }
    }

    /// The start of the line that contains `at`.
    pub(super) fn start_of(&self, at: usize) -> usize {
        self.starts[self.starts.partition_point(|start| *start <= at) - 1]
    }

    /// Converts errors to line and column, in order.
    pub(super) fn locate(&self, found: Mistakes) -> Vec<Mistake> {
        found.into_iter().map(|Found { start, message }| self.mistake(start, message)).collect()
    }

    fn mistake(&self, at: usize, message: String) -> Mistake {
        let line = self.starts.partition_point(|start| *start <= at);
        let before = self.text.get(self.starts[line - 1]..at).unwrap_or_default();
        Mistake { line, column: before.chars().count() + 1, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_mistakes_are_kept_in_the_order_of_their_places() {
        let mut mistakes = Mistakes::default();
        for at in (0..10_000).rev() {
            mistakes.push(Found::at(at..at, "x"));
            mistakes.push(Found::at(at..at, "x"));
        }
        assert!(mistakes.more && mistakes.seen() == 20_000);
        mistakes.push_with(MOST, || panic!("it is not one of the first"));
        let starts: Vec<usize> = mistakes.into_iter().map(|found| found.start()).collect();
        assert_eq!(starts, (0..MOST).collect::<Vec<_>>());
        let mut few = Mistakes::default();
        few.extend((0..MOST).map(|at| Found::at(at..at, "x")));
        assert!(!few.more);
    }

    #[test]
    fn a_message_is_one_short_line() {
        let found = Found::at(0..0, "a\nb".repeat(1_000_000));
        assert!(found.message.starts_with("a\\nba") && found.message.ends_with('…'), "{}", found.message);
        assert!(found.message.len() < 3 * LONGEST_MESSAGE);
    }
}
