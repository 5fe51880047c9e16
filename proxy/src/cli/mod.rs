//! The command line of the standalone front end.

pub(crate) mod ctl;
mod mappings;
mod values;

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::Targets;

use self::ctl::Ctl;
pub use self::mappings::MappingArgs;
use self::values::DrainLimit;
use crate::config::Config;
use crate::control::DEFAULT_PATH;
use crate::log::destination::Destination;
use crate::log::{self, Format, LogConfig};
use crate::metrics::addr::MetricsAddr;
use crate::plane::socket::parse_name;
use crate::plane::{AttachOptions, AttachTable};
use crate::sandbox::{self, User};
use rproxy_mapping::Mapping;
use rproxy_mapping::duration;
use rproxy_mapping::escape::escaped;

/// A TCP and UDP relay that publishes container ports: it listens on host addresses and forwards to backends.
///
/// Started with docker-proxy's flags (-proto, -host-ip, …) it is dockerd's userland proxy.
#[derive(Debug, Parser)]
#[command(name = "rproxy", version, args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  rproxy --host 0.0.0.0:80 --to 172.17.0.2:80     publish a port on all IPv4 addresses
  rproxy --host [::]:80 --to 172.17.0.2:80        the same, for IPv4 and IPv6 clients
  rproxy --host 127.0.0.1:0 --to 172.17.0.2:80    on a free port, printed at the start
  rproxy --to 172.17.0.2 -p 80:80 -p 443:443      the same as docker run
  rproxy --proto udp --host 0.0.0.0:53 --to 172.17.0.2:53
  rproxy --config /etc/rproxy/rproxy.toml         mappings from a file; SIGHUP reloads it
  rproxy --attach --control                       the published ports of Docker; see rproxy ctl list
  rproxy demo                                     a demonstration, without root or containers")]
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
    /// Control a running rproxy that was started with --control
    Ctl(Ctl),
    /// Check a configuration file: print its errors, or 'ok'
    CheckConfig {
        /// The file
        file: PathBuf,
    },
}

/// The options for serving.
#[derive(Args, Debug)]
pub struct Serve {
    /// The mappings.
    #[command(flatten)]
    pub mappings: MappingArgs,
    /// Read the mappings from a file; SIGHUP reloads it
    #[arg(long, value_name = "FILE", conflicts_with_all = MappingArgs::IDS)]
    pub config: Option<PathBuf>,
    /// Print the requested mappings as a configuration file, and exit
    #[arg(long)]
    pub print_config: bool,
    /// How long connections may continue after SIGTERM or SIGINT; 0 resets them at once
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration::parse, allow_hyphen_values = true)]
    pub drain_timeout: Duration,
    /// How long the old process's connections may continue after an upgrade (SIGUSR2), or 'unlimited'
    #[arg(long, value_name = "DURATION", default_value = duration::UNLIMITED, allow_hyphen_values = true)]
    upgrade_drain_timeout: DrainLimit,
    /// Listen for `rproxy ctl` on a Unix socket, for this user and root [default path: /run/rproxy.sock]
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = DEFAULT_PATH)]
    pub control: Option<PathBuf>,
    /// Serve /metrics for Prometheus, /healthz and /readyz over HTTP, without authentication [default: as the
    /// configuration says, or not]
    #[arg(long, value_name = "ADDRESS:PORT|unix:PATH")]
    pub metrics: Option<MetricsAddr>,
    /// Serve the ports that rproxy-shim attaches, those that Docker publishes: shims connect to an abstract Unix
    /// socket of this name; RPROXY_ATTACH in the environment of a shim chooses another one [default name: that of
    /// the configuration, or rproxy]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, value_parser = parse_name)]
    pub attach: Option<Option<String>>,
    /// Change to another user, by name or number, once everything is bound
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<User>,
    /// Confine the serving process: as far as the kernel supports it, completely or refuse to start, or not
    /// at all
    #[arg(long, value_enum, default_value_t, env = sandbox::MODE_VARIABLE)]
    pub sandbox: sandbox::Mode,
    /// Write a line for each connection and flow that ends, and for each client that is refused, to a file (SIGHUP
    /// reopens it), to the Unix socket of a log daemon, or to standard output (-)
    #[arg(long, value_name = "FILE|unix:PATH|-", value_parser = Destination::parse)]
    pub access_log: Option<Destination>,
    /// Format of the access log [default: that of --log-format]
    #[arg(long, value_enum, value_name = "FORMAT", requires = "access_log")]
    access_log_format: Option<Format>,
    /// Format of the log on standard error
    #[arg(long, value_enum, default_value_t)]
    log_format: Format,
    /// What is logged: a level, or a list such as 'warn,rproxy::tcp=debug' [default: RUST_LOG, or info]
    #[arg(long, value_name = "LEVEL", value_parser = log::parse_filter)]
    log_level: Option<Targets>,
}

