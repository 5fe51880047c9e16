//! What is published on this node, in one file of the state directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use rproxy_mapping::addr::Protocol;
use serde::{Deserialize, Serialize};

use super::attachment::AttachmentId;
use super::error::CniError;
use crate::host_ip::HostIp;
use crate::model::{MappingKey, Via};
use crate::name::{Id, IfName};
use crate::netns;
use crate::private_dir::PrivateDir;
use crate::relay::client;
use crate::relayed::{FILES, RelayedPort};
use crate::state::{self as network, COPIES};

/// The file.
const FILE: &str = "attachments.json";

/// The version of the file's format.
const VERSION: u32 = 1;

/// Everything that this plugin maintains in a network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    version: u32,
    /// The cookie of the namespace, if the kernel has cookies.
    netns: Option<u64>,
    /// By which the supervisor of the relay is found.
    pub id: Id,
    /// Whether a change has begun that may not be complete: the rules may be others.
    #[serde(default)]
    pub is_changing: bool,
    /// The attachments with published ports.
    pub attachments: Vec<Attachment>,
    /// The interfaces where this plugin has allowed loopback addresses to be routed.
    #[serde(default)]
    pub localnet: Vec<String>,
}

/// The ports of one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Flat")]
pub struct Attachment {
    /// Which.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Who serves what comes to them.
    pub via: Via,
    /// The ports.
    pub ports: Vec<RelayedPort>,
    /// The networks of the container: what comes from there is served by the relay, or masqueraded.
    pub subnets: Vec<IpNet>,
    /// The interface of the host that leads to the container, if loopback addresses are routed by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub localnet: Option<String>,
    /// The interfaces of the host by which the container answers to its clients' addresses, if the relay keeps those.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub return_path: BTreeSet<IfName>,
}

/// An attachment as it is written: a flattened structure is read a few times more slowly.
#[derive(Deserialize)]
struct Flat {
    network: String,
    container: String,
    interface: String,
    via: Via,
    ports: Vec<RelayedPort>,
    subnets: Vec<IpNet>,
    #[serde(default)]
    localnet: Option<String>,
    #[serde(default)]
    return_path: BTreeSet<IfName>,
}

impl From<Flat> for Attachment {
    fn from(flat: Flat) -> Self {
        let Flat { network, container, interface, via, ports, subnets, localnet, return_path } = flat;
        Self {
            id: AttachmentId { network, container, interface },
            via,
            ports,
            subnets,
            localnet,
            return_path,
        }
    }
}

impl Node {
    fn new() -> Result<Self, CniError> {
        let netns = netns::cookie().map_err(CniError::Namespace)?;
        Ok(Self {
            version: VERSION,
            netns,
            id: Id::random().map_err(CniError::Random)?,
            // What is there without a state was left by a state that is lost.
            is_changing: true,
            attachments: Vec::new(),
            localnet: Vec::new(),
        })
    }

    /// This while it is changed, with the interfaces where loopback addresses are routed then.
    #[must_use]
    pub fn changing(&self, localnet: Vec<String>) -> Self {
        Self { is_changing: true, localnet, ..self.clone() }
    }

    /// This after a change.
    #[must_use]
    pub fn settled(self, localnet: Vec<String>) -> Self {
        Self { is_changing: false, localnet, ..self }
    }

    /// What is really published. A container that is in several networks has a port in each of them; the first serves it,
    /// and another when that is gone.
    #[must_use]
    pub fn effective(&self) -> Self {
        let mut taken: HashMap<(Protocol, u16), Vec<HostIp>> = HashMap::new();
        let mut node = self.clone();
        for attachment in &mut node.attachments {
            attachment.ports.retain(|port| {
                let hosts = taken.entry((port.key.proto, port.key.port)).or_default();
                !hosts.iter().any(|host| host.overlaps(port.key.host))
            });
            for port in &attachment.ports {
                taken.entry((port.key.proto, port.key.port)).or_default().push(port.key.host);
            }
        }
        node
    }

    /// The ports that the relay serves.
    pub fn ports(&self) -> impl Iterator<Item = &RelayedPort> {
        self.attachments.iter().flat_map(|attachment| &attachment.ports)
    }

    /// The ports by their host's side.
    #[must_use]
    pub fn ports_by_key(&self) -> BTreeMap<MappingKey, &RelayedPort> {
        self.ports().map(|port| (port.key, port)).collect()
    }

    /// The attachment of that name.
    #[must_use]
    pub fn attachment(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.attachments.iter().find(|attachment| attachment.id == *id)
    }

    /// This, with an attachment in the place of the one of its name.
    #[must_use]
    pub fn with(&self, attachment: Attachment) -> Self {
        if attachment.ports.is_empty() {
            return self.without(|other| other.id == attachment.id);
        }
        let mut node = self.clone();
        match node.attachments.iter_mut().find(|other| other.id == attachment.id) {
            Some(other) => *other = attachment,
            None => node.attachments.push(attachment),
        }
        node
    }

