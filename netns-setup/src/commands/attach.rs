//! `attach` and `detach`: adding containers to the network, and removing them.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use rproxy_mapping::addr::Protocol;
use serde_json::json;

use super::locked::LockedState;
use super::{Options, Report, show};
use crate::error::Error;
use crate::executor::Executor;
use crate::model::{Endpoint, Netns};
use crate::name::{Id, Name};
use crate::plan::Scope;
use crate::{ipam, netns};

/// The namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsChoice {
    /// A new one, with the container's name.
    New,
    /// The one at a path.
    Path(PathBuf),
    /// That of a process.
    Pid(u32),
}

/// The arguments of `attach`.
#[derive(Debug, Clone)]
pub struct Attach {
    /// The container's name.
    pub name: Name,
    /// Its namespace.
    pub netns: NetnsChoice,
    /// The requested address.
    pub ip: Option<Ipv4Addr>,
    /// The ports that `publish -P` publishes.
    pub expose: Vec<(u16, Protocol)>,
}

impl Attach {
    pub(super) fn run(&self, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
        let mut locked = LockedState::open_settled(options)?;
        let network = locked.network()?;
        if locked.state.current.endpoints.contains_key(&self.name) {
            return Err(Error::NameTaken(self.name.clone()));
        }
        let used = locked.state.current.addresses();
        let ip = match self.ip {
            Some(ip) => ipam::claim(network.subnet, &used, ip)?,
            None => ipam::next_free(network.subnet, &used, network.last_ip)?,
        };
        let endpoint = Endpoint {
            id: Id::random().map_err(Error::Random)?,
            ip,
            ip_requested: self.ip.is_some(),
            netns: self.netns()?,
            exposed: self.expose.clone(),
            mappings: Vec::new(),
        };
        let result = json!(show::Inspected::new(network, &self.name, &endpoint));
        let mut desired = locked.state.current.clone();
        if let (Some(network), None) = (&mut desired.network, self.ip) {
            network.last_ip = Some(ip);
        }
        desired.endpoints.insert(self.name.clone(), endpoint);
        let plan = locked.change(desired, &Scope::one(&self.name), options, executor)?;
        Ok(Report::of(&plan, vec![ip.to_string()], result))
    }

    fn netns(&self) -> Result<Netns, Error> {
        match &self.netns {
            NetnsChoice::New => Ok(Netns::made(&self.name)),
            NetnsChoice::Path(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                Ok(netns::adopt(&path)?)
            }
            NetnsChoice::Pid(pid) => Ok(netns::adopt(&PathBuf::from(format!("/proc/{pid}/ns/net")))?),
        }
    }
}

/// Removes a container and its published ports.
pub(super) fn detach(name: &Name, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let mut locked = LockedState::open_settled(options)?;
    let by_id = locked.by_id(name)?;
    let name = by_id.as_ref().unwrap_or(name);
    locked.endpoint(name)?;
    let mut desired = locked.state.current.clone();
    desired.endpoints.remove(name);
    let plan = locked.change(desired, &Scope::one(name), options, executor)?;
    Ok(Report::of(&plan, vec![format!("{name} is detached")], serde_json::Value::Null))
}
