//! Netlink sockets and the parsing of their datagrams (netlink(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    DecodeError, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// The kernel responds at once. If it does not, this must not hang.
const REPLY_TIMEOUT: TimeVal = TimeVal::new(2, 0);

/// The maximum size of a message in a dump (NLMSG_GOODSIZE is less).
pub(crate) const BUFFER_SIZE: usize = 64 * 1024;

/// A netlink socket in the network namespace of the thread that opened it.
pub(crate) struct Client<S = OwnedFd>(S);

impl Client {
    /// Opens a socket of this protocol.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &REPLY_TIMEOUT)?;
        Ok(Self(socket))
    }

    /// The socket.
    pub(crate) fn into_inner(self) -> OwnedFd {
        self.0
    }
}

impl<'s> Client<BorrowedFd<'s>> {
    /// Uses a socket that is open.
    pub(crate) fn on(socket: BorrowedFd<'s>) -> Self {
        Self(socket)
    }
}

impl<S: AsFd> Client<S> {
    /// Sends a request, the only one until it is answered.
    pub(crate) fn send<M: NetlinkSerializable>(&self, message: M, flags: u16) -> io::Result<()>
    where
        NetlinkPayload<M>: From<M>,
    {
        self.send_as(0, message, flags)
    }

    /// Sends a request, whose answers have its number.
    pub(crate) fn send_as<M: NetlinkSerializable>(
        &self,
        sequence: u32,
        message: M,
        flags: u16,
    ) -> io::Result<()>
    where
        NetlinkPayload<M>: From<M>,
    {
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        sendto(self.0.as_fd().as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    /// Receives responses and calls `take` for each, until that returns a result or the kernel an error.
    pub(crate) fn receive<M: NetlinkDeserializable, R>(
        &self,
        mut take: impl FnMut(NetlinkPayload<M>) -> Option<R>,
    ) -> io::Result<R> {
        let mut buffer = vec![0; BUFFER_SIZE];
        loop {
            let received = recv(self.0.as_fd().as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for message in messages(&buffer[..received]) {
                match message.map_err(io::Error::other)?.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    payload => {
                        if let Some(result) = take(payload) {
                            return Ok(result);
                        }
                    }
                }
            }
        }
    }
}

/// The messages in a datagram from the kernel, in order. Parsing stops after one that is invalid.
pub fn messages<M: NetlinkDeserializable>(
    datagram: &[u8],
) -> impl Iterator<Item = Result<NetlinkMessage<M>, DecodeError>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let message = NetlinkMessage::deserialize(rest);
        rest = match &message {
            Ok(message) => rest.get(padded(message.header.length)..).unwrap_or_default(),
            Err(_) => &[],
        };
        Some(message)
    })
}

/// The distance from a message of `length` bytes to the next one: aligned to four bytes (`NLMSG_ALIGN`), and
/// never 0.
fn padded(length: u32) -> usize {
    (length as usize).next_multiple_of(4).max(4)
}