impl Serve {
    /// The mappings of the command line, in order. None is an error unless there is another source.
    ///
    /// # Errors
    /// Those of [`MappingArgs::mappings`].
    pub fn mappings(&self) -> Result<Vec<Mapping>, UsageError> {
        let may_be_empty = self.control.is_some() || self.config.is_some() || self.attach.is_some();
        self.mappings.refuse_lone()?;
        if may_be_empty && self.mappings.is_empty() {
            self.mappings.refuse_without_mapping()?;
            return Ok(Vec::new());
        }
        self.mappings.mappings()
    }

    /// How ports are attached, if they can be. `config` is the content of the configuration, if there is one.
    pub fn attach_options(&self, config: Option<&Config>) -> Option<AttachOptions> {
        let flag = self.attach.as_ref().map(Option::as_deref);
        let of_flags = || flag.map(|_name| AttachTable { name: None, limits: self.mappings.limits() });
        match config {
            Some(config) => config.attach_options(flag),
            None => AttachOptions::new(flag, of_flags()),
        }
    }

    /// Where metrics are served, if they are. The command line takes precedence over `config`.
    pub fn metrics_addr<'a>(&'a self, config: Option<&'a Config>) -> Option<&'a MetricsAddr> {
        self.metrics.as_ref().or_else(|| config?.metrics.as_ref())
    }

    /// The time limit for connections in a process that another one has taken over from, if there is one.
    pub fn upgrade_drain_timeout(&self) -> Option<Duration> {
        self.upgrade_drain_timeout.0
    }

    /// The format of the access log.
    pub fn access_log_format(&self) -> Format {
        self.access_log_format.unwrap_or(self.log_format)
    }

    /// The file that the access log is appended to, if it is one.
    pub fn access_log_file(&self) -> Option<&Path> {
        self.access_log.as_ref().and_then(Destination::file)
    }

    /// The requested log.
    pub fn log(&self) -> LogConfig {
        LogConfig { format: self.log_format, filter: self.log_level.clone() }
    }
}

/// Parses the command line, without the program's name.
///
/// # Errors
/// [`Unparsed`]: the text of `--help` and `--version`, which is for standard output, or a [`UsageError`].
pub fn parse(args: &[OsString]) -> Result<Cli, Unparsed> {
    parse_words(args.iter().cloned()).map_err(|error| match (one_dash(args), error.kind()) {
        (Some(mistake), _) => Unparsed::Wrong(mistake),
        (None, ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Unparsed::Asked(error.to_string()),
        _ => Unparsed::Wrong(blame_environment(one_line(&quoted(error, args), &help_for(args)), args)),
    })
}

fn parse_words(args: impl Iterator<Item = OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("rproxy".into()).chain(args))
}

/// The same error with escaped arguments, so that a line break in an argument does not split the message.
fn quoted(error: clap::Error, args: &[OsString]) -> clap::Error {
    let escaped = args.iter().map(|arg| escaped(arg).to_string().into());
    let again = parse_words(escaped).err();
    again.filter(|again| again.kind() == error.kind()).unwrap_or(error)
}

