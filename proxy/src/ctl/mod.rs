//! `rproxy ctl`: a client of the control socket, for users and scripts.

mod connections;
mod screen;
mod stats;
mod stats_table;
mod table;
mod unreachable;
mod watch;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use nix::libc;
use rproxy_mapping::Mapping;
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::escape::escaped;
use rproxy_mapping::interfaces::NoInterfaces;
use rproxy_mapping::wire::WireMapping;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::connections::RatedList;
use crate::cli::UsageError;
use crate::cli::ctl::{Command, Ctl};
use crate::config::{self, ConfigError};
use crate::control::answers::{Added, ChangeCounts, CutCounts};
use crate::control::field::wrong_mappings;
use crate::control::protocol::{self, LONGEST_ANSWER, Mappings, Refusal, RefusalKind, Request};
use crate::log::console;

/// The timeout for a response: binding ten thousand sockets takes far less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The maximum input from standard input, in bytes: more than the limit of a request.
const LONGEST_INPUT: u64 = 16 * 1024 * 1024;

/// Sends the command to the running rproxy.
pub fn main(ctl: &Ctl) -> ExitCode {
    match run(ctl) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if ctl.json => {
            console::out(&json!({ "error": error.to_json() }));
            ExitCode::from(if matches!(error, CtlError::Usage(_)) { 2 } else { 1 })
        }
        Err(CtlError::Usage(usage)) => {
            console::err(&usage);
            ExitCode::from(2)
        }
        Err(error) => console::fail(&error),
    }
}

fn run(ctl: &Ctl) -> Result<(), CtlError> {
    if let Command::Stats(args) = &ctl.command {
        if args.sort.is_rate() && args.watch.is_none() {
            return Err(CtlError::Usage(UsageError::new(
                "--sort: a rate is what changes from one look to the next; add --watch",
            )));
        }
        return watch::stats(ctl, args);
    }
    let request = request(&ctl.command)?;
    let mut connection = Connection::open(ctl.control())?;
    let answer = match ctl.command {
        Command::Connections { .. } => ask_twice(&mut connection, &request)?,
        _ => connection.ask(request)?,
    };
    if ctl.json {
        console::out(&answer);
    } else if let Command::List { toml: true } = ctl.command {
        console::out(&configuration(answer)?.trim_end());
    } else {
        show(&ctl.command, answer)?;
    }
    Ok(())
}

/// The connections and flows with their rates, which take two answers.
fn ask_twice(connection: &mut Connection, request: &Request) -> Result<Value, CtlError> {
    let before = result(connection.ask(request.clone())?)?;
    thread::sleep(connections::INTERVAL);
    let rated = RatedList::new(&before, result(connection.ask(request.clone())?)?);
    serde_json::to_value(rated).map_err(|error| CtlError::NotUnderstood(error.to_string()))
}

fn request(command: &Command) -> Result<Request, CtlError> {
    Ok(match command {
        Command::List { .. } => Request::List,
        Command::Stats(_) => Request::Stats,
        Command::Drain => Request::Drain,
        Command::Remove { name, cut } => Request::Remove { name: name.to_string(), cut: *cut },
        Command::Retarget { name, to, cut } => {
            Request::Retarget { name: name.to_string(), to: to.to_string(), cut: *cut }
        }
        Command::Connections { chosen, limit } => {
            Request::Connections(protocol::Chosen { limit: *limit, ..chosen.to_request() })
        }
        Command::Cut { chosen, all } => Request::Cut(protocol::Chosen { all: *all, ..chosen.to_request() }),
        Command::Add(mappings) => {
            let mappings = mappings.mappings().map_err(CtlError::Usage)?;
            Request::Add { mappings: mappings.iter().map(WireMapping::of).collect() }
        }
        Command::Apply { file, cut } => Request::Apply { mappings: read_file(file)?, cut: *cut },
    })
}

