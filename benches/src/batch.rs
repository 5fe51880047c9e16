//! Batches of datagrams.

use std::array;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, sendmsg};

use crate::sock::unless_blocked;

/// The maximum number of datagrams in a batch.
pub(crate) const BATCH: usize = 32;

/// The longest datagram of any workload, with room to detect one that has grown.
const LONGEST: usize = 2048;

/// Up to [`BATCH`] datagrams that are received together, changed in place, and sent together.
pub(crate) struct Batch {
    buffers: Box<[[u8; LONGEST]; BATCH]>,
    lens: [usize; BATCH],
    addresses: [Option<SockaddrIn>; BATCH],
    count: usize,
    incoming: MultiHeaders<SockaddrIn>,
    outgoing: MultiHeaders<SockaddrIn>,
}

impl Batch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            buffers: Box::new([[0; LONGEST]; BATCH]),
            lens: [0; BATCH],
            addresses: [None; BATCH],
            count: 0,
            incoming: MultiHeaders::preallocate(BATCH, None),
            outgoing: MultiHeaders::preallocate(BATCH, None),
        }
    }

    /// Replaces the batch with datagrams from `socket`, up to `limit`. Waits for the first one if `socket` is
    /// blocking, and never for others.
    pub(crate) fn receive(&mut self, socket: &UdpSocket, limit: usize) -> io::Result<()> {
        self.count = 0;
        let mut slices = self.buffers.each_mut().map(|buffer| [IoSliceMut::new(buffer)]);
        let received = unless_blocked(recvmmsg(
            socket.as_raw_fd(),
            &mut self.incoming,
            slices.iter_mut().take(limit),
            MsgFlags::MSG_WAITFORONE,
            None,
        ))?;
        for (index, message) in received.into_iter().flatten().enumerate() {
            self.lens[index] = message.bytes;
            self.addresses[index] = message.address;
            self.count = index + 1;
        }
        Ok(())
    }

    /// The datagrams.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.buffers.iter().zip(self.lens).take(self.count).map(|(buffer, len)| &buffer[..len])
    }

    /// Empties the batch.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
    }

    /// The datagrams and their senders.
    pub(crate) fn with_senders(&self) -> impl Iterator<Item = (&[u8], Option<SockaddrIn>)> {
        self.iter().zip(self.addresses)
    }

    /// Adds a datagram of `len` bytes for a connected socket, and returns it to be written.
    pub(crate) fn push(&mut self, len: usize) -> &mut [u8] {
        self.push_to(len, None)
    }

    /// Adds a datagram of `len` bytes for `receiver`, and returns it to be written.
    pub(crate) fn push_to(&mut self, len: usize, receiver: Option<SockaddrIn>) -> &mut [u8] {
        let index = self.count;
        (self.lens[index], self.addresses[index]) = (len, receiver);
        self.count += 1;
        &mut self.buffers[index][..len]
    }

    /// Shortens each datagram to the part that `part` returns, which it may change.
    pub(crate) fn cut(&mut self, part: impl Fn(&[u8]) -> Range<usize>) {
        for (buffer, len) in self.buffers.iter_mut().zip(&mut self.lens).take(self.count) {
            let range = part(&buffer[..*len]);
            *len = range.len();
            if range.start > 0 {
                buffer.copy_within(range, 0);
            }
        }
    }

    /// Retains the datagrams for which `keep` returns true; it may change them.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&mut [u8]) -> bool) {
        let mut kept = 0;
        for index in 0..self.count {
            if !keep(&mut self.buffers[index][..self.lens[index]]) {
                continue;
            }
            if kept != index {
                self.buffers.swap(kept, index);
                self.lens.swap(kept, index);
                self.addresses.swap(kept, index);
            }
            kept += 1;
        }
        self.count = kept;
    }

    /// Sends the datagrams, which are all of one size and for one receiver, as one GSO batch (udp(7), `UDP_SEGMENT`);
    /// returns how many were sent.
    pub(crate) fn send_as_one(&self, socket: &UdpSocket) -> io::Result<usize> {
        let slices: Vec<_> = self.iter().map(IoSlice::new).collect();
        let size = u16::try_from(self.lens[0]).map_err(io::Error::other)?;
        let segments = ControlMessage::UdpGsoSegments(&size);
        let receiver = self.addresses[0].as_ref();
        let sent = sendmsg(socket.as_raw_fd(), &slices, &[segments], MsgFlags::empty(), receiver);
        Ok(if unless_blocked(sent)?.is_some() { self.count } else { 0 })
    }

    /// Sends the datagrams back to their senders, or on a connected socket; returns how many were sent.
    pub(crate) fn send(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        let slices: [_; BATCH] =
            array::from_fn(|index| [IoSlice::new(&self.buffers[index][..self.lens[index]])]);
        let mut sent = 0;
        while sent < self.count {
            let result = sendmmsg(
                socket.as_raw_fd(),
                &mut self.outgoing,
                slices[sent..self.count].iter(),
                &self.addresses[sent..self.count],
                [],
                MsgFlags::empty(),
            );
            match unless_blocked(result.map(Iterator::count))? {
                Some(count) => sent += count,
                None => break,
            }
        }
        Ok(sent)
    }
}
