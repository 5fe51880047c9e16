//! The Unix sockets of this process that are for its own user.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::escape::escaped;

/// The paths of the control socket and of the socket of metrics, as far as there are such. They know a client by
/// its user, and would take those of a mapping that leads there for this process itself.
#[derive(Debug, Default)]
pub(crate) struct PrivateSockets(Vec<PathBuf>);

impl PrivateSockets {
    /// Those at `paths`, which are bound.
    pub(crate) fn at<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        Self(paths.into_iter().map(Path::to_owned).collect())
    }

    /// Refuses a backend that is one of them, by any path.
    ///
    /// # Errors
    /// [`PrivateSocketError`]
    pub(crate) fn refuse(&self, backend: &BackendHost) -> Result<(), PrivateSocketError> {
        let BackendHost::Unix(addr) = backend else { return Ok(()) };
        let Some(asked) = addr.path().and_then(file_of) else { return Ok(()) };
        match self.0.iter().find(|own| file_of(own) == Some(asked)) {
            Some(own) => Err(PrivateSocketError(own.clone())),
            None => Ok(()),
        }
    }
}

/// Device and inode of what is there, behind links.
fn file_of(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The backend is a socket of this process that is for its own user.
#[derive(Debug, thiserror::Error)]
#[error("{} is this process's own socket, which would take all clients for its user; choose another backend", escaped(.0))]
pub struct PrivateSocketError(PathBuf);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_backend_is_not_a_private_socket_by_any_path() {
        let dir = std::env::temp_dir().join(format!("rproxy-private-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let [own, link, other] = ["own", "link", "other"].map(|name| dir.join(name));
        let _listeners = [&own, &other].map(|path| UnixListener::bind(path).unwrap());
        symlink(&own, &link).unwrap();
        let private = PrivateSockets::at([own.as_path()]);
        let refused = |path: &Path| private.refuse(&format!("unix:{}", path.display()).parse().unwrap());
        assert!(refused(&link).unwrap_err().to_string().contains("this process's own socket"));
        refused(&own).unwrap_err();
        refused(&other).unwrap();
        refused(&dir.join("nowhere")).unwrap();
        private.refuse(&"unix:@own".parse().unwrap()).unwrap();
        private.refuse(&"192.0.2.1".parse().unwrap()).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
}
