//! Sockets.
#![expect(unsafe_code, reason = "addresses, options and messages are passed by raw pointers")]

use core::net::SocketAddr;
use core::ptr;

use crate::arch::number;
use crate::call;
use crate::errno::Errno;
use crate::fd::Fd;

/// Address families and kinds of sockets (socket(2)).
pub const AF_UNIX: i32 = 1;
/// IPv4.
pub const AF_INET: i32 = 2;
/// IPv6.
pub const AF_INET6: i32 = 10;
/// TCP.
pub const SOCK_STREAM: i32 = 1;
/// UDP.
pub const SOCK_DGRAM: i32 = 2;
/// Messages in order, over a connection.
pub const SOCK_SEQPACKET: i32 = 5;

/// `SOCK_NONBLOCK | SOCK_CLOEXEC`
const SOCK_FLAGS: i32 = 0o4000 | 0o2_000_000;

/// An option: its level and its name.
#[derive(Clone, Copy, Debug)]
pub struct Opt(i32, i32);

/// Options that are integers (socket(7), tcp(7), udp(7), ip(7), ipv6(7)).
impl Opt {
    /// `SO_REUSEADDR`
    pub const REUSE_ADDRESS: Self = Self(1, 2);
    /// `SO_TYPE`
    pub const KIND: Self = Self(1, 3);
    /// `SO_SNDBUF`
    pub const SEND_BUFFER: Self = Self(1, 7);
    /// `SO_RCVBUF`
    pub const RECEIVE_BUFFER: Self = Self(1, 8);
    /// `SO_KEEPALIVE`
    pub const KEEPALIVE: Self = Self(1, 9);
    /// `SO_OOBINLINE`
    pub const OUT_OF_BAND_INLINE: Self = Self(1, 10);
    /// `SO_ACCEPTCONN`
    pub const IS_LISTENING: Self = Self(1, 30);
    /// `SO_SNDBUFFORCE`
    pub const SEND_BUFFER_FORCED: Self = Self(1, 32);
    /// `SO_RCVBUFFORCE`
    pub const RECEIVE_BUFFER_FORCED: Self = Self(1, 33);
    /// `SO_DOMAIN`
    pub const FAMILY: Self = Self(1, 39);
    /// `SO_RXQ_OVFL`
    pub const REPORT_DROPS: Self = Self(1, 40);
    /// `IP_PKTINFO`
    pub const REPORT_ADDRESS_V4: Self = Self(0, 8);
    /// `IP_RECVTOS`
    pub const REPORT_CLASS_V4: Self = Self(0, 13);
    /// `IPV6_V6ONLY`
    pub const V6_ONLY: Self = Self(41, 26);
    /// `IPV6_RECVPKTINFO`
    pub const REPORT_ADDRESS_V6: Self = Self(41, 49);
    /// `IPV6_RECVTCLASS`
    pub const REPORT_CLASS_V6: Self = Self(41, 66);
    /// `TCP_NODELAY`
    pub const NO_DELAY: Self = Self(6, 1);
    /// `TCP_KEEPIDLE`, in seconds
    pub const KEEPALIVE_IDLE: Self = Self(6, 4);
    /// `TCP_KEEPINTVL`, in seconds
    pub const KEEPALIVE_INTERVAL: Self = Self(6, 5);
    /// `UDP_GRO`
    pub const COALESCE: Self = Self(17, 104);

    /// `SO_LINGER`, which has two integers.
    const LINGER: Self = Self(1, 13);
    /// `SO_PEERCRED`, which has three.
    const PEER: Self = Self(1, 17);
}

/// An address as the kernel wants it: `sockaddr_in`, `sockaddr_in6` or `sockaddr_un`.
#[derive(Clone, Debug)]
pub struct Address {
    bytes: [u8; Self::LONGEST],
    len: usize,
}

impl Address {
    /// The size of `sockaddr_un`.
    const LONGEST: usize = 110;

