//! Unix sockets for the tests, on either side of a relay.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use tempfile::TempDir;

use crate::PATIENCE;
use crate::process::{Process, Stream};
use crate::rproxy::{self, Standalone};

/// Where a Unix socket is, with a directory of its own.
pub struct Place {
    /// Its address.
    pub address: SocketAddr,
    /// The same, as `rproxy` takes it.
    pub text: String,
    /// The directory, removed in the end.
    pub dir: TempDir,
}

impl Place {
    /// One with a path.
    pub fn path() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.sock");
        let (address, text) = (SocketAddr::from_pathname(&path).unwrap(), format!("unix:{}", path.display()));
        Self { address, text, dir }
    }

    /// One with an abstract name.
    pub fn name() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().display().to_string();
        let (address, text) = (SocketAddr::from_abstract_name(&name).unwrap(), format!("unix:@{name}"));
        Self { address, text, dir }
    }

    /// Its path.
    pub fn as_path(&self) -> &Path {
        self.address.as_pathname().unwrap()
    }

    /// A file in its directory.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Listens there.
    pub fn listen(&self) -> UnixListener {
        UnixListener::bind_addr(&self.address).unwrap()
    }

    /// Serves each connection by `handler`, until the test ends.
    pub fn serve(&self, handler: impl Fn(UnixStream) + Copy + Send + 'static) {
        let listener = self.listen();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = patient(stream.unwrap());
                thread::spawn(move || handler(stream));
            }
        });
    }

    /// Connects there.
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        patient(UnixStream::connect_addr(&self.address).unwrap())
    }

    /// A relay to it.
    #[track_caller]
    pub fn relay(&self, more_arguments: &[&str]) -> Standalone {
        Standalone::start(&[&["--host", "127.0.0.1:0", "--to", &self.text], more_arguments].concat())
    }

    /// A relay that listens there.
    #[track_caller]
    pub fn relay_from(&self, to: &str, more_arguments: &[&str]) -> Process {
        let arguments = [&["--host", &self.text, "--to", to], more_arguments].concat();
        let process = Process::spawn(rproxy::command(&arguments));
        process.wait_for_line(Stream::Stdout, |line| line.ends_with(&format!(" -> {}", self.text)));
        process
    }
}

/// Has a stream wait no longer than a test may.
pub fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}
