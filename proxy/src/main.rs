//! The `rproxy` program: chooses the front end by the flags it was started with.

use std::ffi::OsString;
use std::process::ExitCode;

use rproxy::{docker, standalone};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if docker::is_docker_proxy_command(&args) { docker::main(&args) } else { standalone::main(&args) }
}
