//! Leads mappings to what the names of their backends stand for, at each change and when that changes.

use std::net::IpAddr;

use rproxy_mapping::Mapping;
use rproxy_mapping::backend::{BackendHost, HostName};
use rproxy_mapping::name::Name;
use tracing::warn;

use crate::engine::Server;
use crate::engine::change::{ChangeError, Prepared, Removal};
use crate::engine::plan::Plan;
use crate::loops::whereabouts::Whereabouts;
use crate::names::names_of;

impl Server {
    /// The same plan with what the names of its backends stand for.
    pub(super) async fn with_addresses(&mut self, mut plan: Plan) -> Result<Plan, ChangeError> {
        let names = names_of(plan.mappings());
        if names.is_empty() {
            return Ok(plan);
        }
        self.names.look_up(names).await;
        for (name, mapping) in plan.add.iter_mut().chain(&mut plan.change) {
            let resolved = self.names.resolved(mapping);
            // That the first one leads back is a mistake, which refuses the change.
            *mapping = self.without_loops(name, resolved, 1);
            self.names
                .refuse_unresolved(mapping)
                .map_err(|source| ChangeError::Name { name: name.clone(), source })?;
        }
        Ok(plan)
    }

    /// Has all mappings whose backend is called `host` lead to what that stands for now.
    pub(crate) async fn follow(&mut self, host: &HostName) {
        let theirs =
            self.registry.requested().filter(|(_name, served)| served.mapping.backend().name() == Some(host));
        let theirs: Vec<(Name, Mapping)> =
            theirs.map(|(name, served)| (name.clone(), self.names.resolved(&served.mapping))).collect();
        let mut changed = Vec::with_capacity(theirs.len());
        for (name, mapping) in theirs {
            let mapping = self.without_loops(&name, mapping, 0);
            changed.extend(self.prepare_change(name, mapping));
        }
        self.commit(Prepared::changing(changed), Removal::Drain).await;
    }

    /// `mapping` without the addresses of its backend that lead back to it, but for the first ones.
    fn without_loops(&self, name: &Name, mapping: Mapping, first: usize) -> Mapping {
        let BackendHost::Name(host) = mapping.backend() else { return mapping };
        let mut whereabouts = self.names.whereabouts(host.name());
        let alone = |ip: IpAddr, whereabouts: &mut Whereabouts| {
            let (name, mapping) = (name.clone(), mapping.resolved(&[ip]));
            let mut plan = Plan::default();
            let steps = if self.registry.get(&name).is_some() { &mut plan.change } else { &mut plan.add };
            steps.push((name, mapping));
            self.refuse_loops_by(&plan, whereabouts)
        };
        let mut usable = host.addresses().to_vec();
        let mut rest = usable.split_off(first.min(usable.len()));
        rest.retain(|ip| match alone(*ip, &mut whereabouts) {
            Ok(()) => true,
            Err(reason) => {
                warn!(address = %ip, %reason, "an address of the backend is not used");
                false
            }
        });
        usable.extend(rest);
        mapping.resolved(&usable)
    }

    /// Forgets the names that no mapping has any more.
    pub(super) fn keep_names(&mut self) {
        if !self.names.is_empty() {
            self.names.keep(&names_of(self.registry.iter().map(|(_name, served)| &served.mapping)));
        }
    }
}
