//! The command line of standalone use.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::Targets;

use crate::addr::{BackendAddr, HostAddr, Protocol, Protocols, ScopedIp};
use crate::control::ctl;
use crate::control::socket::DEFAULT_PATH;
use crate::limits::Limits;
use crate::mapping::Mapping;
use crate::overlap::refuse_overlap;
use crate::ports::PortRange;
use crate::sandbox::{self, User};
use crate::telemetry::{self, Format, LogConfig};

/// A TCP and UDP relay that publishes container ports: it listens on host addresses and forwards to backends.
///
/// Started with docker-proxy's flags (-proto, -host-ip, …) it is dockerd's userland proxy.
#[derive(Debug, Parser)]
#[command(name = "rproxy", version, args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  rproxy --host 0.0.0.0:80 --to 172.17.0.2:80     publish a port on all IPv4 addresses
  rproxy --host [::]:80 --to 172.17.0.2:80        the same, for IPv4 and IPv6 clients
  rproxy --host 127.0.0.1:0 --to 172.17.0.2:80    on a free port, which is printed
  rproxy --proto udp --host 0.0.0.0:53 --to 172.17.0.2:53
  rproxy demo                                     see it work, without root or containers")]
pub struct Cli {
    /// What to do instead of serving mappings.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The mappings and how they are served.
    #[command(flatten)]
    pub serve: Serve,
}

/// Something other than serving mappings.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish a built-in web page through a real mapping, and fetch it over IPv4 and IPv6
    Demo {
        /// End after the fetches, instead of serving until Ctrl-C
        #[arg(long)]
        once: bool,
    },
    /// Look after a running rproxy that was started with --control
    Ctl(ctl::Ctl),
}

const HOST_HELP: &str =
    "Address and port to listen on, such as 0.0.0.0:80, [::]:80 or 127.0.0.1:0; goes with a --to";

/// Which mappings, and what bounds them.
#[derive(Args, Debug)]
pub struct MappingArgs {
    // Brackets in a doc comment would be links.
    #[arg(long, value_name = "ADDRESS:PORT", help = HOST_HELP)]
    host: Vec<HostAddr>,
    /// Address and port to forward to, for the --host at the same place
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: Vec<BackendAddr>,
    /// tcp or udp: once for all mappings, or once for each
    #[arg(long, value_name = "PROTOCOL", default_value = "tcp")]
    proto: Vec<Protocol>,
    #[arg(long, help = "Leave IPv4 clients out of [::]")]
    v6only: bool,
    /// How long a backend may take to answer before its client is reset, or 'unlimited'
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    connect_timeout: ConnectTimeout,
    /// A UDP flow ends when neither side has sent anything for this long
    #[arg(long, value_name = "DURATION", default_value = "90s", value_parser = parse_idle)]
    udp_timeout: Duration,
    /// UDP flows at a time; at the cap the longest idle one goes [default: as descriptors and ports allow]
    #[arg(long, value_name = "COUNT", value_parser = parse_count)]
    udp_max_flows: Option<usize>,
    /// UDP flows at a time from one IPv4 address or IPv6 /64 [default: 3/4 of --udp-max-flows]
    #[arg(long, value_name = "COUNT", value_parser = parse_count)]
    udp_max_flows_per_source: Option<usize>,
}

/// The options of serving.
#[derive(Args, Debug)]
pub struct Serve {
    /// The mappings.
    #[command(flatten)]
    pub mappings: MappingArgs,
    /// How long connections may go on after SIGTERM or SIGINT; 0 cuts them at once
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub drain_timeout: Duration,
    /// Listen for `rproxy ctl` on a Unix socket, for this user and root [default path: /run/rproxy.sock]
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = DEFAULT_PATH)]
    pub control: Option<PathBuf>,
    /// Go on as another user once everything is bound; by name or number
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<User>,
    /// Confinement of the process once it serves: as far as the kernel goes, all of it or no start, or none
    #[arg(long, value_enum, default_value_t, env = sandbox::MODE_VARIABLE)]
    pub sandbox: sandbox::Mode,
    /// Format of the log on standard error
    #[arg(long, value_enum, default_value_t)]
    log_format: Format,
    /// What is logged: a level, or a list such as 'warn,rproxy::tcp=debug' [default: RUST_LOG, or info]
    #[arg(long, value_name = "LEVEL", value_parser = telemetry::parse_filter)]
    log_level: Option<Targets>,
}

impl MappingArgs {
    /// Whether no mapping is asked for.
    fn is_empty(&self) -> bool {
        self.host.is_empty() && self.to.is_empty()
    }

