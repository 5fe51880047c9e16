//! Runs the cases of suites whose needs are met, each with a deadline and in a process of its own.
//!
//! The process confines what a case changes process-wide: limits, signals, the working directory, the reaper of
//! orphans. A case that hangs is ended with everything it started, while other cases go on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Command, ExitCode, Stdio, exit};
use std::sync::RwLock;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::process;
use crate::require::{self, Need};
use crate::role;
use crate::rproxy;
use crate::vm::guest;

/// The default deadline: far longer than any case takes, but short enough to wait for.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long an overdue case may take to fail and clean up after its processes have been killed.
const GRACE: Duration = Duration::from_secs(15);

/// The role of a process that runs one case.
const ROLE: &str = "case";

/// With what a case that has failed exits, as one of libtest does.
const FAILED: u8 = 101;

/// Written by a case that runs alone, read by the others.
static MACHINE: RwLock<()> = RwLock::new(());

/// One test: a name, what it needs, and a body that panics to fail.
pub struct Case {
    name: String,
    needs: Vec<Need>,
    deadline: Duration,
    alone: bool,
    on_request: bool,
    body: Box<dyn FnOnce() + Send>,
}

impl Case {
    /// A case without needs, with the default deadline.
    pub fn new(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> Self {
        Self {
            name: name.into(),
            needs: Vec::new(),
            deadline: DEADLINE,
            alone: false,
            on_request: false,
            body: Box::new(body),
        }
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

    /// Runs it while no other case runs.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Ignores it unless the command line has `--include-ignored`, or `--ignored`.
    #[must_use]
    pub fn on_request(mut self) -> Self {
        self.on_request = true;
        self
    }

    /// Runs it in a process of its own, if its needs are met.
    fn run(&self, strict: bool, capture: bool) -> Result<Completion, Failed> {
        let missing: Vec<String> =
            self.needs.iter().filter(|need| !need.is_met()).map(ToString::to_string).collect();
        if missing.is_empty() {
            // Once for all cases, and before any deadline starts, because the first build takes longer than any case.
            rproxy::rproxy();
            return self.run_in_process(capture);
        }
        let missing = format!("needs {}", missing.join(" and "));
        if strict {
            Err(format!("{missing}, and {} is set", require::STRICT).into())
        } else {
            Ok(Completion::ignored_with(missing))
        }
    }

    /// Its whole name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs it in a process of its own whatever it needs, with an environment variable that says where.
    ///
    /// # Errors
    /// Its output, if it fails.
    pub fn play_apart(&self, variable: &str) -> Result<(), Failed> {
        let mut command = role::command(&[ROLE, &self.name]);
        command.env(variable, "1");
        self.run_by(command, true).map(drop)
    }

    fn run_in_process(&self, capture: bool) -> Result<Completion, Failed> {
        self.run_by(role::command(&[ROLE, &self.name]), capture)
    }

    fn run_by(&self, mut command: Command, capture: bool) -> Result<Completion, Failed> {
        let output = if capture { Some(tempfile::tempfile()?) } else { None };
        command.stdin(Stdio::null());
        if let Some(output) = &output {
            // A file, since what the case leaves behind may hold it open for longer than the case runs.
            command.stdout(output.try_clone()?).stderr(output.try_clone()?);
        }
        let status = if self.alone {
            let _nobody_else = MACHINE.write().unwrap();
            command.status()?
        } else {
            let _some = MACHINE.read().unwrap();
            command.status()?
        };
        if status.success() {
            return Ok(Completion::Completed);
        }
        let output = output.map(read_from_start).transpose()?.unwrap_or_default();
        Err(format!("{output}{status}").into())
    }

    /// Runs it in this process, which has nothing else to do.
    pub fn play(self) -> ExitCode {
        rproxy::trust_build();
        let watchdog = Watchdog::start(self.name.clone(), self.deadline);
        // Panics name the thread.
        let thread = thread::Builder::new().name(self.name).spawn(self.body).unwrap();
        let passed = thread.join().is_ok();
        if watchdog.in_time() && passed { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
    }
}

fn read_from_start(mut file: File) -> std::io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The cases of these modules, each name behind that of its module, as libtest has it: `udp::flows::…`.
#[macro_export]
macro_rules! modules {
    ($($module:ident),+ $(,)?) => {{
        let mut cases: Vec<$crate::suite::Case> = Vec::new();
        $(cases.extend($crate::suite::of_module(stringify!($module), $module::cases()));)+
        cases
    }};
}

/// Puts the name of a module before those of its cases; see [`modules!`](crate::modules).
pub fn of_module(module: &str, cases: Vec<Case>) -> impl Iterator<Item = Case> {
    cases.into_iter().map(move |case| Case { name: format!("{module}::{}", case.name), ..case })
}

/// Runs the cases that the command line selects, like `cargo test`.
///
/// # Panics
/// If two cases have the same name.
pub fn run(cases: Vec<Case>) -> ExitCode {
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    if let Some([role, name]) = role::asked().as_deref()
        && role == ROLE
    {
        let case = cases.into_iter().find(|case| case.name == *name);
        return case.expect("there is a case of this name").play();
    }
    if let Some(code) = guest::play(&cases) {
        return code;
    }
    let arguments = Arguments::from_args();
    let (strict, capture) = (require::strict(), !arguments.nocapture);
    let trials = cases
        .into_iter()
        .map(|case| {
            let (name, ignored) = (case.name.clone(), case.on_request);
            Trial::ignorable_test(name, move || case.run(strict, capture)).with_ignored_flag(ignored)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Ends what hangs: first every process that the case has started, which ends nearly every wait, then the case.
struct Watchdog {
    done: Sender<()>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(case: String, deadline: Duration) -> Self {
        let (done, is_done) = mpsc::channel();
        Self { done, thread: thread::spawn(move || watch(&case, deadline, &is_done)) }
    }

    /// Tells it that the case is over; returns whether that was in time.
    fn in_time(self) -> bool {
        drop(self.done);
        self.thread.join().unwrap()
    }
}

/// Returns whether the case ended in time.
#[expect(clippy::print_stderr, reason = "the report of a failed test")]
#[expect(clippy::exit, reason = "a thread that hangs can be ended in no other way")]
fn watch(case: &str, deadline: Duration, is_done: &Receiver<()>) -> bool {
    if is_done.recv_timeout(deadline) != Err(RecvTimeoutError::Timeout) {
        return true;
    }
    eprintln!("{case} has run for {deadline:?}: ending all processes that it has started");
    process::kill_all();
    if is_done.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
        eprintln!("{case} still hangs: ending it");
        process::kill_all();
        exit(FAILED.into());
    }
    false
}
