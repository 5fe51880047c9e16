//! Calls on one-to-one SCTP sockets (sctp(7), RFC 6458): messages with their stream and payload protocol identifier.
//!
//! Control messages have the layout of cmsg(3), and are read and written as plain bytes.
#![expect(unsafe_code, reason = "setsockopt, getsockopt, recvmsg and sendmsg take raw pointers")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

use crate::check;
use crate::socket::set_int;

/// Outgoing streams that a connection asks for, on which messages of as many incoming ones can be sent. The kernel
/// allocates some 20 bytes for each.
pub const STREAMS: u16 = 1024;

/// The option level of SCTP, and its options (linux/sctp.h).
const SOL_SCTP: c_int = 132;
const SCTP_INITMSG: c_int = 2;
const SCTP_NODELAY: c_int = 3;
const SCTP_STATUS: c_int = 14;
const SCTP_RECVRCVINFO: c_int = 32;

/// Kinds of control messages (linux/sctp.h, `enum sctp_cmsg_type`).
const SCTP_SNDINFO: c_int = 2;
const SCTP_RCVINFO: c_int = 3;

/// The flag of a message outside the order of its stream (linux/sctp.h, `enum sctp_sinfo_flags`).
const SCTP_UNORDERED: u16 = 1;

/// Marks an event of the association, which is no message (linux/sctp.h). None are asked for here.
const MSG_NOTIFICATION: c_int = 0x8000;

/// The size of `struct sctp_status` (linux/sctp.h): 24 bytes, and 152 of the primary path.
const STATUS_SIZE: usize = 176;

/// A header of a control message: its length, level and kind.
const HEADER: usize = size_of::<libc::cmsghdr>();

/// The size of `struct sctp_sndinfo` (linux/sctp.h).
const SNDINFO_SIZE: usize = 16;

/// The control message with it.
const SENT: usize = HEADER + SNDINFO_SIZE;

/// Room for received control messages, also those that whoever passed the socket may have asked for.
const RECEIVED: usize = 256;

/// A buffer for control messages, aligned as their headers have to be.
#[repr(C, align(8))]
struct Control<const N: usize>([u8; N]);

/// What a message is sent with, other than its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// The number of its stream.
    pub stream: u16,
    /// Whether it is outside the order of its stream.
    pub is_unordered: bool,
    /// The payload protocol identifier, as it is on the wire.
    pub ppid: [u8; 4],
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// That many bytes of a message, all of it unless the buffer or the kernel's receive buffer was too small.
    Data(usize, Label),
    /// An event of the association.
    Notification,
    /// The peer has shut the association down.
    End,
}

/// Sets the options of a listener, or of a socket before it is connected: messages are sent at once, and received with
/// their [`Label`]; the association asks for that many outgoing streams.
///
/// # Errors
/// Those of setsockopt(2).
pub fn prepare(socket: BorrowedFd<'_>, streams: u16) -> io::Result<()> {
    set_int(socket, SOL_SCTP, SCTP_NODELAY, 1)?;
    set_int(socket, SOL_SCTP, SCTP_RECVRCVINFO, 1)?;
    // `struct sctp_initmsg`: outgoing streams, the most incoming ones, attempts, their longest timeout; 0 is the default.
    let initmsg: [u16; 4] = [streams, 0, 0, 0];
    let pointer = (&raw const initmsg).cast();
    // SAFETY: the pointer leads to eight bytes, whose number is passed along.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), SOL_SCTP, SCTP_INITMSG, pointer, 8) }).map(drop)
}

/// Receives one message, or the part of it that fits into `buffer`.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control([0; RECEIVED]);
    // SAFETY: msghdr is a C struct of integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control.0).cast();
    header.msg_controllen = RECEIVED;
    // SAFETY: the header leads to a buffer and room for control messages, with their sizes, and all outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) };
    let len = usize::try_from(received).map_err(|_negative| io::Error::last_os_error())?;
    if header.msg_flags & MSG_NOTIFICATION != 0 {
        return Ok(Received::Notification);
    }
    if len == 0 {
        return Ok(Received::End);
    }
    let control = control.0.get(..header.msg_controllen).unwrap_or_default();
    Ok(Received::Data(len, label_of(control)))
}

