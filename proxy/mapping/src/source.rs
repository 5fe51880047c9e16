//! Where connections and datagrams to a backend come from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The firewall mark of what backends answer to the addresses of clients, by which the host routes it to itself: one bit,
/// which is its mask, too. `netns-setup transparent` sets it up.
///
/// Those in use elsewhere: 0x2000 (CNI's portmap, Podman), 0x4000 and 0x8000 (Kubernetes), 0xff0000 (Tailscale),
/// 0xffff0000 (Calico), 0xf00 (Cilium), 0x64 (RootlessKit), 0x80 (the AWS VPC CNI), 1 and other low bits
/// (examples for TPROXY), 51820 = 0xca6c (wg-quick).
pub const TRANSPARENT_MARK: u32 = 0x1000;

/// The source address of connections and datagrams to a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// The address that the kernel chooses.
    #[default]
    Auto,
    /// The address and port of the client (`IP_TRANSPARENT`, ip(7)), or as [`Self::Auto`] where that cannot be.
    Client,
    /// As [`Self::Client`], but the client is refused where that cannot be.
    ClientOnly,
    /// This address of the host.
    Address(IpAddr),
}

impl Source {
    /// Whether it is the client's address.
    pub fn is_client(self) -> bool {
        matches!(self, Self::Client | Self::ClientOnly)
    }

    /// Whether what comes from there can go to `backend`, which is of the same family then.
    pub fn reaches(self, backend: IpAddr) -> bool {
        match self {
            Self::Address(ip) => ip.is_ipv4() == backend.to_canonical().is_ipv4(),
            Self::Auto | Self::Client | Self::ClientOnly => true,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Client => f.pad("client"),
            Self::ClientOnly => f.pad("client-only"),
            Self::Address(ip) => fmt::Display::fmt(ip, f),
        }
    }
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let words = [Self::Auto, Self::Client, Self::ClientOnly];
        if let Some(word) = words.into_iter().find(|word| word.to_string() == text) {
            return Ok(word);
        }
        let (address, _zone) = text.split_once('%').unwrap_or((text, ""));
        let ip: IpAddr = address.parse().map_err(|_no_address| SourceError::Unknown)?;
        match ip.to_canonical() {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => Err(SourceError::LinkLocal(v6)),
            _ if address != text => Err(SourceError::Unknown),
            ip if ip.is_unspecified() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST => {
                Err(SourceError::NotOne(ip))
            }
            ip => Ok(Self::Address(ip)),
        }
    }
}

/// Why a text is not a source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Neither a word nor an address.
    #[error("write \"auto\", \"client\", \"client-only\" or an address of this host, such as 10.0.0.11")]
    Unknown,
    /// An address that nothing can come from.
    #[error("{0} is not an address of one host; write \"auto\" to leave the choice to the kernel")]
    NotOne(IpAddr),
    /// An address that is of one link alone.
    #[error(
        "{0} is link-local, and no connection comes from such an address of choice; write \"auto\", and the interface as \
         device: towards a link-local backend, the kernel chooses that address"
    )]
    LinkLocal(Ipv6Addr),
    /// The backend has addresses of the other family.
    #[error("{ip} cannot reach the backend {backend}, which is of the other family; write an {} address", family(*backend))]
    Family {
        /// The source.
        ip: IpAddr,
        /// The address of the backend.
        backend: IpAddr,
    },
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The longest name of an interface in bytes (`IFNAMSIZ`, netdevice(7), less its null byte).
const LONGEST_NAME: usize = 15;

/// The name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device(String);

impl Device {
    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Device {
    type Err = DeviceError;

    /// Accepts the names that the kernel does (`dev_valid_name`, net/core/dev.c), as far as they are printable ASCII.
    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let is_part = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '"' | '\\');
        let is_name = !text.is_empty() && text.len() <= LONGEST_NAME && !matches!(text, "." | "..");
        if is_name && text.chars().all(is_part) { Ok(Self(text.to_owned())) } else { Err(DeviceError) }
    }
}

/// The text cannot be the name of a network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of a network interface; write one such as eth0 (`ip link` lists them)")]
pub struct DeviceError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_words_or_addresses() {
        for (text, source) in [
            ("auto", Source::Auto),
            ("client", Source::Client),
            ("client-only", Source::ClientOnly),
            ("10.0.0.11", Source::Address("10.0.0.11".parse().unwrap())),
            ("fd00::1", Source::Address("fd00::1".parse().unwrap())),
        ] {
            assert_eq!(text.parse(), Ok(source));
            assert_eq!(source.to_string(), text);
        }
        let mapped: Source = "::ffff:10.0.0.11".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.11");
        for unknown in
            ["", "Client", "clients", "10.0.0.11:80", "[fd00::1]", "fd00::1%eth0", "10.0.0.1%1", "eth0"]
        {
            assert_eq!(unknown.parse::<Source>(), Err(SourceError::Unknown), "{unknown}");
        }
        for link_local in ["fe80::1", "fe80::1%eth0", "febf::1"] {
            let error = link_local.parse::<Source>().unwrap_err();
            assert!(matches!(error, SourceError::LinkLocal(_)), "{link_local}");
        }
        for nobodys in ["0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "ff02::1"] {
            let error = nobodys.parse::<Source>().unwrap_err();
            assert!(matches!(error, SourceError::NotOne(_)), "{nobodys}");
        }
    }

    #[test]
    fn devices_are_what_the_kernel_takes_for_a_name() {
        for name in ["eth0", "br-0123456789ab", "veth.7", "a", "…"] {
            assert_eq!(name.parse::<Device>().is_ok(), name != "…", "{name}");
        }
        for wrong in ["", ".", "..", "a/b", "a b", "eth0:1", "br-0123456789abc", "a\nb"] {
            assert_eq!(wrong.parse::<Device>(), Err(DeviceError), "{wrong:?}");
        }
    }
}
