//! `rproxy ctl`: a client of the control socket, for people and scripts.

mod table;
mod unreachable;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::cli::UsageError;
use crate::cli::ctl::{Command, Ctl};
use crate::config::{self, ConfigError};
use crate::control::protocol::{self, Request};
use crate::log::console;
use crate::mapping::Mapping;
use crate::mapping::wire::WireMapping;

/// How long an answer may take: binding ten thousand sockets takes far less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What is read of standard input, in bytes: more than a request may have.
const LONGEST_INPUT: u64 = 16 * 1024 * 1024;

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
            stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
            stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
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
