//! Notifications to the service manager (sd_notify(3)).

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What a service manager is notified of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The first comparison is over.
    Ready,
    /// The process is about to end.
    Stopping,
}

/// Notifies the service manager, if there is one.
pub(super) fn notify(phase: Phase) {
    let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
    // Without the notification, the service manager ends this process when its time to start is over, and says why.
    drop(name.map(|name| send(name.as_bytes(), phase)));
}

fn send(name: &[u8], phase: Phase) -> io::Result<usize> {
    // The name of an abstract socket (unix(7)) is written with an `@`.
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    // A service manager that does not read must not stop this process.
    socket.set_nonblocking(true)?;
    let words = match phase {
        Phase::Ready => "READY=1",
        Phase::Stopping => "STOPPING=1",
    };
    socket.send_to_addr(words.as_bytes(), &address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(socket: &UnixDatagram) -> String {
        let mut message = [0; 64];
        let length = socket.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    }

    #[test]
    fn sockets_with_a_path_and_abstract_ones_are_told() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str().as_bytes(), Phase::Ready).unwrap();
        assert_eq!(told(&socket), "READY=1");

        let name = format!("netns-setup-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(format!("@{name}").as_bytes(), Phase::Stopping).unwrap();
        assert_eq!(told(&socket), "STOPPING=1");
    }

    #[test]
    fn one_that_does_not_read_stops_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("notify");
        let _socket = UnixDatagram::bind(&path).unwrap();
        let refused = (0..100_000).find_map(|_| send(path.as_os_str().as_bytes(), Phase::Ready).err());
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::WouldBlock);
    }
}
