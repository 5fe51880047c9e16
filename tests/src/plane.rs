//! An `rproxy --attach`.

use crate::eventually;
use crate::process::Process;
use crate::rproxy::command;
use crate::shim::Shim;

/// A running `rproxy` that shims can attach to.
pub struct Plane {
    /// The name where it listens.
    pub name: String,
    /// The process.
    pub process: Process,
}

impl Plane {
    /// Starts it, and waits until shims can connect.
    #[track_caller]
    pub fn start(name: &str) -> Self {
        let process = Process::spawn(command(&[&format!("--attach={name}")]));
        eventually("shims can connect", || Shim::connect(name).is_ok());
        Self { name: name.to_owned(), process }
    }
}