/// Names the environment variable in a message about its option, if the option is not in `args`.
fn blame_environment(UsageError(message): UsageError, args: &[OsString]) -> UsageError {
    let is_given = args.iter().filter_map(|arg| arg.to_str()).any(|arg| arg.starts_with("--sandbox"));
    if is_given {
        return UsageError(message);
    }
    UsageError(message.replace("'--sandbox <SANDBOX>'", sandbox::MODE_VARIABLE))
}

/// Detects `-host` and the like. Otherwise, clap would parse it as `-h` and show the help.
fn one_dash(args: &[OsString]) -> Option<UsageError> {
    let mut command = Cli::command();
    command.build();
    let has = |arg: &clap::Arg, name: &str| {
        arg.get_long() == Some(name) || arg.get_visible_aliases().unwrap_or_default().contains(&name)
    };
    let commands = [&command].into_iter().chain(command.get_subcommands());
    let commands = commands.flat_map(|command| [command].into_iter().chain(command.get_subcommands()));
    let options: Vec<&clap::Arg> = commands.flat_map(clap::Command::get_arguments).collect();
    let is_long = |name: &str| options.iter().any(|arg| has(arg, name));
    let written = args.iter().filter_map(|arg| arg.to_str()?.strip_prefix('-'));
    let names = written.map(|text| text.split('=').next().unwrap_or_default());
    let name = names.into_iter().find(|name| is_long(name))?;
    Some(UsageError(format!("-{name}: options have two dashes here; write --{name}")))
}

/// Why a command line was not parsed.
#[derive(Debug)]
pub enum Unparsed {
    /// The requested text of the help or version.
    Asked(String),
    /// An error.
    Wrong(UsageError),
}

/// A usage error, in one line.
#[derive(Debug, thiserror::Error)]
#[error("rproxy: {}", escaped(.0))]
pub struct UsageError(String);

impl UsageError {
    /// An error with the text `message`.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// The command that shows the options available for `args`.
fn help_for(args: &[OsString]) -> String {
    let command = Cli::command();
    let (mut command, mut words) = (&command, "rproxy".to_owned());
    for arg in args.iter().filter_map(|arg| arg.to_str()) {
        let Some(next) = command.find_subcommand(arg) else { break };
        words = format!("{words} {arg}");
        command = next;
    }
    format!("{words} --help")
}

/// clap's message in one line: the argument, what is wrong with it, and what would work, as `help` shows.
fn one_line(error: &clap::Error, help: &str) -> UsageError {
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
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return UsageError(format!("a command is missing; `{help}` lists them"));
    }
    let text = error.to_string();
    let place = place_in_file(error);
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .map(|line| line.trim_start_matches("error: ").trim_start_matches("tip: "))
        .collect();
    let hint = place.unwrap_or_else(|| format!("`{help}` lists the options"));
    UsageError(format!("{}; {hint}", lines.join("; ").replace(":;", ":")))
}