    /// An address of a Unix socket in the abstract namespace (unix(7)), or `None` if the name is too long.
    pub fn abstract_unix(name: &[u8]) -> Option<Self> {
        let mut address = Self::of_family(AF_UNIX);
        // A NUL precedes the name.
        let start = address.len + 1;
        address.len = start + name.len();
        address.bytes.get_mut(start..address.len)?.copy_from_slice(name);
        Some(address)
    }

    fn of_family(family: i32) -> Self {
        let mut bytes = [0; Self::LONGEST];
        let family = family.to_ne_bytes();
        // `sa_family_t` has two bytes.
        let used = if cfg!(target_endian = "big") { &family[2..] } else { &family[..2] };
        bytes[..2].copy_from_slice(used);
        Self { bytes, len: 2 }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..][..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        let mut address = Self::of_family(family_of(addr));
        address.push(&addr.port().to_be_bytes());
        match addr {
            SocketAddr::V4(addr) => {
                address.push(&addr.ip().octets());
                // Padding.
                address.push(&[0; 8]);
            }
            SocketAddr::V6(addr) => {
                address.push(&addr.flowinfo().to_be_bytes());
                address.push(&addr.ip().octets());
                address.push(&addr.scope_id().to_ne_bytes());
            }
        }
        address
    }
}

