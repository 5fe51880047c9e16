//! `publish` and `unpublish`: mapping ports of the host to containers.

use std::collections::HashSet;
use std::str::FromStr;

use rproxy_mapping::addr::AddrError;
use rproxy_mapping::interfaces::Interfaces;
use serde_json::json;

use super::locked::LockedState;
use super::own_ports::{OwnPorts, Requests};
use super::{Options, Report, show};
use crate::error::Error;
use crate::executor::Executor;
use crate::host_ip::HostIp;
use crate::interfaces::HostInterfaces;
use crate::model::{Firewall, Mapping, MappingKey, Network, Topology, Via};
use crate::name::{Name, NameError};
use crate::plan::Scope;
use crate::publish::{HostPort, Listed, PortRequest, Publication, Published};
use crate::registry::Other;
use crate::reserve::ReserveError;
use crate::shared::Shared;
use crate::taken::Taken;

/// How often to try another random port if one is already translated.
const RANDOM_ATTEMPTS: usize = 100;

/// The arguments of `publish`.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The container.
    pub name: Name,
    /// The ports to publish.
    pub specs: Vec<Publication>,
    /// Whether to publish all exposed ports as well, each on a random port.
    pub all_exposed: bool,
    /// What relays the traffic.
    pub via: Via,
}

impl Publish {
    pub(super) fn run(&self, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
        let mut locked = LockedState::open_settled(options)?;
        if let Some(name) = locked.by_id(&self.name)? {
            drop(locked);
            return Self { name, ..self.clone() }.run(options, executor);
        }
        let network = locked.network()?;
        let (via, warnings) = self.usable_via(network)?;
        let mut desired = locked.state.current.clone();
        let others = locked.others()?;
        let mut taken = AllTaken::of(&desired, &others);
        let mut own = OwnPorts::of(locked.endpoint(&self.name)?.mappings.clone());
        let (mut published, mut seen) = (Vec::new(), HashSet::new());
        for request in self.requests(&locked)? {
            check_family(network, via, &request)?;
            let mapping = match own.fulfilling(&request).cloned() {
                Some(mapping) if mapping.via != via => {
                    return Err(Error::OtherVia(mapping.key(), mapping.via));
                }
                Some(mapping) if mapping.suspended => {
                    executor.reserve(mapping.proto, mapping.host, mapping.host_port)?;
                    Mapping { suspended: false, ..mapping }
                }
                Some(mapping) => mapping,
                None => {
                    let new = claim(&taken, &request, via, executor)?;
                    taken.own.insert(new.key(), &self.name);
                    new
                }
            };
            own.put(mapping.clone());
            if seen.insert(mapping.key()) {
                published.push(mapping);
            }
        }
        if let Some(endpoint) = desired.endpoints.get_mut(&self.name) {
            endpoint.mappings = own.into_mappings();
        }
        let ip = locked.endpoint(&self.name)?.ip;
        let lines =
            published.iter().map(|mapping| format!("{} -> {ip}:{}", mapping.key(), mapping.container_port));
        let lines = lines.collect();
        let plan = locked.change(desired, &Scope::one(&self.name), options, executor)?;
        let relay = show::relay(options);
        let shown = published.iter().map(|mapping| show::mapping(mapping, relay));
        let result = json!({ "mappings": shown.collect::<Vec<_>>() });
        Ok(Report::of(&plan, lines, result).warning(warnings))
    }

    /// All requested ports.
    fn requests(&self, locked: &LockedState) -> Result<Vec<PortRequest>, Error> {
        let endpoint = locked.endpoint(&self.name)?;
        let mut requests: Vec<_> = self.specs.iter().flat_map(|spec| spec.requests()).collect();
        if self.all_exposed {
            if endpoint.exposed.is_empty() {
                return Err(Error::NothingExposed(self.name.clone()));
            }
            requests.extend(endpoint.exposed.iter().map(|(container_port, proto)| PortRequest {
                proto: *proto,
                host: HostIp::Any,
                host_port: HostPort::Random,
                container_port: *container_port,
            }));
        }
        Ok(requests)
    }

