//! The process that serves the ports of all shims, and connections to it.

use rproxy_shim::message::{Answer, LONGEST, Request};
use rproxy_sys_raw::errno::Errno;
use rproxy_sys_raw::fd::Fd;
use rproxy_sys_raw::process::effective_user;
use rproxy_sys_raw::socket::{self, AF_UNIX, Address, SOCK_SEQPACKET};

/// The root user.
const ROOT: u32 = 0;

/// The process that may serve the port, by its address.
pub(crate) struct Plane(Address);

/// Why there is no connection to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectError {
    /// Nobody listens, or the connection failed.
    Absent,
    /// The queue of connections is full; it has to accept some first.
    Busy,
    /// Somebody listens who is neither root nor the own user. Anybody can take a free name.
    Stranger,
}

impl Plane {
    /// The plane at an abstract address, or `None` if the name is too long.
    pub(crate) fn new(name: &[u8]) -> Option<Self> {
        Address::abstract_unix(name).map(Self)
    }

    /// Connects, and checks who listens.
    pub(crate) fn connect(&self) -> Result<Connection, ConnectError> {
        let socket = socket::open(AF_UNIX, SOCK_SEQPACKET).map_err(|_error| ConnectError::Absent)?;
        socket::connect(&socket, &self.0).map_err(|error| match error {
            Errno::AGAIN => ConnectError::Busy,
            _ => ConnectError::Absent,
        })?;
        match socket::peer_user(&socket) {
            Ok(user) if user == ROOT || user == effective_user() => Ok(Connection(socket)),
            _ => Err(ConnectError::Stranger),
        }
    }
}

/// A connection to the plane.
pub(crate) struct Connection(Fd);

/// What was read from a connection.
pub(crate) enum Reading<'a> {
    /// Nothing yet.
    Nothing,
    /// An answer.
    Answer(Answer<'a>),
    /// Something that is no answer, for example one of another version.
    Unknown,
    /// The plane has closed it.
    Closed,
}

/// Room for one packet, and a byte by which one that is too long is recognised.
pub(crate) type Packet = [u8; LONGEST + 1];

impl Connection {
    /// Sends a request, with a socket if it is one to attach.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub(crate) fn send(&self, request: Request, socket: Option<&Fd>) -> Result<(), Errno> {
        socket::send(&self.0, request.encode().as_bytes(), socket)
    }

    /// Reads an answer, if one is there. Descriptors that come with it are not received.
    pub(crate) fn receive<'a>(&self, packet: &'a mut Packet) -> Reading<'a> {
        match self.0.read(packet) {
            Ok(0) => Reading::Closed,
            Ok(len) => Answer::decode(&packet[..len]).map_or(Reading::Unknown, Reading::Answer),
            Err(Errno::AGAIN | Errno::INTR) => Reading::Nothing,
            Err(_) => Reading::Closed,
        }
    }

    /// Its descriptor, to wait for.
    pub(crate) fn fd(&self) -> &Fd {
        &self.0
    }
}