/// Converts the response to `list` to a configuration, without attached ports, which are not in one.
fn configuration(answer: Value) -> Result<String, CtlError> {
    let Mappings { mut mappings } = result(answer)?;
    mappings.retain(|mapping| mapping.origin.is_none());
    let mappings: Result<Vec<Mapping>, _> =
        mappings.iter().map(|mapping| mapping.read(&NoInterfaces, ScopedIp::ANY)).collect();
    let mappings = mappings.map_err(|error| CtlError::NotUnderstood(error.to_string()))?;
    // The server may be in another network namespace, where other interfaces have these indexes.
    Ok(config::print(&mappings, None, None, |ip| ip.to_string()))
}

/// Decodes the result of a request. Unknown keys are ignored, because a newer server may send more.
fn result<T: DeserializeOwned>(answer: Value) -> Result<T, CtlError> {
    serde_json::from_value(answer).map_err(|error| CtlError::NotUnderstood(error.to_string()))
}

/// Reads the mappings of a file, in TOML or JSON.
fn read_file(path: &Path) -> Result<Vec<WireMapping>, CtlError> {
    let (path, text) = if path == Path::new("-") {
        let path = Path::new("standard input");
        let read = io::read_to_string(io::stdin().take(LONGEST_INPUT));
        (path, read.map_err(|source| CtlError::File { path: path.to_owned(), reason: source.to_string() })?)
    } else {
        (path, config::read_text(path)?)
    };
    let error = |reason: String| CtlError::File { path: path.to_owned(), reason };
    let start = text.trim_start();
    if start.strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with('{')) {
        return Err(error("a list of JSON; write {\"mappings\":[…]} around it".to_owned()));
    }
    if !start.starts_with('{') {
        let config = config::parse(path, &text)?;
        if config.attach.is_some() {
            let file = escaped(path);
            console::err(&format_args!(
                "rproxy: {file}: attach is not applied, only the mappings are; a running rproxy reads it from its own \
                 --config, with SIGHUP"
            ));
        }
        return Ok(config.mappings.iter().map(WireMapping::of).collect());
    }
    let file: Value = serde_json::from_str(&text).map_err(|source| error(source.to_string()))?;
    let wrong = wrong_mappings(&file);
    if !wrong.is_empty() {
        return Err(error(wrong.join("; ")));
    }
    // Not from the value, which has no duplicate fields any more.
    let file: Result<Mappings, _> = serde_json::from_str(&text);
    Ok(file.map_err(|source| error(source.to_string()))?.mappings)
}

fn show(command: &Command, answer: Value) -> Result<(), CtlError> {
    match command {
        Command::List { .. } => console::out(&table::list(&result(answer)?)),
        Command::Add(_) => {
            let Added { mappings, counts } = result(answer)?;
            mappings.iter().for_each(|mapping| console::out(&table::ready_line(mapping)));
            warn(&counts.warnings);
        }
        Command::Apply { .. } => {
            let ChangeCounts { added, changed, removed, unchanged, warnings } = result(answer)?;
            console::out(&format_args!(
                "{added} added, {changed} changed, {removed} removed, {unchanged} not touched"
            ));
            warn(&warnings);
        }
        Command::Retarget { .. } => warn(&result::<ChangeCounts>(answer)?.warnings),
        Command::Connections { .. } => console::out(&result::<RatedList>(answer)?.to_table()),
        Command::Cut { .. } => {
            let CutCounts { cut } = result(answer)?;
            console::out(&format_args!("{cut} cut"));
        }
        Command::Stats(_) | Command::Remove { .. } | Command::Drain => {}
    }
    Ok(())
}

