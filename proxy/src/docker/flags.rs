//! The flags of docker-proxy, in the syntax of Go's `flag` package.
//!
//! They are not parsed by clap: a flag has one dash or two, its value follows `=` or a space, parsing stops
//! at the first positional argument, and a process per port has to start quickly.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::escape::escaped;

use crate::bind::interfaces::HostInterfaces;

/// Flags that only docker-proxy has. With one dash or two, they select this front end.
const DISTINCTIVE: [&str; 6] =
    ["host-ip", "host-port", "container-ip", "container-port", "use-listen-fd", "v"];

/// Flags that the standalone front end spells with two dashes. With one dash, they select this front end.
const ONE_DASH: [&str; 2] = ["proto", "version"];

/// Whether `args`, without the program's name, are those of docker-proxy: the first argument is a flag, as
/// Go's parser requires, and at least one flag only exists in docker-proxy.
pub fn is_docker_proxy_command(args: &[OsString]) -> bool {
    let starts_with_flag =
        args.first().and_then(|arg| arg.to_str()).is_some_and(|arg| flag_of(arg).is_some());
    let words = || args.iter().map_while(|arg| arg.to_str().filter(|arg| *arg != "--"));
    let is_standalone = |word: &str| matches!(word.split('=').next(), Some("--host" | "--to"));
    starts_with_flag && words().any(is_ours) && !words().any(is_standalone)
}

/// Whether an argument is a flag that the standalone front end does not have.
fn is_ours(word: &str) -> bool {
    let Some(flag) = word.strip_prefix('-') else {
        return false;
    };
    match flag.strip_prefix('-') {
        Some(flag) => DISTINCTIVE.contains(&name(flag)),
        None => DISTINCTIVE.contains(&name(flag)) || ONE_DASH.contains(&name(flag)),
    }
}

fn name(flag: &str) -> &str {
    flag.split_once('=').map_or(flag, |(name, _)| name)
}

/// The values of docker-proxy's flags, with its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flags {
    /// `-proto`
    pub proto: String,
    /// `-host-ip`
    pub host_ip: ScopedIp,
    /// `-host-port`; -1 if not given.
    pub host_port: i64,
    /// `-container-ip`
    pub container_ip: ScopedIp,
    /// `-container-port`; -1 if not given.
    pub container_port: i64,
    /// `-use-listen-fd`
    pub use_listen_fd: bool,
    /// `-v` or `-version`
    pub version: bool,
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            proto: "tcp".to_owned(),
            host_ip: ScopedIp::ANY_V4,
            host_port: -1,
            container_ip: ScopedIp::ANY_V4,
            container_port: -1,
            use_listen_fd: false,
            version: false,
        }
    }
}

impl Flags {
    /// Parses `args`, without the program's name.
    ///
    /// # Errors
    /// [`UsageError`]
    pub fn parse(args: &[OsString]) -> Result<Self, UsageError> {
        let mut flags = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.to_str().and_then(flag_of) else {
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            let next = || args.next().and_then(|value| value.to_str());
            flags.set(name, inline, next)?;
        }
        Ok(flags)
    }

    /// Sets one flag from the value after its `=`, or, unless it is a boolean, from `next`.
    fn set<'a>(
        &mut self,
        name: &str,
        inline: Option<&'a str>,
        next: impl FnOnce() -> Option<&'a str>,
    ) -> Result<(), UsageError> {
        let value = || inline.or_else(next).ok_or_else(|| UsageError::MissingValue(name.to_owned()));
        match name {
            "proto" => value()?.clone_into(&mut self.proto),
            "host-ip" => self.host_ip = parse_ip(name, value()?)?,
            "host-port" => self.host_port = parse_int(name, value()?)?,
            "container-ip" => self.container_ip = parse_ip(name, value()?)?,
            "container-port" => self.container_port = parse_int(name, value()?)?,
            "use-listen-fd" => self.use_listen_fd = parse_bool(name, inline)?,
            "v" | "version" => self.version = parse_bool(name, inline)?,
            "h" | "help" => return Err(UsageError::Help),
            _ => return Err(UsageError::Unknown(name.to_owned())),
        }
        Ok(())
    }
}

/// Returns the flag in `arg` without its dashes, or `None` where Go's parser stops.
fn flag_of(arg: &str) -> Option<&str> {
    let one = arg.strip_prefix('-').filter(|flag| !flag.is_empty())?;
    match one.strip_prefix('-') {
        Some("") => None,
        Some(two) => Some(two),
        None => Some(one),
    }
}

fn invalid(name: &str, value: &str, wanted: &'static str) -> UsageError {
    UsageError::Invalid { name: name.to_owned(), value: value.to_owned(), wanted }
}

/// Parses an address, as Go does, or a link-local one with its interface, which docker-proxy refuses.
fn parse_ip(name: &str, value: &str) -> Result<ScopedIp, UsageError> {
    let wrong = || invalid(name, value, "an IP address");
    match value.split_once('%') {
        Some((ip, _interface)) if ip.parse::<Ipv6Addr>().is_ok() => {
            ScopedIp::parse(value, &HostInterfaces).map_err(|_err| wrong())
        }
        _ => value.parse::<IpAddr>().map(ScopedIp::from).map_err(|_err| wrong()),
    }
}

