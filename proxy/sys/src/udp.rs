//! Batches of datagrams: recvmmsg(2), sendmmsg(2), and GSO batches of equal-sized datagrams (udp(7)).
#![expect(unsafe_code, reason = "the message headers of these calls hold raw pointers")]

use std::io::{self, IoSlice};
use std::mem::{MaybeUninit, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::libc;
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::check;
use crate::cmsg::{self, Encoder};
pub use crate::cmsg::{LocalAddr, Received};

/// The maximum number of datagrams, or GSO batches of them, per call.
pub const BATCH: usize = 64;

/// Room for the largest datagram, 65,527 bytes over IPv6, and for the largest GSO batch. The additional cache
/// line avoids cache set conflicts between the beginnings of the slots.
const SLOT: usize = 65_536 + 64;

/// The smallest page size of any machine.
const SMALL_PAGE: usize = 4096;

/// The maximum number of datagrams in a GSO batch (`UDP_MAX_SEGMENTS`, include/linux/udp.h; 128 since Linux
/// 6.9).
pub const GSO_SEGMENTS: usize = 64;

/// The maximum payload of a GSO batch, in bytes: that of an IPv4 packet.
pub const GSO_BYTES: usize = 65_507;

/// The maximum number of datagrams that [`discard`] removes.
pub const MOST_DISCARDED: usize = 1024;

/// A reusable buffer for receiving a batch of datagrams.
pub struct RecvBatch {
    headers: Vec<libc::mmsghdr>,
    iovecs: Vec<libc::iovec>,
    names: Vec<SockAddrStorage>,
    controls: Vec<[u8; cmsg::SPACE]>,
    payloads: Vec<u8>,
    /// How many bytes of each slot have been written, in whole pages.
    reached: [usize; BATCH],
    /// The sum of `reached`.
    memory: usize,
}

// SAFETY: the raw pointers in the headers and iovecs are written before each call, and only the call follows
// them.
unsafe impl Send for RecvBatch {}

impl std::fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvBatch").finish_non_exhaustive()
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl RecvBatch {
    /// A buffer for [`BATCH`] datagrams. Pages that no datagram has reached take no memory.
    pub fn new() -> Self {
        let iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: SLOT };
        Self {
            headers: vec![empty_header(); BATCH],
            iovecs: vec![iovec; BATCH],
            names: (0..BATCH).map(|_| SockAddrStorage::zeroed()).collect(),
            controls: vec![[0; cmsg::SPACE]; BATCH],
            payloads: vec![0; BATCH * SLOT],
            reached: [0; BATCH],
            memory: 0,
        }
    }

    /// Receives datagrams without waiting, into the slots from `first` on: at most `most`, and at most up to
    /// the last slot. Returns the number received. Sender addresses are only stored with `senders`; a
    /// connected socket does not need them.
    ///
    /// # Errors
    /// Those of recvmmsg(2), including `EAGAIN` if nothing is queued, and errors of datagrams sent earlier
    /// from this socket.
    pub fn recv(
        &mut self,
        socket: BorrowedFd<'_>,
        first: usize,
        most: usize,
        senders: bool,
    ) -> io::Result<usize> {
        let last = first.saturating_add(most).min(BATCH);
        self.prepare(first..last, senders);
        let headers = &mut self.headers[first..last];
        let count = u32::try_from(headers.len()).unwrap_or(0);
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: there are `count` headers, whose pointers have just been set to this batch's own memory and
        // its sizes; the mutable borrow excludes other accesses.
        let received = check(unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, flags, ptr::null_mut())
        })?;
        let received = received.unsigned_abs() as usize;
        for (header, reached) in self.headers[first..].iter().zip(&mut self.reached[first..]).take(received) {
            let pages = (header.msg_len as usize).next_multiple_of(SMALL_PAGE);
            if pages > *reached {
                self.memory += pages - *reached;
                *reached = pages;
            }
        }
        Ok(received)
    }

    /// The approximate memory use of the payloads, in bytes: the pages that datagrams have reached.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Returns the memory of the payloads to the system (madvise(2) `MADV_DONTNEED`). Received data is lost;
    /// the buffer remains usable.
    pub fn give_back(&mut self) {
        // SAFETY: the call takes no pointers.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).unwrap_or(SMALL_PAGE);
        let before = self.payloads.as_ptr().addr().next_multiple_of(page) - self.payloads.as_ptr().addr();
        let whole = self.payloads.get_mut(before..).unwrap_or_default();
        let len = whole.len() / page * page;
        // SAFETY: these are whole pages of private memory that this batch owns, borrowed mutably. They read as
        // zeros afterwards, which are valid bytes.
        let done = unsafe { libc::madvise(whole.as_mut_ptr().cast(), len, libc::MADV_DONTNEED) };
        if done == 0 {
            (self.reached, self.memory) = ([0; BATCH], 0);
            self.headers.iter_mut().for_each(|header| header.msg_len = 0);
        }
    }

    /// Points the headers of some slots at their buffers, and resets the lengths, which the kernel has
    /// overwritten.
    fn prepare(&mut self, slots: Range<usize>, senders: bool) {
        let name_len = if senders { size_of::<SockAddrStorage>() } else { 0 };
        let payloads = self.payloads.chunks_exact_mut(SLOT);
        let room = self.iovecs.iter_mut().zip(&mut self.names).zip(&mut self.controls).zip(payloads);
        let headers = self.headers.iter_mut().zip(room).take(slots.end).skip(slots.start);
        for (header, (((iovec, name), control), payload)) in headers {
            iovec.iov_base = payload.as_mut_ptr().cast();
            let hdr = &mut header.msg_hdr;
            hdr.msg_name = (&raw mut *name).cast();
            hdr.msg_namelen = u32::try_from(name_len).unwrap_or(0);
            hdr.msg_iov = iovec;
            hdr.msg_iovlen = 1;
            hdr.msg_control = control.as_mut_ptr().cast();
            hdr.msg_controllen = cmsg::SPACE;
        }
    }

    /// The payload received into a slot: one datagram, or a GSO batch according to [`Received::segment`].
    /// `None` if the kernel truncated the payload, which only happens to IPv6 jumbograms because of the size
    /// of a slot, or the control messages, which say where to cut a GSO batch.
    pub fn payload(&self, slot: usize) -> Option<&[u8]> {
        let header = &self.headers[slot];
        let whole = header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0;
        let start = slot * SLOT;
        whole.then(|| &self.payloads[start..start + header.msg_len as usize])
    }

    /// The number of payload bytes received into some slots.
    pub fn bytes(&self, slots: Range<usize>) -> usize {
        self.headers[slots].iter().map(|header| header.msg_len as usize).sum()
    }

    /// The control messages of the datagram in `slot`, decoded.
    pub fn control(&self, slot: usize) -> Received {
        let len = self.headers[slot].msg_hdr.msg_controllen;
        cmsg::decode(&self.controls[slot][..len.min(cmsg::SPACE)])
    }

    /// The sender of the datagram in `slot`, if it was requested.
    pub fn sender(&self, slot: usize) -> Option<SocketAddr> {
        let len = self.headers[slot].msg_hdr.msg_namelen;
        if len == 0 {
            return None;
        }
        // SAFETY: the storage is plain bytes, which may be copied.
        let name = unsafe { ptr::read(&raw const self.names[slot]) };
        // SAFETY: the kernel wrote an address of `len` bytes into it.
        unsafe { SockAddr::new(name, len) }.as_socket()
    }
}

