//! The command line.

use std::ffi::OsString;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
use rproxy_mapping::escape::escaped;
use rproxy_mapping::publish::ExposedPorts;
use serde_json::json;

use crate::addr::{Subnet4, Subnet6};
use crate::commands::{
    self, Attach, Command, NetnsChoice, Options, Publish, Report, Target, Transparent, Unpublish, Up,
};
use crate::demo;
use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::Choice;
use crate::hints::Hints;
use crate::model::Via;
use crate::name::{IfName, Name};
use crate::publish::{Publication, Published, exposed, parse_exposed};
use crate::{state, watch};

/// The kernel's largest value for the four sizes (GSO_MAX_SIZE of include/linux/netdevice.h, eight times 65,535).
const LARGEST_GSO: u32 = 524_280;

/// Sets up the container network for rproxy: a bridge, veth pairs, addresses, published ports and the
/// firewall.
#[derive(Debug, Parser)]
#[command(name = "netns-setup", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    action: Sub,
}

#[derive(Debug, Args)]
struct Global {
    /// Print the commands that would be run, and change nothing.
    #[arg(long, global = true)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// The directory for the state.
    #[arg(long, global = true, value_name = "DIR", default_value = state::DEFAULT_DIR)]
    state_dir: PathBuf,
    /// The firewall to use.
    #[arg(long, global = true, value_enum)]
    firewall: Option<Choice>,
    /// The rproxy to start; by default the one beside this program, or in PATH.
    #[arg(long, global = true, value_name = "PATH")]
    rproxy: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Sub {
    /// Bring up the bridge, forwarding and the rules.
    Up(UpArgs),
    /// Remove everything that netns-setup created, and nothing else.
    Down,
    /// Put a container on the network and print its address.
    Attach(AttachArgs),
    /// Take a container off the network, with what it publishes.
    Detach {
        /// The container.
        name: Name,
    },
    /// Publish ports of a container.
    Publish(PublishArgs),
    /// Unpublish ports of a container.
    Unpublish {
        /// The container, or one of its ports as `list` shows it, such as '*:8080->80/tcp'.
        #[arg(value_name = "NAME|PORT")]
        target: Target,
        /// The ports, written as for `publish` or as `list` shows them; all if omitted.
        #[arg(short = 'p', long = "publish", value_name = "SPEC")]
        specs: Vec<Published>,
    },
    /// Deliver replies of backends to transparent sockets (`rproxy --source client`) to this host.
    #[command(subcommand)]
    Transparent(TransparentSub),
    /// List the containers and what they publish.
    List,
    /// Show one container, or all, as `docker inspect` shows networks.
    Inspect {
        /// The container.
        name: Option<Name>,
    },
    /// Compare the system with the state; exit with 1 if it differs.
    Check,
    /// Repair what differs, and finish an interrupted command.
    Repair,
    /// Repair, from now on, what other programs flush, delete or end, within a second.
    ///
    /// Runs until a signal ends it, as a service that notifies systemd (Type=notify). Each repair is one line on standard
    /// error. Commands may be run meanwhile.
    Watch(NoOutput),
    /// Demonstrate everything in namespaces of its own: every step, the rules, the traffic.
    Demo(NoOutput),
}

/// Options of all commands that mean nothing for some, and are refused there. They are not shown.
#[derive(Debug, Args)]
struct NoOutput {
    #[arg(long, hide = true)]
    dry_run: bool,
    #[arg(long, hide = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum TransparentSub {
    /// Set it up for these interfaces, in addition to those that are set up already.
    ///
    /// Writes a rule that marks packets of transparent sockets, a policy routing rule for each interface, and a
    /// routing table with one local route, for IPv4 and IPv6.
    Up {
        /// The interfaces that the backends' packets come in by, such as docker0 (the bridge, not its ports). Without
        /// this option: docker0, the bridges of Docker's other networks (br-…) and netns-setup's own, as far as they
        /// exist.
        #[arg(long = "interface", value_name = "NAME", num_args = 1..)]
        interfaces: Vec<IfName>,
    },
    /// Take it down.
    Down {
        /// Only for these interfaces.
        #[arg(long = "interface", value_name = "NAME", num_args = 1..)]
        interfaces: Vec<IfName>,
    },
    /// Compare it with the system; exit with 1 if something differs.
    Check {
        /// Interfaces that have to be set up.
        #[arg(long = "interface", value_name = "NAME", num_args = 1..)]
        interfaces: Vec<IfName>,
    },
}

#[derive(Debug, Args)]
struct UpArgs {
    /// The name of the bridge.
    #[arg(long, value_name = "NAME", default_value = "docker0")]
    bridge: IfName,
    /// The subnet of the containers; the bridge gets the first address.
    #[arg(long, value_name = "CIDR", default_value = "172.17.0.0/16")]
    subnet: Subnet4,
    /// The IPv6 subnet.
    #[arg(long, value_name = "CIDR")]
    subnet6: Option<Subnet6>,
    /// Switch IPv6 off in the containers, as Docker does without an IPv6 subnet: no ::1 and no link-local address. In a
    /// namespace that was passed, this concerns only eth0.
    #[arg(long, conflicts_with = "subnet6")]
    disable_ipv6: bool,
    /// The MTU.
    // 1280 is the minimum for IPv6 (RFC 8200, section 5), 65535 the maximum for a veth.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    mtu: u32,
    /// The largest packet inside the host (BIG TCP), if the kernel supports it; 0 keeps the kernel's value.
    #[arg(long, value_name = "BYTES", default_value_t = LARGEST_GSO, value_parser = clap::value_parser!(u32).range(0..=i64::from(LARGEST_GSO)))]
    gso_max_size: u32,
    /// Keep forwarding enabled after a reboot, with a file in /etc/sysctl.d.
    #[arg(long)]
    persist: bool,
    /// Deliver replies to transparent sockets (`rproxy --source client`), as `transparent up` does.
    #[arg(long)]
    transparent: bool,
}

#[derive(Debug, Args)]
struct AttachArgs {
    /// The container's name.
    name: Name,
    /// Its network namespace; without this and --pid, one with its name is created.
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// A process in its network namespace.
    #[arg(long)]
    pid: Option<u32>,
    /// Its address; the next free one if omitted.
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,
    /// A port or range that `publish -P` publishes, such as 80 or 53/udp.
    #[arg(long, value_name = "PORT[/PROTOCOL]", value_parser = parse_exposed)]
    expose: Vec<ExposedPorts>,
}

#[derive(Debug, Args)]
struct PublishArgs {
    /// The container.
    name: Name,
    /// What to publish: `[[ADDRESS:][HOST_PORT]:]PORT[/PROTOCOL]`; ports may be ranges.
    #[arg(short = 'p', long = "publish", value_name = "SPEC", required_unless_present = "all_exposed")]
    specs: Vec<Publication>,
    /// Publish everything that the container exposes, each at a random port.
    #[arg(short = 'P', long = "publish-all")]
    all_exposed: bool,
    /// What relays the traffic: rproxy, the kernel, or both as Docker does.
    #[arg(long, value_enum, default_value = "both")]
    via: Via,
}

/// A failure, as it is printed.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong, in one line.
    pub message: String,
    /// The differences, if that is the failure.
    pub differences: Vec<String>,
    /// The exit status.
    pub status: u8,
}

