//! A network whose state and its copy are both lost: what the kernel still tells of it, so that it can be taken down.

use super::locked::LockedState;
use crate::action::Action;
use crate::addr::{Mac, Subnet4, Subnet6};
use crate::block::Block;
use crate::error::Error;
use crate::model::{self, Firewall, Network};
use crate::name::{Id, IfName};
use crate::netlink::xfrm;
use crate::observe::{self, ObserveError};
use crate::observed::{Link, Side};
use crate::relay::find;
use crate::state;

/// What is left of a network that no state directory knows.
#[derive(Debug)]
pub(super) struct Orphan {
    bridge: IfName,
    /// The network without its containers, if the kernel tells enough.
    network: Option<Network>,
    /// The host ends of the containers' veth pairs.
    veths: Vec<IfName>,
}

impl LockedState {
    /// The networks of which this host has a bridge, and nobody a state. One of them can be that of this directory if it
    /// has none.
    ///
    /// # Errors
    /// If a copy of a state cannot be read, which may be that of such a network.
    pub(super) fn orphans(&self) -> Result<Vec<Orphan>, Error> {
        if self.state.owned().network.is_some() {
            return Ok(Vec::new());
        }
        let host = observe::side().map_err(ObserveError::Host)?;
        // A copy may have gone alone, while the relay still says where the state is.
        let others = self.others()?.into_iter().map(|other| other.state);
        let states = others.chain(find::state_dirs().into_iter().filter_map(|dir| state::peek(&dir)));
        let known: Vec<Id> = states.filter_map(|state| Some(state.owned().network?.id)).collect();
        let unknown: Vec<_> = bridges(&host).filter(|(_link, id)| !known.contains(id)).collect();
        if !unknown.is_empty()
            && let Some(file) = self.unreadable_copy()?
        {
            return Err(Error::UnreadableCopy(file));
        }
        let orphan = |(link, id): (&Link, Id)| {
            let bridge = link.name.parse().ok()?;
            Some(Orphan { bridge, network: network(&host, link, bridge, id), veths: veths(&host, link) })
        };
        Ok(unknown.into_iter().filter_map(orphan).collect())
    }
}

impl Orphan {
    pub(super) fn bridge(&self) -> IfName {
        self.bridge
    }

    pub(super) fn error(&self) -> Error {
        Error::Orphaned { bridge: self.bridge, is_removable: self.network.is_some() }
    }

    /// The network without its containers.
    pub(super) fn network(&self) -> Result<Network, Error> {
        self.network.clone().ok_or_else(|| self.error())
    }

    /// What `down` has to remove beside the network.
    pub(super) fn rest(&self) -> Result<Vec<Action>, Error> {
        let blocked = xfrm::blocked().map_err(ObserveError::Policies)?.unwrap_or_default();
        // They belong to published ports.
        let of_ports = self.network.iter().flat_map(|network| {
            let replies = network.gateways().into_iter().map(Block::Reply);
            replies.chain([Block::ToLoopback(network.subnet.cidr())])
        });
        let unblocked = of_ports.filter(|block| blocked.contains(block)).map(Action::Unblock);
        Ok(self.veths.iter().map(|veth| Action::DeleteLink(*veth)).chain(unblocked).collect())
    }

    /// What `down` leaves of it.
    pub(super) fn left(&self) -> String {
        format!(
            "the state of {} was lost: what is left are namespaces of its containers, which `ip netns` lists, kernel parameters such \
             as net.ipv4.ip_forward, and rules of iptables if it had those",
            self.bridge
        )
    }
}

/// The bridges of this program, with their networks.
fn bridges(host: &Side) -> impl Iterator<Item = (&Link, Id)> {
    let bridges = host.links.iter().filter(|link| link.kind.as_deref() == Some("bridge"));
    bridges.filter_map(|link| Some((link, model::tagged(link.alias.as_deref()?)?)))
}

/// The network of a bridge, by its addresses: the bridge has the first of each subnet.
fn network(host: &Side, link: &Link, bridge: IfName, id: Id) -> Option<Network> {
    let own = host.addresses.iter().filter(|(index, _address)| *index == link.index);
    let subnets: Vec<String> = own.map(|(_index, address)| address.network().to_string()).collect();
    // Somebody may have given it other addresses, too.
    let is_its = |subnet: &Subnet4| link.mac == Some(Mac::for_container(subnet.gateway()));
    let subnet = subnets.iter().filter_map(|subnet| subnet.parse().ok()).find(is_its)?;
    // That of link-local addresses is none.
    let subnet6: Option<Subnet6> = subnets.iter().find_map(|subnet| subnet.parse().ok());
    Some(Network {
        id,
        bridge,
        subnet,
        subnet6,
        mtu: link.mtu,
        gso_max_size: 0,
        // The table has the name of the bridge.
        firewall: Firewall::Nft,
        disable_ipv6: false,
        sysctls: Vec::new(),
        persist: None,
        last_ip: None,
    })
}

/// The ports of a bridge that are named as veth pairs are by this program.
fn veths(host: &Side, bridge: &Link) -> Vec<IfName> {
    let is_ours = |link: &&Link| {
        link.master == Some(bridge.index)
            && link.kind.as_deref() == Some("veth")
            && link.name.strip_prefix("veth").is_some_and(|rest| rest.len() == Id::VETH_DIGITS)
    };
    host.links.iter().filter(is_ours).filter_map(|link| link.name.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Cidr;
    use crate::testdata;

    #[test]
    fn the_kernel_tells_which_network_a_bridge_has() {
        let known = testdata::everything().network.unwrap();
        let bridge = |index, alias| Link {
            index,
            name: known.bridge.to_string(),
            kind: Some("bridge".to_owned()),
            alias: Some(alias),
            mac: Some(known.mac()),
            mtu: known.mtu,
            ..Link::default()
        };
        let veth = |name: &str, kind: &str, master| Link {
            name: name.to_owned(),
            kind: Some(kind.to_owned()),
            master: Some(master),
            ..Link::default()
        };
        let links = vec![
            bridge(1, "netns-setup:no identifier".to_owned()),
            bridge(2, known.tag()),
            veth("vetha1a1a1a", "veth", 2),
            veth("vethb1b1b1b", "veth", 1),
            veth("vethc1c1c1c", "bridge", 2),
            veth("veth0", "veth", 2),
        ];
        let foreign = Cidr { ip: [192, 0, 2, 7].into(), prefix: 24 };
        let own = known.addresses().into_iter().rev();
        let addresses = [foreign].into_iter().chain(own).map(|address| (2, address)).collect();
        let host = Side { links, addresses, ..Side::default() };
        let [(link, id)] = &bridges(&host).collect::<Vec<_>>()[..] else { panic!("not one") };
        let found = network(&host, link, known.bridge, id.clone()).unwrap();
        assert_eq!((&found.id, found.subnet, found.mtu), (&known.id, known.subnet, known.mtu));
        assert!(found.subnet6.is_some() && found.subnet6 == known.subnet6);
        assert_eq!(veths(&host, link), ["vetha1a1a1a".parse().unwrap()]);
    }
}
