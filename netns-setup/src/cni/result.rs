//! What the plugin before has made: its addresses are where ports lead (CNI specification 1.1.0, section 5, "Success").

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::CniError;
use crate::host_ip::HostIp;

/// The addresses of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The first IPv4 address, with the network that it is in.
    pub v4: Option<IpNet>,
    /// The first IPv6 address.
    pub v6: Option<IpNet>,
}

#[derive(Deserialize)]
struct PrevResult {
    #[serde(default)]
    interfaces: Option<Vec<Interface>>,
    #[serde(default)]
    ips: Option<Vec<Address>>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Address {
    address: String,
    interface: Option<i64>,
}

impl Addresses {
    /// Those of the interface `name` of the container.
    ///
    /// # Errors
    /// If the result is not understood.
    pub fn of(result: &RawValue, name: &str) -> Result<Self, CniError> {
        let deserializer = &mut serde_json::Deserializer::from_str(result.get());
        let result: PrevResult = serde_path_to_error::deserialize(deserializer)
            .map_err(|error| CniError::Config(format!("prevResult.{}: {}", error.path(), error.inner())))?;
        let interfaces = result.interfaces.unwrap_or_default();
        let is_elsewhere = |index: i64| {
            let interface = usize::try_from(index).ok().and_then(|index| interfaces.get(index));
            interface.is_some_and(|interface| {
                interface.name != name || interface.sandbox.as_deref().unwrap_or_default().is_empty()
            })
        };
        let mut addresses = Self::default();
        for (index, ip) in result.ips.unwrap_or_default().iter().enumerate() {
            let address: IpNet = ip.address.parse().map_err(|_ignored| {
                let text = &ip.address;
                CniError::Config(format!("prevResult.ips[{index}].address {text:?} is not ADDRESS/PREFIX"))
            })?;
            if !ip.interface.is_some_and(is_elsewhere) {
                let of_family = if address.addr().is_ipv4() { &mut addresses.v4 } else { &mut addresses.v6 };
                of_family.get_or_insert(address);
            }
        }
        Ok(addresses)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> {
        [self.v4, self.v6].into_iter().flatten()
    }

    /// Where clients of `host` are led, and on which sockets: every address of the host needs a socket for each family if
    /// the container has both. Clients are led to the other family if it has no address of theirs.
    pub fn targets(&self, host: HostIp) -> Vec<(HostIp, IpAddr)> {
        let [v4, v6] = [self.v4, self.v6].map(|address| address.map(|address| address.addr()));
        match (host, v4, v6) {
            (HostIp::Any, Some(v4), Some(v6)) => {
                let every = |ip: IpAddr| if ip.is_ipv4() { ANY_V4 } else { ANY_V6 };
                vec![(every(v4), v4), (every(v6), v6)]
            }
            (host, v4, v6) => {
                let target = if host.is_ipv6() { v6.or(v4) } else { v4.or(v6) };
                target.map(|target| (host, target)).into_iter().collect()
            }
        }
    }
}

const ANY_V4: HostIp = HostIp::Ip(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
const ANY_V6: HostIp = HostIp::Ip(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED));

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(json: &str) -> Result<Addresses, CniError> {
        Addresses::of(&RawValue::from_string(json.to_owned()).unwrap(), "eth0")
    }

    #[test]
    fn only_addresses_of_the_container_count() {
        let found = addresses(
            r#"{"interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/run/netns/c"}],
                "ips":[{"version":"4","address":"10.1.0.1/24","interface":0},{"address":"10.1.0.2/24","interface":1},
                       {"address":"10.1.0.3/24","interface":1},{"address":"fd00::2/64"}]}"#,
        );
        let found = found.unwrap();
        assert_eq!(found.v4, Some("10.1.0.2/24".parse().unwrap()));
        assert_eq!(found.v6, Some("fd00::2/64".parse().unwrap()));
        assert_eq!(addresses("{}").unwrap(), Addresses::default());
        let error = addresses(r#"{"ips":[{"address":"10.1.0.1"}]}"#).unwrap_err().to_string();
        assert!(error.starts_with("prevResult.ips[0].address \"10.1.0.1\" is not"), "{error}");
        assert!(addresses(r#"{"ips":4}"#).unwrap_err().to_string().starts_with("prevResult.ips: "));
    }

    #[test]
    fn clients_are_led_to_their_own_family_if_there_is_one() {
        let (v4, v6) = ("10.1.0.2/24".parse().unwrap(), "fd00::2/64".parse().unwrap());
        let both = Addresses { v4: Some(v4), v6: Some(v6) };
        let one = Addresses { v4: Some(v4), v6: None };
        let led = |addresses: &Addresses, host: &str| -> Vec<String> {
            let targets = addresses.targets(host.parse().unwrap());
            targets.into_iter().map(|(host, to)| format!("{host}->{to}")).collect()
        };
        assert_eq!(led(&both, "*"), ["0.0.0.0->10.1.0.2", "[::]->fd00::2"]);
        assert_eq!(led(&one, "*"), ["*->10.1.0.2"]);
        assert_eq!(led(&one, "[::1]"), ["[::1]->10.1.0.2"]);
        assert_eq!(led(&both, "[::1]"), ["[::1]->fd00::2"]);
        assert_eq!(led(&both, "127.0.0.1"), ["127.0.0.1->10.1.0.2"]);
        assert!(led(&Addresses::default(), "*").is_empty());
    }
}
