//! How many descriptors this process has open.
//!
//! `/proc/self/fd` is opened before confinement, which allows no further access to it.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::dir::Dir;
use nix::sys::resource::{Resource, getrlimit};

/// The directory of open descriptors.
#[derive(Debug)]
pub(super) struct OpenDescriptors(File);

impl OpenDescriptors {
    /// Opens the directory, if proc(5) is mounted.
    pub(super) fn watch() -> Option<Self> {
        File::open("/proc/self/fd").ok().map(Self)
    }

    /// The number of open descriptors. Since Linux 6.2 it is the size of the directory (proc_fd_getattr in
    /// fs/proc/fd.c); before, all entries have to be listed.
    pub(super) fn count(&self) -> Option<u64> {
        match self.0.metadata() {
            Ok(metadata) if metadata.len() > 0 => Some(metadata.len()),
            _ => self.listed(),
        }
    }

    fn listed(&self) -> Option<u64> {
        let mut directory = Dir::from_fd(OwnedFd::from(self.0.try_clone().ok()?)).ok()?;
        let names = directory.iter().filter_map(Result::ok);
        let numbers = names.filter(|entry| !entry.file_name().to_bytes().starts_with(b"."));
        // Without the duplicate that lists them.
        u64::try_from(numbers.count()).ok()?.checked_sub(1)
    }
}

/// The limit of descriptors (`RLIMIT_NOFILE`).
pub(super) fn limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _hard)| soft)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn descriptors_are_counted() {
        // Other tests open and close descriptors meanwhile, so this one runs alone in a process.
        if std::env::var_os("RPROXY_TEST_ALONE").is_none() {
            let name = "metrics::descriptors::tests::descriptors_are_counted";
            let alone = Command::new(std::env::current_exe().unwrap())
                .args([name, "--exact", "--test-threads=1"])
                .env("RPROXY_TEST_ALONE", "1")
                .output()
                .unwrap();
            assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
            return;
        }
        let open = OpenDescriptors::watch().unwrap();
        let before = open.count().unwrap();
        assert_eq!(open.listed(), Some(before));
        let more: Vec<File> = (0..5).map(|_| File::open("/dev/null").unwrap()).collect();
        assert_eq!((open.count(), open.listed()), (Some(before + 5), Some(before + 5)));
        drop(more);
        assert_eq!((open.count(), open.listed()), (Some(before), Some(before)));
        assert!(limit().is_some_and(|limit| limit > before));
    }
}
