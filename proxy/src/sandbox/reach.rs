//! The files and ports that can be accessed (Landlock, landlock(7)).

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use nix::sys::utsname::uname;

use super::{Changes, Needs};

/// The newest rights to files that are restricted. Later ones are of devices, of which none can be opened.
const FILES: ABI = ABI::V4;

/// The newest scopes that are restricted.
const SCOPES: ABI = ABI::V6;

/// The first kernel with Landlock.
const FIRST_KERNEL: (u32, u32) = (5, 13);

/// The port of name servers (RFC 1035, section 4.2).
const NAME_SERVER: u16 = 53;

/// The network settings, which the first UDP mapping reads when it is added.
const NETWORK_SETTINGS: &str = "/proc/sys/net/ipv4";

/// What Landlock restricts for this process, in the order in which kernels learned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Files,
    Ports,
    Scopes,
}

impl Part {
    const ALL: [Self; 3] = [Self::Files, Self::Ports, Self::Scopes];

    /// The interface that it came with.
    fn since(self) -> ABI {
        match self {
            Self::Files => ABI::V1,
            Self::Ports => ABI::V4,
            Self::Scopes => ABI::V6,
        }
    }
}

/// What it is, and the first kernel that can restrict it (landlock(7), VERSIONS).
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Files => "files (Linux 5.13)",
            Self::Ports => "TCP ports (Linux 6.7)",
            Self::Scopes => "signals and abstract sockets (Linux 6.12)",
        })
    }
}

/// How far the process is restricted: all of it, but for what this kernel is too old for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reach {
    lacking: Vec<Part>,
}

impl Reach {
    fn of(needs: &Needs<'_>, abi: ABI) -> Self {
        let is_lacking = |part: &Part| part.since() > abi && is_wanted(*part, needs);
        Self { lacking: Part::ALL.into_iter().filter(is_lacking).collect() }
    }

    /// What this kernel is too old for.
    pub(super) fn lacking(&self) -> Option<String> {
        let parts: Vec<_> = self.lacking.iter().map(Part::to_string).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// Its state in the log.
impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lacking() {
            None => f.write_str("enforced"),
            Some(_all) if self.lacking.contains(&Part::Files) => {
                f.write_str("unavailable: this kernel is older than it (Linux 5.13)")
            }
            Some(some) => write!(f, "enforced, but this kernel is too old for {some}"),
        }
    }
}

/// Whether a process with these needs restricts it.
fn is_wanted(part: Part, needs: &Needs<'_>) -> bool {
    part != Part::Ports || needs.changes.is_none()
}

/// Restricts the process to what it needs, as far as this kernel can.
///
/// # Errors
/// A kernel that is new enough does not have Landlock, or fails.
pub(super) fn restrict(needs: &Needs<'_>) -> io::Result<Reach> {
    let status = rules(needs).and_then(RulesetCreated::restrict_self).map_err(kernels_answer)?;
    let unsupported = |reason: &str| Err(io::Error::new(io::ErrorKind::Unsupported, reason));
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => Ok(Reach::of(needs, effective_abi)),
        LandlockStatus::NotImplemented if is_too_old(&release()) => Ok(Reach::of(needs, ABI::Unsupported)),
        LandlockStatus::NotImplemented => unsupported(
            "this kernel is new enough, but was built without it, or a system call filter around this process hides it",
        ),
        LandlockStatus::NotEnabled => {
            unsupported("it is switched off in this kernel; the boot parameter lsm= has to name landlock")
        }
    }
}

/// Restricts a process that looks names up to read files, and to connect to the ports of name servers.
///
/// # Errors
/// This kernel does not have Landlock, or fails.
pub(super) fn restrict_resolver() -> io::Result<()> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(FILES))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(FILES)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(SCOPES)))
        .and_then(|ruleset| ruleset.create())
        .and_then(|created| created.add_rule(NetPort::new(NAME_SERVER, AccessNet::ConnectTcp)));
    let root = PathFd::new("/").map_err(io::Error::other)?;
    let ruleset = ruleset.and_then(|created| created.add_rule(PathBeneath::new(root, read)));
    ruleset.and_then(RulesetCreated::restrict_self).map(drop).map_err(kernels_answer)
}