/// Sends `message` as a whole.
///
/// # Errors
/// Those of sendmsg(2): `EAGAIN` if there is no room, `EINVAL` if the peer has no such stream, `EMSGSIZE` for one that is
/// larger than the send buffer.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], label: Label) -> io::Result<()> {
    let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
    let mut control = Control(encode(label));
    // SAFETY: msghdr is a C struct of integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control.0).cast();
    header.msg_controllen = SENT;
    // SAFETY: the header leads to a message and a control message, with their sizes, which the call only reads.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The number of messages and chunks that the peer has not acknowledged yet (`SCTP_STATUS`, RFC 6458, section 8.2.1).
///
/// # Errors
/// Those of getsockopt(2), among them `EINVAL` once there is no association any more.
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut status = Control([0_u8; STATUS_SIZE]);
    let mut len = libc::socklen_t::try_from(STATUS_SIZE).unwrap_or(0);
    let (fd, pointer) = (socket.as_raw_fd(), (&raw mut status.0).cast());
    // SAFETY: the pointer leads to as many bytes as are passed along.
    check(unsafe { libc::getsockopt(fd, SOL_SCTP, SCTP_STATUS, pointer, &raw mut len) })?;
    // Behind the identifier, the state and the window of four bytes each: in flight, and pending.
    let count = |at: usize| usize::from(u16::from_ne_bytes([status.0[at], status.0[at + 1]]));
    Ok(count(12) + count(14))
}

/// The label in received control messages: `struct sctp_rcvinfo` has the stream, a sequence number, flags, padding, and
/// the identifier.
fn label_of(mut control: &[u8]) -> Label {
    while let Some((header, _rest)) = control.split_at_checked(HEADER) {
        let len = usize::from_ne_bytes(header[..8].try_into().unwrap_or_default());
        let level = i32::from_ne_bytes(header[8..12].try_into().unwrap_or_default());
        let kind = i32::from_ne_bytes(header[12..].try_into().unwrap_or_default());
        let Some(data) = control.get(HEADER..len) else { break };
        if let (SOL_SCTP, SCTP_RCVINFO, Some(data)) = (level, kind, data.first_chunk::<12>()) {
            return Label {
                stream: u16::from_ne_bytes([data[0], data[1]]),
                is_unordered: u16::from_ne_bytes([data[4], data[5]]) & SCTP_UNORDERED != 0,
                ppid: [data[8], data[9], data[10], data[11]],
            };
        }
        control = control.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Label::default()
}

/// The control message to send with a label: `struct sctp_sndinfo` has the stream, flags, the identifier, a context and
/// the association.
fn encode(Label { stream, is_unordered, ppid }: Label) -> [u8; SENT] {
    let mut bytes = [0; SENT];
    bytes[..8].copy_from_slice(&SENT.to_ne_bytes());
    bytes[8..12].copy_from_slice(&SOL_SCTP.to_ne_bytes());
    bytes[12..16].copy_from_slice(&SCTP_SNDINFO.to_ne_bytes());
    let data = &mut bytes[HEADER..];
    data[..2].copy_from_slice(&stream.to_ne_bytes());
    let flags = if is_unordered { SCTP_UNORDERED } else { 0 };
    data[2..4].copy_from_slice(&flags.to_ne_bytes());
    data[4..8].copy_from_slice(&ppid);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_read_behind_other_control_messages() {
        let mut control = Vec::new();
        let mut push = |level: i32, kind: i32, data: &[u8]| {
            control.extend((HEADER + data.len()).to_ne_bytes());
            control.extend(level.to_ne_bytes());
            control.extend(kind.to_ne_bytes());
            control.extend(data);
            control.resize(control.len().next_multiple_of(8), 0);
        };
        push(libc::SOL_SOCKET, 29, &[1; 12]);
        let mut info = [0_u8; 28];
        info[..2].copy_from_slice(&7_u16.to_ne_bytes());
        info[4..6].copy_from_slice(&SCTP_UNORDERED.to_ne_bytes());
        info[8..12].copy_from_slice(&[0, 0, 0, 46]);
        push(SOL_SCTP, SCTP_RCVINFO, &info);
        let label = Label { stream: 7, is_unordered: true, ppid: [0, 0, 0, 46] };
        assert_eq!(label_of(&control), label);
        for cut in 0..control.len() {
            let _any = label_of(&control[..cut]);
        }
        assert_eq!(label_of(&[0; 64]), Label::default());
    }
}
