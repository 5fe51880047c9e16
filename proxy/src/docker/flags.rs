//! The flags of docker-proxy: which command lines are meant for this front end, and what is said about wrong ones.
//!
//! They are not parsed by clap, as their syntax is that of Go, and a process per port has to start quickly; see
//! [`rproxy_shim::flags`], which the shim uses, too.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use rproxy_mapping::escape::escaped;
use rproxy_mapping::interfaces::Interfaces;
use rproxy_shim::flags::{FlagError, Flags, flag_of};

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

/// Parses `args`, without the program's name. Zones are network interfaces of this machine.
///
/// # Errors
/// [`UsageError`]
pub fn parse(args: &[OsString]) -> Result<Flags<'_>, UsageError<'_>> {
    let args = args.iter().map(|arg| arg.as_bytes());
    Flags::parse(args, |interface| HostInterfaces.index_of(interface)).map_err(UsageError)
}

/// An invalid command line; the message ends with the usage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError<'a>(FlagError<'a>);

impl UsageError<'_> {
    /// Whether it is a request for help: not an error, but the output is the same.
    pub fn is_help(&self) -> bool {
        self.0 == FlagError::Help
    }
}

impl std::error::Error for UsageError<'_> {}

impl fmt::Display for UsageError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            FlagError::Help => Ok(()),
            FlagError::Unknown(name) => writeln!(f, "rproxy: -{}: there is no such flag", escaped(name)),
            FlagError::MissingValue(name) => writeln!(f, "rproxy: -{}: its value is missing", escaped(name)),
            FlagError::Invalid { name, value, wanted } => {
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
  -proto tcp|udp|sctp   protocol (default tcp)
  -use-listen-fd        serve the listening socket passed at descriptor 4
  -v, -version          print version information and quit";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn args(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
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
    fn wrong_flags_are_named_before_the_usage() {
        for (line, text) in [
            ("-bogus", "rproxy: -bogus: there is no such flag\n"),
            ("-host-ip", "rproxy: -host-ip: its value is missing\n"),
            ("-host-port http", "rproxy: -host-port http: not a number\n"),
            ("-host-ip fe80::1%nosuchif", "rproxy: -host-ip fe80::1%nosuchif: not an IP address\n"),
            ("-use-listen-fd=maybe", "rproxy: -use-listen-fd maybe: not true or false\n"),
            ("-h", ""),
        ] {
            let args = args(line);
            let error = parse(&args).unwrap_err();
            assert_eq!(error.to_string(), format!("{text}{USAGE}"), "{line}");
            assert_eq!(error.is_help(), line == "-h");
        }
    }

    #[test]
    fn interfaces_are_those_of_this_machine() {
        for zone in ["lo", "1"] {
            let args = args(&format!("-host-ip fe80::1%{zone}"));
            assert_eq!(parse(&args).unwrap().host_ip.at(80), "[fe80::1%1]:80".parse().unwrap());
        }
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(words in prop::collection::vec("-{0,3}[a-z=0-9.:-]{0,12}", 0..6)) {
            let words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
            let _docker = is_docker_proxy_command(&words);
            if let Err(error) = parse(&words) {
                prop_assert!(error.to_string().ends_with(USAGE));
            }
        }
    }
}
