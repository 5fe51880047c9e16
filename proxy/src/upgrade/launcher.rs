//! The launcher: a small process beside a confined one, which does what the confined process no longer can:
//! start its program again, open its configuration, look up whether answers to clients come back, and start the
//! [resolver](crate::names::resolver) of the names of backends.
//!
//! It is forked first, and so keeps the arguments, environment, directory, user and limits that the program
//! was started with. It ignores signals and ends when the process it serves ends, for whatever reason. It
//! then also ends a new process that was not kept.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{F_SETFD, FdFlag, fcntl};
use rproxy_sys::fd::claim_inherited;
use rproxy_sys::pass::send_descriptors;
use rproxy_sys::process::{fork_alone, set_title};

use super::channel::Channel;
use super::program::{Program, absolute};
use super::resolver::Resolvers;
use crate::bind::return_path::ReturnPath;
use crate::config;
use crate::log::destination;

/// Set for a new process, to the id of the process that started it and the descriptor of its channel, as in
/// `4711:3`. A process with another parent may have inherited the variable and ignores it.
const VARIABLE: &str = "RPROXY_TAKE_OVER";

/// Variables that systemd sets for the process it started only.
const OF_ONE_PROCESS: [&str; 4] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"];

/// The command line that lists of processes show.
const TITLE: &str = "rproxy: launcher";

/// The name of the process; at most 15 bytes (`PR_SET_NAME`, prctl(2)).
const NAME: &std::ffi::CStr = c"rproxy-launcher";

/// The longest path that is transferred, in bytes (`PATH_MAX`, limits.h).
const LONGEST_PATH: usize = 4096;

/// How long a process may take to exit by itself, with an exit status that says why, before it is killed.
const GRACE: Duration = Duration::from_secs(1);

/// The requests, one byte each.
const OPEN_CONFIGURATION: u8 = b'o';
const OPEN_ACCESS_LOG: u8 = b'l';
const START: u8 = b's';
const KEEP: u8 = b'k';
const END: u8 = b'e';
const RETURN_PATH: u8 = b'w';

/// The longest name of an interface, in bytes (`IFNAMSIZ`, netdevice(7)).
const LONGEST_NAME: usize = 16;

/// The launcher, as seen by the process it serves.
#[derive(Debug)]
pub struct Launcher {
    socket: UnixStream,
    /// The socket for requests of a resolver.
    names: Option<UnixStream>,
}

impl Launcher {
    /// Forks the launcher, which may only open the files at `configuration` and `access_log`, and with `names` starts a
    /// resolver. Call it before this process has threads or anything that a child must not inherit.
    ///
    /// # Errors
    /// Those of readlink(2) for `/proc/self/exe`, socketpair(2) and fork(2).
    pub fn start(configuration: Option<&Path>, access_log: Option<&Path>, names: bool) -> io::Result<Self> {
        let work = Work {
            program: Program::running()?,
            arguments: env::args_os().skip(1).collect(),
            // Absolute, because the current directory may be removed and created again.
            configuration: configuration.map(absolute),
            access_log: access_log.map(absolute),
        };
        let (socket, its) = UnixStream::pair()?;
        let (names, asked) = names.then(UnixStream::pair).transpose()?.unzip();
        match asked {
            None => fork_alone([its.into()], |[socket]| serve(socket.into(), None, &work))?,
            Some(asked) => fork_alone([its.into(), asked.into()], |[socket, asked]| {
                serve(socket.into(), Some(asked), &work);
            })?,
        }
        Ok(Self { socket, names })
    }

    /// Takes the socket by which resolvers of names are requested.
    pub(crate) fn take_names(&mut self) -> Option<UnixStream> {
        self.names.take()
    }

    /// A channel for requests.
    ///
    /// # Errors
    /// Those of dup(2) and epoll_ctl(2).
    pub(super) fn ask(&self) -> io::Result<Asked> {
        Channel::new(self.socket.try_clone()?).map(Asked)
    }
}

/// A file that is opened again while the process runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reopened {
    Configuration,
    AccessLog,
}

