//! Finds network namespaces that live on without their name: `ip netns delete` takes only that away, while processes are
//! in one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::netns::Handle;

/// Where namespaces with these cookies are: the file of a process, or another mount.
#[must_use]
pub fn find(cookies: &BTreeSet<u64>) -> BTreeMap<u64, PathBuf> {
    let mut found = BTreeMap::new();
    if cookies.is_empty() {
        return found;
    }
    let identity = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    // Most processes are in the namespace of this one.
    let mut seen: BTreeSet<_> = identity(Path::new("/proc/thread-self/ns/net")).into_iter().collect();
    for path in of_processes().chain(mounted()) {
        let is_new = identity(&path).is_some_and(|identity| seen.insert(identity));
        let cookie = || Handle::open_path(&path).and_then(|handle| handle.cookie()).ok().flatten();
        if is_new && let Some(cookie) = cookie().filter(|cookie| cookies.contains(cookie)) {
            found.insert(cookie, path);
        }
    }
    found
}

fn of_processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let processes =
        entries.filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit));
    processes.map(|entry| entry.path().join("ns/net"))
}

/// What `nsfs` is mounted on (proc_pid_mountinfo(5)).
fn mounted() -> impl Iterator<Item = PathBuf> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        // A path with blanks is escaped, and not looked at.
        kind.starts_with("nsfs ").then(|| fields.split(' ').nth(4).map(PathBuf::from))?
    });
    points.collect::<Vec<_>>().into_iter()
}
