//! Changes of who may connect to the Unix sockets of mappings.

use std::collections::HashMap;
use std::sync::Arc;

use rproxy_mapping::name::Name;
use rproxy_mapping::permissions::SocketPermissions;

use super::Server;
use super::change::Prepared;
use super::change_error::ChangeError;
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
        let mut done: Vec<(&SocketFile, &Permissions)> = Vec::new();
        for (name, served) in prepared.served() {
            for (binding, file) in files_of(served) {
                let after = &served.policy.limits.socket;
                let Some(before) = before.get(&id(binding)).filter(|before| *before != after) else {
                    continue;
                };
                if let Err(source) = apply(file, after) {
                    // It has been possible before.
                    done.iter().chain([&(file, before)]).for_each(|(file, before)| drop(apply(file, before)));
                    return Err(ChangeError::Permissions { name: name.clone(), source });
                }
                done.push((file, before));
            }
        }
        Ok(())
    }

    /// What the files have whose mappings change or are removed.
    fn permissions_before(&self, prepared: &Prepared) -> HashMap<usize, Permissions> {
        let names = prepared.names_before().filter_map(|name: &Name| self.registry.get(name));
        let all = names.flat_map(|served| {
            files_of(served).map(|(binding, _file)| (id(binding), served.policy.limits.socket.clone()))
        });
        all.collect()
    }
}

fn apply(file: &SocketFile, permissions: &Permissions) -> Result<(), SocketFault> {
    set_permissions(file, &permissions.as_deref().cloned().unwrap_or_default())
}

/// The sockets with files that are this process's own, and these.
fn files_of(served: &Served) -> impl Iterator<Item = (&Binding, &SocketFile)> {
    served.ports.iter().filter_map(|binding| {
        let file = binding.port.file().filter(|file| file.was_owned())?;
        Some((binding, file))
    })
}

/// What tells a socket from others while it is open.
fn id(binding: &Binding) -> usize {
    Arc::as_ptr(&binding.port).addr()
}
