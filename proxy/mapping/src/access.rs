//! Which clients a mapping serves.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Networks whose clients are served, and networks whose clients are refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessList {
    /// If not empty, only clients from these networks are served.
    pub allow: Vec<IpNet>,
    /// Clients from these networks are refused, even if `allow` contains them.
    pub deny: Vec<IpNet>,
}

impl AccessList {
    /// Whether all clients are allowed, so that none has to be checked.
    pub fn is_open(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// Whether a client at `ip` is served. An IPv4-mapped address counts as the IPv4 address, because IPv4 clients of a
    /// dual-stack socket appear in that form.
    pub fn admits(&self, ip: IpAddr) -> bool {
        self.refusal(Some(ip)).is_none()
    }

    /// Why a client at `ip` is refused, if it is. A client of a Unix socket has no address, which no network has either.
    pub fn refusal(&self, ip: Option<IpAddr>) -> Option<&'static str> {
        if self.is_open() {
            return None;
        }
        let Some(ip) = ip.map(|ip| ip.to_canonical()) else {
            return (!self.allow.is_empty()).then_some("allow does not have it");
        };
        let among = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&ip));
        if among(&self.deny) {
            return Some("deny has it");
        }
        (!self.allow.is_empty() && !among(&self.allow)).then_some("allow does not have it")
    }
}

/// Parses a network: `10.0.0.0/8`, `fd00::/8`, or a single address. A network of IPv4-mapped addresses, such as
/// `::ffff:10.0.0.0/104`, becomes the corresponding IPv4 network.
///
/// # Errors
/// A message that suggests a valid form.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ip.to_canonical().into());
    }
    let network: IpNet = text
        .parse()
        .map(canonical)
        .map_err(|_err| "not a network; write one such as 10.0.0.0/8, fd00::/8 or 192.0.2.7".to_owned())?;
    if network != network.trunc() {
        return Err(format!("it has host bits set; write {}", network.trunc()));
    }
    Ok(network)
}

/// The IPv4 network that corresponds to a network of IPv4-mapped addresses, whose first 96 bits are fixed (RFC 4291,
/// section 2.5.5.2).
fn canonical(network: IpNet) -> IpNet {
    const MAPPED: u8 = 96;
    let ipv4 = |network: Ipv6Net| {
        let length = network.prefix_len().checked_sub(MAPPED)?;
        Ipv4Net::new(network.addr().to_ipv4_mapped()?, length).ok()
    };
    match network {
        IpNet::V6(mapped) => ipv4(mapped).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(allow: &[&str], deny: &[&str]) -> AccessList {
        let networks = |texts: &[&str]| texts.iter().map(|text| parse_network(text).unwrap()).collect();
        AccessList { allow: networks(allow), deny: networks(deny) }
    }

    fn admits(list: &AccessList, ip: &str) -> bool {
        list.admits(ip.parse().unwrap())
    }

    #[test]
    fn denied_networks_win_over_allowed_ones() {
        assert!(AccessList::default().is_open());
        assert!(admits(&AccessList::default(), "192.0.2.1"));

        let only = list(&["10.0.0.0/8", "fd00::/8"], &["10.9.0.0/16"]);
        assert!(!only.is_open());
        assert!(admits(&only, "10.0.0.1"));
        assert!(admits(&only, "::ffff:10.0.0.1"), "an IPv4 client of a dual-stack socket");
        assert!(admits(&only, "fd00::1"));
        assert!(!admits(&only, "10.9.0.1"));
        assert!(!admits(&only, "192.0.2.1"));

        let others = list(&[], &["192.0.2.7"]);
        assert!(admits(&others, "192.0.2.8"));
        assert!(!admits(&others, "192.0.2.7"));
    }

    #[test]
    fn networks_of_ipv4_mapped_addresses_are_ipv4_networks() {
        for (text, network) in [
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("::ffff:c000:207/128", "192.0.2.7/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("64:ff9b::/96", "64:ff9b::/96"),
        ] {
            assert_eq!(parse_network(text).unwrap().to_string(), network, "{text}");
        }
        let denied = list(&[], &["::ffff:10.0.0.0/104"]);
        assert!(!admits(&denied, "10.1.2.3") && !admits(&denied, "::ffff:10.1.2.3"));
        assert!(admits(&denied, "11.0.0.1") && admits(&denied, "::a00:1"));
        assert_eq!(denied.refusal("10.1.2.3".parse().ok()), Some("deny has it"));
        let others = list(&["::ffff:10.0.0.0/104"], &[]).refusal("11.0.0.1".parse().ok());
        assert_eq!(others, Some("allow does not have it"));
        assert!(parse_network("::ffff:10.0.0.1/104").unwrap_err().contains("write 10.0.0.0/8"));
    }

    #[test]
    fn a_network_that_is_none_is_refused_with_a_way_out() {
        assert!(parse_network("10.0.0.1/8").unwrap_err().contains("write 10.0.0.0/8"));
        assert!(parse_network("10.0.0.0/33").unwrap_err().contains("not a network"));
        assert!(parse_network("lan").unwrap_err().contains("not a network"));
    }
}
