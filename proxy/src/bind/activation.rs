//! Inherited sockets, and which mapping each belongs to.
//!
//! A socket with the name of a mapping belongs to that mapping, wherever it listens: that was the choice of
//! whoever bound it. Each other socket belongs to the mapping that would otherwise have bound its address.

use std::collections::HashMap;

use rproxy_mapping::addr::{HostSocketAddr, Protocol};
use rproxy_mapping::name::Name;
use rproxy_mapping::{Mapping, PortMapping};
use tracing::warn;

use crate::bind::BoundPort;
use crate::bind::listen::Listener;

/// Inherited sockets that no mapping has taken yet.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// `None` once a mapping has taken it.
    sockets: Vec<Option<PassedSocket>>,
    /// The indices of sockets, by what they listen on.
    by_place: HashMap<Place, Vec<usize>>,
    /// Whether sockets that no mapping takes are closed in silence: whoever passed them is told in another way.
    is_silent: bool,
}

type Place = (Protocol, HostSocketAddr);

/// A socket that another process bound for this one.
#[derive(Debug)]
pub struct PassedSocket {
    /// Its name (`FileDescriptorName=` in systemd.socket(5)).
    pub name: String,
    /// The socket.
    pub listener: Listener,
}

impl PassedSocket {
    fn place(&self) -> Option<Place> {
        Some((self.listener.protocol(), self.listener.local_addr().ok()?))
    }
}

impl InheritedSockets {
    /// These sockets, in this order.
    pub fn new(sockets: Vec<PassedSocket>) -> Self {
        let mut by_place: HashMap<Place, Vec<usize>> = HashMap::with_capacity(sockets.len());
        for (index, socket) in sockets.iter().enumerate() {
            if let Some(place) = socket.place() {
                by_place.entry(place).or_default().push(index);
            }
        }
        Self { sockets: sockets.into_iter().map(Some).collect(), by_place, is_silent: false }
    }

    /// The sockets that came with the request of a client, who is told which one no mapping takes.
    pub(crate) fn of_request(listeners: Vec<Listener>) -> Self {
        let unnamed = |listener| PassedSocket { name: String::new(), listener };
        let mut passed = Self::new(listeners.into_iter().map(unnamed).collect());
        passed.is_silent = true;
        passed
    }

    /// The first socket that no mapping has taken.
    pub(crate) fn first_left(&self) -> Option<&Listener> {
        self.sockets.iter().flatten().map(|socket| &socket.listener).next()
    }

    /// Removes and returns the sockets with the name of `mapping`, if there are any.
    ///
    /// # Errors
    /// [`InheritedError`] if their number does not match the mapping's ports.
    pub(crate) fn take_named(&mut self, mapping: &Mapping) -> Result<Option<Vec<BoundPort>>, InheritedError> {
        if mapping.interface().is_some() {
            // Its addresses come and go, and whoever passes sockets does not know of that.
            return Ok(None);
        }
        let name = mapping.name();
        let is_named = |socket: &mut PassedSocket| socket.name == name.as_str();
        let mut named: Vec<_> =
            self.sockets.iter_mut().filter_map(|socket| socket.take_if(is_named)).collect();
        if named.is_empty() {
            return Ok(None);
        }
        for protocol in Protocol::ALL {
            let wanted =
                if mapping.protocols().contains(protocol) { mapping.backend_ports().count() } else { 0 };
            let passed = named.iter().filter(|socket| socket.listener.protocol() == protocol).count();
            if passed != wanted {
                return Err(InheritedError { name, protocol, wanted, passed });
            }
        }
        // In the order of the mapping's ports; a stable sort keeps that of the sockets of one protocol.
        named.sort_by_key(|socket| socket.listener.protocol());
        let sockets = mapping.port_mappings().zip(named);
        Ok(Some(
            sockets.map(|(port_mapping, socket)| BoundPort::adopt(port_mapping, socket.listener)).collect(),
        ))
    }

