//! The standalone front end: mappings from the command line, readiness on standard output.

pub mod demo;
pub mod manager;
mod start;

use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use rproxy_sys::fd::claim_inherited;

use self::start::{Origin, StartError, may_change, start};
use crate::cli::{self, Cli, Command, Serve, Unparsed};
use crate::config;
use crate::ctl;
use crate::log::console;
use crate::runtime::{prepare, raise_descriptor_limit};
use crate::systemd;
use crate::upgrade::Launcher;

/// Runs the command line until a signal ends it. `args` exclude the program's name.
pub fn main(args: &[OsString]) -> ExitCode {
    let cli = match cli::parse(args) {
        Ok(cli) => cli,
        Err(Unparsed::Asked(text)) => {
            console::out(&text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(Unparsed::Wrong(usage)) => return refuse(&usage),
    };
    match cli {
        Cli { command: Some(Command::Demo { once }), .. } => demo::main(once),
        Cli { command: Some(Command::Ctl(ctl)), .. } => ctl::main(&ctl),
        Cli { command: Some(Command::CheckConfig { file }), .. } => check_config(&file),
        Cli { command: None, serve } if serve.print_config => print_config(&serve),
        Cli { command: None, serve } => serve_mappings(&serve),
    }
}

fn refuse(usage: &impl fmt::Display) -> ExitCode {
    console::err(usage);
    ExitCode::from(2)
}

fn check_config(file: &Path) -> ExitCode {
    match config::read(file) {
        Ok(_config) => {
            console::out(&"ok");
            ExitCode::SUCCESS
        }
        Err(error) => console::fail(&error),
    }
}

fn print_config(options: &Serve) -> ExitCode {
    let config = match options.config.as_deref().map(config::read).transpose() {
        Ok(config) => config,
        Err(error) => return console::fail(&error),
    };
    let attach = options.attach_options(config.as_ref());
    let metrics = options.metrics_addr(config.as_ref()).cloned();
    let mappings = match config {
        Some(config) => config.mappings,
        None => match options.mappings() {
            Ok(mappings) => mappings,
            Err(usage) => return refuse(&usage),
        },
    };
    let printed = config::print(&mappings, attach.as_ref(), metrics.as_ref(), config::with_interface_name);
    console::out(&printed.trim_end());
    ExitCode::SUCCESS
}

fn serve_mappings(options: &Serve) -> ExitCode {
    let mappings = match options.mappings() {
        Ok(mappings) => mappings,
        Err(usage) => return refuse(&usage),
    };
    // Before anything else opens a file.
    let origin = Origin::claim();
    let configuration = options.config.as_deref();
    // A failure is ignored here, because reading the file reports it.
    let passed_file = configuration.and_then(config::descriptor).and_then(|fd| claim_inherited(fd).ok());
    prepare(options.log());
    systemd::open();
    // Before there is anything that a new process must not inherit.
    let names = may_change(options) || mappings.iter().any(|mapping| mapping.backend().name().is_some());
    let launcher = Launcher::start(configuration, options.access_log_file(), names);
    raise_descriptor_limit();
    let started = start(mappings, origin, launcher, options);
    // It had to stay open while it might be opened by its path.
    drop(passed_file);
    let (runtime, manager) = match started {
        Ok(started) => started,
        // It did what it was asked for.
        Err(StartError::Stopped) => return ExitCode::SUCCESS,
        Err(error) => return console::fail(&error),
    };
    match runtime.block_on(manager.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => console::fail(&error),
    }
}
