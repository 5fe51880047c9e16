//! Lets loopback addresses of the host be routed to containers, for ports that the kernel alone serves on `127.0.0.1`.

use std::io;
use std::net::IpAddr;

use super::error::CniError;
use crate::observed::Side;
use crate::sysctl;

/// The interface by which the host reaches `ip`: that of the longest prefix among its routes.
pub(super) fn interface_to(ip: IpAddr, side: &Side) -> Option<String> {
    let leads = side.routes.iter().filter_map(|route| {
        let destination = route.destination?;
        let network = ipnet::IpNet::new(destination.ip, destination.prefix).ok()?;
        network.contains(&ip).then_some((destination.prefix, route.oif?))
    });
    let (_, index) = leads.max_by_key(|(prefix, _)| *prefix)?;
    side.links.iter().find(|link| link.index == index).map(|link| link.name.clone())
}

/// The interfaces where this plugin has to allow it, or has: those of `ours`, and of `wanted` where nobody else does.
pub(super) fn to_allow(ours: &[String], wanted: &[String]) -> Result<Vec<String>, CniError> {
    let mut allowed = ours.to_vec();
    for interface in wanted.iter().filter(|interface| !ours.contains(interface)) {
        let key = key(interface);
        let value =
            sysctl::read(&key).map_err(|source| CniError::Host { step: format!("read {key}"), source })?;
        if value.as_deref() == Some(FORBIDDEN) {
            allowed.push(interface.clone());
        }
    }
    Ok(allowed)
}

/// Allows it on those interfaces of `ours` that are wanted, and forbids it on the others. Returns where it is allowed.
pub(super) fn settle(ours: &[String], wanted: &[String]) -> Result<Vec<String>, CniError> {
    let (stay, go): (Vec<String>, Vec<String>) =
        ours.iter().cloned().partition(|interface| wanted.contains(interface));
    stay.iter().try_for_each(|interface| set(interface, ALLOWED))?;
    go.iter().try_for_each(|interface| set(interface, FORBIDDEN))?;
    Ok(stay)
}

/// What an interface lacks, for people.
pub(super) fn missing(interface: Option<&str>) -> Result<Option<String>, CniError> {
    let Some(interface) = interface else { return Ok(None) };
    let key = key(interface);
    let value =
        sysctl::read(&key).map_err(|source| CniError::Host { step: format!("read {key}"), source })?;
    Ok(value.filter(|value| value != ALLOWED).map(|value| format!("{key} is {value}, not {ALLOWED}")))
}

const ALLOWED: &str = "1";
const FORBIDDEN: &str = "0";

fn key(interface: &str) -> String {
    sysctl::of_interface("ipv4", interface, "route_localnet")
}

fn set(interface: &str, value: &str) -> Result<(), CniError> {
    let key = key(interface);
    match sysctl::write(&key, value) {
        // An interface that is gone has no parameter.
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(CniError::Host { step: format!("set {key}={value}"), source })
        }
        _ => Ok(()),
    }
}
