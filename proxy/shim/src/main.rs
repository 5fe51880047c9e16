//! The process that dockerd starts for each published port in place of docker-proxy; see the library.
//!
//! It is built without the standard library, by `.cargo/rustc-static-rproxy`, which is where its start, `start`,
//! comes from. Anything else that compiles it, such as clippy, sees a program with the standard library, which does
//! nothing.

#![cfg_attr(panic = "abort", no_std, no_main)]

mod listener;
mod mapping;
mod plane;
mod program;
mod serve;
#[cfg(panic = "abort")]
mod start;
mod status;

use rproxy_shim::message::{DEFAULT_NAME, LONGEST_NAME, NAME_VARIABLE};
use rproxy_sys_raw::fd::{close_inherited_from, open_standard_streams};
use rproxy_sys_raw::process::Arguments;

use listener::{LISTENER_FD, Listener};
use mapping::Mapping;
use plane::Plane;
use serve::{Ended, Shim};
use status::Status;

/// The exit status after an error.
const FAILURE: u8 = 1;

/// Runs until a signal ends it, or as another program. Returns the exit status.
fn run(arguments: &mut Arguments) -> u8 {
    open_standard_streams();
    let name = arguments.variable(NAME_VARIABLE).unwrap_or(DEFAULT_NAME.as_bytes());
    let mapping = Mapping::parse(arguments).filter(|_| (1..=LONGEST_NAME).contains(&name.len()));
    let Some(mapping) = mapping else {
        // `rproxy` claims and closes descriptors by itself.
        return give_up(arguments, Status::claim());
    };
    let status = Status::claim();
    let listener = if mapping.use_listen_fd {
        close_inherited_from(LISTENER_FD + 1);
        Listener::adopt(mapping.protocol)
    } else {
        close_inherited_from(LISTENER_FD);
        Listener::bind(mapping.protocol, mapping.host)
    };
    // What is wrong, `rproxy` finds as well, and says it in its own words.
    let Some(listener) = listener else {
        return give_up(arguments, status);
    };
    let inserted = mapping.use_listen_fd || arguments.insert(mapping.flags, c"-use-listen-fd");
    let plane = Plane::new(name).filter(|_| inserted);
    let (Some(plane), Ok(signals)) = (plane, serve::catch_signals()) else {
        drop(listener);
        return give_up(arguments, status);
    };
    let mut shim = Shim { arguments, listener, status: Some(status), signals, plane, attach: mapping.attach };
    match shim.serve() {
        Ended::Signal => 0,
        Ended::Failed => FAILURE,
    }
}

/// Becomes `rproxy` before anything was started. Returns the exit status if that fails.
fn give_up(arguments: &mut Arguments, status: Status) -> u8 {
    status.set_inherited();
    let failure = program::execute(arguments);
    status.failed(|line| failure.describe(line));
    FAILURE
}

/// Where this program is compiled as any other.
#[cfg(not(panic = "abort"))]
fn main() -> std::process::ExitCode {
    let _never_called: fn(&mut Arguments) -> u8 = run;
    rproxy_sys_raw::fd::write_error(b"rproxy-shim was built without .cargo/rustc-static-rproxy\n");
    std::process::ExitCode::FAILURE
}