/// Where the file of `--config` says what an option says that was given beside it.
fn place_in_file(error: &clap::Error) -> Option<String> {
    let context =
        [ContextKind::InvalidArg, ContextKind::PriorArg].into_iter().filter_map(|kind| error.get(kind));
    let arguments: Vec<&str> = context
        .flat_map(|value| match value {
            ContextValue::String(text) => std::slice::from_ref(text),
            ContextValue::Strings(texts) => texts,
            _ => &[],
        })
        .filter_map(|text| text.split([' ', '=']).next())
        .collect();
    if error.kind() != ErrorKind::ArgumentConflict || !arguments.contains(&"--config") {
        return None;
    }
    let option = arguments.into_iter().find(|argument| *argument != "--config")?;
    Some(match option {
        "--host" | "--to" | "--publish" | "-p" | "--publish-all" | "-P" | "--expose" | "--name" => {
            "write it in a [[mapping]] of the file".to_owned()
        }
        "--no-access-log" => {
            "write access_log = false in [defaults] of the file, or in a [[mapping]]".to_owned()
        }
        _ => {
            let key = option.trim_start_matches('-').replace('-', "_");
            format!("write {key} in [defaults] of the file, or in a [[mapping]]")
        }
    })
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::limits::Limits;

    use super::*;

    fn wrong(line: &str) -> String {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        match parse(&args) {
            Ok(cli) => cli.serve.mappings().expect_err(line).to_string(),
            Err(Unparsed::Wrong(error)) => error.to_string(),
            Err(Unparsed::Asked(text)) => panic!("{line}: {text}"),
        }
    }

    fn mappings(line: &str) -> Vec<String> {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let mappings = parse(&args).expect(line).serve.mappings().expect(line);
        mappings.iter().map(|mapping| format!("{mapping} {}", mapping.backend())).collect()
    }

    #[test]
    fn mappings_are_asked_for_by_pairs_or_as_of_docker() {
        assert_eq!(
            mappings("--to 10.0.0.1 -p 81:80 --publish 443:443 -p 53:53/udp"),
            ["[::]:81:80/tcp 10.0.0.1", "[::]:443:443/tcp 10.0.0.1", "[::]:53:53/udp 10.0.0.1"],
        );
        assert_eq!(mappings("--to fd00::2 -p 81:80"), ["[::]:81:80/tcp [fd00::2]"]);
        assert_eq!(
            mappings("-P --expose 80 --expose 53/udp --expose 53/tcp -p 53:53/udp --to 10.0.0.1"),
            ["[::]:53:53/udp 10.0.0.1", "[::]::80/tcp 10.0.0.1", "[::]::53/tcp 10.0.0.1"],
        );
        assert_eq!(
            mappings("--host 0.0.0.0:1 --to 10.0.0.1 --to 10.0.0.2:2 -p 3:3 --proto tcp+udp"),
            ["0.0.0.0:1:2/tcp+udp 10.0.0.2", "[::]:3:3/tcp 10.0.0.1"],
        );
        assert_eq!(
            mappings(
                "--host 10.0.0.11:7000-7005 --to 10.0.0.1:7000-7005 --host :::8000-8010 --to 10.0.0.1:80"
            ),
            ["10.0.0.11:7000-7005:7000-7005/tcp 10.0.0.1", "[::]:8000-8010:80/tcp 10.0.0.1"],
        );
        let both = "--host [::]:80 --to 10.0.0.1:80 --host 0.0.0.0:80 --to 10.0.0.2:80 --v6only";
        assert_eq!(mappings(both), ["[::]:80:80/tcp 10.0.0.1", "0.0.0.0:80:80/tcp 10.0.0.2"]);
    }

    #[test]
    fn mappings_at_random_ports_have_names_of_their_own() {
        let args: Vec<OsString> =
            "--to 10.0.0.1 -p 80 -p 80 -p 81:81 -p 80".split(' ').map(Into::into).collect();
        let mappings = parse(&args).unwrap().serve.mappings().unwrap();
        let names: Vec<_> = mappings.iter().map(|mapping| mapping.name().to_string()).collect();
        assert_eq!(names, ["random:80/tcp", "random:80/tcp#2", "81/tcp", "random:80/tcp#3"]);
    }

    #[test]
    fn options_hold_for_each_mapping() {
        let limits = |line: &str| {
            let args: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let mappings = parse(&args).expect(line).serve.mappings().expect(line);
            mappings.iter().map(|mapping| mapping.limits().clone()).collect::<Vec<_>>()
        };
        assert_eq!(limits("--to 10.0.0.1 -p 80"), [Limits::default()]);
        let of_each = Limits { dscp: "EF".parse().ok(), udp_any_port: true, ..Limits::default() };
        let line = "--to 10.0.0.1 -p 80 -p 69:69/udp --dscp 0x2e --udp-any-port";
        assert_eq!(limits(line), [of_each.clone(), of_each]);
    }

    #[test]
    fn the_command_definition_is_consistent() {
        Cli::command().debug_assert();
        let mut mappings: Vec<_> = MappingArgs::augment_args(clap::Command::new("mappings"))
            .get_arguments()
            .map(|arg| arg.get_id().to_string())
            .collect();
        mappings.sort();
        let mut listed = MappingArgs::IDS.map(str::to_owned);
        listed.sort();
        assert_eq!(mappings, listed, "a file says all that options of mappings say");
    }

    #[track_caller]
    fn assert_wrong(line: &str, part: &str) {
        let message = wrong(line);
        assert!(message.contains(part), "{line}: {message}");
        assert!(message.starts_with("rproxy: ") && !message.contains('\n'), "{line}: {message}");
    }

    #[test]
    fn mistakes_about_what_is_published_name_their_part() {
        for (line, part) in [
            ("-p 80:80", "-p: no backend; give --to ADDRESS"),
            ("-p 80x --to 10.0.0.1", "-p 80x: '80x' is not a port"),
            (
                "-p 80:80 --to 10.0.0.1:80",
                "--to 10.0.0.1:80: its --host is missing; for -p the address is enough",
            ),
            ("-p 80 --host :::1 --to 10.0.0.1:80", "-p: its --to ADDRESS is missing"),
            ("-p 80 --to 10.0.0.1 --to 10.0.0.2", "--to 10.0.0.2: all -p have one backend"),
            ("-p 80 --to 0.0.0.0", "--to 0.0.0.0: 0.0.0.0 is where one listens"),
            ("-p 80:80 -p 80:81 --to 10.0.0.1", "-p 80:81/tcp: port 80 is taken by the mapping 80/tcp"),
            ("-p 80-82:80-81 --to 10.0.0.1", "-p 80-82:80-81: 3 host ports (80-82) do not fit 2"),
            ("-p 80:80 --to 127.0.0.1", "-p 80:80/tcp: 80/tcp would forward to itself"),
            ("-p 80 --proto udp --to 10.0.0.1", "--proto: it is for --host; write -p PORT/PROTOCOL"),
            ("-p 80 -p 81 --name web --to 10.0.0.1", "--name web: it is for one mapping"),
            ("-P --to 10.0.0.1", "-P: no ports to publish; give --expose PORT"),
            ("--expose 80 --to 10.0.0.1", "-P"),
            ("--host *:8080 --to 10.0.0.1:80", "write 0.0.0.0:8080, or [::]:8080 for IPv6 too"),
        ] {
            assert_wrong(line, part);
        }
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
            ("--host :::80 --to 127.0.0.1:80", "--host [::]:80: 80/tcp would forward to itself"),
            (
                "--host 0.0.0.0:80 --to 10.0.0.1:80 --host :::80 --to 10.0.0.2:80",
                "--host [::]:80: port 80 is taken by the mapping 80/tcp",
            ),
            ("--host 10.0.0.11:80 --to 0.0.0.0:80", "--to 0.0.0.0:80: 0.0.0.0 is where one listens"),
            ("--v6only --host 0.0.0.0:80 --to 10.0.0.1:80", "v6only is for [::]"),
            ("--proto icmp", "--proto icmp: 'icmp' is not a protocol"),
            ("--udp-timeout 0", "--udp-timeout 0: everything would be over"),
            ("--udp-timeout 18446744073709551615", "longer than a year"),
            ("--udp-max-flows 0", "--udp-max-flows 0: not a number of at least 1"),
            (
                "--host :::80 --to 10.0.0.1:80 --proto tcp --proto udp",
                "--proto: given 2 times for 1 mappings",
            ),
            ("--connect-timeout 0", "--connect-timeout 0: everything would be over at once"),
            (
                "--host 0.0.0.0:80 --to 10.0.0.1",
                "--to 10.0.0.1: the port is missing; write it as 10.0.0.1:80",
            ),
            ("--config x --to 10.0.0.1", "'--config <FILE>' cannot be used with '--to <ADDRESS[:PORTS]>'"),
            ("--max-connections 0", "--max-connections 0: not a number of at least 1"),
            ("--on-limit drop", "--on-limit"),
            ("--allow 10.0.0.1/8", "--allow 10.0.0.1/8: it has host bits set; write 10.0.0.0/8"),
            ("--deny lan", "--deny lan: not a network"),
            ("-publish 80 --to 10.0.0.1", "-publish: options have two dashes here"),
            ("--drain-timeout soon", "--drain-timeout soon: not a duration"),
            ("--upgrade-drain-timeout soon", "10s, 500ms or 2m, or 'unlimited'"),
            ("--log-level loud", "--log-level loud: 'loud' names no level"),
            ("--log-format xml", "--log-format"),
            ("--hots 0.0.0.0:80", "--hots"),
            ("--host", "--host"),
            ("demo --twice", "--twice"),
            ("dmeo", "dmeo"),
            ("ctl", "a command is missing"),
            ("check-config", "were not provided: <FILE>"),
        ] {
            assert_wrong(line, part);
        }
    }

    #[test]
    fn options_without_what_they_are_for_name_their_place() {
        for (line, part) in [
            (
                "--config x --idle-timeout 3",
                "'; write idle_timeout in [defaults] of the file, or in a [[mapping]]",
            ),
            (
                "--udp-any-port --config x",
                "'; write udp_any_port in [defaults] of the file, or in a [[mapping]]",
            ),
            ("--no-access-log --config x", "'; write access_log = false in [defaults] of the file"),
            ("--config x -p 80 --idle-timeout 3", "; write it in a [[mapping]] of the file"),
            (
                "--attach --freebind",
                "--freebind: it is for mappings, and none is asked for; add --host and --to",
            ),
            ("--attach --require-resolved", "--require-resolved: it is for mappings"),
            ("--control --v6only", "--v6only: it is for mappings"),
            ("--attach --proto udp", "--proto: it is for mappings"),
            ("--attach --name web", "--name: it is for mappings"),
        ] {
            assert_wrong(line, part);
        }
    }

    #[test]
    fn mistakes_in_values_name_the_argument() {
        for (line, part) in [
            ("--drain-timeout -1s", "--drain-timeout -1s: not a duration; write one such as 10s"),
            ("--idle-timeout -5", "--idle-timeout -5: not a duration"),
            ("--max-connections -1", "--max-connections -1: not a number of at least 1"),
            ("--dscp AF5", "--dscp AF5: not a code point; write a number from 0 to 63 or a name such as EF"),
            ("--dscp -1", "--dscp -1: not a code point"),
            ("--dscp 184", "looks like a whole traffic class byte, whose code point is 46; write 46"),
            (
                "--host 10.0.0.11:80-82 --to 10.0.0.1:80-81",
                "--host 10.0.0.11:80-82: 3 host ports (80-82) do not fit 2",
            ),
            (
                "--host [::]:80 --to 18000",
                "--to 18000: the address is missing; write the backend's too, as in 172.17.0.2:18000",
            ),
            ("--host [fe80::1]:80 --to 10.0.0.1:80", "--host [fe80::1]:80: fe80::1 is a link-local address"),
            ("--host [::]:80 --to fe80::1", "--to fe80::1: fe80::1 is a link-local address"),
            ("-p [fe80::1]:80:80 --to 10.0.0.1", "-p [fe80::1]:80:80: fe80::1 is a link-local address"),
            ("ctl retarget web -to 10.0.0.1:80", "-to: options have two dashes here"),
            ("ctl stats -watch", "-watch: options have two dashes here"),
            ("ctl stats --watch 0", "--watch 0: not a number of seconds from 1 to 3600; write one such as 5"),
            ("ctl add --nmae x", "'--name'; `rproxy ctl add --help` lists"),
        ] {
            assert_wrong(line, part);
        }
    }

    /// The values that a message suggests: they follow certain words, and are not words themselves.
    fn suggestions(message: &str) -> Vec<String> {
        let words: Vec<&str> = message.split_whitespace().collect();
        let bare = |word: &str| word.trim_end_matches([',', ';']).trim_matches(['`', '\'']).to_owned();
        let follows = |two: &[&str]| ["write", "as", "in", "or"].contains(&two[0]);
        let suggested = words.windows(2).filter(|two| follows(two)).map(|two| bare(two[1]));
        suggested.filter(|word| word.contains(|c: char| c.is_ascii_digit() || "+[".contains(c))).collect()
    }

    /// Command lines, and invalid values for `{}`.
    const WRONG: &[(&str, &[&str])] = &[
        (
            "--host {} --to 10.0.0.1:80",
            &[
                "80",
                "0",
                ":80",
                "80-90",
                "0.0.0.0",
                "0.0.0.0:",
                "::1:80",
                "::1",
                "fe80::1",
                "[fe80::1]:80",
                "fe80::1:80",
                "[::]",
                "",
            ],
        ),
        (
            "--host 127.0.0.1:0 --to {}",
            &["18000", ":18000", "10.0.0.1", "10.0.0.1:", "fe80::1", "[fe80::1]:80", "fd00::2:80", ""],
        ),
        ("--host {}:80 --to 10.0.0.1:80", &["localhost", "z z", "10.0.0.256"]),
        ("--host 127.0.0.1:0 --to {}:80", &["web!", "10.0.0.256", "0.0.0.0", "[::]"]),
        ("--host 127.0.0.1:{} --to 10.0.0.1:80", &["90-80", "http", "65536"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:{}", &["http", "65536"]),
        (
            "--to 10.0.0.1 -p {}",
            &["10.0.0.11:80", "[::1]:80", "::1:80:80", "[fe80::1]:80:80", "[fe80::1]::80/udp"],
        ),
        ("--to 10.0.0.1 -p {}:80:80", &["localhost", "10.0.0.256"]),
        ("--to {} -p 80", &["0.0.0.0", "[::]", "web-", "1.2.3"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --proto {}", &["icmp", "dccp", "TCP"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --idle-timeout {}", &["soon", "0", "-1s", "1 week ago"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --udp-timeout {}", &["soon", "0", "-1s", "1 week ago"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --drain-timeout {}", &["soon", "-1s"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --allow {}", &["10.0.0.1/8", "::ffff:10.0.0.1/104", "lan"]),
        ("--host 127.0.0.1:0 --to 10.0.0.1:80 --dscp {}", &["64", "0xb8", "-1", "AF5", "best", ""]),
    ];

    #[test]
    fn what_a_message_suggests_is_accepted() {
        for (template, wrong) in WRONG {
            for wrong_value in *wrong {
                let parsed = |value: &str| {
                    let args = template.split(' ').map(|word| word.replace("{}", value).into());
                    let args: Vec<OsString> = args.collect();
                    match parse(&args) {
                        Ok(cli) => cli.serve.mappings().map_err(|error| error.to_string()),
                        Err(Unparsed::Wrong(error)) => Err(error.to_string()),
                        Err(Unparsed::Asked(text)) => panic!("{text}"),
                    }
                };
                let message = parsed(wrong_value).expect_err(template);
                let suggestions = suggestions(&message);
                assert!(!suggestions.is_empty(), "{template} {wrong_value}: {message}");
                for suggestion in suggestions {
                    let again = parsed(&suggestion);
                    assert!(again.is_ok(), "{message}\n{suggestion}: {again:?}");
                }
            }
        }
    }
}