    /// Removes and returns the socket that listens on the host address of `port_mapping`.
    pub(crate) fn take_at(&mut self, port_mapping: &PortMapping) -> Option<BoundPort> {
        let there = self.by_place.get(&(port_mapping.protocol, port_mapping.host.clone()))?;
        let socket = there.iter().find_map(|index| self.sockets[*index].take())?;
        Some(BoundPort::adopt(port_mapping.clone(), socket.listener))
    }
}

impl Drop for InheritedSockets {
    fn drop(&mut self) {
        for PassedSocket { name, listener } in self.sockets.iter().flatten().filter(|_| !self.is_silent) {
            let (protocol, address) = (listener.protocol(), listener.local_addr());
            let address = address.map_or_else(|error| error.to_string(), |address| address.to_string());
            warn!(name, %address, %protocol, "closing a passed socket that no mapping uses");
        }
    }
}

/// The number of sockets does not match the mapping of that name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{passed} {protocol} sockets named {name} were passed, and the mapping {name} wants {wanted}; \
     name as many in the .socket unit, or give the mapping another name"
)]
pub struct InheritedError {
    name: Name,
    protocol: Protocol,
    wanted: usize,
    passed: usize,
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn socket(name: &str, listener: Listener) -> PassedSocket {
        PassedSocket { name: name.to_owned(), listener }
    }

    fn tcp() -> Listener {
        Listener::Tcp(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn udp() -> Listener {
        Listener::Udp(UdpSocket::bind("127.0.0.1:0").unwrap())
    }

    fn mapping(name: &str, protocols: &str, host_port: u16) -> Mapping {
        let host = ("127.0.0.1".parse().unwrap(), host_port.to_string().parse().ok());
        let backend = ("192.0.2.1".parse().unwrap(), "80".parse().unwrap());
        Mapping::new(protocols.parse().unwrap(), host, backend).unwrap().named(name.parse().unwrap())
    }

    #[test]
    fn a_name_decides_wherever_the_socket_listens() {
        let mut passed =
            InheritedSockets::new(vec![socket("dns", udp()), socket("web", tcp()), socket("dns", tcp())]);
        let addresses =
            [2, 0].map(|index| passed.sockets[index].as_ref().unwrap().listener.local_addr().unwrap());
        let ports = passed.take_named(&mapping("dns", "tcp+udp", 53)).unwrap().unwrap();
        let hosts: Vec<_> = ports.iter().map(|port| port.port_mapping.host.clone()).collect();
        assert_eq!(hosts, addresses, "TCP first");
        assert!(passed.take_named(&mapping("dns", "tcp+udp", 53)).unwrap().is_none());
        assert_eq!(passed.sockets.iter().flatten().count(), 1);
    }

    #[test]
    fn a_name_with_too_few_or_too_many_sockets_is_refused() {
        for sockets in [vec![tcp()], vec![tcp(), udp(), udp()], vec![udp()]] {
            let sockets = sockets.into_iter().map(|listener| socket("dns", listener)).collect();
            let refused =
                InheritedSockets::new(sockets).take_named(&mapping("dns", "tcp+udp", 53)).unwrap_err();
            assert!(refused.to_string().contains("sockets named dns were passed"), "{refused}");
        }
    }

    #[test]
    fn otherwise_the_address_decides() {
        let (one, other) = (tcp(), tcp());
        let port = other.local_addr().unwrap().port().unwrap();
        let mut passed =
            InheritedSockets::new(vec![socket("rproxy.socket", one), socket("rproxy.socket", other)]);
        let port_mapping = |protocols| mapping("web", protocols, port).port_mappings().next().unwrap();
        assert!(passed.take_at(&port_mapping("udp")).is_none());
        let bound = passed.take_at(&port_mapping("tcp")).unwrap();
        assert_eq!(bound.local_addr().unwrap().port(), port);
        assert!(passed.take_at(&port_mapping("tcp")).is_none());
        assert_ne!(passed.first_left().unwrap().local_addr().unwrap().port(), Some(port));
    }
}
