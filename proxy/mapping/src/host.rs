//! Where a mapping listens: at an address, at those that an interface has, or at a Unix socket.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::addr::{AddrError, Protocols, ScopedIp};
use crate::escape::needs_no_quotes;
use crate::interfaces::{Interfaces, NoInterfaces};
use crate::unix::{self, UnixAddr};

/// The most bytes of the name of an interface (`IFNAMSIZ` without the final zero, netdevice(7)).
const LONGEST: usize = 15;

/// What every resolver takes for an address, and nobody for an interface.
const LOCALHOST: &str = "localhost";

/// The name of a network interface, in letters, digits and what needs no quotes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceName {
    /// The bytes of the name, and zeros.
    bytes: [u8; LONGEST],
    length: u8,
}

impl InterfaceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl FromStr for InterfaceName {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let wrong = || AddrError::BadInterface(text.to_owned());
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+%#@-".contains(&byte);
        if matches!(text, "" | "." | "..") || text.len() > LONGEST || !text.bytes().all(is_plain) {
            return Err(wrong());
        }
        let mut bytes = [0; LONGEST];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, length: u8::try_from(text.len()).map_err(|_too_long| wrong())? })
    }
}

/// The host of a mapping, as asked for.
///
/// Its text forms are those of [`ScopedIp`], `%eth0` for an interface, or `eth0` where that cannot be anything else, and
/// `unix:/run/front.sock`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostAddr {
    /// An address.
    Ip(ScopedIp),
    /// All addresses that an interface has at a time.
    Interface(InterfaceName),
    /// A Unix socket, which has no ports.
    Unix(UnixAddr),
}

impl HostAddr {
    /// Parses any of the text forms. The interfaces of link-local addresses are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`AddrError`], which names the part at fault.
    pub fn parse(text: &str, interfaces: &dyn Interfaces) -> Result<Self, AddrError> {
        if let Some(name) = text.strip_prefix('%') {
            return name.parse().map(Self::Interface);
        }
        if text.starts_with(unix::PREFIX) {
            return parse_unix(text).map(Self::Unix);
        }
        if let Ok(bare) = text.parse::<UnixAddr>() {
            return Err(AddrError::BareUnix(bare.bare().to_owned()));
        }
        match ScopedIp::parse(text, interfaces) {
            Err(AddrError::BadAddress(_)) if is_clearly_interface(text) => text.parse().map(Self::Interface),
            Err(AddrError::BadAddress(bare)) => Err(match perhaps_interface(&bare) {
                Some(name) => AddrError::PerhapsInterface(bare, name.to_string()),
                None => AddrError::BadAddress(bare),
            }),
            parsed => parsed.map(Self::Ip),
        }
    }

    /// The address, if it is one.
    pub fn ip(&self) -> Option<ScopedIp> {
        match self {
            Self::Ip(ip) => Some(*ip),
            Self::Interface(_) | Self::Unix(_) => None,
        }
    }

    /// The interface, if it is one.
    pub fn interface(&self) -> Option<InterfaceName> {
        match self {
            Self::Interface(name) => Some(*name),
            Self::Ip(_) | Self::Unix(_) => None,
        }
    }

    /// The Unix socket, if it is one.
    pub fn unix_addr(&self) -> Option<&UnixAddr> {
        match self {
            Self::Unix(addr) => Some(addr),
            Self::Ip(_) | Self::Interface(_) => None,
        }
    }

    /// Whether it is all addresses, of one family or of both.
    pub fn is_wildcard(&self) -> bool {
        self.ip().is_some_and(ScopedIp::is_wildcard)
    }

    /// Refuses an address that clients cannot connect to; see [`ScopedIp::ensure_connectable`].
    ///
    /// # Errors
    /// [`AddrError::NoClient`]
    pub fn ensure_connectable(&self, protocols: Protocols) -> Result<(), AddrError> {
        self.ip().map_or(Ok(()), |ip| ip.ensure_connectable(protocols))
    }
}

/// Parses a Unix socket to listen on, of which a mapping can have its name.
fn parse_unix(text: &str) -> Result<UnixAddr, AddrError> {
    let addr: UnixAddr = text.parse()?;
    if needs_no_quotes(&addr.to_string()) { Ok(addr) } else { Err(AddrError::UnixHost(addr)) }
}