/// Prints the warnings of a change, which was made.
fn warn(warnings: &[String]) {
    warnings.iter().for_each(|warning| console::err(&format_args!("rproxy: warning: {warning}")));
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
        // A refused client's connection is closed without reading the request, but after an error message.
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        let mut answer = String::new();
        let read = (&mut self.stream).take(LONGEST_ANSWER + 1).read_line(&mut answer);
        if answer.is_empty() {
            let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let source = sent.and(read).err().unwrap_or_else(ended);
            return Err(CtlError::Conversation(source));
        }
        if u64::try_from(answer.len()).is_ok_and(|length| length > LONGEST_ANSWER) {
            return Err(CtlError::TooLong(self.path.clone()));
        }
        let answer = protocol::read_answer(&answer).ok_or_else(|| CtlError::Foreign(self.path.clone()))?;
        answer.map_err(CtlError::Refused)
    }
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
enum CtlError {
    /// The command line is wrong.
    #[error(transparent)]
    Usage(UsageError),
    /// A configuration file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be read or parsed.
    #[error("{}: {}", escaped(path), escaped(reason))]
    File { path: PathBuf, reason: String },
    /// No process listens on the socket.
    #[error("--control {}: {}", escaped(path), unreachable::explain(path, source))]
    Connect { path: PathBuf, source: io::Error },
    /// Another program listens on the socket.
    #[error("--control {}: another program listens there; give the path that rproxy was started with", escaped(.0))]
    Foreign(PathBuf),
    /// The response is longer than any of rproxy's.
    #[error(
        "--control {}: the answer is longer than {} MiB, so it is not from rproxy; give the path that rproxy was started \
         with",
        escaped(.0), LONGEST_ANSWER >> 20
    )]
    TooLong(PathBuf),
    /// The response lacks a key, or has an unknown one that must not be ignored.
    #[error(
        "cannot understand the answer of the running rproxy: {}; use the `rproxy ctl` of its version",
        escaped(.0)
    )]
    NotUnderstood(String),
    /// Communication failed.
    #[error("the running rproxy did not answer: {0}")]
    Conversation(#[source] io::Error),
    /// The running rproxy refused the request.
    #[error("{}", escaped(&.0.message))]
    Refused(Refusal),
    /// No mapping has a name that `--mapping` means.
    #[error(
        "--mapping {0}: there is no such mapping; `rproxy ctl list` shows all, and * stands for any text"
    )]
    NoMapping(String),
    /// Standard output does not take what is written.
    #[error("standard output: {0}")]
    Output(#[source] io::Error),
    /// The terminal cannot be drawn on, or is gone.
    #[error("the terminal: {0}")]
    Terminal(#[source] io::Error),
}

impl CtlError {
    /// The error as the protocol has it.
    fn to_json(&self) -> Value {
        let mut json = json!({ "kind": self.kind(), "message": self.message() });
        if let Self::Refused(Refusal { mapping: Some(mapping), .. }) = self {
            json["mapping"] = json!(mapping);
        }
        json
    }

    /// The kind of error, for programs: that of a refusal, or one of this side.
    fn kind(&self) -> Value {
        match self {
            // One that only a newer server knows has no name here.
            Self::Refused(refusal) => {
                serde_json::to_value(refusal.kind).unwrap_or_else(|_other| json!("other"))
            }
            Self::NoMapping(_) => json!(RefusalKind::UnknownName),
            Self::Usage(_) => json!("usage"),
            Self::Config(_) | Self::File { .. } => json!("file"),
            Self::Connect { .. } => json!("unreachable"),
            Self::Foreign(_) | Self::TooLong(_) | Self::NotUnderstood(_) | Self::Conversation(_) => {
                json!("answer")
            }
            Self::Output(_) | Self::Terminal(_) => json!("output"),
        }
    }

    /// The error message, for users.
    fn message(&self) -> String {
        match self {
            Self::Refused(refusal) => refusal.message.clone(),
            Self::Usage(error) => error.to_string().trim_start_matches("rproxy: ").to_owned(),
            _ => self.to_string(),
        }
    }

    /// Whether the running rproxy may answer later: it restarts, is upgraded, or has too much to do.
    fn is_passing(&self) -> bool {
        match self {
            Self::Connect { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::ENOENT | libc::ECONNREFUSED | libc::ECONNRESET | libc::EAGAIN)
            ),
            Self::Conversation(_) => true,
            Self::Refused(refusal) => matches!(refusal.kind, RefusalKind::Busy | RefusalKind::Failed),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use super::stats::{History, Look, View};
    use super::*;
    use crate::cli::ctl::{SortKey, StatsArgs};
    use crate::control::answers::{BoundMapping, Draining, List, MappingStats, Origin, Response, StatsList};

    /// Sends a request to a server that always responds with `line`.
    fn ask(line: String) -> Result<Value, CtlError> {
        let (client, stream) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            stream.read_line(&mut String::new()).unwrap();
            // The client disconnects once it has read enough.
            stream.get_mut().write_all(line.as_bytes()).ok();
        });
        let mut connection = Connection { stream: BufReader::new(client), path: "control".into() };
        let answer = connection.ask(Request::List);
        // As at the exit of the program.
        drop(connection);
        server.join().unwrap();
        answer
    }

    /// Reads what the server writes.
    fn said(response: Response) -> Value {
        ask(protocol::answer(None, Ok(response)) + "\n").unwrap()
    }

    fn web() -> BoundMapping {
        let text = r#"{"name":"web","host":"[::]","host_ports":"8080","to":"172.17.0.2","to_ports":"80","proto":"tcp",
            "limits":{"max_connections":7}}"#;
        let mapping = serde_json::from_str(text).unwrap();
        BoundMapping {
            mapping,
            bound: "8080".to_owned(),
            resolved: None,
            unresolved: None,
            lookup_error: None,
            bound_host: None,
            origin: Origin::default(),
        }
    }

    const COUNTS: ChangeCounts =
        ChangeCounts { added: 1, changed: 2, removed: 3, unchanged: 4, warnings: Vec::new() };

    fn counters() -> MappingStats {
        MappingStats {
            name: "web".to_owned(),
            origin: Origin::default(),
            connections: 1,
            connections_total: 2,
            flows: 3,
            flows_total: 4,
            bytes_in: 5,
            bytes_out: 6,
            datagrams_in: 7,
            datagrams_out: 8,
            errors: BTreeMap::from([("denied".to_owned(), 9)]),
        }
    }

    /// The table of a response to `stats`.
    fn stats_shown(answer: Value) -> String {
        let args = StatsArgs { watch: None, mapping: Vec::new(), sort: SortKey::Name };
        let look = Look { at: Instant::now(), answer };
        stats_table::whole(&View::of(look, &args, &mut History::default()).unwrap(), false)
    }

    #[test]
    fn what_the_server_writes_is_read_and_shown() {
        let draining = vec![Draining { name: "old".to_owned(), connections: 2, flows: 1 }];
        let list = List { mappings: vec![web()], draining };
        let answer = said(Response::List(list.clone()));
        assert_eq!(result::<List>(answer.clone()).unwrap(), list);
        assert_eq!(
            table::list(&result(answer.clone()).unwrap()),
            "NAME  LISTENS        BACKEND\n\
             web   [::]:8080/tcp  172.17.0.2:80\n\
             old   -              -              draining: 2 connections, 1 flows"
        );
        let configuration = configuration(answer).unwrap();
        assert!(configuration.contains("max_connections = 7"), "{configuration}");

        let stats = StatsList { mappings: vec![counters()], draining: vec![counters()] };
        let answer = said(Response::Stats(stats.clone()));
        assert_eq!(result::<StatsList>(answer.clone()).unwrap(), stats);
        assert_eq!(
            stats_shown(answer),
            "NAME            CONNS  FLOWS  BYTES IN  OUT  DATAGRAMS IN  OUT  ERRORS\n\
             web             1/2    3/4    5         6    7             8    denied 9\n\
             web (draining)  1/2    3/4    5         6    7             8    denied 9"
        );

        let added = Added { counts: COUNTS, mappings: vec![web()] };
        let answer = said(Response::Added(added.clone()));
        assert_eq!(result::<Added>(answer.clone()).unwrap(), added);
        let Added { mappings, .. } = result(answer).unwrap();
        assert_eq!(table::ready_line(&mappings[0]), "web: 80/tcp -> [::]:8080");
        assert_eq!(result::<ChangeCounts>(said(Response::Changed(COUNTS))).unwrap(), COUNTS);
        assert_eq!(said(Response::Drain {}), json!({}));
        let refusal = Refusal::new(RefusalKind::Bind, "taken");
        let refused = ask(protocol::answer(None, Err(refusal)) + "\n").unwrap_err();
        assert_eq!(refused.to_string(), "taken");
    }

    #[test]
    fn attached_ports_are_not_in_a_configuration() {
        let origin = Origin { origin: Some("docker".to_owned()), process: Some(4711) };
        let attached = BoundMapping { origin, ..web() };
        let mut list = List { mappings: vec![web(), attached], draining: Vec::new() };
        list.mappings[1].mapping.name = Some("docker/tcp/0.0.0.0:8080".to_owned());
        let answer = said(Response::List(list.clone()));
        assert_eq!(result::<List>(answer.clone()).unwrap(), list);
        let text = configuration(answer).unwrap();
        assert_eq!(config::parse(Path::new("file"), &text).unwrap().mappings.len(), 1, "{text}");
        list.mappings.remove(0);
        // What is printed can be applied, also if no mapping is left.
        let text = configuration(said(Response::List(list))).unwrap();
        assert_eq!(config::parse(Path::new("file"), &text).unwrap().mappings, []);
    }

    #[test]
    fn what_only_a_newer_server_says_is_passed_over() {
        let mut answer = said(Response::List(List { mappings: vec![web()], draining: Vec::new() }));
        answer["weather"] = "fine".into();
        answer["mappings"][0]["colour"] = "red".into();
        answer["mappings"][0]["limits"]["max_colours"] = 7.into();
        assert!(table::list(&result(answer.clone()).unwrap()).contains("[::]:8080/tcp"));
        // A configuration that omits part of it would differ from what is served.
        let error = configuration(answer).unwrap_err().to_string();
        assert!(error.contains("unknown field"), "{error}");
        let mut answer =
            said(Response::Stats(StatsList { mappings: vec![counters()], draining: Vec::new() }));
        answer["mappings"][0]["packets"] = 1.into();
        answer["mappings"][0]["errors"]["tired"] = 3.into();
        assert!(stats_shown(answer).ends_with("denied 9, tired 3"));
    }

    #[test]
    fn an_answer_that_lacks_something_is_not_shown_without_it() {
        let mut answer = said(Response::List(List { mappings: vec![web()], draining: Vec::new() }));
        answer["mappings"][0].as_object_mut().unwrap().remove("bound");
        let error = result::<List<table::Shown>>(answer).unwrap_err().to_string();
        assert!(error.contains("missing field `bound`"), "{error}");
    }

    #[test]
    fn what_is_no_answer_is_not_read_for_ever() {
        let length = usize::try_from(LONGEST_ANSWER).unwrap() + 1;
        let error = ask("x".repeat(length)).unwrap_err();
        assert!(matches!(error, CtlError::TooLong(_)), "{error}");
        assert!(error.to_string().contains(": the answer is longer than 128 MiB"), "{error}");
        for line in ["HTTP/1.1 400 Bad Request\r\n", "{\"v\":1}\n"] {
            let error = ask(line.to_owned()).unwrap_err();
            assert!(matches!(error, CtlError::Foreign(_)), "{line}: {error}");
        }
        assert!(matches!(ask(String::new()), Err(CtlError::Conversation(_))));
    }
}
