//! The `rproxy` program: chooses the front end by the flags it was started with.

use std::ffi::OsString;
use std::process::ExitCode;

use rproxy::log::console;
use rproxy::{docker, standalone};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let is_docker_proxy = docker::is_docker_proxy_command(&args);
    console::finish(if is_docker_proxy { docker::main(&args) } else { standalone::main(&args) })
}
