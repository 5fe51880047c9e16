//! Changes of who may connect to the Unix sockets of mappings.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rproxy_mapping::name::Name;
use rproxy_mapping::permissions::SocketPermissions;

use super::Server;
use super::change::{ChangeError, Prepared};
use super::registry::Served;
use crate::bind::unix_socket::{SocketFault, set_permissions};
use crate::runtime::socket_file::SocketFile;
use crate::state::Binding;

type Permissions = Option<Arc<SocketPermissions>>;

impl Server {
    /// Gives the files of sockets that go on listening the permissions that their mappings ask for from now on. If that fails,
    /// they have those of before.
    ///
    /// # Errors
    /// [`ChangeError::Permissions`]
    pub(super) fn change_permissions(&self, prepared: &Prepared) -> Result<(), ChangeError> {
        let before = self.permissions_before(prepared);
        let mut done: Vec<(&Path, &Permissions)> = Vec::new();
        for (name, served) in prepared.served() {
            for (binding, path) in files_of(served) {
                let after = &served.policy.limits.socket;
                let Some(before) = before.get(&id(binding)).filter(|before| *before != after) else {
                    continue;
                };
                if let Err(source) = apply(path, after) {
                    // It has been possible before.
                    done.iter().chain([&(path, before)]).for_each(|(path, before)| drop(apply(path, before)));
                    return Err(ChangeError::Permissions { name: name.clone(), source });
                }
                done.push((path, before));
            }
        }
        Ok(())
    }

    /// What the files have whose mappings change or are removed.
    fn permissions_before(&self, prepared: &Prepared) -> HashMap<usize, Permissions> {
        let names = prepared.names_before().filter_map(|name: &Name| self.registry.get(name));
        let all = names.flat_map(|served| {
            files_of(served).map(|(binding, _path)| (id(binding), served.policy.limits.socket.clone()))
        });
        all.collect()
    }
}

fn apply(path: &Path, permissions: &Permissions) -> Result<(), SocketFault> {
    set_permissions(path, &permissions.as_deref().cloned().unwrap_or_default())
}

/// The sockets with files that are this process's own, and the paths of these.
fn files_of(served: &Served) -> impl Iterator<Item = (&Binding, &Path)> {
    served.ports.iter().filter_map(|binding| {
        let is_owned = binding.port.file().is_some_and(SocketFile::is_owned);
        let path = binding.target.port_mapping.host.unix_addr()?.path()?;
        is_owned.then_some((binding, path))
    })
}

/// What tells a socket from others while it is open.
fn id(binding: &Binding) -> usize {
    Arc::as_ptr(&binding.port).addr()
}