impl Failure {
    /// The failure of a command, whose hints are complete.
    #[must_use]
    pub fn of(error: &Error, hints: &Hints) -> Self {
        let complete = |line: &String| hints.complete(line);
        Self {
            message: escaped(&hints.complete(&error.to_string())).to_string(),
            differences: error.differences().iter().map(complete).collect(),
            status: error.exit_code(),
        }
    }

    /// A mistake on the command line.
    #[must_use]
    pub fn usage(message: &str) -> Self {
        let message = format!("{message}; see `netns-setup --help`");
        Self { message, differences: Vec::new(), status: 2 }
    }

    /// The output of a command with `--json`.
    #[must_use]
    pub fn json(&self) -> String {
        let mut whole = json!({ "error": self.message, "exit_status": self.status });
        if !self.differences.is_empty() {
            whole["differences"] = json!(self.differences);
        }
        format!("{whole:#}")
    }
}

/// Whether the words of a command line that was not parsed ask for JSON.
#[must_use]
pub fn asks_for_json(args: &[OsString]) -> bool {
    args.iter().any(|arg| arg == "--json")
}

/// Why a command line was not parsed.
#[derive(Debug)]
pub enum Unparsed {
    /// The requested text of the help or version.
    Asked(String),
    /// An error, in one line.
    Wrong(String),
}