    /// The mappings asked for, in order.
    ///
    /// # Errors
    /// [`UsageError`]: a `--host` without its `--to` or the reverse, none at all, or a loop.
    pub fn mappings(&self) -> Result<Vec<Mapping>, UsageError> {
        let (hosts, backends) = (self.host.len(), self.to.len());
        if hosts == 0 && backends == 0 {
            return Err(UsageError::new(
                "nothing to forward; give --host ADDRESS:PORT and --to ADDRESS:PORT",
            ));
        }
        if let Some(host) = self.host.get(backends) {
            return Err(UsageError::new(format!(
                "--host {host}: its --to is missing; each --host goes with one"
            )));
        }
        if let Some(to) = self.to.get(hosts) {
            return Err(UsageError::new(format!(
                "--to {to}: its --host is missing; each --to goes with one"
            )));
        }
        let protocols = self.protocols(hosts)?;
        let mappings = self.host.iter().zip(&self.to).zip(protocols);
        let mappings: Vec<_> = mappings
            .map(|((host, to), protocol)| self.mapping(protocol, *host, *to))
            .collect::<Result<_, _>>()?;
        refuse_overlap(&mappings).map_err(|error| {
            let mapping = &error.mapping;
            UsageError::new(format!("--host {}:{}: {error}", mapping.host(), error.port))
        })?;
        Ok(mappings)
    }

    /// The protocol of each of `count` mappings.
    fn protocols(&self, count: usize) -> Result<Vec<Protocol>, UsageError> {
        match self.proto[..] {
            [all] => Ok(vec![all; count]),
            ref each if each.len() == count => Ok(each.to_vec()),
            ref each => Err(UsageError::new(format!(
                "--proto: given {} times for {count} mappings; give it once for all, or once for each",
                each.len()
            ))),
        }
    }

    fn mapping(
        &self,
        protocol: Protocol,
        host: HostAddr,
        backend: BackendAddr,
    ) -> Result<Mapping, UsageError> {
        let host_port = PortRange::single(host.socket_addr().port()).ok();
        let port = PortRange::single(backend.socket_addr().port()).expect("a backend is not at port 0");
        let host = (ScopedIp::from(host.socket_addr()), host_port);
        Mapping::new(Protocols::One(protocol), host, (backend.socket_addr().into(), port))
            .and_then(|mapping| if self.v6only { mapping.v6only() } else { Ok(mapping) })
            .map(|mapping| mapping.limited(self.limits()))
            .map_err(|error| UsageError::new(format!("--to {backend}: {error}")))
    }

    /// The limits for each mapping.
    pub fn limits(&self) -> Limits {
        Limits {
            connect_timeout: self.connect_timeout.0,
            udp_timeout: self.udp_timeout,
            udp_max_flows: self.udp_max_flows,
            udp_max_flows_per_source: self.udp_max_flows_per_source,
            ..Limits::default()
        }
    }
}

impl Serve {
    /// The mappings asked for, in order; none is a mistake unless they may come later.
    ///
    /// # Errors
    /// Those of [`MappingArgs::mappings`].
    pub fn mappings(&self) -> Result<Vec<Mapping>, UsageError> {
        if self.control.is_some() && self.mappings.is_empty() {
            return Ok(Vec::new());
        }
        self.mappings.mappings()
    }

    /// The log asked for.
    pub fn log(&self) -> LogConfig {
        LogConfig { format: self.log_format, filter: self.log_level.clone() }
    }
}

/// Parses the command line, without the program's name.
///
/// # Errors
/// [`clap::Error`] for `--help` and `--version`, whose text goes to standard output, and
/// [`UsageError`] inside [`Unparsed`] for what is wrong.
pub fn parse(args: &[OsString]) -> Result<Cli, Unparsed> {
    let words = std::iter::once("rproxy".into()).chain(args.iter().cloned());
    Cli::try_parse_from(words).map_err(|error| match (one_dash(args), error.kind()) {
        (Some(mistake), _) => Unparsed::Wrong(mistake),
        (None, ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Unparsed::Asked(error.to_string()),
        _ => Unparsed::Wrong(one_line(&error)),
    })
}

/// `-host` is not `-h`, which would show the help, as if that had been asked for.
fn one_dash(args: &[OsString]) -> Option<UsageError> {
    let mut command = Cli::command();
    command.build();
    let is_long = |name: &str| {
        let all = command.get_subcommands().chain([&command]).flat_map(clap::Command::get_arguments);
        all.filter_map(clap::Arg::get_long).any(|long| long == name)
    };
    let written = args.iter().filter_map(|arg| arg.to_str()?.strip_prefix('-'));
    let names = written.map(|text| text.split('=').next().unwrap_or_default());
    let name = names.into_iter().find(|name| is_long(name))?;
    Some(UsageError(format!("-{name}: options have two dashes here; write --{name}")))
}

/// A command line that does not lead to serving.
#[derive(Debug)]
pub enum Unparsed {
    /// Help or version: the text that was asked for.
    Asked(String),
    /// A mistake.
    Wrong(UsageError),
}

/// A mistake on the command line, in one line.
#[derive(Debug, thiserror::Error)]
#[error("rproxy: {0}")]
pub struct UsageError(String);

impl UsageError {
    /// The mistake that `message` describes.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// clap's message without its paragraphs: the argument, what is wrong with it, what would work.
fn one_line(error: &clap::Error) -> UsageError {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let argument = context(ContextKind::InvalidArg).and_then(|arg| arg.split_whitespace().next());
    if let (Some(argument), Some(value), Some(reason)) =
        (argument, context(ContextKind::InvalidValue), error.source())
    {
        return UsageError(format!("{argument} {value}: {reason}"));
    }
    let text = error.to_string();
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .map(|line| line.trim_start_matches("error: ").trim_start_matches("tip: "))
        .collect();
    UsageError(format!("{}; `rproxy --help` lists what there is", lines.join("; ")))
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err("not a protocol that is relayed; tcp and udp are".to_owned()),
        }
    }
}

