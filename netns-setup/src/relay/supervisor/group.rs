//! A control group of its own (cgroups(7)), so that a service manager that stops the unit of a command does not end the relay
//! that the command has started.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const MOUNTED: &str = "/sys/fs/cgroup";

/// The name of the group, below the root.
const NAME: &str = "netns-setup-relay";

/// Leaves the groups by which a service manager knows the processes of a unit.
///
/// # Errors
/// If the kernel refuses, as without the right, or where control groups are mounted to be read.
pub(super) fn leave_unit() -> io::Result<()> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    groups.lines().filter_map(|line| new_group(line, Path::new(MOUNTED))).try_for_each(|group| enter(&group))
}

/// The group instead of the one in a line of `/proc/self/cgroup`, if that is one of a unit: in the hierarchy of version 2, and
/// in systemd's own of version 1.
fn new_group(line: &str, mounted: &Path) -> Option<PathBuf> {
    let (hierarchy, group) = line.split_once(":/")?;
    // A process that is in none, as in a container, cannot be stopped by it.
    if group.is_empty() || group == NAME {
        return None;
    }
    let hybrid = mounted.join("unified");
    match hierarchy.split_once(':')? {
        (_, "name=systemd") => Some(mounted.join("systemd").join(NAME)),
        ("0", "") if hybrid.is_dir() => Some(hybrid.join(NAME)),
        ("0", "") => Some(mounted.join(NAME)),
        _ => None,
    }
}

fn enter(group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_groups_of_units_are_left() {
        let temp = tempfile::tempdir().unwrap();
        let group = |line: &str| new_group(line, temp.path());
        let own = temp.path().join(NAME);
        assert_eq!(group("0::/system.slice/net.service"), Some(own));
        assert_eq!(group("0::/"), None);
        assert_eq!(group("0::/netns-setup-relay"), None);
        assert_eq!(group("4:memory:/system.slice/net.service"), None);
        let systemd = temp.path().join("systemd").join(NAME);
        assert_eq!(group("9:name=systemd:/system.slice/net.service"), Some(systemd));
        fs::create_dir(temp.path().join("unified")).unwrap();
        assert_eq!(group("0::/a.scope"), Some(temp.path().join("unified").join(NAME)));
    }
}