/// Whether a text without `%` is meant as an interface: `eth0`, `br-lan`, `eth0.100`, but neither `10.0.0.256` nor
/// `web.internal`, a host name, which cannot be listened at.
fn is_clearly_interface(text: &str) -> bool {
    let has_letter = text.bytes().any(|byte| byte.is_ascii_alphabetic());
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let is_host_name = text.rsplit_once('.').is_some_and(|(_rest, last)| !is_number(last));
    has_letter && !is_host_name && text != LOCALHOST && text.parse::<InterfaceName>().is_ok()
}

/// The interface that a text may be meant as: `web.internal`, `%eth0` in brackets, `eth0:1`, a label of an address.
fn perhaps_interface(text: &str) -> Option<InterfaceName> {
    let name = text.strip_prefix('%').unwrap_or(text);
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let name =
        name.split_once(':').filter(|(_name, label)| is_number(label)).map_or(name, |(name, _label)| name);
    let is_likely = name.starts_with(|first: char| first.is_ascii_alphabetic()) && name != LOCALHOST;
    name.parse().ok().filter(|_name| is_likely)
}

impl From<ScopedIp> for HostAddr {
    fn from(ip: ScopedIp) -> Self {
        Self::Ip(ip)
    }
}

impl PartialEq<ScopedIp> for HostAddr {
    fn eq(&self, ip: &ScopedIp) -> bool {
        *self == Self::Ip(*ip)
    }
}

impl fmt::Display for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Interface(name) => write!(f, "%{name}"),
            Self::Unix(addr) => addr.fmt(f),
        }
    }
}

/// Parses what [`Display`](fmt::Display) writes, with the interfaces of link-local addresses as indexes.
/// [`HostAddr::parse`] also accepts their names.
impl FromStr for HostAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        Self::parse(text, &NoInterfaces)
    }
}

/// The addresses of an interface that a mapping listens at.
///
/// All are equal: what an interface has is looked up, and not part of what somebody has asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct InterfaceAddrs(pub(crate) Arc<[ScopedIp]>);

impl PartialEq for InterfaceAddrs {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for InterfaceAddrs {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::TwoInterfaces;

    fn parse(text: &str) -> Result<String, String> {
        let parsed = HostAddr::parse(text, &TwoInterfaces);
        parsed
            .map(|host| format!("{}{host}", host.interface().map_or("", |_| "interface ")))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_interface_is_told_from_an_address() {
        for (text, expected) in [
            ("%eth0", "interface %eth0"),
            ("eth0", "interface %eth0"),
            ("eth0.100", "interface %eth0.100"),
            ("br-lan", "interface %br-lan"),
            ("%lo", "interface %lo"),
            ("%80", "interface %80"),
            ("%web.internal", "interface %web.internal"),
            ("%localhost", "interface %localhost"),
            ("abcdefghijklmno", "interface %abcdefghijklmno"),
            ("10.0.0.11", "10.0.0.11"),
            ("fe80::1%eth0", "[fe80::1%2]"),
            ("unix:/run/front.sock", "unix:/run/front.sock"),
            ("unix:///run/front.sock", "unix:/run/front.sock"),
            ("unix:@front", "unix:@front"),
            ("[::]", "[::]"),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_neither_is_refused_as_what_it_seems_to_be() {
        for (text, part) in [
            ("localhost", "'localhost' is not an IP address"),
            ("web.internal", "'web.internal' is not an IP address"),
            ("10.0.0.256", "'10.0.0.256' is not an IP address"),
            ("80", "'80' is not an IP address"),
            ("[eth0]", "'eth0' is not an IP address"),
            ("[%eth0]", "or %eth0 for those of an interface"),
            ("eth0.web", "or %eth0.web for those of an interface"),
            ("eth0:1", "or %eth0 for those of an interface"),
            ("localhost", "or [::1]"),
            ("abcdefghijklmnop", "is not an IP address"),
            ("%", "'' is not the name of an interface"),
            ("%..", "'..' is not the name of an interface"),
            ("%a/b", "'a/b' is not the name"),
            ("%a b", "'a b' is not the name"),
            ("%abcdefghijklmnop", "at most 15"),
            ("unix:front.sock", "write unix:/run/app.sock"),
            ("unix:/run/käse.sock", "to listen on 'unix:/run/käse.sock', write its path in letters"),
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        for text in ["%eth0", "%80", "[fe80::1%2]", "0.0.0.0", "unix:/run/a:80"] {
            assert_eq!(text.parse::<HostAddr>().unwrap().to_string(), text);
        }
    }
}
