//! What is there: the answer of a read-only look at the kernel, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use crate::action::{Family, OffloadSizes};
use crate::addr::{Cidr, Mac};
use crate::firewall::iptables::SavedTables;
use crate::model::{MappingKey, RelayProcess};
use crate::name::Name;

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// The kernel's index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its type, such as `bridge` or `veth`.
    pub kind: Option<String>,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// The largest packet on the wire.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Whether a bridge port sends frames back.
    pub hairpin: bool,
    /// The packet sizes inside the host, as far as this kernel knows them.
    pub offload: OffloadSizes,
    /// The largest packet that the driver takes.
    pub tso_max_size: Option<u32>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads; `None` for a default route.
    pub destination: Option<Cidr>,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// The index of the interface.
    pub oif: Option<u32>,
}

/// One network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Side {
    /// Its interfaces.
    pub links: Vec<Link>,
    /// Its addresses, with the index of the interface.
    pub addresses: Vec<(u32, Cidr)>,
    /// Its routes.
    pub routes: Vec<Route>,
}

impl Side {
    /// The interface of that name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Whether the interface has the address.
    #[must_use]
    pub fn has_address(&self, link: &Link, address: Cidr) -> bool {
        self.addresses.contains(&(link.index, address))
    }

    /// Whether there is a default route through that router.
    #[must_use]
    pub fn has_default_route(&self, gateway: IpAddr) -> bool {
        self.routes.iter().any(|route| route.destination.is_none() && route.gateway == Some(gateway))
    }
}

/// The rules of the backend in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Rules {
    /// There is no backend.
    #[default]
    None,
    /// Our table, as `nft` lists it.
    Nft {
        /// The listing; `None` when there is no such table.
        listing: Option<String>,
        /// Whether it is what the wanted rules look like when listed; `None` when that was not looked into.
        as_wanted: Option<bool>,
    },
    /// The tables of both families, as `iptables-save` lists them.
    Iptables(BTreeMap<Family, SavedTables>),
}

/// Everything that was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The namespace this program was started in.
    pub host: Side,
    /// The containers' namespaces; `None` when one is gone.
    pub containers: BTreeMap<Name, Option<Side>>,
    /// The containers at whose namespace's place there is a file, be it one or not.
    pub namespace_files: BTreeSet<Name>,
    /// The kernel parameters that matter; one that the kernel does not have is left out.
    pub sysctls: BTreeMap<String, String>,
    /// The rules.
    pub rules: Rules,
    /// The relays that run.
    pub relays: BTreeMap<MappingKey, RelayProcess>,
    /// The content of files of ours; `None` when one does not exist.
    pub files: BTreeMap<PathBuf, Option<String>>,
}
