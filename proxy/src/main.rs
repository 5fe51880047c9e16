//! The `rproxy` program: chooses the front end by the flags it was started with, or by the name that Podman starts it by.

use std::ffi::OsString;
use std::process::ExitCode;

use rproxy::log::console;
use rproxy::{docker, rootlessport, standalone};

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let is_rootlessport = args.next().is_some_and(|program| rootlessport::is_name(&program));
    let args: Vec<OsString> = args.collect();
    console::finish(match () {
        () if is_rootlessport => rootlessport::main(&args),
        () if docker::is_docker_proxy_command(&args) => docker::main(&args),
        () => standalone::main(&args),
    })
}