/// A limit for connection attempts, or none.
#[derive(Clone, Copy, Debug)]
struct ConnectTimeout(Option<Duration>);

impl FromStr for ConnectTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        match parse_duration(text)? {
            Duration::ZERO => Err("no backend answers in no time; write 'unlimited' for no limit".to_owned()),
            limit => Ok(Self(Some(limit))),
        }
    }
}

/// Deadlines further away than this are a slip of the finger, and in the end overflow the clock.
const LONGEST_IDLE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Parses a duration that is not zero.
fn parse_idle(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("every flow would be over at once; write one such as 90s".to_owned()),
        idle if idle > LONGEST_IDLE => Err("longer than a year; write one such as 90s".to_owned()),
        idle => Ok(idle),
    }
}

/// Parses a number from 1 up.
fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "not a number from 1 up".to_owned())
}

/// Parses `10`, in seconds, or a number with a unit.
fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text)
        .map_err(|_err| "not a duration; write one such as 10s, 500ms or 2m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(line: &str) -> String {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        match parse(&args) {
            Ok(cli) => cli.serve.mappings().expect_err(line).to_string(),
            Err(Unparsed::Wrong(error)) => error.to_string(),
            Err(Unparsed::Asked(text)) => panic!("{line}: {text}"),
        }
    }

    #[test]
    fn the_command_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_get_one_line_that_names_the_argument() {
        for (line, part) in [
            ("", "nothing to forward; give --host"),
            ("-host 0.0.0.0:80 --to 10.0.0.1:80", "-host: options have two dashes here; write --host"),
            ("--host 0.0.0.0:80 -to=10.0.0.1:80", "-to: options have two dashes here; write --to"),
            ("--host 0.0.0.0:80", "--host 0.0.0.0:80: its --to is missing"),
            ("--to 10.0.0.1:80", "--to 10.0.0.1:80: its --host is missing"),
            ("--host 0.0.0.0 --to 10.0.0.1:80", "--host 0.0.0.0: the port is missing"),
            ("--host 0.0.0.0:80 --to 10.0.0.1:0", "--to 10.0.0.1:0: port 0 cannot"),
            ("--host :::80 --to 127.0.0.1:80", "--to 127.0.0.1:80: [::]:80 would forward to itself"),
            (
                "--host 0.0.0.0:80 --to 10.0.0.1:80 --host :::80 --to 10.0.0.2:80",
                "--host [::]:80: port 80 is taken by the mapping 80/tcp",
            ),
            ("--host 10.0.0.11:80 --to 0.0.0.0:80", "--to 0.0.0.0:80: 0.0.0.0 is where one listens"),
            ("--v6only --host 0.0.0.0:80 --to 10.0.0.1:80", "v6only is for [::]"),
            ("--proto icmp", "--proto icmp: not a protocol"),
            ("--udp-timeout 0", "--udp-timeout 0: every flow would be over"),
            ("--udp-timeout 18446744073709551615", "longer than a year"),
            ("--udp-max-flows 0", "--udp-max-flows 0: not a number from 1 up"),
            (
                "--host :::80 --to 10.0.0.1:80 --proto tcp --proto udp",
                "--proto: given 2 times for 1 mappings",
            ),
            ("--connect-timeout 0", "--connect-timeout 0: no backend answers"),
            ("--drain-timeout soon", "--drain-timeout soon: not a duration"),
            ("--log-level loud", "--log-level loud: 'loud' names no level"),
            ("--log-format xml", "--log-format"),
            ("--hots 0.0.0.0:80", "--hots"),
            ("--host", "--host"),
            ("demo --twice", "--twice"),
            ("dmeo", "dmeo"),
        ] {
            let message = wrong(line);
            assert!(message.contains(part), "{line}: {message}");
            assert!(message.starts_with("rproxy: ") && !message.contains('\n'), "{line}: {message}");
        }
    }

    #[test]
    fn durations_are_seconds_or_have_a_unit() {
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert!("unlimited".parse::<ConnectTimeout>().is_ok_and(|limit| limit.0.is_none()));
    }
}