    /// This, without some attachments.
    #[must_use]
    pub fn without(&self, is_removed: impl Fn(&Attachment) -> bool) -> Self {
        let mut node = self.clone();
        node.attachments.retain(|attachment| !is_removed(attachment));
        node
    }

    /// The attachment of another container that has a port which excludes `key`.
    #[must_use]
    pub fn holder(&self, key: MappingKey, own: &AttachmentId) -> Option<&Attachment> {
        let excludes = |port: &RelayedPort| {
            (port.key.proto, port.key.port) == (key.proto, key.port) && port.key.host.overlaps(key.host)
        };
        let others = self.attachments.iter().filter(|attachment| attachment.id.container != own.container);
        others.into_iter().find(|attachment| attachment.ports.iter().any(excludes))
    }

    /// The interfaces by which containers answer to their clients' addresses.
    #[must_use]
    pub fn return_path(&self) -> BTreeSet<IfName> {
        self.attachments.iter().flat_map(|attachment| attachment.return_path.clone()).collect()
    }

    /// The interfaces where loopback addresses have to be routed.
    #[must_use]
    pub fn wanted_localnet(&self) -> Vec<String> {
        let mut interfaces: Vec<_> =
            self.attachments.iter().filter_map(|attachment| attachment.localnet.clone()).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        interfaces
    }
}

/// The state directory, open and locked: one call at a time.
#[derive(Debug)]
pub struct Store {
    dir: PrivateDir,
    /// The directories that were made for it, the innermost first.
    made: Vec<PathBuf>,
}

impl Store {
    /// Opens the directory for a change, and creates it if there is none.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn create(path: &Path) -> Result<Self, CniError> {
        let missing = path.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists());
        let made = missing.map(Path::to_owned).collect();
        Self { dir: PrivateDir::create(path)?, made }.check_own()
    }

    /// Opens the directory; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn open(path: &Path) -> Result<Option<Self>, CniError> {
        PrivateDir::open(path)?.map(|dir| Self { dir, made: Vec::new() }.check_own()).transpose()
    }

    /// Whether a directory is that of this plugin, with published ports.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        path.join(FILE).exists()
    }

    /// Refuses a directory that belongs to something else.
    fn check_own(self) -> Result<Self, CniError> {
        let is_registry = self.path() == Path::new(COPIES);
        match is_registry || self.path().join(network::FILE).exists() {
            true => Err(CniError::OtherDirectory(self.path().to_owned())),
            false => Ok(self),
        }
    }

    /// Removes the directories that were made for it, if nothing has come into them.
    pub fn discard(&self) {
        self.made.iter().take_while(|dir| std::fs::remove_dir(dir).is_ok()).for_each(drop);
    }

    /// Removes what a relay has left that has not ended by itself.
    pub fn remove_relay_files(&self) {
        FILES.iter().for_each(|name| drop(self.dir.remove(name)));
    }

    /// Refuses a directory where nothing can be written.
    ///
    /// # Errors
    /// If that is so.
    pub fn check_writable(&self) -> Result<(), CniError> {
        const PROBE: &str = "probe";
        // On a full disk, an empty file could be made.
        self.dir.replace(PROBE, b"writable")?;
        Ok(self.dir.remove(PROBE)?)
    }

    /// Reads what is published.
    ///
    /// # Errors
    /// If the file is damaged, or is that of another network namespace.
    pub fn load(&self) -> Result<Node, CniError> {
        let Some(bytes) = self.dir.read(FILE)? else { return Node::new() };
        let file = self.path().join(FILE);
        let node: Node = serde_json::from_slice(&bytes).map_err(|source| CniError::State { file, source })?;
        if node.version != VERSION {
            return Err(CniError::OtherVersion { file: self.path().join(FILE), version: node.version });
        }
        let current = netns::cookie().map_err(CniError::Namespace)?;
        match node.netns.zip(current) {
            Some((recorded, current)) if recorded != current => self.replace_foreign(&node),
            _ => Ok(node),
        }
    }

    /// A state for this namespace, if the one that the file is about has ended.
    fn replace_foreign(&self, node: &Node) -> Result<Node, CniError> {
        // A relay ends with its namespace, and with the last port.
        match node.attachments.is_empty() || client::status(self.path())?.is_none() {
            true => Node::new(),
            false => Err(CniError::OtherNamespace(self.path().to_owned())),
        }
    }

    /// Writes it, or removes the file if nothing is published.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, node: &Node) -> Result<(), CniError> {
        if node.attachments.is_empty() && node.localnet.is_empty() && !node.is_changing {
            self.dir.remove(FILE)?;
            return Ok(self.dir.remove(&format!("{FILE}.new"))?);
        }
        // Text, numbers and lists can always be encoded.
        let text = serde_json::to_vec(node).unwrap_or_default();
        Ok(self.dir.replace(FILE, &text)?)
    }

    /// The path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}
