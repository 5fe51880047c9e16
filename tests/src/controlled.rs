//! An `rproxy` with a control socket, and a client for it.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rproxy_sys::pass::send_before_json;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::Namespace;
use crate::process::{self, Output, Process};
use crate::{PATIENCE, eventually, rproxy};

/// A running `rproxy` without initial mappings.
pub struct Controlled {
    /// The process.
    pub process: Process,
    dir: TempDir,
}

impl Controlled {
    /// Starts one, and waits until it listens on its control socket.
    #[track_caller]
    pub fn start(more_arguments: &[&str]) -> Self {
        Self::start_by(more_arguments, Process::spawn)
    }

    /// Like [`Controlled::start`], inside a namespace.
    #[track_caller]
    pub fn start_in(namespace: &Namespace, more_arguments: &[&str]) -> Self {
        Self::start_by(more_arguments, |command| namespace.spawn(command))
    }

    /// Like [`Controlled::start`], using `spawn`, which may choose a namespace or wrap the command.
    #[track_caller]
    pub fn start_by(more_arguments: &[&str], spawn: impl FnOnce(Command) -> Process) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let socket_text = socket.to_str().unwrap();
        let process = spawn(rproxy::command(&[&["--control", socket_text], more_arguments].concat()));
        let controlled = Self { process, dir };
        eventually("the control socket is there", || UnixStream::connect(&socket).is_ok());
        // Connections are accepted during the start, and served afterwards.
        controlled.ctl(&["list"]).success();
        controlled
    }

    /// The path of its control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    /// A file for the test, beside the socket.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Runs `rproxy ctl` with these arguments.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str]) -> Output {
        let socket = self.socket();
        process::run(rproxy::command(&[&["ctl", "--control", socket.to_str().unwrap()], arguments].concat()))
    }

    /// Runs `rproxy ctl --json`, which must succeed.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ctl(&[arguments, &["--json"]].concat()).success();
        serde_json::from_str(&output).unwrap()
    }

    /// Applies mappings with `rproxy ctl apply`.
    #[track_caller]
    pub fn apply(&self, mappings: &[Value]) -> Output {
        let file = self.file("mappings.json", &json!({ "mappings": mappings }).to_string());
        self.ctl(&["apply", file.to_str().unwrap()])
    }

    /// Connects to its control socket.
    #[track_caller]
    pub fn connect(&self) -> Conversation {
        Conversation::open(&self.socket())
    }

    /// The counters of a mapping, which may be one that drains.
    #[track_caller]
    pub fn stats(&self, name: &str) -> Value {
        let stats = self.json(&["stats"]);
        let all = ["mappings", "draining"].map(|key| stats[key].as_array().unwrap().clone()).concat();
        all.into_iter().find(|stats| stats["name"] == name).unwrap_or_else(|| panic!("no {name} in {stats}"))
    }
}

/// A mapping from one address to another, called `name`, in the syntax of the protocol.
pub fn mapping(name: &str, proto: &str, host: SocketAddr, to: SocketAddr) -> Value {
    json!({
        "name": name, "proto": proto,
        "host": host.ip().to_string(), "host_ports": host.port().to_string(),
        "to": to.ip().to_string(), "to_ports": to.port().to_string(),
    })
}

/// A connection to a control socket.
pub struct Conversation(BufReader<UnixStream>);

impl Conversation {
    fn open(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// Sends raw bytes, which need not be a request.
    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    /// Sends a request with sockets, and returns the response.
    #[track_caller]
    pub fn ask_with(&mut self, request: &Value, sockets: &[BorrowedFd<'_>]) -> Value {
        send_before_json(self.0.get_ref().as_fd(), sockets).unwrap();
        self.ask(request)
    }

    /// Reads a response; `None` at the end of the stream.
    pub fn answer(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    /// Sends a request, and returns the response.
    #[track_caller]
    pub fn ask(&mut self, request: &Value) -> Value {
        self.send(format!("{request}\n").as_bytes()).unwrap();
        self.answer().expect("there is an answer")
    }
}