/// The family of an address.
pub fn family_of(addr: SocketAddr) -> i32 {
    if addr.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// Opens a non-blocking, close-on-exec socket (socket(2)).
///
/// # Errors
/// Those of socket(2).
pub fn open(family: i32, kind: i32) -> Result<Fd, Errno> {
    let arguments = [argument(family), argument(kind | SOCK_FLAGS), 0];
    // SAFETY: no pointers.
    unsafe { call(number::SOCKET, arguments) }.map(Fd::returned)
}

/// Binds a socket (bind(2)).
///
/// # Errors
/// Those of bind(2).
pub fn bind(socket: &Fd, address: &Address) -> Result<(), Errno> {
    with_address(number::BIND, socket, address)
}

/// Connects a socket (connect(2)).
///
/// # Errors
/// Those of connect(2): [`Errno::AGAIN`] if the backlog of a Unix socket is full.
pub fn connect(socket: &Fd, address: &Address) -> Result<(), Errno> {
    with_address(number::CONNECT, socket, address)
}

fn with_address(number: usize, socket: &Fd, address: &Address) -> Result<(), Errno> {
    let arguments = [socket.argument(), address.bytes.as_ptr().expose_provenance(), address.len];
    // SAFETY: the kernel reads `len` bytes of the address, which has them.
    unsafe { call(number, arguments) }.map(drop)
}

/// Accepts connections (listen(2)).
///
/// # Errors
/// Those of listen(2).
pub fn listen(socket: &Fd, backlog: i32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    unsafe { call(number::LISTEN, [socket.argument(), argument(backlog)]) }.map(drop)
}

/// Shuts both directions down (shutdown(2)). A listening TCP socket ends to listen, whoever else has it open.
///
/// # Errors
/// Those of shutdown(2).
pub fn shut_down(socket: &Fd) -> Result<(), Errno> {
    const SHUT_RDWR: usize = 2;
    // SAFETY: no pointers.
    unsafe { call(number::SHUTDOWN, [socket.argument(), SHUT_RDWR]) }.map(drop)
}

/// Sets an option (setsockopt(2)).
///
/// # Errors
/// Those of setsockopt(2).
pub fn set(socket: &Fd, option: Opt, value: i32) -> Result<(), Errno> {
    set_words(socket, option, &[value])
}

/// Makes a close discard what was not sent, and reset the connection (socket(7), `SO_LINGER` of 0 s).
///
/// # Errors
/// Those of setsockopt(2).
pub fn reset_on_close(socket: &Fd) -> Result<(), Errno> {
    set_words(socket, Opt::LINGER, &[1, 0])
}

fn set_words(socket: &Fd, Opt(level, name): Opt, words: &[i32]) -> Result<(), Errno> {
    let (pointer, size) = (words.as_ptr().expose_provenance(), size_of_val(words));
    let arguments = [socket.argument(), argument(level), argument(name), pointer, size];
    // SAFETY: the kernel reads `size` bytes of the words.
    unsafe { call(number::SETSOCKOPT, arguments) }.map(drop)
}

/// Reads an option (getsockopt(2)).
///
/// # Errors
/// Those of getsockopt(2).
pub fn get(socket: &Fd, option: Opt) -> Result<i32, Errno> {
    get_words::<1>(socket, option).map(|[value]| value)
}

/// The user that the process at the other end of a connection had when it began to listen (unix(7), `SO_PEERCRED`).
///
/// # Errors
/// Those of getsockopt(2).
pub fn peer_user(socket: &Fd) -> Result<u32, Errno> {
    get_words::<3>(socket, Opt::PEER).map(|[_process, user, _group]| user.cast_unsigned())
}

fn get_words<const COUNT: usize>(socket: &Fd, Opt(level, name): Opt) -> Result<[i32; COUNT], Errno> {
    let mut words = [0; COUNT];
    let mut size = i32::try_from(size_of_val(&words)).unwrap_or(0);
    let pointers = [words.as_mut_ptr().expose_provenance(), (&raw mut size).expose_provenance()];
    let arguments = [socket.argument(), argument(level), argument(name), pointers[0], pointers[1]];
    // SAFETY: the kernel writes at most `size` bytes into the words, of which any are valid, and the
    // size.
    unsafe { call(number::GETSOCKOPT, arguments) }?;
    Ok(words)
}

/// `struct iovec`
#[repr(C)]
struct Buffer {
    start: *const u8,
    len: usize,
}

/// `struct msghdr`
#[repr(C)]
struct Message {
    name: *const u8,
    name_len: u32,
    buffers: *const Buffer,
    buffer_count: usize,
    control: *const Rights,
    control_len: usize,
    flags: i32,
}

/// `struct cmsghdr` with `SCM_RIGHTS`, and one descriptor.
#[repr(C, align(8))]
struct Rights {
    len: usize,
    level: i32,
    kind: i32,
    fd: i32,
}

/// Sends a packet over a connection, with one descriptor or none (sendmsg(2), unix(7) `SCM_RIGHTS`).
///
/// # Errors
/// Those of sendmsg(2).
pub fn send(socket: &Fd, packet: &[u8], passed: Option<&Fd>) -> Result<(), Errno> {
    const SOL_SOCKET: i32 = 1;
    const SCM_RIGHTS: i32 = 1;
    const MSG_NOSIGNAL: usize = 0x4000;
    /// `CMSG_LEN(sizeof(int))`
    const LEN: usize = 20;
    let buffer = Buffer { start: packet.as_ptr(), len: packet.len() };
    let rights = passed.map(|fd| Rights { len: LEN, level: SOL_SOCKET, kind: SCM_RIGHTS, fd: fd.number() });
    let message = Message {
        name: ptr::null(),
        name_len: 0,
        buffers: &raw const buffer,
        buffer_count: 1,
        control: rights.as_ref().map_or(ptr::null(), ptr::from_ref),
        control_len: if rights.is_some() { size_of::<Rights>() } else { 0 },
        flags: 0,
    };
    let arguments = [socket.argument(), (&raw const message).expose_provenance(), MSG_NOSIGNAL];
    // SAFETY: the message points to a buffer and, if there is a descriptor, to a control message, with their sizes;
    // the kernel reads them.
    unsafe { call(number::SENDMSG, arguments) }.map(drop)
}

/// `struct ifreq` as far as `SIOCGIFINDEX` uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    index: i32,
    rest: [u8; 20],
}

/// The index of the network interface `name`, if there is one (netdevice(7)).
pub fn interface_index(name: &str) -> Option<u32> {
    const SIOCGIFINDEX: usize = 0x8933;
    let mut request = InterfaceRequest { name: [0; 16], index: 0, rest: [0; 20] };
    // The kernel's names have at most 15 bytes and a NUL.
    request.name[..15].get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    let socket = open(AF_INET, SOCK_DGRAM).or_else(|_no_ipv4| open(AF_INET6, SOCK_DGRAM)).ok()?;
    let arguments = [socket.argument(), SIOCGIFINDEX, (&raw mut request).expose_provenance()];
    // SAFETY: the kernel reads the name, and writes into a request of the size of ifreq.
    unsafe { call(number::IOCTL, arguments) }.ok()?;
    u32::try_from(request.index).ok()
}

