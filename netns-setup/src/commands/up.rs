//! `up` and `down`: the bridge, forwarding, and the basic rules.

use serde_json::json;

use super::change::LockedState;
use super::{Options, Report, transparent};
use crate::addr::{Subnet4, Subnet6};
use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::{self, Choice};
use crate::model::{Network, SysctlChange, Topology};
use crate::name::{Id, IfName};
use crate::plan::Scope;
use crate::{observe, persist, sysctl};

/// The arguments of `up`.
#[derive(Debug, Clone)]
pub struct Up {
    /// The name of the bridge.
    pub bridge: IfName,
    /// The pool of addresses.
    pub subnet: Subnet4,
    /// The pool of IPv6 addresses.
    pub subnet6: Option<Subnet6>,
    /// The MTU.
    pub mtu: u32,
    /// The largest packet inside the host; 0 keeps the kernel's value.
    pub gso_max_size: u32,
    /// Whether to persist forwarding across reboots.
    pub persist: bool,
    /// Whether to deliver replies to transparent sockets.
    pub transparent: bool,
}

impl Up {
    pub(super) fn run(&self, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
        let mut locked = LockedState::open_settled(options)?;
        let mut desired = locked.state.current.clone();
        let network = match desired.network.take() {
            Some(network) => self.keep(network)?,
            None => self.create(options)?,
        };
        let mut warnings = detect::interference(&network);
        warnings.extend(router_advertisements(&network)?);
        let mut lines = vec![format!("{} is up with {}", network.bridge, addresses(&network))];
        if let Some(path) = &network.persist {
            lines.push(format!("forwarding is permanent: {} says so at every boot", path.display()));
        }
        if self.transparent {
            let wanted = transparent::with(&desired, &[network.bridge], Some(network.firewall), options)?;
            lines.push(transparent::describe(&wanted));
            warnings.extend(transparent::warnings(&wanted)?);
            desired.transparent = Some(wanted);
        }
        let result = json!({ "network": network, "transparent": desired.transparent });
        desired.network = Some(network);
        let plan = locked.change(desired, &Scope::All, options, executor)?;
        warnings.extend(plan.problems);
        Ok(Report { warnings, ..Report::of(&plan.steps, lines, result) })
    }

    /// The network that is up, which must match the requested one.
    fn keep(&self, network: Network) -> Result<Network, Error> {
        let is =
            describe(&network.bridge, network.subnet, network.subnet6, network.mtu, network.gso_max_size);
        let wanted = describe(&self.bridge, self.subnet, self.subnet6, self.mtu, self.gso_max_size);
        if is != wanted {
            return Err(Error::OtherNetwork { is, wanted });
        }
        let persist = network.persist.or_else(|| self.persist.then(|| persist::FILE.into()));
        Ok(Network { persist, ..network })
    }

    fn create(&self, options: &Options) -> Result<Network, Error> {
        Ok(Network {
            id: random_id()?,
            bridge: self.bridge,
            subnet: self.subnet,
            subnet6: self.subnet6,
            mtu: self.mtu,
            gso_max_size: self.gso_max_size,
            firewall: detect::choose(options.firewall.unwrap_or(Choice::Auto))?,
            sysctls: forwarding(self.subnet6.is_some())?,
            persist: self.persist.then(|| persist::FILE.into()),
            last_ip: None,
        })
    }
}

/// Removes everything that this program created.
pub(super) fn down(options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let mut locked = LockedState::open_or_restore(options)?;
    let warnings = locked.restored.clone().into_iter().collect();
    let plan = locked.change(Topology::default(), &Scope::All, options, executor)?;
    let line =
        if plan.is_empty() { "nothing was up" } else { "everything that netns-setup created is removed" };
    Ok(Report { warnings, ..Report::of(&plan.steps, vec![line.to_owned()], json!(null)) })
}

/// An identifier of 256 random bits.
pub(super) fn random_id() -> Result<Id, Error> {
    use std::io::Read;
    let mut bytes = [0; 32];
    let mut source = std::fs::File::open("/dev/urandom").map_err(Error::Random)?;
    source.read_exact(&mut bytes).map_err(Error::Random)?;
    Ok(Id::from_bytes(bytes))
}

fn addresses(network: &Network) -> String {
    let v6 = |subnet: Subnet6| format!(" and {}/{}", subnet.gateway(), subnet.prefix());
    let v6 = network.subnet6.map_or_else(String::new, v6);
    format!("{}/{}{v6}", network.subnet.gateway(), network.subnet.prefix())
}

fn describe(bridge: &IfName, subnet: Subnet4, subnet6: Option<Subnet6>, mtu: u32, gso: u32) -> String {
    let subnet6 = subnet6.map_or_else(String::new, |subnet| format!(" --subnet6 {subnet}"));
    format!("--bridge {bridge} --subnet {subnet}{subnet6} --mtu {mtu} --gso-max-size {gso}")
}

/// The parameters that make the host a router and are not set yet.
fn forwarding(ipv6: bool) -> Result<Vec<SysctlChange>, Error> {
    const V4: &str = "net.ipv4.ip_forward";
    const V6: &str = "net.ipv6.conf.all.forwarding";
    // Changing IPv4 forwarding also sets this parameter to a fixed value (inet_forward_change() in
    // net/ipv4/devinet.c). Its own value is therefore recorded, and restored after forwarding is switched off
    // again.
    const REDIRECTS: &str = "net.ipv4.conf.all.accept_redirects";
    let mut changes = Vec::new();
    if let Some(before) = current(V4)?.filter(|before| before != "1") {
        if let Some(before) = current(REDIRECTS)? {
            changes.push(SysctlChange { key: REDIRECTS.to_owned(), before, after: "0".to_owned() });
        }
        changes.push(SysctlChange { key: V4.to_owned(), before, after: "1".to_owned() });
    }
    if ipv6 {
        let before = current(V6)?.ok_or_else(|| Error::NoSysctl(V6.to_owned()))?;
        if before != "1" {
            changes.push(SysctlChange { key: V6.to_owned(), before, after: "1".to_owned() });
        }
    }
    Ok(changes)
}

fn current(key: &str) -> Result<Option<String>, Error> {
    sysctl::read(key).map_err(|source| Error::Sysctl { key: key.to_owned(), source })
}

/// Routers ignore router advertisements by default, so the host may lose its own default route for IPv6.
fn router_advertisements(network: &Network) -> Result<Vec<String>, Error> {
    let turns_router = network.sysctls.iter().any(|change| change.key.starts_with("net.ipv6."));
    if !turns_router {
        return Ok(Vec::new());
    }
    let side = observe::side().map_err(observe::ObserveError::Host)?;
    let learnt = side.routes.iter().filter(|route| {
        route.destination.is_none() && route.gateway.is_some_and(|gateway| gateway.is_ipv6())
    });
    let devices = learnt.filter_map(|route| side.links.iter().find(|link| Some(link.index) == route.oif));
    let listening = devices.filter(|link| {
        let key = sysctl::of_interface("ipv6", &link.name, "accept_ra");
        sysctl::read(&key).ok().flatten().as_deref() == Some("1")
    });
    let warnings = listening.map(|link| {
        let name = &link.name;
        format!("with IPv6 forwarding on, {name} no longer takes router advertisements: set accept_ra of {name} to 2")
    });
    Ok(warnings.collect())
}
