//! A stand-in for `rproxy-shim`: it attaches sockets that the test has bound, and may send what no shim would.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, socket,
};
use rproxy_shim::message::{Answer, Attach, LONGEST, Reason, Request, TCP, UDP};
use socket2::SockRef;

use crate::PATIENCE;
use crate::netns::Namespace;

/// A connection to an `rproxy --attach`. Dropping it is what the death of a shim is.
pub struct Shim {
    connection: OwnedFd,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Clients are served.
    Serving,
    /// Nobody can serve the port, for this reason.
    Refused(String),
    /// This process cannot serve the port, for this reason.
    Unavailable(String),
    /// The port is closed.
    Detached,
    /// The other side has closed the connection.
    Gone,
}

impl Shim {
    /// Connects to the process that serves attached ports under `name`.
    ///
    /// # Errors
    /// Those of connect(2): `ECONNREFUSED` if there is no such process.
    pub fn connect(name: &str) -> io::Result<Self> {
        let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(connection.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        SockRef::from(&connection).set_read_timeout(Some(PATIENCE))?;
        Ok(Self { connection })
    }

    /// Like [`Shim::connect`], inside a namespace, as each has abstract names of its own.
    ///
    /// # Errors
    /// Those of [`Shim::connect`].
    pub fn connect_in(namespace: &Namespace, name: &str) -> io::Result<Self> {
        namespace.run(|| Self::connect(name))
    }

    /// Attaches a listening socket, which the caller keeps.
    #[track_caller]
    pub fn attach_tcp(&self, listener: &TcpListener, backend: SocketAddr) -> Reply {
        self.ask(Request::Attach(Attach { protocol: TCP, backend }), &[listener.as_fd()])
    }

    /// Attaches a bound socket, which the caller keeps.
    #[track_caller]
    pub fn attach_udp(&self, socket: &UdpSocket, backend: SocketAddr) -> Reply {
        self.ask(Request::Attach(Attach { protocol: UDP, backend }), &[socket.as_fd()])
    }

    /// Detaches its port. The caller closes the socket after that, as the end of a shim does.
    #[track_caller]
    pub fn detach(&self, reason: Reason) -> Reply {
        self.ask(Request::Detach(reason), &[])
    }

    /// Sends a request with `descriptors`, and waits for the answer.
    #[track_caller]
    pub fn ask(&self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Reply {
        self.send(request.encode().as_bytes(), descriptors).unwrap();
        self.reply()
    }

    /// Sends a packet, which need not be a request.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() { &[][..] } else { &rights };
        let packet = [IoSlice::new(packet)];
        sendmsg::<()>(self.connection.as_raw_fd(), &packet, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Whether nothing has come: neither an answer nor the end of the connection.
    pub fn is_silent(&self) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        recv(self.connection.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }

    /// Waits for the next answer.
    ///
    /// # Panics
    /// If none comes, or something else.
    #[track_caller]
    pub fn reply(&self) -> Reply {
        let mut buffer = [0; LONGEST];
        let length = match recv(self.connection.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) | Err(Errno::ECONNRESET) => return Reply::Gone,
            Ok(length) => length,
            Err(error) => panic!("there is no answer to the shim: {error}"),
        };
        match Answer::decode(&buffer[..length]) {
            Ok(Answer::Serving) => Reply::Serving,
            Ok(Answer::Refused(text)) => Reply::Refused(text.to_owned()),
            Ok(Answer::Unavailable(text)) => Reply::Unavailable(text.to_owned()),
            Ok(Answer::Detached) => Reply::Detached,
            Err(error) => panic!("not an answer to a shim: {error}: {:?}", &buffer[..length]),
        }
    }
}
