//! The status pipe, through which the runtime learns that clients are served, or why not.

use rproxy_sys_raw::fd::{Fd, write_error};

/// The descriptor of the status pipe.
const STATUS_FD: i32 = 3;

/// The status pipe, if the caller passed one. There is none if a user starts the shim by hand.
pub(crate) struct Status(Option<Fd>);

impl Status {
    /// Claims descriptor 3 if it is a writable pipe, and closes it if it is something else. Call it before anything
    /// opens a file.
    pub(crate) fn claim() -> Self {
        let claimed = Fd::claim(STATUS_FD).ok();
        Self(claimed.filter(Fd::is_writable_pipe))
    }

    /// Lets `rproxy` inherit the pipe, which then reports.
    pub(crate) fn set_inherited(&self) {
        if let Some(pipe) = &self.0 {
            // Without it, the runtime would see the pipe closed.
            let _inherited = pipe.set_inherited(true);
        }
    }

    /// Reports that clients are served, with one write, and closes the pipe. If nobody reads it, the runtime is gone,
    /// and a signal will follow.
    pub(crate) fn ready(self) {
        if let Some(pipe) = self.0 {
            let _written = pipe.write(b"0\n");
        }
    }

    /// Reports the failure that `describe` writes in parts, also to standard error.
    pub(crate) fn failed(self, describe: impl FnOnce(&mut dyn FnMut(&[u8]))) {
        let pipe = self.0;
        let mut write = |part: &[u8]| {
            write_error(part);
            if let Some(pipe) = &pipe {
                let _written = pipe.write(part);
            }
        };
        if let Some(pipe) = &pipe {
            let _written = pipe.write(b"1\n");
        }
        write_error(b"rproxy-shim: ");
        describe(&mut write);
        write_error(b"\n");
    }
}