/// A header with null pointers and no lengths.
fn empty_header() -> libc::mmsghdr {
    // SAFETY: zeros are valid for all fields.
    unsafe { zeroed() }
}

/// A datagram or GSO batch to send.
#[derive(Clone, Copy, Debug)]
pub struct Transmit<'a> {
    /// The payload, in pieces that are sent as one.
    pub payload: &'a [IoSlice<'a>],
    /// The destination; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// The local address to send from; `None` leaves the choice to the kernel.
    pub source: Option<LocalAddr>,
    /// For a GSO batch, the size of the datagrams to cut the payload into: at most [`GSO_SEGMENTS`] datagrams
    /// and [`GSO_BYTES`] in total.
    pub segment: Option<u16>,
    /// The traffic class, as in [`Received::class`]; 0 uses that of the socket.
    pub class: u8,
}

/// Sends up to [`BATCH`] of `messages` without waiting. Returns the number sent, at least one. If that is not
/// all, the next one failed; sending it first returns its error.
///
/// # Errors
/// Those of sendmmsg(2) for the first message.
pub fn send_batch(socket: BorrowedFd<'_>, messages: &[Transmit<'_>]) -> io::Result<usize> {
    let mut prepared = [const { MaybeUninit::<Prepared>::uninit() }; BATCH];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
    let mut count = 0;
    for ((message, prepared), header) in messages.iter().zip(&mut prepared).zip(&mut headers) {
        header.write(prepared.write(Prepared::new(message)).header(message));
        count += 1;
    }
    let first = headers.as_mut_ptr().cast();
    // SAFETY: `count` headers were written. Their pointers lead to `prepared` and to the payloads borrowed by
    // `messages`, which both outlive the call, and sendmmsg only reads them.
    let sent = check(unsafe { libc::sendmmsg(socket.as_raw_fd(), first, count, SEND_FLAGS) })?;
    Ok(sent.unsigned_abs() as usize)
}

