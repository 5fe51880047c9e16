//! Whether what backends answer to the addresses of clients is delivered to this host.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use rproxy_mapping::interfaces::Interfaces;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::name::Name;
use rproxy_mapping::source::{Device, TRANSPARENT_MARK};
use rproxy_sys::route::{interface_towards, is_delivered};
use tracing::warn;

use super::interfaces::HostInterfaces;
use super::routes::scope_of;
use super::source::SourceError;
use crate::log::limit::LogLimit;

/// Clients that nobody has: addresses for documentation (RFC 5737, RFC 3849).
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The index of the loopback interface in each network namespace.
const LOOPBACK: u32 = 1;

/// The return path from a backend to clients, to be looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReturnPath {
    backend: SocketAddr,
    /// The interface that leads to it, if one was asked for.
    device: Option<Device>,
}

impl ReturnPath {
    /// The length of [`ReturnPath::to_bytes`].
    pub(crate) const BYTES: usize = 16 + 4 + 15;

    /// That of a mapping's backends, if they see clients. A mapping leads to one address.
    pub(crate) fn of(limits: &Limits, backend: SocketAddr) -> Option<Self> {
        limits.source.is_client().then(|| Self { backend, device: limits.device.clone() })
    }

    /// The name of the interface for which a command is missing, if one is. It takes netlink sockets, which a confined
    /// process does not have.
    ///
    /// # Errors
    /// Those of socket(2), and `ENETUNREACH` without a route to the backend.
    pub(crate) fn interface_without(&self) -> io::Result<Option<String>> {
        let interface = match &self.device {
            // Its absence is reported for each client.
            Some(device) => HostInterfaces.index_of(device.name()),
            None => match scope_of(self.backend) {
                Some(scope) => Some(scope),
                None => interface_towards(self.backend.ip())?,
            },
        };
        // A backend on this host does not see clients; that is reported for each.
        let Some(interface) = interface.filter(|index| *index != LOOPBACK) else { return Ok(None) };
        let client: IpAddr = if self.backend.is_ipv4() { CLIENT_V4.into() } else { CLIENT_V6.into() };
        if is_delivered(self.backend.ip(), client, interface, TRANSPARENT_MARK)? {
            return Ok(None);
        }
        Ok(Some(HostInterfaces.name_of(interface).unwrap_or_else(|| interface.to_string())))
    }

    /// For another process: the address (IPv4-mapped), its scope, and the name of the interface, padded with zeros.
    pub(crate) fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (ip, scope) = match self.backend {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
        };
        bytes[..16].copy_from_slice(&ip.octets());
        bytes[16..20].copy_from_slice(&scope.to_ne_bytes());
        let name = self.device.as_ref().map_or("", Device::name);
        bytes[20..20 + name.len()].copy_from_slice(name.as_bytes());
        bytes
    }

    /// What [`ReturnPath::to_bytes`] has returned. The port is lost; `None` if the name is none.
    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let (ip, rest) = bytes.split_first_chunk::<16>()?;
        let (scope, name) = rest.split_first_chunk::<4>()?;
        let v6 = Ipv6Addr::from(*ip);
        let backend = match v6.to_ipv4_mapped() {
            Some(v4) => (v4, 0).into(),
            None => SocketAddrV6::new(v6, 0, 0, u32::from_ne_bytes(*scope)).into(),
        };
        let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0');
        let device = (!name.is_empty()).then(|| name.parse()).transpose().ok()?;
        Some(Self { backend, device })
    }
}

/// The return paths from backends that see clients, and the paths to those that see a given address.
#[derive(Debug, Default)]
pub(crate) struct ReturnPaths {
    /// The mappings whose paths are to be looked up.
    pub(crate) to_look_up: Vec<Name>,
    /// Those that lack one, as far as reported.
    pub(crate) reported: Reported,
}

/// The mappings whose missing command, or whose wrong address, was reported: once, until it was there.
#[derive(Debug, Default)]
pub(crate) struct Reported(BTreeSet<Name>);

impl Reported {
    /// Warns if clients would not get what the backends of `mapping` answer to their addresses, by what
    /// [`ReturnPath::interface_without`] has found out.
    pub(crate) fn report(&mut self, mapping: &Name, found: io::Result<Option<String>>) {
        // A runtime may publish many ports at once.
        static LINES: LogLimit = LogLimit::new();

        if matches!(found, Ok(None)) {
            self.0.remove(mapping);
            return;
        }
        if !self.0.insert(mapping.clone()) {
            return;
        }
        let Some(suppressed) = LINES.permit() else { return };
        match found {
            Ok(interface) => {
                let interface = interface.unwrap_or_default();
                let command = format!("netns-setup transparent up --interface {interface}");
                warn!(%mapping, suppressed, "answers to clients will not come back; run {command}");
            }
            Err(error) => {
                warn!(%mapping, %error, suppressed, "cannot find out whether answers to clients come back");
            }
        }
    }

    /// Warns if connections of `mapping` cannot come from the address that they should.
    pub(crate) fn report_source(&mut self, mapping: &Name, found: Result<(), SourceError>) {
        static LINES: LogLimit = LogLimit::new();

        let Err(error) = found else {
            self.0.remove(mapping);
            return;
        };
        if self.0.insert(mapping.clone())
            && let Some(suppressed) = LINES.permit()
        {
            warn!(%mapping, %error, suppressed, "the backend cannot be reached");
        }
    }

    /// Forgets mappings that are gone.
    pub(crate) fn keep(&mut self, is_there: impl Fn(&Name) -> bool) {
        self.0.retain(is_there);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_the_same_in_another_process() {
        let name = "abcdefghijklmno";
        for (backend, device) in
            [("10.0.0.1:0", None), ("[fe80::1%7]:0", Some(name)), ("[fd00::1]:0", Some("a"))]
        {
            let device = device.map(|name| name.parse().unwrap());
            let path = ReturnPath { backend: backend.parse().unwrap(), device };
            assert_eq!(ReturnPath::from_bytes(&path.to_bytes()), Some(path));
        }
        let mut bytes = [0; ReturnPath::BYTES];
        for wrong in [&b"a b"[..], b"\xff", b"a\0b"] {
            bytes[20..20 + wrong.len()].copy_from_slice(wrong);
            assert_eq!(ReturnPath::from_bytes(&bytes), None, "{wrong:?}");
        }
    }
}