    /// Without rules there is no translation, so a relay has to do everything.
    fn usable_via(&self, network: &Network) -> Result<(Via, Vec<String>), Error> {
        match (network.firewall, self.via) {
            (Firewall::None, Via::Dnat) => Err(Error::Usage(
                "--via dnat needs rules, and the network is up with --firewall none".to_owned(),
            )),
            (Firewall::None, Via::Both) => Ok((
                Via::Proxy,
                vec!["without a firewall rproxy relays all traffic, as with --via proxy".to_owned()],
            )),
            (_, via) => Ok((via, Vec::new())),
        }
    }
}

/// Refuses a host address that cannot lead to the container: on an interface that is not there, or by a translation that
/// the kernel does not do, such as that of IPv6 to IPv4.
fn check_family(network: &Network, via: Via, request: &PortRequest) -> Result<(), Error> {
    let host = request.host;
    if let HostIp::Scoped(_, interface) = host
        && HostInterfaces.index_of(interface.as_str()).is_none()
    {
        return Err(Error::Usage(AddrError::NoSuchInterface(interface.to_string()).to_string()));
    }
    if via == Via::Dnat && matches!(host, HostIp::Scoped(..)) {
        // RFC 4291, section 2.5.6: routers do not forward packets with link-local addresses.
        return Err(Error::Usage(format!(
            "--via dnat cannot lead {host} to a container: the kernel forwards nothing that link-local addresses \
             send; use --via both"
        )));
    }
    if host.is_ipv6() && via == Via::Dnat && network.subnet6.is_none() {
        return Err(Error::Usage(format!(
            "--via dnat cannot translate {host} to an IPv4 container: use --via both, or a network with --subnet6"
        )));
    }
    Ok(())
}

/// The ports that are published on this host.
struct AllTaken<'a> {
    own: Taken,
    others: Vec<(&'a Other, Taken)>,
}

impl<'a> AllTaken<'a> {
    fn of(topology: &Topology, others: &'a [Other]) -> Self {
        let others = others.iter().map(|other| (other, Taken::of(&other.state.owned())));
        Self { own: Taken::of(topology), others: others.collect() }
    }

    /// Fails if a port excludes `key`.
    fn check(&self, key: MappingKey) -> Result<(), Error> {
        if let Some(owner) = self.own.owner_of(key) {
            return Err(Error::PortTaken { key, owner: owner.clone() });
        }
        let mut theirs = self.others.iter();
        let shared =
            theirs.find_map(|(other, taken)| Some(Shared::port(key, taken.owner_of(key)?, &other.state_dir)));
        shared.map_or(Ok(()), |shared| Err(shared.into()))
    }
}

/// Finds a host port for `request` and binds it, so that no other program can take it.
fn claim(
    taken: &AllTaken<'_>,
    request: &PortRequest,
    via: Via,
    executor: &mut dyn Executor,
) -> Result<Mapping, Error> {
    let PortRequest { proto, host, host_port, container_port } = *request;
    let random = host_port == HostPort::Random;
    let mut reserve = |port| reserve(taken, MappingKey { proto, host, port }, executor);
    let host_port = match host_port {
        HostPort::Exactly(port) => reserve(port)?,
        HostPort::Random => {
            let mut last = reserve(0);
            for _attempt in 0..RANDOM_ATTEMPTS {
                if !matches!(last, Err(Error::PortTaken { .. } | Error::Shared(_))) {
                    break;
                }
                last = reserve(0);
            }
            last?
        }
        HostPort::FirstFreeOf(range) => first_free(range.iter(), reserve)?,
    };
    Ok(Mapping { proto, host, host_port, random, container_port, via, relay: None, suspended: false })
}

