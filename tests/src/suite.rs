//! Runs the cases of a suite whose needs are met, each with a deadline.

use std::process::{ExitCode, exit};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::process;
use crate::require::{self, Need};
use crate::rproxy;

/// The default deadline: far longer than any case takes, but short enough to wait for.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long an overdue case may take to fail and clean up after its processes have been killed.
const GRACE: Duration = Duration::from_secs(15);

/// One test: a name, what it needs, and a body that panics to fail.
pub struct Case {
    name: String,
    needs: Vec<Need>,
    deadline: Duration,
    body: Box<dyn FnOnce() + Send>,
}

impl Case {
    /// A case without needs, with the default deadline.
    pub fn new(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> Self {
        Self { name: name.into(), needs: Vec::new(), deadline: DEADLINE, body: Box::new(body) }
    }

    /// Adds requirements of the case.
    #[must_use]
    pub fn needs(mut self, needs: &[Need]) -> Self {
        self.needs.extend_from_slice(needs);
        self
    }

    /// Replaces the default deadline.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn run(self, strict: bool) -> Result<Completion, Failed> {
        let missing: Vec<String> =
            self.needs.iter().filter(|need| !need.is_met()).map(ToString::to_string).collect();
        if missing.is_empty() {
            // Before the deadline starts, because the first build takes longer than any case.
            rproxy::rproxy();
            let watchdog = Watchdog::start(self.name, self.deadline);
            (self.body)();
            return watchdog.verdict();
        }
        let missing = format!("needs {}", missing.join(" and "));
        if strict {
            Err(format!("{missing}, and {} is set", require::STRICT).into())
        } else {
            Ok(Completion::ignored_with(missing))
        }
    }
}

/// Runs the cases that the command line selects, like `cargo test`.
pub fn run(cases: Vec<Case>) -> ExitCode {
    let strict = require::strict();
    let trials = cases
        .into_iter()
        .map(|case| Trial::ignorable_test(case.name.clone(), move || case.run(strict)))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Ends what hangs: first every process of the suite, which ends nearly every wait, then the suite.
struct Watchdog {
    deadline: Duration,
    done: Sender<()>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(case: String, deadline: Duration) -> Self {
        let (done, is_done) = mpsc::channel();
        let thread = thread::spawn(move || watch(&case, deadline, &is_done));
        Self { deadline, done, thread }
    }

    fn verdict(self) -> Result<Completion, Failed> {
        drop(self.done);
        if self.thread.join().unwrap() {
            Ok(Completion::Completed)
        } else {
            Err(format!("took longer than {:?}", self.deadline).into())
        }
    }
}

/// Returns whether the case ended in time. A case that panics drops its `done`, which counts as ended.
#[expect(clippy::print_stderr, reason = "the suite's own report")]
#[expect(clippy::exit, reason = "a thread that hangs can be ended in no other way")]
fn watch(case: &str, deadline: Duration, is_done: &Receiver<()>) -> bool {
    if is_done.recv_timeout(deadline) != Err(RecvTimeoutError::Timeout) {
        return true;
    }
    eprintln!("{case} has run for {deadline:?}: ending all processes that this suite started");
    process::kill_all();
    if is_done.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
        eprintln!("{case} still hangs: ending the suite");
        exit(101);
    }
    false
}
