//! The observed state of the kernel, as plain data.

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
    /// The MTU.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Whether it has hairpin mode, in which a bridge port sends frames back.
    pub hairpin: bool,
    /// The packet sizes inside the host, as far as this kernel supports them.
    pub offload: OffloadSizes,
    /// The largest packet that the driver accepts.
    pub tso_max_size: Option<u32>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The destination; `None` for a default route.
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

    /// Whether there is a default route through `gateway`.
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
    /// The table of this program, as `nft` lists it.
    Nft {
        /// The listing; `None` if there is no such table.
        listing: Option<String>,
        /// Whether the listing equals that of the wanted rules; `None` if not compared.
        as_wanted: Option<bool>,
    },
    /// The tables of both families, as `iptables-save` lists them.
    Iptables(BTreeMap<Family, SavedTables>),
}

/// Everything that was observed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The namespace that this program runs in.
    pub host: Side,
    /// The containers' namespaces; `None` for one that is gone.
    pub containers: BTreeMap<Name, Option<Side>>,
    /// The containers for whose namespace a file exists, whether or not it is one.
    pub namespace_files: BTreeSet<Name>,
    /// The relevant kernel parameters, without those that the kernel lacks.
    pub sysctls: BTreeMap<String, String>,
    /// The rules.
    pub rules: Rules,
    /// The running relays.
    pub relays: BTreeMap<MappingKey, RelayProcess>,
    /// The content of this program's files; `None` for one that does not exist.
    pub files: BTreeMap<PathBuf, Option<String>>,
}
