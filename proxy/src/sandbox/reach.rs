//! The files and ports that can be accessed (Landlock, landlock(7)).

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{Changes, Needs};

/// What strict confinement requires: ports (Linux 6.7). Signals and abstract sockets (6.12) are restricted if
/// the kernel supports it.
const NEEDED: ABI = ABI::V4;
const WANTED: ABI = ABI::V6;

/// The network settings, which the first UDP mapping reads when it is added.
const NETWORK_SETTINGS: &str = "/proc/sys/net/ipv4";

/// Restricts the process to what it needs, and returns how far that is enforced.
pub(super) fn restrict(needs: &Needs<'_>, strict: bool) -> io::Result<String> {
    let level = if strict { CompatLevel::HardRequirement } else { CompatLevel::BestEffort };
    let status = rules(needs, level).and_then(RulesetCreated::restrict_self).map_err(kernels_answer)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok("enforced".to_owned()),
        RulesetStatus::PartiallyEnforced => {
            Ok("partly enforced, as far as this kernel supports it".to_owned())
        }
        RulesetStatus::NotEnforced => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel does not support it, or it is disabled",
        )),
    }
}

/// The kernel's error, if it is the cause.
fn kernels_answer(error: RulesetError) -> io::Error {
    let (mut answer, mut cause) = (None, error.source());
    while let Some(error) = cause {
        answer = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).or(answer);
        cause = error.source();
    }
    answer.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

fn rules(needs: &Needs<'_>, level: CompatLevel) -> Result<RulesetCreated, RulesetError> {
    let mut ruleset =
        Ruleset::default().set_compatibility(level).handle_access(AccessFs::from_all(NEEDED))?;
    if needs.changes.is_none() {
        let bind = if needs.sources.are_bound() { BitFlags::empty() } else { AccessNet::BindTcp.into() };
        ruleset = ruleset.handle_access(bind | AccessNet::ConnectTcp)?;
    }
    let scopes = if needs.abstract_sockets { Scope::Signal.into() } else { Scope::from_all(WANTED) };
    let ruleset = ruleset.set_compatibility(CompatLevel::BestEffort).scope(scopes)?;
    let created = allow_files(ruleset.create()?, needs)?;
    match &needs.changes {
        Some(_changes) => Ok(created),
        // Binding is refused for all ports, unless connections come from those of clients. (A connect does not need it
        // for its local port.)
        None => created
            .add_rules(needs.tcp_backends.iter().map(|port| Ok(NetPort::new(*port, AccessNet::ConnectTcp)))),
    }
}

fn allow_files(created: RulesetCreated, needs: &Needs<'_>) -> Result<RulesetCreated, RulesetError> {
    let directory = |path: &Path| path.parent().unwrap_or(Path::new("")).to_owned();
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let sockets = needs.unix_sockets.iter().map(|path| (directory(path), AccessFs::RemoveFile.into()));
    let mut allowed: Vec<(PathBuf, BitFlags<AccessFs>)> = sockets.collect();
    if let Some(Changes { configuration }) = needs.changes {
        allowed.push((NETWORK_SETTINGS.into(), AccessFs::ReadFile.into()));
        allowed.extend(configuration.map(|path| (directory(path), read)));
    }
    let rules = allowed.into_iter().filter_map(|(path, access)| {
        // The parent of a bare file name is the current directory.
        let path = if path.as_os_str().is_empty() { ".".into() } else { path };
        // A path that does not exist needs no rule.
        let fd = PathFd::new(path).ok()?;
        Some(Ok(PathBeneath::new(fd, access)))
    });
    created.add_rules(rules)
}
