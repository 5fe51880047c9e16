//! `up`: the bridge, forwarding, and the basic rules.

use std::path::PathBuf;

use serde_json::json;

use super::locked::LockedState;
use super::restore::Restorable;
use super::{Options, Report, transparent};
use crate::addr::{Subnet4, Subnet6};
use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::{self, Choice};
use crate::model::{Firewall, Network, SysctlChange};
use crate::name::{Id, IfName};
use crate::netlink::xfrm;
use crate::registry::Other;
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
    /// Whether to switch IPv6 off in the containers.
    pub disable_ipv6: bool,
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
            None => {
                if let Some(orphan) = locked.orphans()?.iter().find(|orphan| orphan.bridge() == self.bridge) {
                    return Err(orphan.error());
                }
                self.create(options, &locked.others()?)?
            }
        };
        let mut warnings = detect::interference(&network, &desired);
        warnings.extend(router_advertisements(&network)?);
        if network.firewall != Firewall::None
            && xfrm::blocked().map_err(observe::ObserveError::Policies)?.is_none()
        {
            warnings.push(
                "this kernel has no IPsec policies (CONFIG_XFRM_USER): if somebody flushes all rules, neighbours reach the \
                 containers until `netns-setup repair`"
                    .to_owned(),
            );
        }
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
        // After a reboot, it restores what is published.
        let Restorable { desired, waiting, .. } =
            Restorable::reserve(&locked.state, desired, options, executor)?;
        let plan = locked.restore(desired, options, executor)?;
        warnings.extend(plan.problems.iter().cloned().chain(waiting));
        Ok(Report::of(&plan, lines, result).warning(warnings))
    }

    /// The network that is up, which must match the requested one.
    fn keep(&self, network: Network) -> Result<Network, Error> {
        let is = describe(&network);
        let wanted = describe(&Network {
            bridge: self.bridge,
            subnet: self.subnet,
            subnet6: self.subnet6,
            disable_ipv6: self.disable_ipv6,
            mtu: self.mtu,
            gso_max_size: self.gso_max_size,
            ..network.clone()
        });
        if is != wanted {
            return Err(Error::OtherNetwork { is, wanted });
        }
        let persist = network.persist.or_else(|| self.persist.then(|| persist::file(&network.bridge)));
        Ok(Network { persist, ..network })
    }

    fn create(&self, options: &Options, others: &[Other]) -> Result<Network, Error> {
        let file = persist::file(&self.bridge);
        // It outlives a reboot, so that `down` has to know it again.
        let is_left = |file: &PathBuf| {
            let text = persist::read(file).ok().flatten();
            text.is_some_and(|text| persist::is_ours(&text, self.bridge.as_str()))
        };
        Ok(Network {
            id: Id::random().map_err(Error::Random)?,
            bridge: self.bridge,
            subnet: self.subnet,
            subnet6: self.subnet6,
            disable_ipv6: self.disable_ipv6,
            mtu: self.mtu,
            gso_max_size: self.gso_max_size,
            firewall: detect::choose(options.firewall.unwrap_or(Choice::Auto))?,
            sysctls: forwarding(self.subnet6.is_some(), others)?,
            persist: Some(file).filter(|file| self.persist || is_left(file)),
            last_ip: None,
        })
    }
}

fn addresses(network: &Network) -> String {
    let v6 = |subnet: Subnet6| format!(" and {}/{}", subnet.gateway(), subnet.prefix());
    let v6 = network.subnet6.map_or_else(String::new, v6);
    format!("{}/{}{v6}", network.subnet.gateway(), network.subnet.prefix())
}

/// The options of a network.
fn describe(network: &Network) -> String {
    let Network { bridge, subnet, subnet6, disable_ipv6, mtu, gso_max_size, .. } = network;
    let subnet6 = subnet6.map_or_else(String::new, |subnet| format!(" --subnet6 {subnet}"));
    let disable_ipv6 = if *disable_ipv6 { " --disable-ipv6" } else { "" };
    format!(
        "--bridge {bridge} --subnet {subnet}{subnet6}{disable_ipv6} --mtu {mtu} --gso-max-size {gso_max_size}"
    )
}

/// The parameters that make the host a router and are not set yet, or that other networks have set: the last one to go
/// restores them.
fn forwarding(ipv6: bool, others: &[Other]) -> Result<Vec<SysctlChange>, Error> {
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
    let is_known = |known: &[SysctlChange], key: &str| known.iter().any(|change| change.key == key);
    let theirs = others.iter().filter_map(|other| other.state.owned().network);
    for change in theirs.flat_map(|network| network.sysctls) {
        let is_needed = ipv6 || !change.key.starts_with("net.ipv6.");
        if is_needed && !is_known(&changes, &change.key) {
            changes.push(change);
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
