//! Ending at once what mappings have left, instead of letting it finish.

use std::collections::HashSet;
use std::sync::Arc;

use rproxy_mapping::PortMapping;
use rproxy_mapping::name::Name;

use crate::engine::Server;
use crate::runtime::poll::WatchedListener;
use crate::state::task::Detached;

impl Server {
    /// Closes listeners at once, and ends their flows. Returns when they are closed.
    pub(crate) async fn close_unpublished(&self, ports: Vec<Arc<WatchedListener>>) {
        for (task, ports) in self.tasks.group(ports, AsRef::as_ref) {
            // If the task is gone, so are its listeners and flows.
            drop(task.close(ports, Detached::Unpublished).await);
        }
    }

    /// Ends the connections and flows of the mappings with these names that lead where their host ports do not lead any
    /// more, whichever mapping has these ports now.
    pub(crate) async fn cut_left(&self, names: &HashSet<Name>) {
        // From then on, nobody gets the old target.
        self.until_responsive().await;
        let mut left = self.live();
        left.retain(|record| names.contains(&record.port.mapping));
        if left.is_empty() {
            return;
        }
        let served = self.registry.iter().flat_map(|(_name, served)| served.targets());
        let targets: HashSet<_> = served.collect();
        left.retain(|record| {
            let PortMapping { protocol, host, .. } = &record.port.port_mapping;
            !targets.contains(&((*protocol, host.clone()), record.backend().clone()))
        });
        self.cut_recorded(&left).await;
    }
}
