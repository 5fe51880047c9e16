//! Where the state directory is: at its path, unless somebody has moved it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::state;

/// The state directory that was seen last.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// Open, so that it is found again.
    dir: Option<File>,
}

/// The state directory is not where it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Moved {
    /// Where it is.
    pub(super) to: PathBuf,
    /// What to do about it.
    pub(super) note: String,
}

impl Place {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), dir: None }
    }

    /// Where the directory with the state has been moved to; `None` if it is at its path, or is gone.
    pub(super) fn look(&mut self) -> Option<Moved> {
        if has_state(&self.path) || self.known().is_none() {
            // The one at the path is meant, whatever became of another one.
            self.dir = File::open(&self.path).ok();
            return None;
        }
        let to = self.known()?;
        let (path, moved) = (self.path.display(), to.display());
        let note = format!(
            "the state directory {path} was moved to {moved}, where it is watched: move it back, or start `netns-setup watch` \
             with --state-dir {moved}"
        );
        Some(Moved { to, note })
    }

    /// Where the directory that was seen last is now, if it has a state.
    fn known(&self) -> Option<PathBuf> {
        let dir = self.dir.as_ref()?;
        let link = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).ok()?;
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        // The link of one that was deleted leads nowhere, or to another one.
        let is_same = fs::metadata(&link).ok().map(identity) == dir.metadata().ok().map(identity);
        (is_same && has_state(&link)).then_some(link)
    }
}

fn has_state(dir: &Path) -> bool {
    dir.join(state::FILE).symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_moved_is_found_and_one_at_its_path_is_preferred() {
        let temp = tempfile::tempdir().unwrap();
        let [path, other, third] = ["state", "other", "third"].map(|name| temp.path().join(name));
        let mut place = Place::new(&path);
        assert_eq!(place.look(), None, "there is none yet");
        let make = |dir: &Path| {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join(state::FILE), "").unwrap();
        };
        make(&path);
        assert_eq!(place.look(), None);
        fs::rename(&path, &other).unwrap();
        assert_eq!(place.look().unwrap().to, other);
        fs::rename(&other, &third).unwrap();
        assert_eq!(place.look().unwrap().to, third);
        fs::create_dir(&path).unwrap();
        assert_eq!(place.look().unwrap().to, third, "one without a state is no other state");
        make(&path);
        assert_eq!(place.look(), None);
        fs::remove_dir_all(&third).unwrap();
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(place.look(), None, "it is gone");
        make(&path);
        fs::rename(&path, &other).unwrap();
        assert_eq!(place.look(), None, "it was not seen before");
    }
}