fn first_free(
    ports: impl Iterator<Item = u16>,
    mut reserve: impl FnMut(u16) -> Result<u16, Error>,
) -> Result<u16, Error> {
    let mut last = None;
    for port in ports {
        match reserve(port) {
            Err(Error::PortTaken { .. } | Error::Shared(_)) => {}
            Err(Error::Reserve(error @ ReserveError::InUse { .. })) => last = Some(error),
            other => return other,
        }
    }
    Err(last.map_or_else(
        || Error::Usage("every host port of the range is published already".to_owned()),
        Error::NoFreePort,
    ))
}

fn reserve(taken: &AllTaken<'_>, key: MappingKey, executor: &mut dyn Executor) -> Result<u16, Error> {
    // A port that only the kernel serves has no socket that would make the bind fail.
    taken.check(key)?;
    let port = executor.reserve(key.proto, key.host, key.port)?;
    taken.check(MappingKey { port, ..key }).map(|()| port)
}

/// What `unpublish` is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A container.
    Container(Name),
    /// One port, of whichever container publishes it.
    Port(PortRequest),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("->") {
            return text.parse().map(|Listed(request)| Self::Port(request));
        }
        text.parse().map(Self::Container).map_err(|error: NameError| error.to_string())
    }
}

/// The arguments of `unpublish`.
#[derive(Debug, Clone)]
pub struct Unpublish {
    /// The container, or one of its ports.
    pub target: Target,
    /// The ports to unpublish; all if empty.
    pub specs: Vec<Published>,
}

impl Unpublish {
    pub(super) fn run(&self, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
        let mut locked = LockedState::open_settled(options)?;
        let (name, requests) = self.chosen(&locked)?;
        let mappings = &locked.endpoint(&name)?.mappings;
        let own = OwnPorts::of(mappings.clone());
        if let Some(request) = requests.iter().find(|request| own.fulfilling(request).is_none()) {
            return Err(Error::NotPublished { name, what: describe(request) });
        }
        let wanted = Requests::of(&requests);
        let goes = |mapping: &Mapping| requests.is_empty() || wanted.are_fulfilled_by(mapping);
        let gone: Vec<_> = mappings.iter().filter(|mapping| goes(mapping)).cloned().collect();
        let mut desired = locked.state.current.clone();
        if let Some(endpoint) = desired.endpoints.get_mut(&name) {
            endpoint.mappings.retain(|mapping| !goes(mapping));
        }
        let plan = locked.change(desired, &Scope::one(&name), options, executor)?;
        let lines = gone.iter().map(|mapping| format!("{} is no longer published", mapping.key())).collect();
        let shown: Vec<_> = gone.iter().map(|mapping| show::mapping(mapping, None)).collect();
        Ok(Report::of(&plan, lines, json!({ "mappings": shown })))
    }
}

impl Unpublish {
    /// The container, and which of its ports; all if there are none.
    fn chosen(&self, locked: &LockedState) -> Result<(Name, Vec<PortRequest>), Error> {
        let mut requests: Vec<_> = self.specs.iter().flat_map(Published::requests).collect();
        match &self.target {
            Target::Container(name) => Ok((locked.by_id(name)?.unwrap_or_else(|| name.clone()), requests)),
            Target::Port(request) => {
                locked.network()?;
                let mut all = locked.state.current.mappings();
                let owner =
                    all.find(|(_, _, mapping)| mapping.fulfils(request)).map(|(owner, ..)| owner.clone());
                requests.push(*request);
                Ok((owner.ok_or_else(|| Error::NotPublishedAtAll(describe(request)))?, requests))
            }
        }
    }
}

fn describe(request: &PortRequest) -> String {
    let port = match request.host_port {
        HostPort::Exactly(port) => port.to_string(),
        HostPort::Random | HostPort::FirstFreeOf(_) => String::new(),
    };
    format!("{}:{port}:{}/{}", request.host, request.container_port, request.proto)
}
