//! `rproxy ctl`: a client of the control socket, for people and scripts.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::protocol::{self, Request};
use super::socket::DEFAULT_PATH;
use super::table;
use super::unreachable;
use super::wire::WireMapping;
use crate::cli::{MappingArgs, UsageError};
use crate::config::{self, ConfigError};
use crate::console;
use crate::endpoint::BackendSpec;
use crate::mapping::Mapping;
use crate::name::Name;

/// How long an answer may take: binding ten thousand sockets takes far less.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is read of standard input, in bytes: more than a request may have.
const LONGEST_INPUT: u64 = 16 * 1024 * 1024;

/// The command line of `rproxy ctl`.
#[derive(Args, Debug)]
pub struct Ctl {
    /// The control socket of the running rproxy
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH, global = true)]
    control: PathBuf,
    /// Print the answer as JSON, for programs
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// What to do with the running rproxy.
#[derive(Debug, Subcommand)]
enum Command {
    /// Show the mappings
    List {
        /// Print the mappings as a configuration, for `--config` and `ctl apply`; not those that drain
        #[arg(long, conflicts_with = "json")]
        toml: bool,
    },
    /// Serve more mappings: all of those given, or none
    Add(Box<MappingArgs>),
    /// Serve a mapping no more; its connections go on, its UDP flows until they are quiet, 10 s at most
    Remove {
        /// The mapping, as `list` shows it
        name: Name,
    },
    /// Send new connections and all datagrams of a mapping to another backend; connections that it has go on
    Retarget {
        /// The mapping, as `list` shows it
        name: Name,
        /// The new backend; for a range all ports, or the first one
        #[arg(long, value_name = "ADDRESS:PORTS")]
        to: BackendSpec,
    },
    /// Serve exactly what a file says: all of it, or nothing changes
    Apply {
        /// A configuration file, or mappings as `list --json` prints them; - for standard input
        file: PathBuf,
    },
    /// Take no new clients, let those that are there finish, and end
    Drain,
    /// Show connections, flows, bytes and errors of each mapping
    Stats {
        /// Again and again, after so many seconds
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=5))]
        watch: Option<u64>,
    },
}

/// Asks the running rproxy for what the command line says.
pub fn main(ctl: &Ctl) -> ExitCode {
    match run(ctl) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CtlError::Usage(usage)) => {
            console::err(&usage);
            ExitCode::from(2)
        }
        Err(error) => console::fail(&error),
    }
}

fn run(ctl: &Ctl) -> Result<(), CtlError> {
    let request = request(&ctl.command)?;
    let mut connection = Connection::open(&ctl.control)?;
    loop {
        let answer = connection.ask(request.clone())?;
        if ctl.json {
            console::out(&answer);
        } else if let Command::List { toml: true } = ctl.command {
            console::out(&configuration(answer)?.trim_end());
        } else {
            show(&ctl.command, &answer);
        }
        match ctl.command {
            Command::Stats { watch: Some(seconds) } => thread::sleep(Duration::from_secs(seconds)),
            _ => return Ok(()),
        }
        if !ctl.json {
            console::out(&"");
        }
    }
}

fn request(command: &Command) -> Result<Request, CtlError> {
    Ok(match command {
        Command::List { .. } => Request::List,
        Command::Stats { .. } => Request::Stats,
        Command::Drain => Request::Drain,
        Command::Remove { name } => Request::Remove { name: name.to_string() },
        Command::Retarget { name, to } => Request::Retarget { name: name.to_string(), to: to.to_string() },
        Command::Add(mappings) => {
            let mappings = mappings.mappings().map_err(CtlError::Usage)?;
            Request::Add { mappings: mappings.iter().map(WireMapping::of).collect() }
        }
        Command::Apply { file } => Request::Apply { mappings: read_file(file)? },
    })
}

