//! Progress output: a line that is rewritten on a terminal, or a line for each workload otherwise.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// Moves to the start of the line and clears it.
const REWRITE: &str = "\r\x1b[K";

/// The progress of a run.
pub(crate) struct Progress {
    start: Instant,
    steps: usize,
    done: usize,
    terminal: bool,
    last_heading: String,
}

impl Progress {
    /// Before the first of `steps` steps.
    pub(crate) fn new(steps: usize) -> Self {
        let terminal = stderr().is_terminal();
        Self { start: Instant::now(), steps, done: 0, terminal, last_heading: String::new() }
    }

    /// Starts a step.
    pub(crate) fn step(&mut self, heading: &str, detail: &str) {
        let line = format!("[{}/{}] {heading}", self.done + 1, self.steps);
        if self.terminal {
            write(&format!("{REWRITE}{line} · {detail}{}", self.left()));
        } else if self.last_heading != heading {
            heading.clone_into(&mut self.last_heading);
            write(&format!("{line}{}\n", self.left()));
        }
        self.done += 1;
    }

    /// Prints a line that stays on the screen.
    pub(crate) fn note(&self, text: &str) {
        write(&format!("{}{text}\n", if self.terminal { REWRITE } else { "" }));
    }

    /// Clears the progress line before the result.
    pub(crate) fn finish(&self) {
        if self.terminal {
            write(REWRITE);
        }
    }

    /// The estimated remaining time, based on the time so far.
    fn left(&self) -> String {
        let Some(done) = u32::try_from(self.done).ok().filter(|done| *done > 0) else { return String::new() };
        let remaining = u32::try_from(self.steps - self.done).unwrap_or(u32::MAX);
        let left = self.start.elapsed() / done * remaining;
        format!(" · {} left", humantime::format_duration(Duration::from_secs(left.as_secs())))
    }
}

fn write(text: &str) {
    // If nobody reads the output, the run continues.
    drop(stderr().write_all(text.as_bytes()));
}