/// The version of the running kernel, such as `6.1.0-50-amd64`.
pub(super) fn release() -> String {
    uname().map_or_else(|_error| String::new(), |name| name.release().to_string_lossy().into_owned())
}

/// Whether a kernel of this version was released before Landlock.
fn is_too_old(release: &str) -> bool {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < FIRST_KERNEL,
        _ => false,
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

/// The rules, of which the kernel ignores those that it is too old for.
fn rules(needs: &Needs<'_>) -> Result<RulesetCreated, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(FILES))?;
    if is_wanted(Part::Ports, needs) {
        let bind = if needs.sources.are_bound() { BitFlags::empty() } else { AccessNet::BindTcp.into() };
        ruleset = ruleset.handle_access(bind | AccessNet::ConnectTcp)?;
    }
    let is_abstract = needs.abstract_sockets || needs.unix_backends;
    let scopes = if is_abstract { Scope::Signal.into() } else { Scope::from_all(SCOPES) };
    let created = allow_files(ruleset.scope(scopes)?.create()?, needs)?;
    match &needs.changes {
        Some(_changes) => Ok(created),
        // Binding is refused for all ports, unless connections come from those of clients. (A connect does not need it
        // for its local port.)
        None => created
            // Before Linux 6.14, the rules for TCP also bind SCTP (hook_socket_connect in security/landlock/net.c).
            .add_rules(
                needs
                    .tcp_backends
                    .iter()
                    .chain(&needs.sctp_backends)
                    .map(|port| Ok(NetPort::new(*port, AccessNet::ConnectTcp))),
            ),
    }
}

fn allow_files(created: RulesetCreated, needs: &Needs<'_>) -> Result<RulesetCreated, RulesetError> {
    let directory = |path: &Path| path.parent().unwrap_or(Path::new("")).to_owned();
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let sockets = needs.unix_sockets.iter().map(|path| (directory(path), AccessFs::RemoveFile.into()));
    let hosts = needs.unix_host_files.iter().map(|path| {
        let bind = if needs.binds_unix_sockets() { AccessFs::MakeSock.into() } else { BitFlags::empty() };
        (directory(path), bind | AccessFs::RemoveFile)
    });
    let mut allowed: Vec<(PathBuf, BitFlags<AccessFs>)> = sockets.chain(hosts).collect();
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

#[cfg(test)]
mod tests {
    use super::super::Changes;
    use super::*;

    #[test]
    fn what_a_kernel_is_too_old_for_is_named_with_the_first_that_has_it() {
        let fixed = Needs::to_serve([]);
        let changing = Needs { changes: Some(Changes::default()), ..Needs::to_serve([]) };
        let scopes = "signals and abstract sockets (Linux 6.12)";
        let no_ports = format!("TCP ports (Linux 6.7), {scopes}");
        let nothing = format!("files (Linux 5.13), {no_ports}");
        for (needs, abi, lacking) in [
            (&fixed, 0, Some(nothing.as_str())),
            (&fixed, 1, Some(no_ports.as_str())),
            (&fixed, 2, Some(no_ports.as_str())),
            (&fixed, 3, Some(no_ports.as_str())),
            (&fixed, 4, Some(scopes)),
            (&fixed, 5, Some(scopes)),
            (&fixed, 6, None),
            (&fixed, 7, None),
            (&changing, 2, Some(scopes)),
            (&changing, 7, None),
        ] {
            assert_eq!(Reach::of(needs, ABI::from(abi)).lacking().as_deref(), lacking, "{abi}");
        }
        let text = |abi| Reach::of(&fixed, ABI::from(abi)).to_string();
        assert_eq!(text(7), "enforced");
        assert_eq!(text(2), format!("enforced, but this kernel is too old for {no_ports}"));
        assert!(text(0).starts_with("unavailable: "), "{}", text(0));
    }

    #[test]
    fn kernels_before_landlock_are_told_from_those_without_it() {
        for old in ["5.12.19", "5.10.0-32-cloud-amd64", "4.19", "3.10.0-1160.el7.x86_64"] {
            assert!(is_too_old(old), "{old}");
        }
        for new in ["5.13.0", "5.13-rc1", "6.1.0-50-amd64", "6.12.117+deb13-cloud-amd64", "10.0", "", "x.y"] {
            assert!(!is_too_old(new), "{new}");
        }
    }
}
