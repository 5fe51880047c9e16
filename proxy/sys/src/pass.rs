//! Passing descriptors between processes (`SCM_RIGHTS`, unix(7)).
#![expect(unsafe_code, reason = "numbers that the kernel made become owned descriptors here")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, send, sendmsg};

/// The maximum number of descriptors per message (`SCM_MAX_FD` in include/net/scm.h).
pub const MOST: usize = 253;

/// Sends up to [`MOST`] descriptors with one byte of a stream.
///
/// # Errors
/// Those of sendmsg(2); `ETOOMANYREFS` if too many are in flight.
pub fn send_descriptors(socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, b'd', descriptors)
}

/// Sends any number of descriptors, as many as fit with each byte of a stream. Each of these bytes is a space, which
/// JSON allows before a value: a line of JSON can follow.
///
/// # Errors
/// Those of sendmsg(2); `ETOOMANYREFS` if too many are in flight.
pub fn send_before_json(socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    descriptors.chunks(MOST).try_for_each(|some| send_with(socket, b' ', some))
}

fn send_with(socket: BorrowedFd<'_>, byte: u8, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[byte])], &rights, flags, None)?;
    Ok(())
}

/// Receives the descriptors of one [`send_descriptors`], close-on-exec. All earlier bytes must have been
/// read.
///
/// # Errors
/// Those of recvmsg(2); `EOF` if the other side is gone; `InvalidData` if not all descriptors could be
/// received, mostly because too many are open.
pub fn receive_descriptors(socket: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let received = receive(socket, &mut [0])?;
    if received.length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.is_incomplete {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "some descriptors could not be received"));
    }
    Ok(received.descriptors)
}

/// What one call has received.
#[derive(Debug)]
pub struct Received {
    /// The length in bytes. A packet that was longer than the buffer has more than fit. 0 is an empty packet, or
    /// the other side is gone.
    pub length: usize,
    /// The descriptors that came with it, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// Whether there were more descriptors, which could not be received, mostly because too many are open.
    pub is_incomplete: bool,
}

/// Receives a packet of a `SOCK_SEQPACKET` socket, or some bytes of a stream, without waiting, and up to [`MOST`]
/// descriptors. Bytes of a stream that were sent after descriptors are received by the next call.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_flagged(socket, buffer, MsgFlags::MSG_DONTWAIT)
}

/// Like [`receive`], but waits as the socket does.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive_waiting(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_flagged(socket, buffer, MsgFlags::empty())
}

fn receive_flagged(socket: BorrowedFd<'_>, buffer: &mut [u8], more: MsgFlags) -> io::Result<Received> {
    let mut data = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!([RawFd; MOST]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_TRUNC | more;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let numbers = message.cmsgs().into_iter().flatten().flat_map(|control| match control {
        ControlMessageOwned::ScmRights(numbers) => numbers,
        _ => Vec::new(),
    });
    // SAFETY: the kernel has just opened these descriptors for this process, and nothing else knows them.
    let descriptors = numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect();
    let is_incomplete = message.flags.contains(MsgFlags::MSG_CTRUNC);
    Ok(Received { length: message.bytes, descriptors, is_incomplete })
}

/// Sends a packet of a `SOCK_SEQPACKET` socket without waiting.
///
/// # Errors
/// Those of send(2); `EAGAIN` if the other side does not read.
pub fn send_packet(socket: BorrowedFd<'_>, packet: &[u8]) -> io::Result<()> {
    send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::net::Shutdown;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{F_GETFD, FdFlag, fcntl};

    use super::*;

    #[test]
    fn descriptors_arrive_open_and_close_on_exec() {
        let (one, other) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..MOST).map(|_| File::open("/dev/zero").unwrap()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send_descriptors(one.as_fd(), &borrowed).unwrap();
        drop(files);
        let received = receive_descriptors(other.as_fd()).unwrap();
        assert_eq!(received.len(), MOST);
        for descriptor in received {
            let flags = FdFlag::from_bits_retain(fcntl(&descriptor, F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC));
            File::from(descriptor).read_exact(&mut [0; 8]).unwrap();
        }
        // A test beside this one may fork, and have a copy for a moment.
        one.shutdown(Shutdown::Both).unwrap();
        let gone = receive_descriptors(other.as_fd()).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
