//! What is wrong in a file, and where.

use std::fmt;
use std::ops::Range;

/// What is wrong at a place that is known by its bytes.
#[derive(Clone, Debug)]
pub(super) struct Found {
    place: Range<usize>,
    message: String,
}

impl Found {
    pub(super) fn at(place: Range<usize>, message: impl Into<String>) -> Self {
        Self { place, message: message.into() }
    }
}

impl Found {
    /// Where it starts, in bytes.
    pub(super) fn start(&self) -> usize {
        self.place.start
    }
}

impl From<toml::de::Error> for Found {
    fn from(error: toml::de::Error) -> Self {
        Self::at(error.span().unwrap_or_default(), error.message().replace('\n', "; "))
    }
}

/// A mistake in a file. Its text starts with line and column, as compilers write them.
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

    /// The mistakes in the order of their places.
    pub(super) fn locate(&self, mut found: Vec<Found>) -> Vec<Mistake> {
        found.sort_by_key(|found| found.place.start);
        let mistakes = found.into_iter().map(|Found { place, message }| self.mistake(place.start, message));
        let mut mistakes: Vec<Mistake> = mistakes.collect();
        // One in `[defaults]` is one of each mapping.
        mistakes.dedup();
        mistakes
    }

    fn mistake(&self, at: usize, message: String) -> Mistake {
        let line = self.starts.partition_point(|start| *start <= at);
        let before = self.text.get(self.starts[line - 1]..at).unwrap_or_default();
        Mistake { line, column: before.chars().count() + 1, message }
    }
}