impl Cli {
    /// Parses a command line, whose first word is the name of the program.
    ///
    /// # Errors
    /// [`Unparsed`]: help was requested, or the command line is invalid.
    pub fn from_args(args: Vec<OsString>) -> Result<Self, Unparsed> {
        Self::try_parse_from(&args).map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Unparsed::Asked(error.to_string()),
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                Unparsed::Wrong("a command is missing".to_owned())
            }
            ErrorKind::MissingRequiredArgument => Unparsed::Wrong(missing(&error)),
            _ => Unparsed::Wrong(escaped(&one_line(&quoted(error, &args))).to_string()),
        })
    }

    /// Whether its output is JSON.
    #[must_use]
    pub fn json(&self) -> bool {
        self.global.json
    }

    /// Completes the commands in this program's messages.
    #[must_use]
    pub fn hints(&self) -> Hints {
        Hints::about(&self.global.state_dir)
    }

    /// Runs the command. Its output goes to `out`, warnings to `log`.
    ///
    /// # Errors
    /// If the command fails, or its output cannot be written.
    pub fn run(
        self,
        executor: &mut dyn Executor,
        out: &mut dyn Write,
        log: &mut dyn Write,
    ) -> Result<(), Error> {
        let hints = self.hints();
        let Global { dry_run, json, state_dir, firewall, rproxy } = self.global;
        let options = Options { state_dir, dry_run, firewall, rproxy };
        let alone = |name: &str| match dry_run || json {
            true => Err(Error::Usage(format!("{name} takes neither --dry-run nor --json"))),
            false => Ok(()),
        };
        let command = match self.action.into_work() {
            Work::Command(command) => command,
            Work::Demo => {
                return alone("demo").and_then(|()| demo::run(options.firewall, options.rproxy, out));
            }
            Work::Watch => return alone("watch").and_then(|()| watch::run(&options, log)),
        };
        let report = match commands::run(&command, &options, executor) {
            Err(error) if !error.differences().is_empty() => {
                // With --json, they are part of the error.
                for line in error.differences().iter().filter(|_| !json) {
                    writeln!(out, "{}", hints.complete(line)).map_err(Error::Output)?;
                }
                return Err(error);
            }
            other => other?,
        };
        let warnings = report.warnings.iter().map(|line| hints.complete(line)).collect();
        let report = Report { warnings, ..report };
        write_report(out, log, &report, json, dry_run).map_err(Error::Output)
    }
}

/// What a subcommand does.
enum Work {
    /// One command.
    Command(Command),
    /// The demonstration, which runs several.
    Demo,
    /// The service, which runs one again and again.
    Watch,
}

impl Sub {
    fn into_work(self) -> Work {
        Work::Command(match self {
            Self::Up(args) => Command::Up(args.into()),
            Self::Down => Command::Down,
            Self::Attach(args) => Command::Attach(args.into()),
            Self::Detach { name } => Command::Detach(name),
            Self::Publish(PublishArgs { name, specs, all_exposed, via }) => {
                Command::Publish(Publish { name, specs, all_exposed, via })
            }
            Self::Unpublish { target, specs } => Command::Unpublish(Unpublish { target, specs }),
            Self::Transparent(sub) => Command::Transparent(sub.into()),
            Self::List => Command::List,
            Self::Inspect { name } => Command::Inspect(name),
            Self::Check => Command::Check,
            Self::Repair => Command::Repair,
            Self::Demo(_) => return Work::Demo,
            Self::Watch(_) => return Work::Watch,
        })
    }
}

impl From<UpArgs> for Up {
    fn from(args: UpArgs) -> Self {
        let UpArgs { bridge, subnet, subnet6, disable_ipv6, mtu, gso_max_size, persist, transparent } = args;
        Self { bridge, subnet, subnet6, disable_ipv6, mtu, gso_max_size, persist, transparent }
    }
}

impl From<TransparentSub> for Transparent {
    fn from(sub: TransparentSub) -> Self {
        match sub {
            TransparentSub::Up { interfaces } => Self::Up(interfaces),
            TransparentSub::Down { interfaces } => Self::Down(interfaces),
            TransparentSub::Check { interfaces } => Self::Check(interfaces),
        }
    }
}

impl From<AttachArgs> for Attach {
    fn from(args: AttachArgs) -> Self {
        let AttachArgs { name, netns, pid, ip, expose } = args;
        let netns = netns.map(NetnsChoice::Path).or(pid.map(NetnsChoice::Pid)).unwrap_or(NetnsChoice::New);
        let expose = expose.into_iter().flat_map(exposed).collect();
        Self { name, netns, ip, expose }
    }
}

/// The same error with escaped arguments, so that a line break in an argument does not split the message.
fn quoted(error: clap::Error, args: &[OsString]) -> clap::Error {
    let escaped = args.iter().map(|arg| OsString::from(escaped(arg).to_string()));
    let again = Cli::try_parse_from(escaped).err();
    again.filter(|again| again.kind() == error.kind()).unwrap_or(error)
}

/// Which arguments are missing, in one line.
fn missing(error: &clap::Error) -> String {
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else {
        return one_line(error);
    };
    match missing.as_slice() {
        [ports] if ports.starts_with("--publish ") => {
            "which ports to publish is missing: add them, as in `-p 8080:80`, or -P for all that the container exposes"
                .to_owned()
        }
        [one] => format!("{one} is missing"),
        all => {
            // In the order of the usage: options last.
            let (options, mut names): (Vec<_>, Vec<_>) = all.iter().partition(|name| name.starts_with('-'));
            names.extend(options);
            let names: Vec<_> = names.into_iter().map(String::as_str).collect();
            format!("{} are missing", names.join(" and "))
        }
    }
}