/// Sends one message without waiting.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send(socket: BorrowedFd<'_>, message: &Transmit<'_>) -> io::Result<()> {
    let prepared = Prepared::new(message);
    let header = prepared.header(message).msg_hdr;
    // SAFETY: the header's pointers lead to `prepared` and to the payload borrowed by `message`, and
    // sendmsg only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, SEND_FLAGS) };
    if sent == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const SEND_FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// The memory that the header of a message points to.
struct Prepared {
    to: Option<SockAddr>,
    control: Encoder,
}

impl Prepared {
    fn new(message: &Transmit<'_>) -> Self {
        let control = Encoder::new(message.source, message.segment, message.class);
        Self { to: message.to.map(SockAddr::from), control }
    }

    /// The header of `message`, which points to `self` and to the message's payload.
    fn header(&self, message: &Transmit<'_>) -> libc::mmsghdr {
        let mut header = empty_header();
        let hdr = &mut header.msg_hdr;
        if let Some(to) = &self.to {
            hdr.msg_name = to.as_ptr().cast_mut().cast();
            hdr.msg_namelen = to.len();
        }
        // `IoSlice` has the layout of iovec, as its documentation promises.
        hdr.msg_iov = message.payload.as_ptr().cast_mut().cast();
        hdr.msg_iovlen = message.payload.len();
        let control = self.control.bytes();
        if !control.is_empty() {
            hdr.msg_control = control.as_ptr().cast_mut().cast();
            hdr.msg_controllen = control.len();
        }
        header
    }
}

/// Makes a socket report the local address of each datagram. `ipv6` is the family of the socket. A dual-stack
/// socket reports both kinds for IPv4 datagrams; the IPv4 kind has an address from which a broadcast can be
/// answered.
///
/// # Errors
/// Those of setsockopt(2).
pub fn report_local_addr(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        crate::socket::set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
    }
    crate::socket::set_int(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
}

