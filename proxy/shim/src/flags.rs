//! The flags of docker-proxy, in the syntax of Go's `flag` package.
//!
//! A flag has one dash or two, its value follows `=` or a space, and parsing stops at the first positional argument.
//! Nothing is allocated: texts are parts of the arguments.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The values of docker-proxy's flags, with its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flags<'a> {
    /// `-proto`
    pub proto: &'a str,
    /// `-host-ip`
    pub host_ip: FlagIp,
    /// `-host-port`; -1 if not given.
    pub host_port: i64,
    /// `-container-ip`
    pub container_ip: FlagIp,
    /// `-container-port`; -1 if not given.
    pub container_port: i64,
    /// `-use-listen-fd`
    pub use_listen_fd: bool,
    /// `-v` or `-version`
    pub version: bool,
    /// The number of arguments that are flags or their values; another flag can be inserted after them.
    pub count: usize,
}

impl Default for Flags<'_> {
    fn default() -> Self {
        Self {
            proto: "tcp",
            host_ip: FlagIp::ANY_V4,
            host_port: -1,
            container_ip: FlagIp::ANY_V4,
            container_port: -1,
            use_listen_fd: false,
            version: false,
            count: 0,
        }
    }
}

/// An IP address, and the index of its interface, or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlagIp {
    ip: IpAddr,
    scope: u32,
}

impl FlagIp {
    const ANY_V4: Self = Self { ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), scope: 0 };

    /// The socket address of this address and `port`. An IPv4-mapped address becomes the IPv4 address.
    pub fn at(self, port: u16) -> SocketAddr {
        match self.ip.to_canonical() {
            IpAddr::V4(ip) => SocketAddr::new(ip.into(), port),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, self.scope).into(),
        }
    }
}

/// Why a command line is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagError<'a> {
    /// `-h`: not an error, but the output is the same.
    Help,
    /// A flag that does not exist.
    Unknown(&'a str),
    /// The last flag lacks its value.
    MissingValue(&'a str),
    /// A value of the wrong type.
    Invalid {
        /// The flag.
        name: &'a str,
        /// What was given.
        value: &'a str,
        /// The expected type.
        wanted: &'static str,
    },
}

impl<'a> Flags<'a> {
    /// Parses `args`, without the program's name. `index_of` finds a network interface by its name.
    ///
    /// # Errors
    /// [`FlagError`]
    pub fn parse(
        args: impl IntoIterator<Item = &'a [u8]>,
        index_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<Self, FlagError<'a>> {
        let mut flags = Self::default();
        let mut args = args.into_iter().map(|arg| str::from_utf8(arg).ok());
        while let Some(arg) = args.next() {
            let Some(flag) = arg.and_then(flag_of) else {
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            flags.count += 1;
            let mut used = 0;
            let next = || {
                used = 1;
                args.next().flatten()
            };
            flags.set(name, inline, next, &index_of)?;
            flags.count += used;
        }
        Ok(flags)
    }

    /// Sets one flag from the value after its `=`, or, unless it is a boolean, from `next`.
    fn set(
        &mut self,
        name: &'a str,
        inline: Option<&'a str>,
        next: impl FnOnce() -> Option<&'a str>,
        index_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<(), FlagError<'a>> {
        let value = || inline.or_else(next).ok_or(FlagError::MissingValue(name));
        match name {
            "proto" => self.proto = value()?,
            "host-ip" => self.host_ip = parse_ip(name, value()?, index_of)?,
            "host-port" => self.host_port = parse_int(name, value()?)?,
            "container-ip" => self.container_ip = parse_ip(name, value()?, index_of)?,
            "container-port" => self.container_port = parse_int(name, value()?)?,
            "use-listen-fd" => self.use_listen_fd = parse_bool(name, inline)?,
            "v" | "version" => self.version = parse_bool(name, inline)?,
            "h" | "help" => return Err(FlagError::Help),
            _ => return Err(FlagError::Unknown(name)),
        }
        Ok(())
    }
}

/// Returns the flag in `arg` without its dashes, or `None` where Go's parser stops.
pub fn flag_of(arg: &str) -> Option<&str> {
    let one = arg.strip_prefix('-').filter(|flag| !flag.is_empty())?;
    match one.strip_prefix('-') {
        Some("") => None,
        Some(two) => Some(two),
        None => Some(one),
    }
}

/// Parses an address, as Go does, or a link-local one with its interface, which docker-proxy refuses.
fn parse_ip<'a>(
    name: &'a str,
    value: &'a str,
    index_of: impl Fn(&str) -> Option<u32>,
) -> Result<FlagIp, FlagError<'a>> {
    let wrong = FlagError::Invalid { name, value, wanted: "an IP address" };
    let scoped = value.split_once('%').and_then(|(ip, interface)| Some((ip.parse().ok()?, interface)));
    match scoped {
        Some((ip, interface)) => {
            let scope = scope_of(interface, index_of).ok_or(wrong)?;
            Ok(FlagIp { ip: Ipv6Addr::into(ip), scope })
        }
        None => value.parse().map(|ip| FlagIp { ip, scope: 0 }).map_err(|_err| wrong),
    }
}

/// The index of an interface that is given by its name or its index. A name may consist of digits.
fn scope_of(interface: &str, index_of: impl Fn(&str) -> Option<u32>) -> Option<u32> {
    let number =
        || interface.bytes().all(|byte| byte.is_ascii_digit()).then(|| interface.parse().ok()).flatten();
    index_of(interface).or_else(number).filter(|index| *index > 0)
}

