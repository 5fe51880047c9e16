//! The user of the process, and its capabilities (capabilities(7)).

use std::io;
use std::os::unix::fs::lchown;

use nix::unistd::{setgid, setgroups, setuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities, set_no_new_privs,
};

use super::{Needs, SandboxError, User};

/// The capabilities that serving needs.
pub(super) fn needed(needs: &Needs<'_>) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    // For pipes beyond `fs.pipe-user-pages-soft`, a budget that all bulk transfers of a user share (pipe(7)).
    let tcp = needs.tcp() || needs.changes.is_some();
    needed.set(CapabilitySet::SYS_RESOURCE, tcp);
    // For receive buffers beyond `net.core.rmem_max` (socket(7), `SO_RCVBUFFORCE`), and for changes also to
    // delete stale conntrack entries.
    needed.set(CapabilitySet::NET_ADMIN, needs.udp || needs.changes.is_some());
    // For the addresses of clients, of which either one is enough (ip(7), `IP_TRANSPARENT`). A filter refuses raw sockets.
    // A change may ask for them, too, as may the limits of ports that are attached later.
    let changes_alone = needs.changes.is_some() && !has(CapabilitySet::NET_ADMIN);
    needed.set(CapabilitySet::NET_RAW, needs.sources.clients || needs.sources.devices || changes_alone);
    if needs.sources.clients && !has(CapabilitySet::NET_RAW) {
        needed.insert(CapabilitySet::NET_ADMIN);
    }
    // For new ports below 1024, client sockets on them, and clients that have one.
    let low_ports = needs.low_udp_ports || needs.sources.clients || needs.changes.is_some();
    needed.set(CapabilitySet::NET_BIND_SERVICE, low_ports);
    needed
}

/// Whether the process has a capability.
fn has(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|own| own.permitted.contains(capability))
}

/// Calls `open` without the effective capability `CAP_NET_ADMIN`. What it opens never has that power, although the process may
/// keep it: for netlink, the kernel asks both whoever has opened a socket and whoever sends.
pub(super) fn without_net_admin<T>(open: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = capabilities(None)?;
    let lowered = CapabilitySets { effective: own.effective - CapabilitySet::NET_ADMIN, ..own };
    set_capabilities(None, lowered)?;
    let opened = open();
    set_capabilities(None, own)?;
    opened
}

/// Changes to `user` and keeps those of the capabilities `kept` that the process has.
pub(super) fn change_user(user: Option<&User>, kept: CapabilitySet) -> Result<(), SandboxError> {
    let Some(user) = user else { return Ok(()) };
    let change = || -> io::Result<()> {
        // Otherwise they are lost with the change; see capabilities(7) on SECBIT_KEEP_CAPS.
        set_keep_capabilities(true)?;
        setgroups(&[user.gid()])?;
        setgid(user.gid())?;
        setuid(user.uid())?;
        keep(kept).map(drop)
    };
    change().map_err(|source| SandboxError::User { user: user.to_string(), source })
}

/// Makes `user` the owner of `path`.
pub(super) fn give_to(user: &User, path: &std::path::Path) -> Result<(), SandboxError> {
    lchown(path, Some(user.uid().as_raw()), Some(user.gid().as_raw())).map_err(|source| SandboxError::Owner {
        user: user.to_string(),
        path: path.to_owned(),
        source,
    })
}

/// Drops all capabilities except `kept`, and returns the names of those that remain.
pub(super) fn keep(kept: CapabilitySet) -> io::Result<String> {
    let left = capabilities(None)?.permitted & kept;
    set_capabilities(
        None,
        CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() },
    )?;
    let names: Vec<_> = left.iter_names().map(|(name, _set)| name.to_lowercase()).collect();
    Ok(if names.is_empty() { "none".to_owned() } else { names.join(",") })
}

/// Prevents executed programs from gaining privileges. Unprivileged seccomp filters require this.
pub(super) fn refuse_new() -> io::Result<String> {
    set_no_new_privs(true)?;
    Ok("set".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Sources;
    use super::*;

    #[test]
    fn a_capability_is_there_again_after_something_was_opened_without_it() {
        let before = capabilities(None).unwrap();
        let during = without_net_admin(|| Ok(capabilities(None)?)).unwrap();
        assert!(!during.effective.contains(CapabilitySet::NET_ADMIN));
        assert_eq!(during.permitted, before.permitted);
        assert_eq!(capabilities(None).unwrap(), before);
    }

    #[test]
    fn no_capability_is_kept_that_is_of_no_use() {
        let needs = |udp, tcp_backends| Needs { udp, tcp_backends, ..Needs::to_serve([]) };
        assert_eq!(needed(&needs(false, vec![80])), CapabilitySet::SYS_RESOURCE);
        assert_eq!(needed(&needs(true, vec![])), CapabilitySet::NET_ADMIN);
        let clients = Sources { clients: true, ..Sources::default() };
        let of_clients = needed(&Needs { sources: clients, ..needs(false, vec![80]) });
        assert!(of_clients.contains(CapabilitySet::NET_RAW));
        assert_eq!(of_clients.contains(CapabilitySet::NET_ADMIN), !has(CapabilitySet::NET_RAW));
        let low = Needs { low_udp_ports: true, ..needs(true, vec![]) };
        assert_eq!(needed(&low), CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE);
        let changes = Needs { changes: Some(super::super::Changes::default()), ..needs(false, vec![]) };
        let all = CapabilitySet::SYS_RESOURCE | CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
        // One of the two is enough for the addresses of clients.
        let raw = if has(CapabilitySet::NET_ADMIN) { CapabilitySet::empty() } else { CapabilitySet::NET_RAW };
        assert_eq!(needed(&changes), all | raw);
    }
}