/// Makes a socket report the traffic class of each datagram, and how many datagrams it has dropped (socket(7)
/// `SO_RXQ_OVFL`), mostly because its buffer was full; wrong checksums count, too. `ipv6` is the family of
/// the socket.
///
/// # Errors
/// Those of setsockopt(2).
pub fn report_class_and_drops(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        crate::socket::set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
    }
    crate::socket::set_int(socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
    crate::socket::set_int(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// Disables the error queue (`IP_RECVERR`, ip(7)), which would have to be read: until then, the socket is
/// reported to have failed. A socket without it is left alone, so that a confined process may not change it.
///
/// # Errors
/// Those of getsockopt(2) and setsockopt(2).
pub fn queue_no_errors(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    let v6 = ipv6.then_some((libc::IPPROTO_IPV6, libc::IPV6_RECVERR));
    for (level, name) in v6.into_iter().chain([(libc::IPPROTO_IP, libc::IP_RECVERR)]) {
        if crate::socket::get_int(socket, level, name)? != 0 {
            crate::socket::set_int(socket, level, name, 0)?;
        }
    }
    Ok(())
}

/// Lets the kernel return coalesced datagrams as one GSO batch (`UDP_GRO`, udp(7)).
///
/// # Errors
/// Those of setsockopt(2): `ENOPROTOOPT` before Linux 5.0.
pub fn enable_gro(socket: BorrowedFd<'_>) -> io::Result<()> {
    crate::socket::set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Sets the sizes of a socket's receive and send buffers, in bytes. With `CAP_NET_ADMIN`, they can exceed
/// `net.core.rmem_max` and `wmem_max` (socket(7) `SO_RCVBUFFORCE`); otherwise these are the limits.
///
/// # Errors
/// Those of setsockopt(2).
pub fn set_buffers(socket: BorrowedFd<'_>, receive: usize, send: usize) -> io::Result<()> {
    let set = |forced, limited, bytes| {
        let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        crate::socket::set_int(socket, libc::SOL_SOCKET, forced, value)
            .or_else(|_not_allowed| crate::socket::set_int(socket, libc::SOL_SOCKET, limited, value))
    };
    set(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, receive)?;
    set(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, send)
}

/// How many datagrams a socket has dropped since it was opened; the counter wraps (`SO_MEMINFO`;
/// `SK_MEMINFO_DROPS`, include/uapi/linux/sock_diag.h).
///
/// # Errors
/// Those of getsockopt(2): `ENOPROTOOPT` before Linux 4.12.
pub fn dropped(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const DROPS: usize = 8;
    let mut values = [0_u32; DROPS + 1];
    let mut len = u32::try_from(size_of_val(&values)).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes into `values`, which has that size, and any bytes are
    // valid integers.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    Ok(values[DROPS])
}

/// Discards what is queued for a socket. Returns the number of datagrams, where coalesced ones count as one.
/// If that is [`MOST_DISCARDED`], there may be more.
pub fn discard(socket: BorrowedFd<'_>) -> usize {
    let socket = socket2::SockRef::from(&socket);
    let mut count = 0;
    for _ in 0..MOST_DISCARDED {
        match socket.recv_with_flags(&mut [], libc::MSG_DONTWAIT) {
            Ok(_) => count += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // The error of an earlier datagram, which this call has cleared.
            Err(_) => {}
        }
    }
    count
}

/// Whether `addr` belongs to this host. Returns `false` if that is unknown.
///
/// Packets to a host's own address have that address as their source, unless it is a secondary address of an
/// interface. An own address can also be bound. But with `ip_nonlocal_bind` (ip(7)), so can any other
/// address, including the documentation addresses (RFC 5737, RFC 3849), in which case that proves nothing.
pub fn is_local(addr: SocketAddr) -> bool {
    let nobodys: IpAddr = match addr {
        SocketAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        SocketAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    let mut own = addr;
    own.set_port(0);
    let can_be_bound = |addr: SocketAddr| UdpSocket::bind(addr).is_ok();
    source_towards(addr).is_ok_and(|source| source == addr.ip())
        || can_be_bound(own) && !can_be_bound(SocketAddr::new(nobodys, 0))
}

/// The source address of a datagram to `addr`, according to the current routing table and addresses of this
/// host.
///
/// # Errors
/// Those of socket(2) and connect(2), such as `ENETUNREACH`.
pub fn source_towards(addr: SocketAddr) -> io::Result<IpAddr> {
    // Unbound, so that connect(2) does both.
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, None)?;
    socket.connect(&addr.into())?;
    let local = socket.local_addr()?.as_socket();
    local.map(|local| local.ip()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// The size of a socket's receive buffer in bytes, as set; the kernel doubles it for its own bookkeeping.
///
/// # Errors
/// Those of getsockopt(2).
pub fn receive_buffer(socket: BorrowedFd<'_>) -> io::Result<usize> {
    Ok(socket2::SockRef::from(&socket).recv_buffer_size()? / 2)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn pair(ip: &str) -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind((ip, 0)).unwrap();
        let b = UdpSocket::bind((ip, 0)).unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        (a, b)
    }

    fn transmit<'a>(payload: &'a [IoSlice<'a>]) -> Transmit<'a> {
        Transmit { payload, to: None, source: None, segment: None, class: 0 }
    }

    #[test]
    fn a_batch_arrives_with_senders_and_local_addresses_again_and_again() {
        for ip in ["127.0.0.1", "::1"] {
            let (a, b) = pair(ip);
            report_local_addr(b.as_fd(), ip == "::1").unwrap();
            let mut batch = RecvBatch::new();
            for round in 0..3_u8 {
                let bytes = [[round; 1], [round + 1; 1]];
                let slices = bytes.each_ref().map(|b| [IoSlice::new(b)]);
                assert_eq!(send_batch(a.as_fd(), &slices.each_ref().map(|s| transmit(s))).unwrap(), 2);
                send(a.as_fd(), &transmit(&[])).unwrap();
                assert_eq!(batch.recv(b.as_fd(), 1, 9, true).unwrap(), 3);
                assert_eq!(batch.payload(1), Some(&[round][..]));
                assert_eq!(batch.payload(2), Some(&[round + 1][..]));
                assert_eq!(batch.payload(3), Some(&[][..]), "a datagram without bytes is one too");
                for slot in 1..=3 {
                    assert_eq!(batch.sender(slot), Some(a.local_addr().unwrap()));
                    let local = batch.control(slot).local.unwrap();
                    assert_eq!(local.ip, ip.parse::<IpAddr>().unwrap());
                }
            }
            let none = batch.recv(b.as_fd(), 0, BATCH, true).unwrap_err();
            assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_train_is_cut_on_the_way_and_may_arrive_as_one() {
        let (a, b) = pair("127.0.0.1");
        let batch_of = [IoSlice::new(&[1; 100]), IoSlice::new(&[2; 100]), IoSlice::new(&[3; 50])];
        let message = Transmit { segment: Some(100), ..transmit(&batch_of) };
        let mut batch = RecvBatch::new();

        send(a.as_fd(), &message).unwrap();
        assert_eq!(batch.recv(b.as_fd(), 0, BATCH, false).unwrap(), 3);
        assert_eq!(batch.payload(2), Some(&[3; 50][..]));
        assert_eq!(batch.control(2).segment, None);
        assert_eq!(batch.sender(2), None);

        enable_gro(b.as_fd()).unwrap();
        send(a.as_fd(), &message).unwrap();
        assert_eq!(batch.recv(b.as_fd(), 0, BATCH, false).unwrap(), 1);
        assert_eq!(batch.payload(0).map(<[u8]>::len), Some(250));
        assert_eq!(batch.control(0).segment, Some(100));
    }

    #[test]
    fn the_largest_datagram_fits() {
        let (a, b) = pair("127.0.0.1");
        let bytes = vec![7; 65_507];
        send(a.as_fd(), &transmit(&[IoSlice::new(&bytes)])).unwrap();
        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(b.as_fd(), 63, 9, true).unwrap(), 1);
        assert_eq!(batch.payload(63), Some(&bytes[..]));
    }

    #[test]
    fn memory_is_given_back_and_used_again() {
        let (a, b) = pair("127.0.0.1");
        let bytes = vec![7; 65_507];
        let mut batch = RecvBatch::new();
        assert_eq!(batch.memory(), 0);
        for _ in 0..2 {
            for (slot, size) in [(0, 65_507), (31, 1), (31, 5000)] {
                a.send(&bytes[..size]).unwrap();
                assert_eq!(batch.recv(b.as_fd(), slot, 1, true).unwrap(), 1);
                assert_eq!(batch.payload(slot), Some(&bytes[..size]));
            }
            assert_eq!(batch.memory(), 18 * SMALL_PAGE);
            batch.give_back();
            assert_eq!(batch.memory(), 0);
            assert_eq!(batch.payload(0), Some(&[][..]));
            // The first page may also contain memory before the buffer.
            assert!(batch.payloads[65_536..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn an_answer_leaves_from_the_address_it_is_told() {
        let server = UdpSocket::bind("0.0.0.0:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let source = LocalAddr { ip: "127.0.0.9".parse().unwrap(), interface: 0 };
        let payload = [IoSlice::new(b"answer")];
        let to = Some(client.local_addr().unwrap());
        let message = Transmit { to, source: Some(source), ..transmit(&payload) };
        assert_eq!(send_batch(server.as_fd(), &[message]).unwrap(), 1);
        let (_len, from) = client.recv_from(&mut [0; 9]).unwrap();
        assert_eq!(from.ip(), source.ip);
    }

    #[test]
    fn a_socket_of_both_families_names_the_address_in_the_clients_family() {
        let server = UdpSocket::bind("[::]:0").unwrap();
        report_local_addr(server.as_fd(), true).unwrap();
        let port = server.local_addr().unwrap().port();
        let mut batch = RecvBatch::new();
        for ip in ["127.0.0.1", "::1"] {
            let client = UdpSocket::bind((ip, 0)).unwrap();
            client.send_to(b"question", (ip, port)).unwrap();
            assert_eq!(batch.recv(server.as_fd(), 0, 1, true).unwrap(), 1);
            let local = batch.control(0).local.unwrap();
            assert_eq!(local.ip.to_string(), ip);
            let payload = [IoSlice::new(b"answer")];
            let message = Transmit { to: batch.sender(0), source: Some(local), ..transmit(&payload) };
            send(server.as_fd(), &message).unwrap();
            assert_eq!(client.recv_from(&mut [0; 9]).unwrap().1.ip(), local.ip);
        }
    }

    #[test]
    fn the_addresses_of_this_host_are_its_own() {
        for (addr, is_own) in [("127.0.0.1:9", true), ("127.9.9.9:9", true), ("192.0.2.1:9", false)] {
            assert_eq!(is_local(addr.parse().unwrap()), is_own, "{addr}");
        }
    }

    #[test]
    fn buffers_grow_as_far_as_the_limits_go() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_buffers(socket.as_fd(), 300_000, 300_000).unwrap();
        let size = receive_buffer(socket.as_fd()).unwrap();
        assert!(size > 100_000, "{size}");
    }
}
