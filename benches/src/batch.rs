//! Many datagrams in one system call.

use std::array;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg};

use crate::sock::unless_blocked;

/// Datagrams in a batch, at the most.
pub(crate) const BATCH: usize = 32;

/// The longest datagram that the workloads use, with room to see one that has grown.
const LONGEST: usize = 2048;

/// Up to [`BATCH`] datagrams: received together, changed in place, and sent together.
pub(crate) struct Batch {
    buffers: Box<[[u8; LONGEST]; BATCH]>,
    lens: [usize; BATCH],
    addresses: [Option<SockaddrIn>; BATCH],
    count: usize,
    incoming: MultiHeaders<SockaddrIn>,
    outgoing: MultiHeaders<SockaddrIn>,
}

impl Batch {
    /// An empty one.
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

    /// Replaces the batch by what `socket` has, up to `limit` datagrams. It waits for the first one as
    /// `socket` is set up to, and for no other.
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

    /// Adds a datagram of `len` bytes to send on a connected socket, and returns it to be written.
    pub(crate) fn push(&mut self, len: usize) -> &mut [u8] {
        let index = self.count;
        (self.lens[index], self.addresses[index]) = (len, None);
        self.count += 1;
        &mut self.buffers[index][..len]
    }

    /// Keeps the datagrams that `keep` wants, and lets it change them.
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

    /// Sends the datagrams, to where they came from or on a connected socket; returns how many went out.
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