/// clap's message in one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let said =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let said: Vec<_> =
        said.map(|line| line.trim_start_matches("error: ").trim_start_matches("tip: ")).collect();
    said.join("; ")
}

fn write_report(
    out: &mut dyn Write,
    log: &mut dyn Write,
    report: &Report,
    json: bool,
    dry_run: bool,
) -> std::io::Result<()> {
    for warning in &report.warnings {
        writeln!(log, "netns-setup: warning: {warning}")?;
    }
    if json {
        return writeln!(out, "{}", report.json(dry_run));
    }
    let lines = if dry_run && report.shown.is_none() { &report.steps } else { &report.lines };
    lines.iter().try_for_each(|line| writeln!(out, "{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage_error(args: &[&str]) -> String {
        let args = ["netns-setup"].iter().chain(args);
        let error = Cli::try_parse_from(args).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let line = one_line(&error);
        assert_eq!(line.lines().count(), 1, "{line}");
        line
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn options_that_mean_nothing_for_a_command_are_not_shown_and_refused() {
        let help = |command: &str| {
            let args = ["netns-setup", command, "--help"].map(OsString::from).to_vec();
            match Cli::from_args(args) {
                Err(Unparsed::Asked(text)) => text,
                other => panic!("{other:?}"),
            }
        };
        assert!(help("check").contains("--json"));
        for command in ["watch", "demo"] {
            assert!(!help(command).contains("--json") && !help(command).contains("--dry-run"), "{command}");
            for args in [["--json", command], [command, "--json"]] {
                let cli = Cli::try_parse_from(["netns-setup"].iter().chain(&args)).unwrap();
                assert!(cli.json(), "{args:?}");
            }
        }
    }

    #[test]
    fn what_is_missing_is_named_in_one_line() {
        for (args, expected) in [
            (&["publish", "web"][..], "as in `-p 8080:80`, or -P for all that the container exposes"),
            (&["publish"], "<NAME> and --publish <SPEC> are missing"),
            (&["attach"], "<NAME> is missing"),
            (&["unpublish"], "<NAME|PORT> is missing"),
        ] {
            let args = ["netns-setup"].iter().chain(args).map(OsString::from).collect();
            let Err(Unparsed::Wrong(line)) = Cli::from_args(args) else { panic!("{expected}") };
            assert!(line.ends_with(expected) && line.lines().count() == 1, "{line}");
        }
    }

    #[test]
    fn the_defaults_are_the_story_s() {
        let cli = Cli::try_parse_from(["netns-setup", "up"]).unwrap();
        let Work::Command(Command::Up(up)) = cli.action.into_work() else { panic!("not up") };
        assert_eq!((up.bridge.as_str(), up.mtu), ("docker0", 1500));
        assert_eq!(up.subnet.to_string(), "172.17.0.0/16");
    }

    #[test]
    fn bad_input_is_a_usage_error() {
        assert!(usage_error(&["attach", "../web"]).contains("not a container name"));
        assert!(usage_error(&["publish", "web", "-p", "80:0"]).contains("not a port"));
        assert!(usage_error(&["publish", "web", "-p", "*:80->80/tcp"]).contains("'*' is not a port"));
        assert!(usage_error(&["unpublish", "*:80->80"]).contains("as `netns-setup list` shows it"));
        assert!(usage_error(&["unpublish", "../web"]).contains("not a container name"));
        assert!(usage_error(&["up", "--subnet", "172.17.0.1/16"]).contains("172.17.0.0/16"));
        assert!(usage_error(&["up", "--subnet", "127.0.0.0/8"]).contains("has loopback addresses"));
        assert!(usage_error(&["up", "--subnet6", "ff00::/64"]).contains("has multicast addresses"));
        assert!(usage_error(&["publish", "web", "-p", "224.0.0.1:80:80"]).contains("no client can connect"));
        assert!(usage_error(&["frobnicate"]).contains("unrecognized subcommand 'frobnicate'"));
        assert!(usage_error(&["up", "--mtu", "100"]).contains("1280"));
        assert!(usage_error(&["up", "--bridge", "a/b"]).contains("not an interface name"));
        assert!(usage_error(&["attach", "web", "--expose", "x"]).contains("not a port"));
        assert!(
            usage_error(&["attach", "web", "--netns", "/n", "--pid", "1"]).contains("cannot be used with")
        );
    }
}
