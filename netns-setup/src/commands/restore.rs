//! What can be restored: after a reboot or an interrupted command, other programs may have taken ports.

use std::collections::BTreeSet;

use rproxy_mapping::interfaces::Interfaces;

use super::Options;
use crate::error::Error;
use crate::executor::Executor;
use crate::host_ip::HostIp;
use crate::interfaces::HostInterfaces;
use crate::model::{Mapping, MappingKey, Topology, Via};
use crate::name::Name;
use crate::observe;
use crate::observed::ObservedRelay;
use crate::plan::Scope;
use crate::relay::process;
use crate::reserve::{self, ReserveError};
use crate::state::State;

/// The part of a wanted state that can be had.
#[derive(Debug, Default)]
pub(super) struct Restorable {
    /// That part. What has to wait for its port is suspended.
    pub(super) desired: Topology,
    /// What has to wait.
    pub(super) waiting: Vec<String>,
    /// What an interrupted command began, and is given up.
    pub(super) given_up: Vec<String>,
}

impl Restorable {
    /// Reserves the ports that are wanted and not served, as far as that is possible. Processes that the state does not
    /// know any more end before that.
    pub(super) fn reserve(
        state: &State,
        desired: Topology,
        options: &Options,
        executor: &mut dyn Executor,
    ) -> Result<Self, Error> {
        if options.dry_run {
            return Self::look(state, desired, options);
        }
        let relay = relay_of(state, &desired, options)?;
        for stray in &relay.strays {
            process::stop(*stray).map_err(observe::ObserveError::Relay)?;
        }
        Ok(Self::of(state, desired, &relay, |mapping| match mapping.via.has_relay() {
            true => executor.reserve(mapping.proto, mapping.host, mapping.host_port).map(drop),
            // Nothing holds it later, either.
            false => try_to_bind(mapping),
        }))
    }

    /// Like [`Restorable::reserve`], without keeping anything. Each port is bound for a moment.
    pub(super) fn look(state: &State, desired: Topology, options: &Options) -> Result<Self, Error> {
        let relay = relay_of(state, &desired, options)?;
        // A supervisor that has to end first still has ports.
        let is_blind = !relay.strays.is_empty();
        Ok(Self::of(state, desired, &relay, |mapping| if is_blind { Ok(()) } else { try_to_bind(mapping) }))
    }

    fn of(
        state: &State,
        desired: Topology,
        relay: &ObservedRelay,
        mut reserve: impl FnMut(&Mapping) -> Result<(), ReserveError>,
    ) -> Self {
        let settled: BTreeSet<MappingKey> =
            state.current.mappings().map(|(_, _, mapping)| mapping.key()).collect();
        let is_held = |key: &MappingKey| relay.served.contains_key(key) || relay.singles.contains_key(key);
        let mut restorable = Self { desired, ..Self::default() };
        let mut mappings = |name: &Name, mapping: &mut Mapping| {
            let key = mapping.key();
            let is_new = !settled.contains(&key);
            if is_held(&key) || lacks_interface(key) || (mapping.via == Via::Dnat && !is_new) {
                return true;
            }
            let Err(why) = reserve(mapping) else {
                mapping.suspended = false;
                return true;
            };
            match is_new {
                true => restorable.given_up.push(format!(
                    "{key} of {name} is not published, which an earlier command had begun: {why}"
                )),
                false => restorable.waiting.push(format!("{key} of {name} is not published: {why}")),
            }
            mapping.suspended = true;
            !is_new
        };
        for (name, endpoint) in &mut restorable.desired.endpoints {
            endpoint.mappings.retain_mut(|mapping| mappings(name, mapping));
        }
        restorable
    }
}

fn try_to_bind(mapping: &Mapping) -> Result<(), ReserveError> {
    reserve::bind(mapping.proto, mapping.host, mapping.host_port).map(drop)
}

/// Whether the interface of a link-local address is gone, which the plan reports.
fn lacks_interface(key: MappingKey) -> bool {
    matches!(key.host, HostIp::Scoped(_, interface) if HostInterfaces.index_of(interface.as_str()).is_none())
}

fn relay_of(state: &State, desired: &Topology, options: &Options) -> Result<ObservedRelay, Error> {
    Ok(observe::relay(&desired.union(&state.owned()), &Scope::All, &options.state_dir)?)
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::testdata;

    fn topology(ports: &[(u16, Via)]) -> Topology {
        let mut topology = testdata::story();
        let web = topology.endpoints.values_mut().next().unwrap();
        let mapping = |(port, via): &(u16, Via)| testdata::mapping(Protocol::Tcp, "*", *port, 80, *via);
        web.mappings = ports.iter().map(mapping).collect();
        topology
    }

    /// What can be had while these ports are taken, with the ports that are in place.
    fn restorable(state: &State, taken: &[u16]) -> (Restorable, Vec<u16>) {
        let desired = state.pending.clone().unwrap_or_else(|| state.current.clone());
        let reserve = |mapping: &Mapping| match taken.contains(&mapping.host_port) {
            true => {
                let MappingKey { proto, host, port } = mapping.key();
                Err(ReserveError::InUse { proto, host, port })
            }
            false => Ok(()),
        };
        let found = Restorable::of(state, desired, &ObservedRelay::default(), reserve);
        let active = found.desired.active().map(|(_, _, mapping)| mapping.host_port).collect();
        (found, active)
    }

    #[test]
    fn a_settled_port_that_is_taken_waits_until_it_is_free() {
        let current = topology(&[(80, Via::Both), (81, Via::Proxy), (82, Via::Dnat)]);
        let (found, active) = restorable(&State { current, pending: None }, &[80, 82]);
        assert_eq!(
            (active, found.given_up.len()),
            (vec![81, 82], 0),
            "one without a socket is the rules' alone"
        );
        assert!(
            found.waiting[0].starts_with("*:80/tcp of web is not published: host port 80/tcp"),
            "{found:?}"
        );
        let again = State { current: found.desired, pending: None };
        let (found, active) = restorable(&again, &[]);
        assert_eq!((active, found.waiting.len()), (vec![80, 81, 82], 0));
    }

    #[test]
    fn a_port_of_an_interrupted_command_is_given_up() {
        let state = State {
            current: topology(&[(80, Via::Both)]),
            pending: Some(topology(&[(80, Via::Both), (81, Via::Proxy), (82, Via::Dnat), (83, Via::Both)])),
        };
        let (found, active) = restorable(&state, &[81, 82]);
        assert_eq!(active, [80, 83]);
        assert_eq!((found.given_up.len(), found.waiting.len()), (2, 0));
        assert_eq!(found.desired.mappings().count(), 2, "{found:?}");
    }

    #[test]
    fn a_port_that_is_served_is_not_bound_again() {
        let current = topology(&[(80, Via::Both)]);
        let port = crate::plan::relayed_ports(&current).remove(0);
        let relay = ObservedRelay { served: [(port.key, port)].into(), ..ObservedRelay::default() };
        let state = State { current: current.clone(), pending: None };
        let found = Restorable::of(&state, current.clone(), &relay, |mapping| panic!("{mapping:?} is bound"));
        assert_eq!(found.desired, current);
    }
}
