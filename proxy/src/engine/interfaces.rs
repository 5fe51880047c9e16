//! Has mappings listen at the addresses that their interfaces have, at each change and when these change.

use std::collections::BTreeSet;
use std::sync::Arc;

use rproxy_mapping::Mapping;
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::host::InterfaceName;
use rproxy_mapping::name::Name;
use tracing::debug;

use crate::engine::change::Prepared;
use crate::engine::change_error::ChangeError;
use crate::engine::plan::keeps_sockets;
use crate::engine::registry::Served;
use crate::engine::{Server, udp_id};
use crate::state::Binding;

impl Server {
    /// These mappings, where their interfaces have addresses now. One that keeps its sockets stays where it is.
    ///
    /// # Errors
    /// [`ChangeError::Interfaces`]
    pub(super) fn located(&mut self, mut mappings: Vec<Mapping>) -> Result<Vec<Mapping>, ChangeError> {
        if mappings.iter().any(|mapping| mapping.interface().is_some()) {
            self.links.look().map_err(ChangeError::Interfaces)?;
            for mapping in &mut mappings {
                let served = self.registry.get(&mapping.name()).map(|served| &served.mapping);
                let kept = served.filter(|served| keeps_sockets(served, mapping));
                *mapping = match kept {
                    Some(served) => mapping.listening_at(served.addresses()),
                    None => self.links.located(mapping),
                };
            }
        }
        Ok(mappings)
    }

    /// Why the clients of a mapping are refused for now, if they are.
    pub(crate) fn problem_of(&self, name: &Name) -> Option<String> {
        let served = self.registry.get(name)?;
        match served.mapping.interface() {
            Some(interface) if served.ports.is_empty() => self.links.problem_of(interface),
            _ => served.problem(),
        }
    }

    /// Has all mappings of interfaces listen at the addresses that these have now. Others stay as they are.
    pub(crate) async fn follow_interfaces(&mut self) {
        let theirs = self.registry.requested().filter_map(|(name, served)| {
            let interface = served.mapping.interface()?;
            Some((name.clone(), self.links.addresses_of(interface)))
        });
        let theirs: Vec<(Name, Vec<ScopedIp>)> = theirs.collect();
        // First what is gone: another interface may have it now.
        for (name, now) in &theirs {
            self.leave_all_but(name, now).await;
        }
        for (name, now) in &theirs {
            for ip in now {
                match self.serve_at(name, *ip).await {
                    Ok(()) => {}
                    Err(error) if error.is_not_there() => self.refuse_unbindable(name, *ip, &error),
                    Err(error) => self.links.refuse(name, *ip, error.to_string()),
                }
            }
        }
        let is_open = |name: &Name, ip: ScopedIp| {
            let wanted = theirs.iter().any(|(other, now)| other == name && now.contains(&ip));
            wanted && self.registry.get(name).is_some_and(|served| !served.mapping.addresses().contains(&ip))
        };
        self.links.keep_refused(is_open);
        self.tell_interfaces();
    }

    /// Records that the kernel did not let an address be bound, unless it has told that the address is gone again.
    fn refuse_unbindable(&mut self, name: &Name, ip: ScopedIp, error: &ChangeError) {
        if let Err(error) = self.links.look() {
            debug!(%error, "cannot learn what addresses interfaces have");
        }
        let interface = self.registry.get(name).and_then(|served| served.mapping.interface());
        if interface.is_some_and(|interface| self.links.addresses_of(interface).contains(&ip)) {
            self.links.refuse_early(name, ip, error.to_string());
        } else {
            debug!(mapping = %name, %ip, %error, "gone again");
        }
    }

    /// Logs which interfaces of mappings cannot be listened at.
    pub(crate) fn tell_interfaces(&mut self) {
        if !self.links.is_idle() {
            let in_use = self.registry.requested().filter_map(|(_name, served)| served.mapping.interface());
            self.links.tell(&in_use.collect::<BTreeSet<InterfaceName>>());
        }
    }

    /// Closes the listeners of a mapping at all addresses but these. Connections continue; flows end, as no reply can come
    /// from an address that is gone.
    async fn leave_all_but(&mut self, name: &Name, now: &[ScopedIp]) {
        let Some(served) = self.registry.get(name) else { return };
        let is_kept = |binding: &Binding| host_of(binding).is_some_and(|host| now.contains(&host));
        let (kept, gone): (Vec<Binding>, Vec<Binding>) = served.ports.iter().cloned().partition(is_kept);
        if gone.is_empty() {
            return;
        }
        let addresses = served.mapping.addresses().iter().copied();
        let (left, addresses): (Vec<ScopedIp>, Vec<ScopedIp>) = addresses.partition(|ip| !now.contains(ip));
        self.replace(name, addresses, kept);
        for ip in left {
            self.links.log_left(name, ip);
        }
        let (udp, others): (Vec<Binding>, Vec<Binding>) =
            gone.into_iter().partition(|binding| udp_id(binding).is_some());
        self.release(others.into_iter().map(|binding| binding.port).collect()).await;
        self.close_unpublished(udp.into_iter().map(|binding| binding.port).collect()).await;
    }

    /// Has a mapping listen at one more address, if it does not yet.
    async fn serve_at(&mut self, name: &Name, ip: ScopedIp) -> Result<(), ChangeError> {
        let Some(served) = self.registry.get(name) else { return Ok(()) };
        if served.mapping.addresses().contains(&ip) {
            return Ok(());
        }
        let addresses = [served.mapping.addresses(), &[ip]].concat();
        let (there, policy, mut ports) =
            (served.mapping.listening_at(&[ip]), served.policy.clone(), served.ports.clone());
        let looped = |source| ChangeError::Loop { name: name.clone(), source };
        self.refuse_loop(&there).map_err(looped)?;
        let mut prepared = Prepared::missing(there.sockets());
        let new = self.bind_ports(name, &there, &policy, &mut prepared).await?;
        self.begin_at(&new, prepared);
        ports.extend(new.iter().cloned());
        self.replace(name, addresses, ports);
        self.watch(new);
        self.links.log_served(name, ip);
        Ok(())
    }

    /// Replaces the addresses and sockets of a mapping.
    fn replace(&mut self, name: &Name, addresses: Vec<ScopedIp>, ports: Vec<Binding>) {
        if let Some(Served { mapping, policy, process, .. }) = self.registry.get(name) {
            let (mapping, policy) = (mapping.listening_at(&addresses), Arc::clone(policy));
            let served = Served { mapping, policy, ports, process: *process };
            self.registry.put(name.clone(), served);
        }
    }
}

/// The address that a socket is bound to.
fn host_of(binding: &Binding) -> Option<ScopedIp> {
    binding.target.port_mapping.host.inet_addr().map(ScopedIp::from)
}