/// Parses a decimal number, or one with Go's prefix for another base.
fn parse_int<'a>(name: &'a str, value: &'a str) -> Result<i64, FlagError<'a>> {
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
        .ok_or(FlagError::Invalid { name, value, wanted: "a number" })
}

/// Parses a boolean. A flag without a value is true; a value is one of those of Go's `strconv.ParseBool`.
fn parse_bool<'a>(name: &'a str, inline: Option<&'a str>) -> Result<bool, FlagError<'a>> {
    match inline {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(FlagError::Invalid { name, value, wanted: "true or false" }),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::String;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Flags<'_>, FlagError<'_>> {
        let interface = |name: &str| (name == "eth0").then_some(2);
        Flags::parse(line.split_whitespace().map(str::as_bytes), interface)
    }

    fn ip(text: &str) -> FlagIp {
        FlagIp { ip: text.parse().unwrap(), scope: 0 }
    }

    #[test]
    fn the_command_lines_of_dockerd_are_understood_in_every_spelling() {
        let wanted = |count| Flags {
            proto: "tcp",
            host_ip: ip("10.0.0.11"),
            host_port: 8080,
            container_ip: ip("172.17.0.2"),
            container_port: 80,
            use_listen_fd: true,
            version: false,
            count,
        };
        for (count, line) in [
            (
                11,
                "-proto tcp -host-ip 10.0.0.11 -host-port 8080 -container-ip 172.17.0.2 -container-port 80 -use-listen-fd",
            ),
            (
                6,
                "--host-ip=10.0.0.11 --host-port 8080 -container-ip=172.17.0.2 --container-port=80 -use-listen-fd=true",
            ),
            (
                9,
                "-host-ip 10.0.0.11 -host-port 0x1f90 -container-ip 172.17.0.2 -container-port 0120 -use-listen-fd=1",
            ),
            (
                8,
                "-use-listen-fd -host-port=8080 -host-ip 10.0.0.11 -container-ip 172.17.0.2 -container-port 80 stop -bogus",
            ),
            (
                8,
                "-use-listen-fd -host-port=8080 -host-ip 10.0.0.11 -container-ip 172.17.0.2 -container-port 80 -- -bogus",
            ),
        ] {
            assert_eq!(parse(line), Ok(wanted(count)), "{line}");
        }
    }

    #[test]
    fn wrong_flags_are_named() {
        assert_eq!(parse("-bogus"), Err(FlagError::Unknown("bogus")));
        assert_eq!(parse("-host-ip"), Err(FlagError::MissingValue("host-ip")));
        assert_eq!(parse("-h"), Err(FlagError::Help));
        for line in [
            "-host-ip nowhere",
            "-host-ip 10.0.0.1%eth0",
            "-host-ip fe80::1%eth1",
            "-host-ip fe80::1%",
            "-host-ip fe80::1%0",
            "-host-port http",
            "-host-port -",
            "-host-port --1",
            "-use-listen-fd=maybe",
            "-host-port 0x",
        ] {
            assert!(matches!(parse(line), Err(FlagError::Invalid { .. })), "{line}");
        }
    }

    #[test]
    fn the_first_mistake_is_reported() {
        assert!(matches!(parse("-host-ip fe80::1%eth1 -bogus"), Err(FlagError::Invalid { .. })));
        assert_eq!(parse("-bogus -host-ip fe80::1%eth1"), Err(FlagError::Unknown("bogus")));
    }

    #[test]
    fn parsing_stops_where_go_stops() {
        for line in ["- -bogus", "-- -bogus", "word -bogus", "-use-listen-fd false -bogus"] {
            assert!(parse(line).is_ok(), "{line}");
        }
        assert!(parse("-use-listen-fd false").unwrap().use_listen_fd);
        let no_text: &[&[u8]] = &[b"-host-port", b"80", b"\xff", b"-bogus"];
        assert_eq!(Flags::parse(no_text.iter().copied(), |_name| None).unwrap().count, 2);
        let no_text: &[&[u8]] = &[b"-host-port", b"\xff"];
        let missing = Err(FlagError::MissingValue("host-port"));
        assert_eq!(Flags::parse(no_text.iter().copied(), |_name| None), missing);
    }

    #[test]
    fn addresses_have_their_interface_or_are_plain_ipv4() {
        for (text, addr) in [
            ("fe80::1%eth0", "[fe80::1%2]:80"),
            ("fe80::1%7", "[fe80::1%7]:80"),
            ("::ffff:192.0.2.1", "192.0.2.1:80"),
            ("::ffff:192.0.2.1%eth0", "192.0.2.1:80"),
            ("::", "[::]:80"),
        ] {
            let flags = ["-host-ip", text].map(str::as_bytes);
            let flags = Flags::parse(flags, |name| (name == "eth0").then_some(2)).unwrap();
            assert_eq!(flags.host_ip.at(80), addr.parse().unwrap(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(words in prop::collection::vec("-{0,3}[a-z=0-9.:%-]{0,12}", 0..6)) {
            if let Ok(flags) = Flags::parse(words.iter().map(String::as_bytes), |_name| None) {
                // What was parsed is all there is up to its end.
                let parsed: Vec<_> = words.iter().take(flags.count).collect();
                let again = Flags::parse(parsed.iter().map(|word| word.as_bytes()), |_name| None);
                prop_assert_eq!(again, Ok(flags));
            }
        }
    }
}
