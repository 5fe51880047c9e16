//! The system calls that a process makes, as strace(1) sees them.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::process::{Process, Stream};
use crate::{eventually, require};

/// Follows all threads of a process, and those that it starts.
pub struct Trace {
    strace: Process,
    traced: Pid,
    /// A file for each thread.
    dir: TempDir,
}

impl Trace {
    /// Attaches to a process, which may be stopped. Calls count from now on.
    ///
    /// # Panics
    /// When strace is not installed or may not attach.
    #[track_caller]
    pub fn attach(process: &Process) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = require::command("strace");
        command.args(["--follow-forks", "--output-separately", "--string-limit=0", "--signal=none"]);
        command.arg("-o").arg(dir.path().join("calls"));
        command.arg("-p").arg(process.pid().to_string());
        let strace = Process::spawn(command);
        strace.wait_for_line(Stream::Stderr, |line| line.contains("attached"));
        Self { strace, traced: process.pid(), dir }
    }

    /// As [`Self::finish`], once a call of this name has been made: it may still be about to be.
    #[track_caller]
    pub fn finish_after(self, name: &str) -> Calls {
        eventually(&format!("{name} is called"), || self.calls().count(&[name]) > 0);
        self.finish()
    }

    /// Waits until the process does, detaches, and says which calls came to their end meanwhile.
    #[track_caller]
    pub fn finish(self) -> Calls {
        // What a call has brought about may be seen before its end.
        eventually("the process waits", || threads_wait(self.traced));
        self.strace.signal(Signal::SIGINT);
        self.strace.wait();
        self.calls()
    }

    fn calls(&self) -> Calls {
        let mut calls = Vec::new();
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            let log = fs::read(entry.unwrap().path()).unwrap();
            calls.extend(String::from_utf8_lossy(&log).lines().filter_map(Call::parse));
        }
        Calls(calls)
    }
}

/// Whether all threads of a process sleep in a call (proc(5), `stat`): one that has been stopped does not.
fn threads_wait(pid: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        // It may have ended. The state follows the name, which is in parentheses.
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_name, rest)| rest.starts_with('S'))
    })
}

/// A system call that came to its end.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// Its arguments, as strace writes them.
    pub arguments: String,
    /// What it returned; -1 for an error.
    pub result: i64,
    /// The name of the error, or nothing.
    pub error: String,
}

impl Call {
    /// Reads a line. `None` for one that had not ended when the trace did, and for what goes on because the trace
    /// began or a signal came, neither of which the process asked for.
    fn parse(line: &str) -> Option<Self> {
        let (name, rest) = line.split_once('(')?;
        let (arguments, outcome) = rest.rsplit_once(" = ")?;
        let (result, error) = outcome.split_once(' ').unwrap_or((outcome, ""));
        let error = error.split(' ').next().unwrap_or_default();
        let is_interrupted = error == "EINTR" || name == "restart_syscall";
        let call = Self {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
            result: parse_number(result)?,
            error: error.to_owned(),
        };
        (!is_interrupted).then_some(call)
    }
}

/// Reads a number, or an address.
fn parse_number(text: &str) -> Option<i64> {
    match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The calls of a process during a trace.
#[derive(Clone, Debug)]
pub struct Calls(Vec<Call>);

impl Calls {
    /// How many there were.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All calls with one of these names.
    pub fn named<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = &'a Call> {
        self.0.iter().filter(|call| names.contains(&&*call.name))
    }

    /// How many calls there were with one of these names, failed ones too.
    pub fn count(&self, names: &[&str]) -> usize {
        self.named(names).count()
    }

    /// The sum of what the successful ones of these calls returned: bytes of a read, messages of a sendmmsg(2).
    pub fn sum(&self, names: &[&str]) -> usize {
        self.named(names).filter_map(|call| usize::try_from(call.result).ok()).sum()
    }

    /// How many calls there were of each name.
    pub fn by_name(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for call in &self.0 {
            *counts.entry(&*call.name).or_default() += 1;
        }
        counts
    }

    /// Checks that there were at most `most` calls with one of these names.
    ///
    /// # Panics
    /// When there were more; the message says how many of each name.
    #[track_caller]
    pub fn assert_at_most(&self, most: usize, names: &[&str]) {
        let count = self.count(names);
        assert!(count <= most, "{count} of {names:?}, and not at most {most}: {:?}", self.by_name());
    }

    /// Checks that there were at most `most` calls in all.
    ///
    /// # Panics
    /// When there were more; the message says how many of each name.
    #[track_caller]
    pub fn assert_in_all_at_most(&self, most: usize) {
        assert!(self.len() <= most, "{} calls, and not at most {most}: {:?}", self.len(), self.by_name());
    }
}
