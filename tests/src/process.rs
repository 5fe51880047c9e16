//! Child processes that end with the value that owns them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::{PATIENCE, eventually, require};

/// All processes that have not been reaped yet, for [`kill_all`].
static RUNNING: Mutex<BTreeMap<Pid, Weak<Shared>>> = Mutex::new(BTreeMap::new());

/// One of the two captured outputs of a process.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A running child. Its output is captured; dropping it kills and reaps it.
///
/// If it is dropped during a panic, its output is printed, which usually shows the cause.
pub struct Process {
    name: String,
    pid: Pid,
    shared: Arc<Shared>,
}

/// How a finished process ended.
#[derive(Debug)]
pub struct Output {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Output {
    /// Its standard output.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.status.success(), "{self:#?}");
        self.stdout
    }
}

/// How a message names this process.
pub fn own_name() -> String {
    let comm = fs::read_to_string("/proc/self/comm").unwrap();
    format!("{} (process {})", comm.trim_end(), std::process::id())
}

/// Runs a command to its end.
pub fn run(command: Command) -> Output {
    Process::spawn(command).into_output()
}

/// `prefix`, which runs the command that its last arguments are: the words of `command`, with its environment.
pub fn prefixed(mut prefix: Command, command: &Command) -> Command {
    prefix.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => prefix.env(name, value),
            None => prefix.env_remove(name),
        };
    }
    prefix
}

/// A shell that runs `script`, in which `"$0" "$@"` is `command`.
pub fn in_shell(script: &str, command: &Command) -> Command {
    let mut shell = require::command("sh");
    shell.args(["-c", script]);
    prefixed(shell, command)
}

/// Kills every process that this one started and has not reaped.
pub fn kill_all() {
    let running: Vec<_> = RUNNING.lock().unwrap().values().cloned().collect();
    for shared in running.iter().filter_map(Weak::upgrade) {
        shared.signal(Signal::SIGKILL);
    }
}

impl Process {
    /// Starts a command with its output captured and no input.
    ///
    /// The command is consumed, so that descriptors it passes on are closed in this process.
    #[track_caller]
    pub fn spawn(command: Command) -> Self {
        Self::spawn_by(command, Command::spawn)
    }

    /// Like [`Process::spawn`], using `spawn`, which chooses the thread that forks, and so the namespaces.
    #[track_caller]
    pub fn spawn_by(mut command: Command, spawn: impl FnOnce(&mut Command) -> io::Result<Child>) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let name = command.get_program().to_string_lossy().into_owned();
        let child = match spawn(&mut command) {
            Ok(child) => child,
            Err(error) => panic!("cannot start {name}: {error}"),
        };
        // It holds the sockets that the program was given, whose ports the program may have to find free.
        drop(command);
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let shared = Arc::new(Shared::default());
        RUNNING.lock().unwrap().insert(pid, Arc::downgrade(&shared));
        Shared::follow(&shared, pid, child);
        Self { name, pid, shared }
    }

    /// Its process id, which is not reused until this value is dropped or [`Process::wait`] returns.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its only child.
    ///
    /// # Panics
    /// If it has none, or several.
    #[track_caller]
    pub fn only_child(&self) -> Pid {
        let pid = self.pid;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Pid::from_raw(children.trim().parse().unwrap())
    }

    /// Sends a signal; does nothing if the process has exited.
    pub fn signal(&self, signal: Signal) {
        self.shared.signal(signal);
    }

    /// Waits until the process has exited and all of its output has been read.
    #[track_caller]
    pub fn wait(&self) -> ExitStatus {
        self.wait_within(PATIENCE)
    }

    /// Like [`Process::wait`], for a process that may run for longer.
    #[track_caller]
    pub fn wait_within(&self, patience: Duration) -> ExitStatus {
        let status = self.shared.wait_for(patience, |state| state.status);
        let Some(status) = status else {
            panic!("{} has not ended after {patience:?}{}", self.name, self.transcript())
        };
        // A grandchild may keep the pipes open after the process exits; the output so far is used then.
        self.shared.wait_for(Duration::from_secs(1), |state| (state.open_streams() == 0).then_some(()));
        status
    }

    /// Whether the process still runs.
    pub fn is_running(&self) -> bool {
        self.shared.lock().status.is_none()
    }

    /// The number of its open descriptors.
    ///
    /// # Panics
    /// If it has exited.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        match fs::read_dir(format!("/proc/{}/fd", self.pid)) {
            Ok(entries) => entries.count(),
            Err(error) => panic!("cannot list the descriptors: {error}{}", self.transcript()),
        }
    }

    /// Sets the most descriptors that it may have open, its soft limit; by prlimit(1).
    #[track_caller]
    pub fn limit_descriptors(&self, most: usize) {
        let mut prlimit = require::command("prlimit");
        prlimit.args([format!("--pid={}", self.pid), format!("--nofile={most}:")]);
        run(prlimit).success();
    }

    /// Stops the process until [`Process::resume`], so that it finds everything sent meanwhile at once.
    #[track_caller]
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        eventually(&format!("{} is stopped", self.name), || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
            // The state follows the name, which is in parentheses.
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        });
    }

    /// Resumes it after [`Process::pause`].
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Waits for its exit and returns its status and output.
    #[track_caller]
    pub fn into_output(self) -> Output {
        let status = self.wait();
        Output { status, stdout: self.captured(Stream::Stdout), stderr: self.captured(Stream::Stderr) }
    }

    /// What the process has written so far.
    pub fn captured(&self, stream: Stream) -> String {
        self.shared.lock().text(stream)
    }

    /// Waits for the first line that `wanted` accepts, including lines already written.
    #[track_caller]
    pub fn wait_for_line(&self, stream: Stream, wanted: impl Fn(&str) -> bool) -> String {
        self.wait_for_lines(stream, 1, wanted).remove(0)
    }

    /// Waits for the first `count` lines that `wanted` accepts.
    #[track_caller]
    pub fn wait_for_lines(&self, stream: Stream, count: usize, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let lines = self.shared.wait_for(PATIENCE, |state| {
            let text = state.text(stream);
            let complete = text.rsplit_once('\n').map_or("", |(lines, _partial)| lines);
            let found: Vec<_> = complete.lines().filter(|line| wanted(line)).take(count).collect();
            let over = !state.is_open(stream) || found.len() == count;
            over.then(|| found.into_iter().map(String::from).collect::<Vec<_>>())
        });
        match lines {
            Some(lines) if lines.len() == count => lines,
            _ => panic!("{} did not print the expected line{}", self.name, self.transcript()),
        }
    }

    fn transcript(&self) -> String {
        let state = self.shared.lock();
        let mut text = format!("\n--- {} (pid {}), status {:?}", self.name, self.pid, state.status);
        for stream in [Stream::Stdout, Stream::Stderr] {
            write!(text, "\n--- {stream:?}:\n{}", state.text(stream)).unwrap();
        }
        text
    }
}