/// Parses a decimal number, or one with Go's prefix for another base.
fn parse_int(name: &str, value: &str) -> Result<i64, UsageError> {
    let (sign, digits) = match value.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, value.strip_prefix('+').unwrap_or(value)),
    };
    let (base, digits) = match digits.get(..2) {
        Some("0x" | "0X") => (16, &digits[2..]),
        Some("0o" | "0O") => (8, &digits[2..]),
        Some("0b" | "0B") => (2, &digits[2..]),
        _ if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        _ => (10, digits),
    };
    i64::from_str_radix(digits, base)
        .ok()
        .filter(|_| digits.starts_with(|c: char| c.is_ascii_alphanumeric()))
        .map(|number| sign * number)
        .ok_or_else(|| invalid(name, value, "a number"))
}

/// Parses a boolean. A flag without a value is true; a value is one of those of Go's `strconv.ParseBool`.
fn parse_bool(name: &str, inline: Option<&str>) -> Result<bool, UsageError> {
    match inline {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(invalid(name, value, "true or false")),
    }
}

/// An invalid command line; the message ends with the usage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageError {
    /// `-h`: not an error, but the output is the same.
    Help,
    /// A flag that does not exist.
    Unknown(String),
    /// The last flag lacks its value.
    MissingValue(String),
    /// A value of the wrong type.
    Invalid {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
        /// The expected type.
        wanted: &'static str,
    },
}

impl std::error::Error for UsageError {}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Help => Ok(()),
            Self::Unknown(name) => writeln!(f, "rproxy: -{}: there is no such flag", escaped(name)),
            Self::MissingValue(name) => writeln!(f, "rproxy: -{}: its value is missing", escaped(name)),
            Self::Invalid { name, value, wanted } => {
                writeln!(f, "rproxy: -{} {}: not {wanted}", escaped(name), escaped(value))
            }
        }?;
        f.write_str(USAGE)
    }
}

const USAGE: &str = "\
Usage of rproxy as docker-proxy:
  -container-ip IP      address of the container (default 0.0.0.0)
  -container-port PORT  port of the container
  -host-ip IP           address to listen on (default 0.0.0.0)
  -host-port PORT       port to listen on
  -proto tcp|udp        protocol (default tcp)
  -use-listen-fd        serve the listening socket passed at descriptor 4
  -v, -version          print version information and quit";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn args(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn parse(line: &str) -> Result<Flags, UsageError> {
        Flags::parse(&args(line))
    }

    #[test]
    fn the_command_lines_of_dockerd_are_understood_in_every_spelling() {
        let wanted = Flags {
            proto: "tcp".to_owned(),
            host_ip: "10.0.0.11".parse().unwrap(),
            host_port: 8080,
            container_ip: "172.17.0.2".parse().unwrap(),
            container_port: 80,
            use_listen_fd: true,
            version: false,
        };
        for line in [
            "-proto tcp -host-ip 10.0.0.11 -host-port 8080 -container-ip 172.17.0.2 -container-port 80 -use-listen-fd",
            "--host-ip=10.0.0.11 --host-port 8080 -container-ip=172.17.0.2 --container-port=80 -use-listen-fd=true",
            "-host-ip 10.0.0.11 -host-port 0x1f90 -container-ip 172.17.0.2 -container-port 0120 -use-listen-fd=1",
            "-use-listen-fd -host-port=8080 -host-ip 10.0.0.11 -container-ip 172.17.0.2 -container-port 80 stop -bogus",
        ] {
            assert_eq!(parse(line).as_ref(), Ok(&wanted), "{line}");
        }
    }

    #[test]
    fn flags_and_not_the_name_choose_this_front_end() {
        for line in [
            "-proto tcp",
            "-host-ip=::1",
            "--container-port 80",
            "-v",
            "--v",
            "-version",
            "-use-listen-fd",
            "-proto=sctp -bogus",
        ] {
            assert!(is_docker_proxy_command(&args(line)), "{line}");
        }
        for line in [
            "",
            "--host 0.0.0.0:80 --to 172.17.0.2:80 --proto tcp",
            "demo",
            "-V",
            "--version",
            "-h",
            "-- -proto",
            "--host 0.0.0.0:80 --to 172.17.0.2:80 -v",
        ] {
            assert!(!is_docker_proxy_command(&args(line)), "{line}");
        }
    }

    #[test]
    fn wrong_flags_are_named() {
        assert_eq!(parse("-bogus"), Err(UsageError::Unknown("bogus".to_owned())));
        assert_eq!(parse("-host-ip"), Err(UsageError::MissingValue("host-ip".to_owned())));
        assert_eq!(parse("-h"), Err(UsageError::Help));
        for line in [
            "-host-ip nowhere",
            "-host-port http",
            "-host-port -",
            "-host-port --1",
            "-use-listen-fd=maybe",
            "-host-port 0x",
        ] {
            assert!(matches!(parse(line), Err(UsageError::Invalid { .. })), "{line}");
        }
    }

    #[test]
    fn parsing_stops_where_go_stops() {
        for line in ["- -bogus", "-- -bogus", "word -bogus", "-use-listen-fd false -bogus"] {
            assert!(parse(line).is_ok(), "{line}");
        }
        assert!(parse("-use-listen-fd false").unwrap().use_listen_fd);
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(words in prop::collection::vec("-{0,3}[a-z=0-9.:-]{0,12}", 0..6)) {
            let words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
            let _docker = is_docker_proxy_command(&words);
            if let Err(error) = Flags::parse(&words) {
                prop_assert!(error.to_string().ends_with(USAGE));
            }
        }
    }
}