/// The channel for requests to the launcher.
pub(super) struct Asked(Channel);

impl Asked {
    /// Starts a new process. Returns its id and our end of its channel, or the program's path and the error
    /// of execve(2).
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) async fn start(&self) -> io::Result<Result<(u32, OwnedFd), (PathBuf, io::Error)>> {
        self.0.write(&[START]).await?;
        match self.number().await? {
            0 => {
                let process = self.number().await?.unsigned_abs();
                Ok(Ok((process, self.descriptor().await?)))
            }
            errno => {
                let length =
                    usize::try_from(self.number().await?).map_err(|_negative| io::ErrorKind::InvalidData)?;
                let mut path = vec![0; length.min(LONGEST_PATH)];
                self.0.read(&mut path).await?;
                Ok(Err((OsString::from_vec(path).into(), io::Error::from_raw_os_error(errno))))
            }
        }
    }

    /// Opens a file, or returns the error of open(2).
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) async fn open(&self, which: Reopened) -> io::Result<io::Result<File>> {
        let request = match which {
            Reopened::Configuration => OPEN_CONFIGURATION,
            Reopened::AccessLog => OPEN_ACCESS_LOG,
        };
        self.0.write(&[request]).await?;
        match self.number().await? {
            0 => match self.descriptor().await {
                // The launcher has answered, but there is no descriptor for the file.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Err(Errno::EMFILE.into())),
                descriptor => Ok(Ok(descriptor?.into())),
            },
            errno => Ok(Err(io::Error::from_raw_os_error(errno))),
        }
    }

    /// Looks up a return path: the interface for which a command is missing, or the error.
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) async fn look_up(&self, path: &ReturnPath) -> io::Result<io::Result<Option<String>>> {
        self.0.write(&[&[RETURN_PATH][..], &path.to_bytes()].concat()).await?;
        match self.number().await? {
            0 => {}
            errno => return Ok(Err(io::Error::from_raw_os_error(errno))),
        }
        let length = usize::try_from(self.number().await?).map_err(|_negative| io::ErrorKind::InvalidData)?;
        let mut name = vec![0; length.min(LONGEST_NAME)];
        self.0.read(&mut name).await?;
        Ok(Ok((!name.is_empty()).then(|| String::from_utf8_lossy(&name).into_owned())))
    }

    async fn descriptor(&self) -> io::Result<OwnedFd> {
        let descriptor = self.0.receive_descriptors(1).await?.pop();
        Ok(descriptor.ok_or(io::ErrorKind::InvalidData)?)
    }

    /// Keeps the new process running. The launcher is no longer needed, and ends.
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) fn keep(&self) -> io::Result<()> {
        self.0.write_at_once(&[KEEP])
    }

    /// Ends the new process unless it exits within a second, and returns its exit status.
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) async fn end(&self) -> io::Result<ExitStatus> {
        self.0.write(&[END]).await?;
        Ok(ExitStatus::from_raw(self.number().await?))
    }

    async fn number(&self) -> io::Result<i32> {
        let mut number = [0; 4];
        self.0.read(&mut number).await?;
        Ok(i32::from_ne_bytes(number))
    }
}

/// What the launcher is able to do.
struct Work {
    program: Program,
    /// The arguments of the process, without its name.
    arguments: Vec<OsString>,
    configuration: Option<PathBuf>,
    access_log: Option<PathBuf>,
}

/// Serves requests until the other side closes the socket. Starts a resolver whenever `names` requests one.
fn serve(mut socket: UnixStream, names: Option<OwnedFd>, work: &Work) {
    // For readers of process lists only, so errors do not matter.
    rustix::thread::set_name(NAME).ok();
    set_title(TITLE).ok();
    let mut started = Started(None);
    let mut resolvers = Resolvers::new(names);
    let mut request = [0];
    while resolvers.serve_until_request(&socket) && matches!(socket.read(&mut request), Ok(1)) {
        let answered = match request[0] {
            OPEN_CONFIGURATION => open(work.configuration.as_deref(), config::open, &mut socket),
            OPEN_ACCESS_LOG => open(work.access_log.as_deref(), destination::open_file, &mut socket),
            START => start(work, &mut started, &mut socket),
            KEEP => {
                // It is reparented to whichever process adopts orphans, like any service.
                started.0 = None;
                return;
            }
            END => tell(&mut socket, started.end().map_or(0, ExitStatus::into_raw)),
            RETURN_PATH => look_up(&mut socket),
            _ => return,
        };
        if answered.is_err() {
            return;
        }
    }
}

