//! The status pipe, through which the runtime learns that the proxy serves, or why not.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{F_GETFL, OFlag, fcntl};
use nix::libc::{S_IFIFO, S_IFMT};
use nix::sys::stat::fstat;
use rproxy_sys::fd::claim_inherited;

/// The descriptor of the status pipe.
const STATUS_FD: i32 = 3;

/// The status pipe, if the caller passed one. There is none if a user starts the proxy by hand.
#[derive(Debug)]
pub(super) struct StatusPipe(Option<File>);

impl StatusPipe {
    /// Claims descriptor 3 if it is a writable pipe, and marks it close-on-exec. Call it before anything
    /// opens a file. Anything else at descriptor 3 is not the status pipe, and is not written to.
    pub(super) fn claim() -> Self {
        let is_pipe = |fd: &OwnedFd| fstat(fd).is_ok_and(|status| status.st_mode & S_IFMT == S_IFIFO);
        let is_writable = |fd: &OwnedFd| {
            fcntl(fd, F_GETFL).is_ok_and(|flags| {
                let access = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
                access != OFlag::O_RDONLY
            })
        };
        let claimed = claim_inherited(STATUS_FD).ok();
        Self(claimed.filter(|fd| is_pipe(fd) && is_writable(fd)).map(File::from))
    }

    /// Reports that clients are served, and closes the pipe.
    pub(super) fn ready(self) -> io::Result<()> {
        self.send("0\n")
    }

    /// Reports why the start failed, and closes the pipe.
    pub(super) fn failed(self, reason: &impl Display) -> io::Result<()> {
        self.send(&format!("1\n{reason}"))
    }

    /// Writes with one call, because moby reads the first two bytes with a single read.
    fn send(self, status: &str) -> io::Result<()> {
        match self.0 {
            Some(mut pipe) => pipe.write_all(status.as_bytes()),
            None => Ok(()),
        }
    }
}
