//! `rproxy-portmap` publishes ports of containers as a CNI plugin.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

use netns_setup::{cni, descriptors, relay};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(status) = relay::supervisor::run_if_asked(&arguments) {
        return status;
    }
    descriptors::raise_limit();
    cni::cli::run(&arguments)
}
