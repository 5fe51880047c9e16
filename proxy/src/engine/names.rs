//! Leads mappings to what the names of their backends stand for, at each change and when that changes.

use std::collections::HashSet;
use std::net::IpAddr;

use rproxy_mapping::Mapping;
use rproxy_mapping::backend::{BackendHost, HostName};
use rproxy_mapping::name::Name;

use crate::bind::report_unused;
use crate::engine::Server;
use crate::engine::change::{Prepared, Removal};
use crate::engine::change_error::ChangeError;
use crate::engine::plan::Plan;
use crate::engine::registry::Served;
use crate::loops::whereabouts::Whereabouts;
use crate::names::names_of;

impl Server {
    /// The same plan with what the names of its backends stand for.
    pub(super) async fn with_addresses(&mut self, mut plan: Plan) -> Result<Plan, ChangeError> {
        let names = names_of(plan.mappings());
        if names.is_empty() {
            return Ok(plan);
        }
        Box::pin(self.names.look_up(names)).await;
        for (name, mapping) in plan.add.iter_mut().chain(&mut plan.change) {
            let resolved = self.names.resolved(mapping);
            *mapping = self.without_loops(name, resolved);
            self.names
                .refuse_unresolved(mapping)
                .map_err(|source| ChangeError::Name { name: name.clone(), source })?;
        }
        Ok(plan)
    }

    /// Has all mappings whose backends have these names lead to what those stand for now.
    pub(crate) async fn follow(&mut self, hosts: &HashSet<HostName>) {
        let is_meant =
            |served: &Served| served.mapping.backend().name().is_some_and(|name| hosts.contains(name));
        let theirs = self.registry.requested().filter(|(_name, served)| is_meant(served));
        let mut changed = Vec::new();
        for (name, served) in theirs {
            let resolved = self.names.resolved(&served.mapping);
            let mapping = self.without_loops(name, resolved);
            // A change may have had it lead there already.
            if leads_elsewhere(served.mapping.backend(), mapping.backend()) {
                changed.extend(self.prepare_change(name.clone(), mapping));
            }
        }
        if !changed.is_empty() {
            self.commit(Prepared::changing(changed), Removal::Drain).await;
        }
    }

    /// `mapping` without the addresses of its backend that lead back to it.
    fn without_loops(&self, name: &Name, mapping: Mapping) -> Mapping {
        let BackendHost::Name(host) = mapping.backend() else { return mapping };
        if host.addresses().is_empty() {
            return mapping;
        }
        let mut whereabouts = self.names.whereabouts(host.name());
        let alone = |ip: IpAddr, whereabouts: &mut Whereabouts| {
            let (name, mapping) = (name.clone(), mapping.resolved(&[ip]));
            let mut plan = Plan::default();
            let steps = if self.registry.get(&name).is_some() { &mut plan.change } else { &mut plan.add };
            steps.push((name, mapping));
            self.refuse_loops_by(&plan, whereabouts)
        };
        let is_usable = |ip: &IpAddr| {
            alone(*ip, &mut whereabouts).inspect_err(|reason| report_unused(*ip, reason)).is_ok()
        };
        let usable: Vec<IpAddr> = host.addresses().iter().copied().filter(is_usable).collect();
        mapping.leading_to(&usable)
    }

    /// Forgets the names that no mapping has any more.
    pub(super) fn keep_names(&mut self) {
        if !self.names.is_empty() {
            self.names.keep(&names_of(self.registry.iter().map(|(_name, served)| &served.mapping)));
        }
    }
}

/// Whether the name of a backend stands for others than before, or for nothing for another reason.
fn leads_elsewhere(before: &BackendHost, now: &BackendHost) -> bool {
    let (BackendHost::Name(before), BackendHost::Name(now)) = (before, now) else { return false };
    before.addresses() != now.addresses() || before.no_address() != now.no_address()
}
