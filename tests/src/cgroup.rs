//! Control groups (cgroups(7)) of a suite, in each hierarchy of this machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the hierarchies are.
const MOUNTED: &str = "/sys/fs/cgroup";

/// The root of version 2's hierarchy, which on some machines is beside those of version 1.
pub fn unified() -> PathBuf {
    let root = Path::new(MOUNTED);
    if root.join("cgroup.procs").exists() { root.to_owned() } else { root.join("unified") }
}

/// Removes the group of this name, with those inside it, wherever there is one that has no process any more.
pub fn remove(name: &str) {
    for root in roots() {
        remove_below(&root.join(name)).ok();
    }
}

/// The root of the one hierarchy, or of each of several.
fn roots() -> Vec<PathBuf> {
    let root = Path::new(MOUNTED);
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).chain([root.into()]).collect()
}

/// Removes a group with those inside it. Their files cannot be removed, and need not be.
fn remove_below(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_below(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
