//! Datagrams received in GRO batches (udp(7), `UDP_GRO`), as QUIC stacks receive them.

use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::slice::Chunks;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};

use crate::sock::unless_blocked;

/// The longest batch that the kernel builds: that of an IP packet.
const LONGEST: usize = 65_536;

/// Receives from sockets that [`enable`] was called for.
pub(crate) struct Receiver {
    buffer: Vec<u8>,
    control: Vec<u8>,
}

/// Has the kernel deliver datagrams of one size as a batch.
///
/// # Errors
/// That of setsockopt(2).
pub(crate) fn enable(socket: &UdpSocket) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::UdpGroSegment, &true)?)
}

impl Receiver {
    /// With room for one batch.
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; LONGEST], control: cmsg_space!(i32) }
    }

    /// The datagrams of the next batch, of which only the last one may be shorter than the others; `None` if there is none.
    ///
    /// # Errors
    /// That of recvmsg(2).
    pub(crate) fn receive(&mut self, socket: &UdpSocket) -> io::Result<Option<Chunks<'_, u8>>> {
        let mut buffer = [IoSliceMut::new(&mut self.buffer)];
        let control = Some(&mut self.control[..]);
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut buffer, control, MsgFlags::empty());
        let Some(received) = unless_blocked(received)? else { return Ok(None) };
        let size = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
            _ => None,
        });
        let len = received.bytes;
        // A datagram that came alone has no such message.
        Ok(Some(self.buffer[..len].chunks(size.unwrap_or(len).max(1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;

    #[test]
    fn a_batch_arrives_as_it_was_sent() {
        let [sender, receiver] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        receiver.set_nonblocking(true).unwrap();
        enable(&receiver).unwrap();
        let (mut batch, mut gro) = (Batch::new(), Receiver::new());
        for value in 0..3 {
            batch.push(100).fill(value);
        }
        assert_eq!(batch.send_as_one(&sender).unwrap(), 3);
        sender.send(b"alone").unwrap();
        let mut got: Vec<Vec<u8>> = Vec::new();
        while let Some(datagrams) = gro.receive(&receiver).unwrap() {
            got.extend(datagrams.map(<[u8]>::to_vec));
        }
        assert_eq!(got, [vec![0; 100], vec![1; 100], vec![2; 100], b"alone".to_vec()]);
    }
}
