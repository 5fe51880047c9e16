//! The kernel's settings for local ports of the network namespace (ip(7)).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The directory of the settings.
const SETTINGS: &str = "/proc/sys/net/ipv4";

/// The kernel's default range.
const DEFAULT_RANGE: (u16, u16) = (32_768, 60_999);

/// Longer than any list of ports: the kernel merges adjacent ranges.
const MOST_BYTES: usize = 512 * 1024;

/// The ports that the kernel assigns to sockets of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PortRange {
    /// The first and the last port (`ip_local_port_range`).
    pub(super) range: (u16, u16),
    /// Ranges that are not assigned automatically (`ip_local_reserved_ports`).
    pub(super) reserved: Vec<(u16, u16)>,
}

impl Default for PortRange {
    fn default() -> Self {
        Self { range: DEFAULT_RANGE, reserved: Vec::new() }
    }
}

/// The files with the settings, kept open because a confined process cannot open them.
#[derive(Debug)]
pub(super) struct Settings {
    range: Option<File>,
    reserved: Option<File>,
}

impl Settings {
    /// Opens those of this thread's network namespace.
    pub(super) fn open() -> Self {
        let open = |name: &str| File::open(Path::new(SETTINGS).join(name)).ok();
        Self { range: open("ip_local_port_range"), reserved: open("ip_local_reserved_ports") }
    }

    /// Those in files of a test.
    #[cfg(test)]
    pub(super) fn of(range: File, reserved: File) -> Self {
        Self { range: Some(range), reserved: Some(reserved) }
    }

    /// Reads the current settings; the kernel's defaults if a file does not exist. `None` if one cannot be read.
    pub(super) fn read(&self) -> Option<PortRange> {
        let text = |file: &Option<File>| file.as_ref().map_or(Some(String::new()), whole);
        let (range, reserved) = (text(&self.range)?, text(&self.reserved)?);
        Some(PortRange { range: parse_range(&range), reserved: parse_list(&reserved) })
    }
}

/// The text of a file of proc(5), which must be read with one call.
fn whole(file: &File) -> Option<String> {
    let mut bytes = vec![0; 4096];
    loop {
        let len = file.read_at(&mut bytes, 0).ok()?;
        if len < bytes.len() || len >= MOST_BYTES {
            bytes.truncate(len);
            return Some(String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.resize(len * 4, 0);
    }
}

/// Parses the first and the last port.
fn parse_range(text: &str) -> (u16, u16) {
    let bounds: Vec<u16> = text.split_whitespace().filter_map(|port| port.parse().ok()).collect();
    match bounds[..] {
        [first, last] if 0 < first && first <= last => (first, last),
        _ => DEFAULT_RANGE,
    }
}

/// Parses ports and ranges, separated by commas: `8080,9148-9150`.
fn parse_list(text: &str) -> Vec<(u16, u16)> {
    let parse_one = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    text.split(',').filter_map(parse_one).collect()
}

/// A file that contains `text`.
#[cfg(test)]
pub(super) fn file_of(text: &str) -> File {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    let file = File::from(memfd_create(c"settings", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(text.as_bytes(), 0).unwrap();
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_range("32768\t60999\n"), (32_768, 60_999));
        assert_eq!(parse_range("1 1"), (1, 1));
        for text in ["", "0 9", "9 8", "1", "1 2 3", "a b"] {
            assert_eq!(parse_range(text), DEFAULT_RANGE, "{text}");
        }
        assert_eq!(parse_list("8080,9148-9150\n"), [(8080, 8080), (9148, 9150)]);
        assert_eq!(parse_list("\n"), []);
    }

    #[test]
    fn what_there_is_can_be_read_again() {
        let settings = Settings::open();
        let first = settings.read().unwrap();
        let text = std::fs::read_to_string(Path::new(SETTINGS).join("ip_local_port_range"));
        assert_eq!(first.range, text.map_or(DEFAULT_RANGE, |text| parse_range(&text)));
        assert_eq!(settings.read(), Some(first));
    }

    #[test]
    fn settings_longer_than_a_page_are_read_whole() {
        let ports: Vec<(u16, u16)> = (0..4000).map(|port| (2 * port + 1, 2 * port + 1)).collect();
        let text = ports.iter().map(|(port, _last)| port.to_string()).collect::<Vec<_>>().join(",");
        assert!(text.len() > 4 * 4096);
        let [range, reserved] = ["1000\t1999\n", &text].map(file_of);
        let wanted = PortRange { range: (1000, 1999), reserved: ports };
        assert_eq!(Settings::of(range, reserved).read(), Some(wanted));
    }
}
