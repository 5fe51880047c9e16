//! The CNI plugin `rproxy-portmap`: publishes ports of containers whose network another plugin has made (CNI specification
//! 1.1.0; `docs/cni.md`).
//!
//! It is chained after a plugin that gives a container its addresses, and takes the place of `portmap`. One relay
//! ([`crate::relay`]) holds and serves all ports of a node; nft translates those packets that need no relay (`rules`).

pub mod attachment;
pub mod call;
pub mod cli;
pub mod command;
pub mod commands;
pub mod conf;
pub mod error;
pub mod holder;
pub mod result;
pub mod state;
pub mod version;

mod change;
mod localnet;
mod return_path;
mod rules;

use std::io::{Read, Write};
use std::process::ExitCode;

use serde_json::json;

use self::call::{Environment, Understood};
use self::command::Command;
use self::error::CniError;
use self::version::Version;

/// Answers a call: the result or the error on `out`, warnings on `log`.
pub fn answer(
    environment: &Environment,
    input: &mut dyn Read,
    out: &mut dyn Write,
    log: &mut dyn Write,
) -> ExitCode {
    let (version, result) = call(environment, input);
    let (text, status) = match result {
        Ok(commands::Answer { text, warnings }) => {
            // Write errors are ignored: there is nowhere to report them.
            warnings.iter().for_each(|warning| drop(writeln!(log, "rproxy-portmap: {warning}")));
            (text, ExitCode::SUCCESS)
        }
        Err(error) => (error_json(&error, version), ExitCode::FAILURE),
    };
    match text.is_empty() || writeln!(out, "{text}").and_then(|()| out.flush()).is_ok() {
        true => status,
        false => ExitCode::FAILURE,
    }
}

fn call(environment: &Environment, input: &mut dyn Read) -> (Version, Result<commands::Answer, CniError>) {
    let read = call::command(environment).and_then(|command| Ok((command, call::read(input)?)));
    let (command, (text, conf)) = match read {
        Ok(read) => read,
        Err(error) => return (Version::NEWEST, Err(error)),
    };
    if command == Command::Version {
        return (Version::NEWEST, Ok(commands::Answer::of(version::answer(&conf))));
    }
    let Understood { version, call } = call::understand(command, environment, &conf, &text);
    (version, call.and_then(|call| commands::run(&call)))
}

/// An error, as runtimes read it on standard output (CNI specification 1.1.0, section 5, "Error").
fn error_json(error: &CniError, version: Version) -> String {
    let mut answer =
        json!({ "cniVersion": version.as_str(), "code": error.code(), "msg": error.to_string() });
    if !error.details().is_empty() {
        answer["details"] = error.details().into();
    }
    answer.to_string()
}