/// An int as an argument of a call.
fn argument(value: i32) -> usize {
    value.cast_unsigned() as usize
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixSocketAddr, UnixListener, UnixStream};

    use super::*;

    /// Hands a socket to the standard library.
    fn owned(socket: Fd) -> OwnedFd {
        let number = socket.number();
        core::mem::forget(socket);
        // SAFETY: it is open, and nobody else owns it.
        unsafe { OwnedFd::from_raw_fd(number) }
    }

    #[test]
    fn sockets_are_bound_where_they_should_be() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let addr: SocketAddr = addr.parse().unwrap();
            let udp = open(family_of(addr), SOCK_DGRAM).unwrap();
            bind(&udp, &addr.into()).unwrap();
            assert_eq!(UdpSocket::from(owned(udp)).local_addr().unwrap().ip(), addr.ip());

            let tcp = open(family_of(addr), SOCK_STREAM).unwrap();
            bind(&tcp, &addr.into()).unwrap();
            assert_eq!(get(&tcp, Opt::IS_LISTENING), Ok(0));
            listen(&tcp, 1).unwrap();
            assert_eq!(get(&tcp, Opt::IS_LISTENING), Ok(1));
            assert_eq!(get(&tcp, Opt::FAMILY), Ok(family_of(addr)));
            assert_eq!(get(&tcp, Opt::KIND), Ok(SOCK_STREAM));
            let listener = TcpListener::from(owned(tcp));
            TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        }
    }

    #[test]
    fn a_listener_that_is_shut_down_refuses_clients_whoever_has_it_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let copy = Fd::claim(listener.try_clone().unwrap().into_raw_fd()).unwrap();
        shut_down(&copy).unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap_err();
    }

    #[test]
    fn options_are_read_as_they_were_set() {
        let socket = open(AF_INET, SOCK_STREAM).unwrap();
        for (option, value) in [(Opt::KEEPALIVE_IDLE, 15), (Opt::NO_DELAY, 1), (Opt::OUT_OF_BAND_INLINE, 1)] {
            set(&socket, option, value).unwrap();
            assert_eq!(get(&socket, option), Ok(value), "{option:?}");
        }
        assert_eq!(set(&socket, Opt::COALESCE, 1), Err(Errno::NOPROTOOPT));
    }

    #[test]
    fn a_name_has_one_length_only() {
        assert!(Address::abstract_unix(&[b'x'; 107]).is_some());
        assert!(Address::abstract_unix(&[b'x'; 108]).is_none());
    }

    #[test]
    fn a_descriptor_is_passed_to_a_listener_whose_user_is_known() {
        let name = format!("rproxy-sys-raw-{}", std::process::id());
        let addr = UnixSocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&addr).unwrap();
        let socket = open(AF_UNIX, SOCK_STREAM).unwrap();
        let address = Address::abstract_unix(name.as_bytes()).unwrap();
        connect(&socket, &address).unwrap();
        assert_eq!(peer_user(&socket), Ok(crate::process::effective_user()));
        let passed = open(AF_INET, SOCK_DGRAM).unwrap();
        send(&socket, b"hello", Some(&passed)).unwrap();
        send(&socket, b"world", None).unwrap();
        let (accepted, _addr): (UnixStream, _) = listener.accept().unwrap();
        let accepted = Fd::claim(accepted.into_raw_fd()).unwrap();
        let mut buffer = [0; 5];
        // A message with a descriptor is not joined with the next one.
        for text in [b"hello", b"world"] {
            assert_eq!(accepted.read(&mut buffer), Ok(5));
            assert_eq!(&buffer, text);
        }
        drop(accepted);
        assert_eq!(send(&socket, b"!", None), Err(Errno(32)));
    }

    #[test]
    fn interfaces_have_their_index() {
        assert_eq!(interface_index("lo"), Some(1));
        assert_eq!(interface_index(""), None);
        assert_eq!(interface_index("a-name-that-is-too-long"), None);
    }
}
