//! The syntax of `-p` in Docker's command line: `[[ADDRESS:][HOST_PORTS]:]PORTS[/PROTOCOL]`.

use std::fmt;
use std::str::FromStr;

use crate::addr::{AddrError, Protocol, ProtocolError, Protocols, ScopedIp};
use crate::backend::BackendHost;
use crate::host::HostAddr;
use crate::interfaces::{Interfaces, NoInterfaces};
use crate::ports::{PortError, PortRange};
use crate::{HostPorts, Mapping, MappingError, refuse_at_unix, unix};

/// Backend ports, and where to publish them on this machine.
///
/// The forms are those of `docker run --publish` (docker/go-connections, `nat/parse.go`): `80`,
/// `8080:80`, `10.0.0.11:8080:80`, `10.0.0.11::80`, `[::1]:8080:80`, each port also as a range, each form
/// with `/udp`, `/sctp`, `/tcp+udp` or the older `:udp`; and `unix:/run/front.sock:80`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishSpec {
    /// The address that clients connect to, or the interface; `None` for every address of the machine.
    pub host: Option<HostAddr>,
    /// The ports that clients connect to.
    pub host_ports: HostPorts,
    /// The ports of the backend.
    pub ports: PortRange,
    /// The transport protocols, the same for host and backend.
    pub protocols: Protocols,
}

impl PublishSpec {
    /// The mapping of these ports to `backend`, with `everywhere` as the default host address.
    ///
    /// # Errors
    /// Those of [`Mapping::new`].
    pub fn to(self, backend: BackendHost, everywhere: ScopedIp) -> Result<Mapping, MappingError> {
        let host = (self.host.unwrap_or(everywhere.into()), self.host_ports.range());
        Mapping::new(self.protocols, host, (backend, self.ports))
    }

    /// Parses any of the text forms. Interfaces are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`SpecError`], which names the part at fault.
    pub fn parse(spec: &str, interfaces: &dyn Interfaces) -> Result<Self, SpecError> {
        if spec.starts_with(unix::PREFIX) {
            return Self::parse_at_unix(spec, interfaces);
        }
        let (rest, protocols) = split_protocols(spec)?;
        let (address, rest) = split_address(rest)?;
        let host = address.map(|address| HostAddr::parse(address, interfaces)).transpose();
        let host = host.map_err(|error| error.before_ports(&format!("{rest}/{protocols}")))?;
        host.as_ref().map_or(Ok(()), |host| host.ensure_connectable(protocols))?;
        let (host_ports, ports) = match (rest.rsplit_once(':'), &host) {
            (Some((host_ports, ports)), _) => (host_ports, ports),
            (None, None) => ("", rest),
            (None, Some(host)) => return Err(no_host_port(host, rest, protocols)),
        };
        if let (None, Some(host)) = (&host, clearly_address(host_ports)) {
            host.ensure_connectable(protocols)?;
            return Err(no_host_port(&host, ports, protocols));
        }
        // Docker also treats 0 as a random port.
        let is_random = matches!(host_ports, "" | "0");
        let host_ports = if is_random { None } else { Some(host_ports.parse()?) };
        let ports = ports.parse()?;
        Ok(Self { host, host_ports: HostPorts::new(host_ports, ports)?, ports, protocols })
    }

    /// Parses `unix:/run/front.sock:80/tcp`. The port is behind the last colon, because a path may contain some.
    fn parse_at_unix(spec: &str, interfaces: &dyn Interfaces) -> Result<Self, SpecError> {
        let no_port = || SpecError::NoPort(spec.to_owned());
        let (host, rest) = spec[unix::PREFIX.len()..].rsplit_once(':').ok_or_else(no_port)?;
        let (ports, protocols) = split_protocols(rest)?;
        let host = HostAddr::parse(&format!("{}{host}", unix::PREFIX), interfaces)?;
        let (host_ports, ports) = (HostPorts::Exactly(PortRange::OF_UNIX), ports.parse()?);
        refuse_at_unix(protocols, host_ports.range(), ports)?;
        Ok(Self { host: Some(host), host_ports, ports, protocols })
    }
}

