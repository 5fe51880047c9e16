//! Persists kernel parameters in a file that `sysctl --system` reads at boot.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::model::Network;

/// The file. Its number sorts it after the distribution's files and before an administrator's.
pub const FILE: &str = "/etc/sysctl.d/60-netns-setup.conf";

/// The content for a network: forwarding, regardless of its previous value.
#[must_use]
pub fn text(network: &Network) -> String {
    let mut text = format!(
        "# Written by netns-setup for the bridge {}; `netns-setup down` removes it.\nnet.ipv4.ip_forward = 1\n",
        network.bridge
    );
    if network.subnet6.is_some() {
        text.push_str("net.ipv6.conf.all.forwarding = 1\n");
    }
    text
}

/// Replaces a file atomically. A symbolic link in its place is replaced, not followed.
///
/// # Errors
/// If the directory is missing or cannot be written.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)
}

/// Reads a file; `None` if it does not exist.
///
/// # Errors
/// If it exists but cannot be read.
pub fn read(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_in_the_file_s_place_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let (file, victim) = (temp.path().join("60.conf"), temp.path().join("victim"));
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, &file).unwrap();
        write(&file, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(read(&file).unwrap().as_deref(), Some("new"));
        assert_eq!(read(&temp.path().join("none")).unwrap(), None);
    }
}
