//! Explains why no process can be reached through the control socket, and suggests a remedy.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::libc;
use rproxy_mapping::escape::escaped;

/// The cause of a failure to connect to `path`.
pub(super) fn explain(path: &Path, error: &io::Error) -> String {
    let shown = escaped(path);
    let start = format!("start one with --control {shown}, or give the path of the one that runs");
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => denied(path),
        Some(libc::ENOENT) => {
            match path.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.exists()) {
                Some(parent) => {
                    format!("no rproxy listens there: there is no directory {}; {start}", escaped(parent))
                }
                None => format!("no rproxy listens there: there is no such file; {start}"),
            }
        }
        Some(libc::ENOTDIR) => {
            let parents = path.ancestors().skip(1);
            let file = parents.filter(|parent| parent.exists()).find(|parent| !parent.is_dir());
            let file = escaped(file.unwrap_or(path));
            format!("no rproxy listens there: {file} is not a directory; {start}")
        }
        Some(libc::ECONNREFUSED) => match fs::metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                let kind = if metadata.is_dir() { "a directory" } else { "a file" };
                format!("it is {kind}, not a socket; give the path that rproxy was started with")
            }
            _ => format!("no rproxy listens there any more: the one that did has ended; {start}"),
        },
        Some(libc::EPROTOTYPE) => {
            "the socket is another program's; give the path that rproxy was started with".to_owned()
        }
        _ if error.kind() == io::ErrorKind::InvalidInput => {
            format!("{error}; the path of a socket has at most 107 bytes (unix(7))")
        }
        _ => format!("no rproxy listens there: {error}; {start}"),
    }
}

/// The owner of the socket, or of the directory that cannot be searched.
fn denied(path: &Path) -> String {
    let is_hidden =
        |path: &Path| fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    // From the root downwards, because everything below an inaccessible directory appears to be missing.
    let all: Vec<&Path> = path.ancestors().collect();
    let closed = all.iter().rev().find(|path| is_hidden(path)).and_then(|hidden| hidden.parent());
    let (what, object) = match closed {
        Some(directory) => (format!("the directory {}", escaped(directory)), directory),
        None => ("the socket".to_owned(), path),
    };
    match fs::metadata(object).map(|metadata| metadata.uid()) {
        Ok(0) => format!("permission denied: {what} belongs to root; use sudo"),
        Ok(uid) => {
            let user = user_name(uid);
            format!("permission denied: {what} belongs to user {user}; use sudo, or `sudo -u {user}`")
        }
        Err(_unknown) => format!("permission denied: {what} belongs to somebody else; use sudo"),
    }
}

/// The name of a user from `/etc/passwd`, or else `#` and the number, which sudo(8) accepts.
pub(super) fn user_name(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let is_it = |line: &&str| line.split(':').nth(2) == Some(&*uid.to_string());
    let name = passwd.lines().find(is_it).and_then(|line| line.split(':').next());
    name.map_or_else(|| format!("#{uid}"), ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn why(path: &Path) -> String {
        explain(path, &UnixStream::connect(path).unwrap_err())
    }

    #[test]
    fn what_is_at_the_path_is_named() {
        let dir = std::env::temp_dir().join(format!("rproxy-unreachable-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let at = |name: &str| dir.join(name);
        fs::write(at("file"), "").unwrap();
        drop(UnixListener::bind(at("stale")).unwrap());
        let _other = UnixDatagram::bind(at("datagrams")).unwrap();
        let missing = format!("there is no such file; start one with --control {}", at("missing").display());
        for (path, words) in [
            (at("missing"), &*missing),
            (at("missing/socket"), "there is no directory"),
            (at("file/socket"), "file is not a directory"),
            (at("file"), "it is a file, not a socket; give"),
            (dir.clone(), "it is a directory, not a socket; give"),
            (at("stale"), "no rproxy listens there any more"),
            (at("datagrams"), "the socket is another program's"),
            (at(&"x".repeat(120)), "at most 107 bytes"),
        ] {
            let message = why(&path);
            assert!(message.contains(words), "{}: {message}", path.display());
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn users_have_names() {
        assert_eq!(user_name(0), "root");
        assert_eq!(user_name(4_000_000_000), "#4000000000");
    }
}
