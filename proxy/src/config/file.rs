//! Reading configuration files: regular files and, at the start, also pipes, such as those of a shell's
//! `<(…)`.
//!
//! No read blocks forever or is unbounded. Otherwise, whoever can change what is at the path could stop the
//! process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The maximum length of a configuration, in bytes: tens of thousands of mappings. Reading one takes fifty
/// times as much memory, or a hundred times if there is an error every few bytes.
pub(super) const LONGEST: u64 = 2 * 1024 * 1024;

/// How long to wait for data from a pipe, in milliseconds.
const READ_TIMEOUT: u16 = 60_000;

/// Opens the file at `path` without blocking.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path) -> io::Result<File> {
    // The other end of a FIFO may not be open, and a terminal must not become the controlling terminal.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

/// The number of the descriptor that `path` refers to, as in `/dev/fd/63`.
pub fn descriptor(path: &Path) -> Option<RawFd> {
    let parent = path.parent()?;
    let is_list = ["/dev/fd", "/proc/self/fd"].iter().any(|list| parent == Path::new(list));
    path.file_name().filter(|_number| is_list)?.to_str()?.parse().ok()
}

/// Reads a whole file as text. A pipe can only be read the `first` time; it is empty after that.
///
/// # Errors
/// Those of read(2), or why the file cannot be a configuration.
pub(super) fn text(mut file: File, first: bool) -> io::Result<String> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return refuse("it is a directory; give a file in it");
    }
    if kind.is_char_device() || kind.is_block_device() {
        return refuse("it is a device; give a file");
    }
    if kind.is_fifo() && !first {
        return once();
    }
    if metadata.len() > LONGEST {
        return refuse(TOO_LONG);
    }
    let mut bytes = Vec::new();
    if kind.is_fifo() {
        read_pipe(&mut file, &mut bytes)?;
    } else {
        // It may grow, and files of proc(5) have no size.
        file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    }
    if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
        return refuse(TOO_LONG);
    }
    String::from_utf8(bytes).or_else(|_error| refuse("it is not UTF-8 text"))
}

const TOO_LONG: &str = "it is longer than 2 MiB, the maximum for a configuration";

/// The error for a file that could only be read at the start.
///
/// # Errors
/// Always.
pub(super) fn once<T>() -> io::Result<T> {
    refuse("it is a pipe, which can only be read once, at the start; give a file to allow reloads")
}

fn refuse<T>(reason: &str) -> io::Result<T> {
    Err(io::Error::other(reason))
}

/// Reads until all writers are gone, the maximum is exceeded, or no data arrives in time.
fn read_pipe(pipe: &mut File, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut some = [0; 16 * 1024];
    while u64::try_from(bytes.len()).is_ok_and(|length| length <= LONGEST) {
        // Before a writer opens a FIFO, read(2) returns 0, but poll(2) waits.
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(READ_TIMEOUT)) {
            Ok(0) => return refuse("it is a pipe that nobody has written to for a minute; give a file"),
            Ok(_ready) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match pipe.read(&mut some) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&some[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::*;

    fn refused(file: File, first: bool) -> String {
        text(file, first).unwrap_err().to_string()
    }

    #[test]
    fn a_pipe_is_read_once() {
        let pipe = |written: &'static [u8]| {
            let (reader, mut writer) = io::pipe().unwrap();
            let writer = std::thread::spawn(move || drop(writer.write_all(written)));
            (File::from(OwnedFd::from(reader)), writer)
        };
        let (reader, writer) = pipe(&[b'#'; 200_000]);
        assert_eq!(text(reader, true).unwrap().len(), 200_000);
        writer.join().unwrap();
        let (reader, writer) = pipe(b"#");
        assert!(refused(reader, false).contains("a pipe, which can only be read once"));
        writer.join().unwrap();
        let (reader, writer) = pipe(&[b'#'; 17 * 1024 * 1024]);
        assert!(refused(reader, true).contains("longer than 2 MiB"));
        writer.join().unwrap();
    }

    #[test]
    fn what_is_no_file_is_refused() {
        for (path, reason) in
            [("/proc/self", "a directory"), ("/dev/zero", "a device"), ("/dev/null", "a device")]
        {
            let reason_given = refused(open(Path::new(path)).unwrap(), true);
            assert!(reason_given.contains(reason), "{path}: {reason_given}");
        }
        // A sparse file larger than any memory.
        let file =
            File::from(nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.set_len(1 << 40).unwrap();
        assert!(refused(file.try_clone().unwrap(), false).contains("longer than 2 MiB"));
        file.set_len(0).unwrap();
        (&file).write_all(b"\xff").unwrap();
        io::Seek::rewind(&mut &file).unwrap();
        assert!(refused(file, false).contains("not UTF-8 text"));
        assert!(!text(open(Path::new("/proc/self/status")).unwrap(), false).unwrap().is_empty());
    }

    #[test]
    fn paths_of_descriptors_are_known() {
        for (path, number) in [("/dev/fd/63", 63), ("/proc/self/fd/4", 4)] {
            assert_eq!(descriptor(Path::new(path)), Some(number), "{path}");
        }
        for path in ["/dev/fd", "/dev/fd/x", "/etc/rproxy.toml", "63", ""] {
            assert_eq!(descriptor(Path::new(path)), None, "{path}");
        }
    }
}
