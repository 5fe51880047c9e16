//! The lines of the service.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rproxy_mapping::escape::escaped;

use super::pace::Outcome;
use crate::commands::Mended;
use crate::error::{Error, finding};
use crate::hints::Hints;

/// A line names so many differences.
const NAMED: usize = 3;

/// A line has at most so many bytes: a pipe that is ready takes them without waiting (`PIPE_BUF`, pipe(7)).
const LONGEST: usize = 4096;

/// The lines of the service. Those that say the same as before are left out.
pub(super) struct Log<'a> {
    out: &'a mut dyn Write,
    hints: Hints,
    /// The failure or the problems of the last comparison.
    trouble: Vec<String>,
    /// What the last repairs were about, as long as they follow each other.
    repaired: Vec<String>,
    /// How many lines nobody has read.
    lost: usize,
}

impl<'a> Log<'a> {
    /// A log to `out`, which is standard error, or never makes its writer wait.
    pub(super) fn new(out: &'a mut dyn Write, hints: Hints) -> Self {
        Self { out, hints, trouble: Vec::new(), repaired: Vec::new(), lost: 0 }
    }

    /// Writes what was repaired, and what could not be. `follows` says whether it follows another repair.
    pub(super) fn mended(
        &mut self,
        mended: &Mended,
        took: Duration,
        follows: bool,
        notes: Vec<String>,
    ) -> Outcome {
        if let Some(restored) = &mended.restored {
            self.line(restored);
        }
        let found = findings(mended);
        if !found.is_empty() {
            let (named, more) = found.split_at(found.len().min(NAMED));
            let more = if more.is_empty() { String::new() } else { format!("; and {} more", more.len()) };
            self.line(&format!("repaired within {} ms: {}{more}", took.as_millis(), named.join("; ")));
        }
        let plan = &mended.plan;
        let trouble = [&mended.given_up, &plan.problems, &plan.warnings].into_iter().flatten().cloned();
        self.trouble(notes.into_iter().chain(trouble).collect());
        match (found.is_empty(), plan.problems.is_empty()) {
            (false, _) => Outcome::Repaired { again: self.is_again(found, follows) },
            (true, false) => Outcome::Failed,
            (true, true) => Outcome::Same,
        }
    }

    /// Whether one of the repairs before was about one of these, too. They are remembered.
    fn is_again(&mut self, found: Vec<String>, follows: bool) -> bool {
        if !follows {
            self.repaired.clear();
        }
        let again = found.iter().any(|found| self.repaired.contains(found));
        self.repaired.extend(found);
        self.repaired.sort_unstable();
        self.repaired.dedup();
        again
    }

    /// Whether nothing was found but what repairs were about that followed each other.
    pub(super) fn knows(&self, found: &Mended) -> bool {
        findings(found).iter().all(|found| self.repaired.contains(found))
    }

    pub(super) fn failure(&mut self, error: &Error, notes: Vec<String>) {
        self.trouble(notes.into_iter().chain([format!("not repaired: {error}")]).collect());
    }

    /// Writes what is not as it should be, unless that has been said.
    fn trouble(&mut self, trouble: Vec<String>) {
        let known = std::mem::replace(&mut self.trouble, trouble.clone());
        for line in trouble.iter().filter(|line| !known.contains(line)) {
            self.line(line);
        }
        if trouble.is_empty() && !known.is_empty() {
            self.line("everything is as it should be again");
        }
    }

    pub(super) fn fight(&mut self, delay: Duration) {
        let seconds = delay.as_secs();
        self.line(&format!(
            "another program undoes the repairs again and again; the next one is not before {seconds} s"
        ));
    }

    /// Writes a line, unless nobody reads: repairs do not wait for that.
    pub(super) fn line(&mut self, text: &str) {
        if self.lost > 0 && is_ready() {
            let lost = std::mem::take(&mut self.lost);
            self.write(&format!("{lost} lines are missing here, as nobody read them"));
        }
        if is_ready() {
            let text = escaped(&self.hints.complete(text)).to_string();
            self.write(&text);
        } else {
            self.lost += 1;
        }
    }

    fn write(&mut self, text: &str) {
        let line = format!("netns-setup: {text}");
        let longest = line.len().min(LONGEST - 1);
        let end = (0..=longest).rev().find(|at| line.is_char_boundary(*at)).unwrap_or_default();
        // There is nowhere to report that it cannot be written.
        drop(self.out.write_all(format!("{}\n", &line[..end]).as_bytes()));
    }
}

/// Whether standard error takes a line without waiting.
fn is_ready() -> bool {
    let stderr = io::stderr();
    // An error is noticed by writing, too.
    !matches!(poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO), Ok(0))
}

/// What a repair was about.
fn findings(mended: &Mended) -> Vec<String> {
    mended.plan.steps.iter().map(|step| finding(&step.action)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(out: &mut Vec<u8>) -> Log<'_> {
        Log::new(out, Hints::about("/run/netns-setup".as_ref()))
    }

    fn again(log: &mut Log<'_>, found: &str, follows: bool) -> bool {
        log.is_again(vec![found.to_owned()], follows)
    }

    #[test]
    fn repairs_that_alternate_are_the_same_ones_again() {
        let mut out = Vec::new();
        let mut log = log(&mut out);
        let turns = ["a", "b", "a", "b", "c", "a"].map(|found| again(&mut log, found, true));
        assert_eq!(turns, [false, false, true, true, false, true]);
        assert!(!again(&mut log, "a", false), "much later");
        assert!(!again(&mut log, "b", true), "what was before that is forgotten");
    }

    #[test]
    fn a_line_is_never_longer_than_what_a_pipe_takes_at_once() {
        let mut out = Vec::new();
        log(&mut out).write(&"ü".repeat(LONGEST));
        assert!(out.len() <= LONGEST && out.ends_with("ü\n".as_bytes()), "{}", out.len());
    }
}
