//! Formats where the sockets of a mapping actually listen, including ports that were chosen and addresses of
//! inherited sockets.

use rproxy_mapping::PortMapping;
use rproxy_mapping::backend::{BackendHost, NoAddress};
use rproxy_mapping::host::HostAddr;
use rproxy_mapping::name::Name;
use tracing::info;

use crate::bind::source::can_reach;
use crate::engine::registry::Served;

/// The mappings of one change that have a log line of their own.
const ANNOUNCED: usize = 100;

impl Served {
    /// The bound host ports, as in `49160,50001-50003`. If UDP's differ from TCP's, they follow these.
    pub fn bound_ports(&self) -> String {
        let ports: Vec<u16> = self.host_ports().collect();
        // All addresses of an interface have the same.
        let ports = &ports[..ports.len().min(self.mapping.sockets_per_address())];
        let (tcp, udp) = ports.split_at(ports.len().min(self.mapping.backend_ports().count()));
        ports_text(if tcp == udp { tcp } else { ports })
    }

    /// The bound host addresses, if they differ from the requested one. An inherited socket listens wherever
    /// it was bound, and a mapping of an interface at its addresses.
    pub fn bound_host(&self) -> Option<String> {
        let mut hosts: Vec<HostAddr> = Vec::new();
        for binding in &self.ports {
            let PortMapping { host, .. } = &binding.target.port_mapping;
            let ip = host.inet_addr().map(|addr| HostAddr::Ip(addr.into()));
            let host = ip.or_else(|| host.unix_addr().cloned().map(HostAddr::Unix));
            hosts.extend(host.filter(|host| !hosts.contains(host)));
        }
        let is_as_asked = hosts[..] == [self.mapping.host().clone()];
        (!is_as_asked && !hosts.is_empty())
            .then(|| hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
    }

    /// The addresses that the name of the backend stands for, if it has a name.
    pub fn resolved(&self) -> Option<Vec<String>> {
        let backend = self.mapping.backend();
        backend.name().map(|_name| backend.ips().iter().map(ToString::to_string).collect())
    }

    /// Why the name of the backend leads nowhere, if it does.
    pub fn unresolved(&self) -> Option<NoAddress> {
        match self.mapping.backend() {
            BackendHost::Name(host) => host.no_address(),
            _ => None,
        }
    }

    /// Why its clients are refused for now, if they are.
    pub fn problem(&self) -> Option<String> {
        let target = &self.ports.first()?.target;
        if let Some(problem) = target.unresolved() {
            return Some(format!("{problem}; clients are refused until that changes"));
        }
        let backend = target.port_mapping.backend.socket_addr();
        can_reach(&target.policy.limits, backend).err().map(|error| error.to_string())
    }

    /// The backend, and what its name stands for: `web.internal:80 (172.17.0.2)`.
    pub(crate) fn backend_text(&self) -> String {
        let backend = self.mapping.backend_spec().to_string();
        let unresolved = self.unresolved().map(|why| why.to_string());
        with_addresses(backend, self.resolved().as_deref(), unresolved.as_deref())
    }

    /// Logs that the mapping is served, and where.
    pub(crate) fn announce(&self, name: &Name) {
        let mapping = &self.mapping;
        if self.ports.is_empty() {
            // What it waits for is logged once for all mappings of an interface.
            return;
        }
        let host = self.bound_host().unwrap_or_else(|| mapping.host().to_string());
        let ports = self.bound_ports();
        let host = if ports.is_empty() { host } else { format!("{host}:{ports}") };
        let backend = self.backend_text();
        info!(mapping = %name, %host, %backend, protocol = %mapping.protocols(), "serving");
    }
}

/// The text of a backend, with the addresses that its name stands for, if it has a name, or why there are none.
pub(crate) fn with_addresses(
    backend: String,
    resolved: Option<&[String]>,
    unresolved: Option<&str>,
) -> String {
    match resolved {
        None => backend,
        Some([]) => format!("{backend} ({})", unresolved.unwrap_or("does not resolve")),
        Some(addresses) => format!("{backend} ({})", addresses.join(", ")),
    }
}

/// Logs that mappings are served, and where. Of many, the first ones have a line, so that they do not flood the log.
pub(crate) fn announce_all<'a>(mappings: impl Iterator<Item = (&'a Name, &'a Served)>) {
    let mut mappings = mappings.peekable();
    mappings.by_ref().take(ANNOUNCED).for_each(|(name, served)| served.announce(name));
    if mappings.peek().is_some() {
        info!(mappings = mappings.count(), "serving more; rproxy ctl list has all");
    }
}

/// Logs that mappings are not served any more, likewise.
pub(crate) fn announce_removed(names: &[Name]) {
    names.iter().take(ANNOUNCED).for_each(|name| info!(mapping = %name, "no longer serving"));
    if let Some(more @ 1..) = names.len().checked_sub(ANNOUNCED) {
        info!(mappings = more, "no longer serving more");
    }
}

/// Formats ports in order, consecutive ones as ranges: `8080`, `8000-8010`, `49160,50001-50003`.
fn ports_text(ports: &[u16]) -> String {
    let mut rows: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match rows.last_mut() {
            Some((_first, last)) if last.checked_add(1) == Some(port) => *last = port,
            _ => rows.push((port, port)),
        }
    }
    let text = |(first, last): &(u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    rows.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use rproxy_mapping::Mapping;
    use rproxy_mapping::addr::{Protocol, Protocols};

    use super::*;
    use crate::runtime::poll::PollSet;
    use crate::state::{Binding, MappingPolicy, Target};

    #[test]
    fn ports_are_written_as_ranges() {
        for (ports, text) in [
            (vec![80], "80"),
            (vec![80, 81, 82], "80-82"),
            (vec![50_001, 50_002, 49_160], "50001-50002,49160"),
            (vec![u16::MAX, 1], "65535,1"),
        ] {
            assert_eq!(ports_text(&ports), text);
        }
    }

    /// A mapping of `127.0.0.1` whose sockets listen at `hosts`.
    fn listening_at(hosts: &[&str]) -> Served {
        let set = PollSet::new().unwrap();
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
        let at = |host: &&str| {
            let (host, backend) = (host.parse().unwrap(), "192.0.2.1:80".parse().unwrap());
            let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
            let port = Arc::new(set.add(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap());
            Binding { port, target: Arc::new(Target::new(port_mapping, policy.clone())) }
        };
        let ports = hosts.iter().map(at).collect();
        let backend = ("192.0.2.1".parse().unwrap(), "80".parse().unwrap());
        let host = ("127.0.0.1".parse().unwrap(), None);
        let mapping = Mapping::new(Protocols::One(Protocol::Tcp), host, backend).unwrap();
        Served { mapping, policy, ports, process: None }
    }

    #[test]
    fn addresses_are_told_if_they_are_not_those_asked_for_and_each_once() {
        for (hosts, told) in [
            (&["127.0.0.1:80", "127.0.0.1:81"][..], None),
            (&["127.0.0.2:80", "127.0.0.2:81"], Some("127.0.0.2")),
            (&["127.0.0.1:80", "127.0.0.2:80", "127.0.0.1:81"], Some("127.0.0.1,127.0.0.2")),
        ] {
            assert_eq!(listening_at(hosts).bound_host().as_deref(), told);
        }
    }
}
