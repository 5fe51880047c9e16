//! Persists kernel parameters in a file that `sysctl --system` reads at boot.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::model::Network;
use crate::name::IfName;

/// The directory. Boot scripts read it in the order of the files' names.
pub const DIR: &str = "/etc/sysctl.d";

/// What the names of the files begin with. The number sorts them after the distribution's files and before an
/// administrator's.
const PREFIX: &str = "60-netns-setup";

/// What the first line of a file begins with, before the bridge.
const HEADER: &str = "# Written by netns-setup for the bridge ";

/// What a file may contain besides its first line: forwarding, regardless of its previous value.
const V4: &str = "net.ipv4.ip_forward = 1";
const V6: &str = "net.ipv6.conf.all.forwarding = 1";

/// The file of the network with `bridge`.
#[must_use]
pub fn file(bridge: &IfName) -> PathBuf {
    Path::new(DIR).join(format!("{PREFIX}-{bridge}.conf"))
}

fn header(bridge: &str) -> String {
    format!("{HEADER}{bridge}; `netns-setup down` removes it.")
}

/// The content for a network.
#[must_use]
pub fn text(network: &Network) -> String {
    let v6 = network.subnet6.map_or_else(String::new, |_| format!("{V6}\n"));
    format!("{}\n{V4}\n{v6}", header(network.bridge.as_str()))
}

/// Whether this program wrote a text for `bridge`, now or before, and nobody has changed it since.
#[must_use]
pub fn is_ours(text: &str, bridge: &str) -> bool {
    let mut lines = text.lines();
    lines.next() == Some(header(bridge).as_str()) && lines.all(|line| line == V4 || line == V6)
}

/// The files that this program wrote for networks that are not up any more, except those that somebody still has, with
/// their content. A reboot leaves them, on purpose, but no state.
#[must_use]
pub fn leftovers(kept: &[PathBuf]) -> Vec<PathBuf> {
    let files = std::fs::read_dir(DIR).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> = files.filter(|path| !kept.contains(path) && is_written_here(path)).collect();
    found.sort();
    found
}

fn is_written_here(path: &Path) -> bool {
    let name = path.file_stem().and_then(OsStr::to_str).filter(|name| name.starts_with(PREFIX));
    let Some(text) = name.and_then(|_| read(path).ok()?) else { return false };
    let bridge = text.strip_prefix(HEADER).and_then(|rest| rest.split(';').next());
    bridge.is_some_and(|bridge| is_ours(&text, bridge))
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
    fn a_file_is_ours_until_somebody_changes_it() {
        let text = text(&crate::testdata::network());
        assert!(is_ours(&text, "docker0") && is_ours(&format!("{text}{V6}\n"), "docker0"));
        assert!(!is_ours(&text, "br7"));
        assert!(!is_ours(&format!("{text}vm.swappiness = 1\n"), "docker0"));
        assert!(!is_ours(&text.replace("= 1", "= 0"), "docker0"));
        assert!(!is_ours("net.ipv4.ip_forward = 1\n", "docker0"));
        let (temp, name) = (tempfile::tempdir().unwrap(), |name: &str| format!("{name}.conf"));
        for (name, text, expected) in [
            (name("60-netns-setup"), text.clone(), true),
            (name("60-netns-setup-docker0"), text.clone(), true),
            (name("99-admin"), text.clone(), false),
            (name("60-netns-setup-br7"), format!("# mine\n{text}"), false),
        ] {
            let path = temp.path().join(name);
            std::fs::write(&path, text).unwrap();
            assert_eq!(is_written_here(&path), expected, "{}", path.display());
        }
    }

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