/// Writes the protocol and host port explicitly, so that the text can be parsed again.
impl fmt::Display for PublishSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, host_ports, ports, protocols } = self;
        if let Some(host) = host {
            write!(f, "{host}:")?;
        }
        match (host, host_ports.range()) {
            (Some(HostAddr::Unix(_)), _) => {}
            (_, Some(host_ports)) => write!(f, "{host_ports}:")?,
            (Some(_), None) => f.write_str(":")?,
            (None, None) => {}
        }
        write!(f, "{ports}/{protocols}")
    }
}

/// Parses what [`Display`](fmt::Display) writes, with interfaces as indexes. [`PublishSpec::parse`] also accepts their
/// names.
impl FromStr for PublishSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        Self::parse(spec, &NoInterfaces)
    }
}

/// An address, or an interface with its `%`, where a port is expected.
fn clearly_address(text: &str) -> Option<HostAddr> {
    let host: HostAddr = text.parse().ok()?;
    (host.interface().is_none() || text.starts_with('%')).then_some(host)
}

/// The error for an address with only one port, or the error of that port.
fn no_host_port(address: &HostAddr, ports: &str, protocols: Protocols) -> SpecError {
    match ports.parse() {
        Ok(ports) => SpecError::NoHostPort { address: address.clone(), ports, protocols },
        Err(error) => SpecError::Port(error),
    }
}

/// Why a host is not followed by one port, and what works: an interface has no random ports.
fn three_parts(host: &HostAddr, ports: PortRange, protocols: Protocols) -> String {
    let same = format!("{host}:{ports}:{ports}/{protocols}");
    if host.interface().is_some() {
        return format!(
            "{host} is an interface, so there are three parts; write {same} for the same host port"
        );
    }
    format!(
        "{host} is an address, so there are three parts; write {host}::{ports}/{protocols} for a random host port, \
         {same} for the same one"
    )
}

/// A backend port that `-P` publishes: `80`, `53/udp`, `8000-8010/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExposedPorts {
    /// The ports.
    pub ports: PortRange,
    /// Their transport protocols.
    pub protocols: Protocols,
}

impl ExposedPorts {
    /// Publishes these ports at random ports of every address.
    pub fn at_random(self) -> PublishSpec {
        let Self { ports, protocols } = self;
        PublishSpec { host: None, host_ports: HostPorts::Random, ports, protocols }
    }
}

impl FromStr for ExposedPorts {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (ports, protocols) = split_protocols(text)?;
        Ok(Self { ports: ports.parse()?, protocols })
    }
}

/// Splits off the protocol: after the last slash, or after the last colon if it is a word.
fn split_protocols(spec: &str) -> Result<(&str, Protocols), SpecError> {
    let is_word = |text: &str| text.starts_with(|first: char| first.is_ascii_alphabetic());
    let (spec, slashed) = spec.rsplit_once('/').map_or((spec, None), |(rest, word)| (rest, Some(word)));
    let coloned = spec.rsplit_once(':').filter(|(_rest, word)| is_word(word) && !word.ends_with(']'));
    let (spec, coloned) = coloned.map_or((spec, None), |(rest, word)| (rest, Some(word)));
    let parse = |word: &str| word.to_ascii_lowercase().parse::<Protocols>();
    let protocols = match (slashed.map(parse).transpose()?, coloned.map(parse).transpose()?) {
        (Some(one), Some(other)) if one != other => return Err(SpecError::TwoProtocols(other, one)),
        (one, other) => one.or(other).unwrap_or(Protocols::One(Protocol::Tcp)),
    };
    Ok((spec, protocols))
}

/// Splits off a leading address: in brackets, or the first of three parts.
fn split_address(spec: &str) -> Result<(Option<&str>, &str), SpecError> {
    if spec.starts_with('[') {
        let end = spec.find(']').ok_or_else(|| SpecError::NoBracket(spec.to_owned()))?;
        let (address, rest) = spec.split_at(end + 1);
        let rest = rest.strip_prefix(':').filter(|rest| !rest.is_empty());
        return Ok((Some(address), rest.ok_or(SpecError::Shape)?));
    }
    match spec.matches(':').count() {
        0 | 1 => Ok((None, spec)),
        2 => Ok(spec.split_once(':').map_or((None, spec), |(address, rest)| (Some(address), rest))),
        _ => Err(SpecError::Unbracketed),
    }
}