fn open(path: Option<&Path>, open: fn(&Path) -> io::Result<File>, socket: &mut UnixStream) -> io::Result<()> {
    match open(path.ok_or(io::ErrorKind::InvalidInput)?) {
        Ok(file) => {
            tell(socket, 0)?;
            send_descriptors(socket.as_fd(), &[file.as_fd()])
        }
        Err(error) => tell(socket, errno(&error)),
    }
}

fn start(work: &Work, started: &mut Started, socket: &mut UnixStream) -> io::Result<()> {
    started.end();
    let program = work.program.now();
    let (child, its_other_end) = match spawn(&program, work) {
        Ok(spawned) => spawned,
        Err(error) => {
            tell(socket, errno(&error))?;
            let path = program.as_os_str().as_bytes();
            let path = &path[..path.len().min(LONGEST_PATH)];
            tell(socket, i32::try_from(path.len()).unwrap_or_default())?;
            return socket.write_all(path);
        }
    };
    let process = child.id().cast_signed();
    started.0 = Some(child);
    tell(socket, 0)?;
    tell(socket, process)?;
    send_descriptors(socket.as_fd(), &[its_other_end.as_fd()])
}

fn look_up(socket: &mut UnixStream) -> io::Result<()> {
    let mut path = [0; ReturnPath::BYTES];
    socket.read_exact(&mut path)?;
    let path = ReturnPath::from_bytes(&path).ok_or(io::ErrorKind::InvalidData)?;
    match path.interface_without() {
        Ok(interface) => {
            let name = interface.unwrap_or_default();
            let name = &name.as_bytes()[..name.len().min(LONGEST_NAME)];
            tell(socket, 0)?;
            tell(socket, i32::try_from(name.len()).unwrap_or_default())?;
            socket.write_all(name)
        }
        Err(error) => tell(socket, errno(&error)),
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(nix::libc::EIO)
}

fn tell(socket: &mut UnixStream, number: i32) -> io::Result<()> {
    socket.write_all(&number.to_ne_bytes())
}

/// Starts the program with its original arguments and one end of a channel. Returns the other end.
fn spawn(program: &Path, work: &Work) -> io::Result<(Child, UnixStream)> {
    let (own, its) = UnixStream::pair()?;
    fcntl(&its, F_SETFD(FdFlag::empty()))?;
    let mut command = Command::new(program);
    command.arg0(&work.program.name).args(&work.arguments);
    for variable in OF_ONE_PROCESS {
        command.env_remove(variable);
    }
    command.env(VARIABLE, format!("{}:{}", process::id(), its.as_raw_fd()));
    Ok((command.spawn()?, own))
}

/// Claims the channel to the old process, if this process was started to take over. Call it before anything
/// else opens a file.
pub(super) fn claim_channel() -> Option<io::Result<OwnedFd>> {
    let value = env::var(VARIABLE).ok()?;
    let (parent, descriptor) = value.split_once(':')?;
    let is_for_this = parent.parse() == Ok(std::os::unix::process::parent_id());
    is_for_this.then(|| claim_inherited(descriptor.parse().unwrap_or(-1)))
}

/// A started process that is not kept yet. Dropping this ends it.
struct Started(Option<Child>);

impl Started {
    fn end(&mut self) -> Option<ExitStatus> {
        let mut child = self.0.take()?;
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = child.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        // It may have exited already.
        drop(child.kill());
        child.wait().ok()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.end();
    }
}