/// The mappings of an answer to `list`, as a configuration.
fn configuration(mut answer: Value) -> Result<String, CtlError> {
    let not_understood =
        |error: String| CtlError::Conversation(io::Error::new(io::ErrorKind::InvalidData, error));
    let mappings: Vec<WireMapping> = serde_json::from_value(answer["mappings"].take())
        .map_err(|error| not_understood(error.to_string()))?;
    let mappings: Result<Vec<Mapping>, _> = mappings.iter().map(WireMapping::read).collect();
    Ok(config::print(&mappings.map_err(|error| not_understood(error.to_string()))?))
}

/// Reads the mappings of a file, in TOML or in JSON.
fn read_file(path: &Path) -> Result<Vec<WireMapping>, CtlError> {
    let (path, text) = if path == Path::new("-") {
        let path = Path::new("standard input");
        let read = io::read_to_string(io::stdin().take(LONGEST_INPUT));
        (path, read.map_err(|source| CtlError::File { path: path.to_owned(), reason: source.to_string() })?)
    } else {
        (path, config::read_text(path)?)
    };
    let error = |reason: String| CtlError::File { path: path.to_owned(), reason };
    if !text.trim_start().starts_with('{') {
        let mappings = config::parse(path, &text)?;
        return Ok(mappings.iter().map(WireMapping::of).collect());
    }
    let mut file: Value = serde_json::from_str(&text).map_err(|source| error(source.to_string()))?;
    serde_json::from_value(file["mappings"].take()).map_err(|source| error(source.to_string()))
}

fn show(command: &Command, answer: &Value) {
    let ports = |mapping: &Value| {
        let text = |key: &str| mapping[key].as_str().unwrap_or_default().to_owned();
        console::out(&format_args!(
            "{}: {}/{} -> {}:{}",
            text("name"),
            text("to_ports"),
            text("proto"),
            table::bound_host(mapping),
            text("bound")
        ));
    };
    match command {
        Command::List { .. } => console::out(&table::list(answer)),
        Command::Stats { .. } => console::out(&table::stats(answer)),
        Command::Add(_) => answer["mappings"].as_array().into_iter().flatten().for_each(ports),
        Command::Apply { .. } => console::out(&format_args!(
            "{} added, {} changed, {} removed, {} not touched",
            answer["added"], answer["changed"], answer["removed"], answer["unchanged"]
        )),
        Command::Remove { .. } | Command::Retarget { .. } | Command::Drain => {}
    }
}

/// A connection to the running rproxy.
struct Connection {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Connection {
    fn open(path: &Path) -> Result<Self, CtlError> {
        let connected = UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        });
        let stream = connected.map_err(|source| CtlError::Connect { path: path.to_owned(), source })?;
        Ok(Self { stream: BufReader::new(stream), path: path.to_owned() })
    }

    fn ask(&mut self, request: Request) -> Result<Value, CtlError> {
        let line = protocol::encode(request) + "\n";
        // One that is sent away closes without reading, but says why.
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        let mut answer = String::new();
        let read = self.stream.read_line(&mut answer);
        if answer.is_empty() {
            let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let source = sent.and(read).err().unwrap_or_else(ended);
            return Err(CtlError::Conversation(source));
        }
        let answer = serde_json::from_str(&answer).ok().filter(|answer: &Value| answer["v"].is_number());
        let mut answer = answer.ok_or_else(|| CtlError::Foreign(self.path.clone()))?;
        match answer["error"]["message"].as_str() {
            Some(message) => Err(CtlError::Refused(message.to_owned())),
            None => Ok(answer["ok"].take()),
        }
    }
}

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
enum CtlError {
    /// The command line is wrong.
    #[error(transparent)]
    Usage(UsageError),
    /// A configuration file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be used.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// Nobody is there.
    #[error("--control {}: {}", path.display(), unreachable::explain(path, source))]
    Connect { path: PathBuf, source: io::Error },
    /// Something else listens there.
    #[error("--control {}: what listens there is no rproxy; give the path that rproxy was started with", .0.display())]
    Foreign(PathBuf),
    /// The conversation broke off.
    #[error("the running rproxy did not answer: {0}")]
    Conversation(#[source] io::Error),
    /// The running rproxy says no.
    #[error("{0}")]
    Refused(String),
}