/// Why a text is not a publish specification. The message suggests a valid form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A part is not a port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A part is not an address.
    #[error(transparent)]
    Address(#[from] AddrError),
    /// The ranges have different lengths.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The last part is not a protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// One protocol after a colon, and another one after a slash.
    #[error("it says both {0} and {1}; write one of them, or tcp+udp")]
    TwoProtocols(Protocols, Protocols),
    /// An address and one port, which could be the host's or the backend's.
    #[error("{}", three_parts(address, *ports, *protocols))]
    NoHostPort {
        /// The address, or the interface.
        address: HostAddr,
        /// The port after it.
        ports: PortRange,
        /// The protocols.
        protocols: Protocols,
    },
    /// A Unix socket without a port.
    #[error("which port of the backend? write it behind the Unix socket, as in {0}:80")]
    NoPort(String),
    /// The opening bracket of an IPv6 address has no closing one.
    #[error("'{0}' has no closing bracket; write an IPv6 address as in [::1]:8080:80")]
    NoBracket(String),
    /// Too many colons.
    #[error(
        "too many parts; an address, a host port and a port are the most, and an IPv6 address needs brackets, as in [::1]:8080:80"
    )]
    Unbracketed,
    /// Another error.
    #[error("not something to publish; write [[ADDRESS:][HOST_PORT]:]PORT[/PROTOCOL], as in 8080:80/tcp")]
    Shape,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::interfaces::TwoInterfaces;

    fn spec(text: &str) -> Result<String, String> {
        PublishSpec::parse(text, &TwoInterfaces)
            .map(|spec| spec.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_is_read() {
        for (text, expected) in [
            ("80", "80/tcp"),
            (":80", "80/tcp"),
            ("0:80", "80/tcp"),
            ("80/udp", "80/udp"),
            ("80:udp", "80/udp"),
            ("8080:80", "8080:80/tcp"),
            ("8080:80/tcp", "8080:80/tcp"),
            ("8080:80/UDP", "8080:80/udp"),
            ("53:53:udp", "53:53/udp"),
            ("53:53:udp/udp", "53:53/udp"),
            ("53:53/tcp+udp", "53:53/tcp+udp"),
            ("80:80/sctp", "80:80/sctp"),
            ("10.0.0.11:8080:80", "10.0.0.11:8080:80/tcp"),
            ("10.0.0.11::80", "10.0.0.11::80/tcp"),
            ("10.0.0.11:0:80", "10.0.0.11::80/tcp"),
            ("10.0.0.11::80:udp", "10.0.0.11::80/udp"),
            ("0.0.0.0:81:80:udp", "0.0.0.0:81:80/udp"),
            ("[::]:8080:80", "[::]:8080:80/tcp"),
            ("[::1]:8080:80", "[::1]:8080:80/tcp"),
            ("[::ffff:10.0.0.11]:8080:80", "10.0.0.11:8080:80/tcp"),
            ("[fe80::1%lo]::80/udp", "[fe80::1%1]::80/udp"),
            ("8000-8010:80-90", "8000-8010:80-90/tcp"),
            ("8000-8010:80", "8000-8010:80/tcp"),
            ("8000-8010", "8000-8010/tcp"),
            ("%eth0:8080:80", "%eth0:8080:80/tcp"),
            ("unix:/run/front.sock:80", "unix:/run/front.sock:80/tcp"),
            ("unix:/run/a:1/b:80/tcp", "unix:/run/a:1/b:80/tcp"),
            ("unix:@front:80", "unix:@front:80/tcp"),
            ("eth0:8000-8001:80-81/udp", "%eth0:8000-8001:80-81/udp"),
        ] {
            assert_eq!(spec(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_a_way_out() {
        for (text, part) in [
            ("", "'' is not a port"),
            ("http:80", "'http' is not a port"),
            ("80:", "'' is not a port"),
            ("80:0", "'0' is not a port"),
            ("80:65536", "'65536' is not a port"),
            ("+80:80", "'+80' is not a port"),
            ("90-80:90-80", "write 80-90"),
            (
                "8000-8010:80-81",
                "11 host ports (8000-8010) do not fit 2 backend ports (80-81); make both ranges",
            ),
            ("8000:80-81", "1 host ports (8000) do not fit 2"),
            ("224.0.0.1:80:80", "to which no client can connect"),
            ("[ff02::1%eth0]:80:80/tcp+udp", "to which no client can connect"),
            ("255.255.255.255:80:80", "to which no client can connect"),
            ("80/", "'' is not a protocol"),
            ("80/dccp", "'dccp' is not a protocol that is relayed"),
            ("80:80:dccp", "'dccp' is not a protocol"),
            ("80:80:tcp/udp", "both tcp and udp; write one of them, or tcp+udp"),
            ("10.0.0.11:80", "write 10.0.0.11::80/tcp for a random host port"),
            ("[::1]:80", "write [::1]::80/tcp for a random host port, [::1]:80:80/tcp for"),
            ("[::1]:53/udp", "write [::1]::53/udp for a random host port, [::1]:53:53/udp for"),
            ("10.0.0.11:53/tcp+udp", "write 10.0.0.11::53/tcp+udp for"),
            ("10.0.0.11:http", "'http' is not a protocol"),
            ("[zz]:80", "'zz' is not an IP address"),
            ("[fe80::1]:80", "on which interface? write [fe80::1%eth0]:80/tcp;"),
            ("224.0.0.1:80", "to which no client can connect"),
            ("10.0.0.256:80:80", "'10.0.0.256' is not an IP address"),
            ("localhost:80:80", "'localhost' is not an IP address"),
            ("[zz]:80:80", "'zz' is not an IP address"),
            ("[fe80::1]:80:80", "on which interface? write [fe80::1%eth0]:80:80/tcp;"),
            ("[fe80::1]::80/udp", "write [fe80::1%eth0]::80/udp;"),
            ("[::1:80:80", "no closing bracket"),
            ("%eth0:80", "%eth0 is an interface, so there are three parts; write %eth0:80:80/tcp for"),
            ("eth0:80", "'eth0' is not a port"),
            ("%a/b:80:80", "'b:80:80' is not a protocol"),
            ("[::1]80", "write [[ADDRESS:]"),
            ("unix:/run/front.sock", "as in unix:/run/front.sock:80"),
            ("unix:/run/front.sock:80/udp", "only tcp can be relayed to or from a Unix socket"),
            ("unix:/run/front.sock:80-81", "stands for one port of the backend, and not for 80-81"),
            ("unix:front.sock:80", "write unix:/run/app.sock"),
            ("[::1]:", "write [[ADDRESS:]"),
            ("::1:80:80", "needs brackets"),
        ] {
            let message = spec(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn what_is_exposed_has_no_host_port() {
        let spec = |text: &str| text.parse::<ExposedPorts>().map(|exposed| exposed.at_random().to_string());
        assert_eq!(spec("80"), Ok("80/tcp".to_owned()));
        assert_eq!(spec("8000-8010/udp"), Ok("8000-8010/udp".to_owned()));
        assert!(spec("8080:80").unwrap_err().to_string().contains("'8080:80' is not a port"));
    }

    fn any_spec() -> impl Strategy<Value = PublishSpec> {
        let hosts = vec!["[::]", "0.0.0.0", "10.0.0.11", "[::1]", "[fe80::1%1]", "%eth0"];
        let host = proptest::option::of(proptest::sample::select(hosts));
        let range = (1..=u16::MAX, 0..20_u16)
            .prop_map(|(first, more)| PortRange::new(first, first.saturating_add(more)).unwrap());
        let protocols = proptest::sample::select(vec!["tcp", "udp", "sctp", "tcp+udp"]);
        let spec = (host, proptest::option::of(range.clone()), range, protocols);
        spec.prop_filter_map("ranges fit", |(host, host_ports, ports, protocols)| {
            Some(PublishSpec {
                host: host.map(|host| host.parse().unwrap()),
                host_ports: HostPorts::new(host_ports, ports).ok()?,
                ports,
                protocols: protocols.parse().unwrap(),
            })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read_again(spec in any_spec()) {
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn no_text_does_harm(text in "[0-9a-z:/\\[\\].%+*-]{0,24}") {
            if let Ok(spec) = text.parse::<PublishSpec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}