impl Drop for Process {
    #[expect(clippy::print_stderr, reason = "the report of a failed test")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.transcript());
        }
        self.signal(Signal::SIGKILL);
        // Not a panic, which would abort: a process that survives SIGKILL hangs in the kernel.
        self.shared.wait_for(PATIENCE, |state| state.status);
    }
}

/// What the threads that watch the process report, and the lock that makes signalling safe. A process is
/// reaped and its status stored under this lock, so that a signal never reaches a reused pid.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pid: Option<Pid>,
    status: Option<ExitStatus>,
    captured: [Captured; 2],
}

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    open: bool,
}

impl State {
    fn text(&self, stream: Stream) -> String {
        String::from_utf8_lossy(&self.captured[stream as usize].bytes).into_owned()
    }

    fn is_open(&self, stream: Stream) -> bool {
        self.captured[stream as usize].open
    }

    fn open_streams(&self) -> usize {
        self.captured.iter().filter(|captured| captured.open).count()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Starts the threads that capture the output and reap the process.
    fn follow(this: &Arc<Self>, pid: Pid, mut child: Child) {
        this.update(|state| state.pid = Some(pid));
        Self::capture(this, Stream::Stdout, child.stdout.take().unwrap());
        Self::capture(this, Stream::Stderr, child.stderr.take().unwrap());
        let shared = Arc::clone(this);
        thread::spawn(move || shared.reap(pid, child));
    }

    fn capture(this: &Arc<Self>, stream: Stream, mut pipe: impl Read + Send + 'static) {
        this.update(|state| state.captured[stream as usize].open = true);
        let shared = Arc::clone(this);
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(len @ 1..) = pipe.read(&mut buffer) {
                shared.update(|state| {
                    state.captured[stream as usize].bytes.extend_from_slice(&buffer[..len]);
                });
            }
            shared.update(|state| state.captured[stream as usize].open = false);
        });
    }

    fn reap(&self, pid: Pid, mut child: Child) {
        // Does not reap, so that the pid cannot be reused before the lock is held.
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        self.update(|state| {
            state.status = Some(child.wait().unwrap());
            RUNNING.lock().unwrap().remove(&pid);
        });
    }

    fn signal(&self, signal: Signal) {
        let state = self.lock();
        if let (Some(pid), None) = (state.pid, state.status) {
            kill(pid, signal).unwrap();
        }
    }

    /// Waits until `ready` returns `Some`, for at most `patience`.
    fn wait_for<T>(&self, patience: Duration, ready: impl Fn(&State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(value) = ready(&state) {
                return Some(value);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}
