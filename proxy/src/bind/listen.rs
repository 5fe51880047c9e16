//! Listening sockets, bound here or inherited.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Once;
use std::time::Duration;

use nix::libc;
use rproxy_mapping::addr::{HostSocketAddr, Protocol, ScopedIp, SockAddr};
use rproxy_mapping::host::InterfaceName;
use rproxy_mapping::keepalive::{Keepalive, Probes};
use rproxy_mapping::limits::Limits;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::{Mapping, PortMapping};
use rproxy_sys::{sctp, udp};
use socket2::{Domain, Protocol as Transport, SockRef, Socket, TcpKeepalive, Type};

use crate::bind::holder::{self, Holder, Taken};
use crate::bind::unix_socket::UnixSocket;
use crate::runtime::descriptors::explain;

pub(crate) use rproxy_shim::listen::BACKLOG;
use rproxy_shim::listen::{KEEPALIVE, UDP_RECEIVE_BUFFER, UDP_SEND_BUFFER};

/// A non-blocking socket that clients of a mapping connect or send to.
#[derive(Debug)]
pub enum Listener {
    /// A listening TCP socket.
    Tcp(TcpListener),
    /// A bound UDP socket that reports the local address of each datagram.
    Udp(UdpSocket),
    /// A listening SCTP socket, one-to-one.
    Sctp(Socket),
    /// A listening Unix socket, whose connections are relayed as those of TCP.
    Unix(UnixSocket),
}

impl Listener {
    /// Binds the host address of `mapping`, in the way that `limits` ask for.
    ///
    /// # Errors
    /// [`BindError`], whose message suggests what would work.
    pub fn bind(mapping: &PortMapping, limits: &Limits) -> Result<Self, BindError> {
        let PortMapping { protocol, host, v6only, .. } = mapping;
        let options = BindOptions { v6only: *v6only, freebind: limits.freebind };
        let bound = match host.sockaddr() {
            SockAddr::Inet(addr) => match protocol {
                Protocol::Tcp => listen_tcp(*addr, options).map(Self::Tcp),
                Protocol::Udp => bind_udp(*addr, options).map(Self::Udp),
                Protocol::Sctp => listen_sctp(*addr, options).map(Self::Sctp),
            },
            SockAddr::Unix(addr) => {
                let permissions = limits.socket.as_deref().cloned().unwrap_or_default();
                UnixSocket::listen(addr, &permissions).map(Self::Unix).map_err(io::Error::from)
            }
        };
        let (protocol, addr) = (*protocol, host.clone());
        bound.map_err(|source| BindError { protocol, addr, interface: None, among: None, more: 1, source })
    }

    /// Adopts an inherited socket of any protocol, or a Unix socket.
    ///
    /// # Errors
    /// [`AdoptError`] if it is something else.
    pub fn adopt_any(fd: OwnedFd) -> Result<Self, AdoptError> {
        let socket = SockRef::from(&fd);
        let kind = socket.r#type().map_err(AdoptError::NotASocket)?;
        let transport = socket.protocol().map_err(AdoptError::NotASocket)?;
        if socket.domain().map_err(AdoptError::NotASocket)? == Domain::UNIX && kind == Type::STREAM {
            return Self::adopt_unix(fd.into());
        }
        let protocol = match transport {
            Some(Transport::SCTP) => Protocol::Sctp,
            _ if kind == Type::STREAM => Protocol::Tcp,
            _ => Protocol::Udp,
        };
        Self::adopt(fd, protocol)
    }

    /// Adopts an inherited socket. One that clients connect to must be listening (moby's `-use-listen-fd`).
    ///
    /// # Errors
    /// [`AdoptError`] if it is something else.
    pub fn adopt(fd: OwnedFd, protocol: Protocol) -> Result<Self, AdoptError> {
        let socket = Socket::from(fd);
        let kind = socket.r#type().map_err(AdoptError::NotASocket)?;
        let domain = socket.domain().map_err(AdoptError::NotASocket)?;
        let transport = socket.protocol().map_err(AdoptError::NotASocket)?;
        // ICMP has datagrams, too, and SCTP streams.
        let wanted: (_, &[_]) = match protocol {
            Protocol::Tcp => (Type::STREAM, &[Transport::TCP, Transport::MPTCP]),
            Protocol::Udp => (Type::DGRAM, &[Transport::UDP]),
            Protocol::Sctp => (Type::STREAM, &[Transport::SCTP]),
        };
        let is_wanted = kind == wanted.0 && transport.is_some_and(|transport| wanted.1.contains(&transport));
        if !is_wanted || !matches!(domain, Domain::IPV4 | Domain::IPV6) {
            return Err(AdoptError::WrongKind(protocol));
        }
        // Nothing is set on a socket that is refused: others use it.
        if protocol.has_connections() && !socket.is_listener().map_err(AdoptError::Setup)? {
            return Err(AdoptError::NotListening(protocol));
        }
        socket.set_nonblocking(true).map_err(AdoptError::Setup)?;
        match protocol {
            Protocol::Tcp => set_stream_options(&SockRef::from(&socket)),
            Protocol::Udp => udp::queue_no_errors(socket.as_fd(), domain == Domain::IPV6)
                .and_then(|()| set_datagram_options(&socket, domain == Domain::IPV6)),
            Protocol::Sctp => set_message_options(&SockRef::from(&socket)),
        }
        .map_err(AdoptError::Setup)?;
        Ok(match protocol {
            Protocol::Tcp => Self::Tcp(socket.into()),
            Protocol::Udp => Self::Udp(socket.into()),
            Protocol::Sctp => Self::Sctp(socket),
        })
    }

    fn adopt_unix(socket: Socket) -> Result<Self, AdoptError> {
        if !socket.is_listener().map_err(AdoptError::Setup)? {
            return Err(AdoptError::NotListening(Protocol::Tcp));
        }
        UnixSocket::adopt_listener(socket).map(Self::Unix).map_err(AdoptError::Setup)
    }

    /// The protocol of the socket.
    pub fn protocol(&self) -> Protocol {
        match self {
            Self::Tcp(_) | Self::Unix(_) => Protocol::Tcp,
            Self::Udp(_) => Protocol::Udp,
            Self::Sctp(_) => Protocol::Sctp,
        }
    }

    /// Whether IPv4 clients are excluded (`IPV6_V6ONLY`, ipv6(7)).
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn is_v6only(&self) -> io::Result<bool> {
        if !self.local_addr()?.inet_addr().is_some_and(|addr| addr.is_ipv6()) {
            return Ok(false);
        }
        match self {
            Self::Unix(_) => Ok(false),
            Self::Tcp(listener) => SockRef::from(listener).only_v6(),
            Self::Udp(socket) => SockRef::from(socket).only_v6(),
            Self::Sctp(socket) => socket.only_v6(),
        }
    }

    /// The address that clients send to, with the actual port.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<HostSocketAddr> {
        let other = || io::Error::from(io::ErrorKind::InvalidInput);
        let addr = match self {
            Self::Tcp(listener) => listener.local_addr()?,
            Self::Udp(socket) => socket.local_addr()?,
            Self::Sctp(socket) => socket.local_addr()?.as_socket().ok_or_else(other)?,
            Self::Unix(socket) => return socket.local_addr().map(HostSocketAddr::from).ok_or_else(other),
        };
        Ok(addr.into())
    }
}

/// Creates a socket for the family of `addr`. Whether an IPv6 socket also accepts IPv4 is set explicitly,
/// because the default depends on a sysctl (net.ipv6.bindv6only).
fn new_socket(
    addr: SocketAddr,
    kind: Type,
    transport: Option<Transport>,
    options: BindOptions,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind.nonblocking(), transport)?;
    if addr.is_ipv6() {
        socket.set_only_v6(options.v6only)?;
    }
    match addr {
        _ if !options.freebind => {}
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    Ok(socket)
}

/// How an address is bound.
#[derive(Clone, Copy, Debug)]
struct BindOptions {
    v6only: bool,
    /// Also if this machine does not have it (`IP_FREEBIND`, ip(7)).
    freebind: bool,
}

/// Binds a TCP socket that listens on `addr`.
pub(crate) fn bind_tcp(addr: SocketAddr, v6only: bool) -> io::Result<TcpListener> {
    listen_tcp(addr, BindOptions { v6only, freebind: false })
}

fn listen_tcp(addr: SocketAddr, options: BindOptions) -> io::Result<TcpListener> {
    let socket = new_socket(addr, Type::STREAM, None, options)?;
    // Connections of an earlier run may still be in TIME_WAIT on this port.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    set_stream_options(&SockRef::from(&socket))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn listen_sctp(addr: SocketAddr, options: BindOptions) -> io::Result<Socket> {
    let socket = new_socket(addr, Type::STREAM, Some(Transport::SCTP), options)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    set_message_options(&SockRef::from(&socket))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind_udp(addr: SocketAddr, options: BindOptions) -> io::Result<UdpSocket> {
    let socket = new_socket(addr, Type::DGRAM, None, options)?;
    // Before the first datagram can arrive.
    set_datagram_options(&socket, addr.is_ipv6())?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Sets the options that both sides of a connection have: no Nagle delay, keepalive probes, and a reset on
/// close. An orderly end disables the reset again. A connection that is cut, even by the death of this
/// process, must not look complete.
///
/// Accepted sockets inherit all options from their listener, which saves five calls per connection. MPTCP
/// sockets do not support all of them, and some kernels do not pass them on to accepted MPTCP sockets;
/// unsupported ones are skipped (mptcp(7); include/net/mptcp.h). MPTCP keeps urgent bytes inline anyway.
pub(crate) fn set_stream_options(socket: &SockRef<'_>) -> io::Result<()> {
    if_known(socket.set_linger(Some(Duration::ZERO)))?;
    if_known(socket.set_tcp_nodelay(true))?;
    // An urgent byte is a byte of the stream (RFC 6093). Kept inline, it does not end a read early.
    if_known(socket.set_out_of_band_inline(true))?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    if_known(socket.set_tcp_keepalive(&keepalive))
}

/// Sets the timers of a TCP connection that `limits` ask for, if these are other ones than by default.
pub(crate) fn set_timers(socket: &SockRef<'_>, limits: &Limits) -> io::Result<()> {
    if limits.tcp_user_timeout.is_some() {
        if_known(socket.set_tcp_user_timeout(limits.tcp_user_timeout))?;
    }
    match limits.keepalive {
        Keepalive::Off => if_known(socket.set_keepalive(false)),
        probed if probed == Keepalive::default() => Ok(()),
        Keepalive::On(Probes { idle, interval, count }) => {
            let probes = TcpKeepalive::new().with_time(idle).with_interval(interval);
            let probes = count.map_or(probes.clone(), |count| probes.with_retries(count));
            if_known(socket.set_tcp_keepalive(&probes))
        }
    }
}

/// As [`set_stream_options`], for SCTP, of which each message is read with its stream and payload protocol identifier.
pub(crate) fn set_message_options(socket: &SockRef<'_>) -> io::Result<()> {
    set_stream_options(socket)?;
    sctp::prepare(socket.as_fd(), sctp::STREAMS)
}

/// Ignores that the socket does not support an option.
fn if_known(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT)) => Ok(()),
        result => result,
    }
}

/// Sets the options of a UDP listener: reports of the local address, the traffic class and drops, GRO, and
/// buffers for bursts.
fn set_datagram_options(socket: &Socket, ipv6: bool) -> io::Result<()> {
    static SMALL: Once = Once::new();

    udp::report_local_addr(socket.as_fd(), ipv6)?;
    udp::report_class_and_drops(socket.as_fd(), ipv6)?;
    if let Err(error) = udp::enable_gro(socket.as_fd()) {
        tracing::debug!(%error, "this kernel does not support UDP_GRO");
    }
    udp::set_buffers(socket.as_fd(), UDP_RECEIVE_BUFFER, UDP_SEND_BUFFER)?;
    let size = udp::receive_buffer(socket.as_fd())?;
    if size < UDP_RECEIVE_BUFFER {
        SMALL.call_once(|| {
            tracing::info!(
                bytes = size,
                "UDP buffers are limited by net.core.rmem_max and wmem_max; larger bursts are lost"
            );
        });
    }
    Ok(())
}

/// Why a host address could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}: {}", self.place(), self.reason())]
pub struct BindError {
    /// The protocol of the socket.
    pub protocol: Protocol,
    /// The requested address.
    pub addr: HostSocketAddr,
    /// The interface that has the address, if that was requested.
    pub interface: Option<InterfaceName>,
    /// The candidate ports, if there was more than one.
    pub among: Option<PortRange>,
    /// The number of sockets still to be bound, including this one.
    pub(crate) more: usize,
    /// The error of the kernel.
    pub source: io::Error,
}

impl BindError {
    /// Where it is: an address with the protocol, or a Unix socket.
    pub fn place(&self) -> String {
        let Self { addr, protocol, .. } = self;
        if addr.unix_addr().is_some() { addr.to_string() } else { format!("{addr}/{protocol}") }
    }

    /// Sets the number of sockets still to be bound, including this one.
    pub(crate) fn of(self, more: usize) -> Self {
        Self { more, ..self }
    }

    /// Sets the interface that was requested, if it was one.
    pub(crate) fn on(self, interface: Option<InterfaceName>) -> Self {
        Self { interface, ..self }
    }

    /// Whether this machine has no such address.
    pub(crate) fn is_not_there(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrNotAvailable
    }

    /// The address and port, as requested: of an interface, its name, and the address at fault.
    pub fn requested(&self) -> String {
        let Self { addr, interface, .. } = self;
        match (interface, addr.inet_addr()) {
            (Some(name), Some(addr)) => format!("%{name}:{} at {}", addr.port(), ScopedIp::from(addr)),
            _ => addr.to_string(),
        }
    }

    /// None of the candidate ports of `mapping` is free; `last` is the error of the last one tried.
    pub(crate) fn all_taken(mapping: &Mapping, last: Option<Self>) -> Self {
        let range = mapping.host_ports().range().unwrap_or(PortRange::EPHEMERAL);
        let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
        let protocol = mapping.protocols().iter().next().unwrap_or(Protocol::Tcp);
        Self {
            protocol,
            addr: HostSocketAddr::new(*mapping.addresses().first().unwrap_or(&ScopedIp::ANY), range.first()),
            interface: None,
            among: Some(range),
            more: 1,
            source: last.map_or_else(in_use, |error| error.source),
        }
    }

    /// That `freebind`, as the front end at hand has it, would bind the address, where that is so; or else nothing.
    pub fn hint(&self, freebind: &str) -> String {
        match self.source.kind() {
            io::ErrorKind::AddrNotAvailable => format!("; {freebind} binds it before it is there"),
            _ => String::new(),
        }
    }

    /// That the port is taken, by whom, and what would work.
    fn is_taken(&self, addr: SocketAddr) -> String {
        let Self { protocol, .. } = self;
        let holder = match holder::of(*protocol, addr) {
            Some(Taken { by: holder @ Holder::Process(..), is_sure: true }) => {
                return format!(
                    "the {protocol} port is taken by {holder}; use another one, or end what has it"
                );
            }
            Some(Taken { by: holder @ Holder::Hidden, is_sure: true }) => {
                return format!(
                    "the {protocol} port is taken by no process that is visible here: by {holder}; use another one"
                );
            }
            Some(Taken { by: holder, is_sure: true }) => format!(" by {holder}"),
            Some(Taken { by: holder, is_sure: false }) => format!(", perhaps by {holder}"),
            // A client may have it, too.
            None => String::new(),
        };
        let option = match protocol {
            Protocol::Tcp => "t",
            Protocol::Udp => "u",
            Protocol::Sctp => "S",
        };
        // All addresses of an interface have the same port.
        let free = if self.interface.is_none() { " port 0 takes a free one," } else { "" };
        format!(
            "the {protocol} port is taken{holder}; `ss -an{option}p 'sport = :{}'` shows by which program,{free} and \
             net.ipv4.ip_local_reserved_ports keeps one for listening",
            addr.port()
        )
    }

    /// What the error means here, and what would work.
    pub fn reason(&self) -> String {
        let Self { protocol, addr, source, .. } = self;
        // That of a Unix socket says it all.
        let Some(addr) = addr.inet_addr() else { return source.to_string() };
        let wildcard = if addr.is_ipv4() { "0.0.0.0" } else { "[::]" };
        match source.kind() {
            io::ErrorKind::AddrInUse if self.among.is_some_and(|among| !among.is_single()) => {
                let among = self.among.map_or_else(String::new, |among| among.to_string());
                format!("none of its ports is free ({among}); `ss -antup` shows who has them")
            }
            io::ErrorKind::AddrInUse => self.is_taken(addr),
            io::ErrorKind::AddrNotAvailable if self.interface.is_some() => {
                "the kernel does not bind it although the interface has it, as in a VRF; `ip vrf exec` starts \
                 rproxy in one"
                    .to_owned()
            }
            io::ErrorKind::AddrNotAvailable => format!(
                "this machine has no such address; `ip address` lists those it has, {wildcard} stands for all"
            ),
            io::ErrorKind::PermissionDenied => {
                "ports below net.ipv4.ip_unprivileged_port_start (1024) need root or CAP_NET_BIND_SERVICE; \
                 use a port above, or lower it with sysctl"
                    .to_owned()
            }
            _ if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                format!("this kernel has no {protocol}; `modprobe {protocol}` loads its module")
            }
            _ if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => match addr {
                SocketAddr::V6(addr) if addr.ip().is_unspecified() => {
                    let all = SocketAddr::from((Ipv4Addr::UNSPECIFIED, addr.port()));
                    format!("this machine has no IPv6; write {all} for all of its IPv4 addresses")
                }
                _ => "this machine has no IPv6; use an IPv4 address".to_owned(),
            },
            _ => explain(source, self.more),
        }
    }
}

/// Why an inherited descriptor cannot be used as a listener.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Nothing is open at the descriptor, or it is not a socket.
    #[error("it is not a socket: {0}")]
    NotASocket(#[source] io::Error),
    /// A socket of another kind.
    #[error("it is not a {0} socket over IPv4 or IPv6")]
    WrongKind(Protocol),
    /// A socket on which `listen` was not called.
    #[error("it is a {} socket that does not listen", .0.as_str().to_uppercase())]
    NotListening(Protocol),
    /// An option could not be set.
    #[error("its options cannot be set: {0}")]
    Setup(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{getsockopt, setsockopt, sockopt};

    use super::*;

    fn adopt(fd: impl Into<OwnedFd>, protocol: Protocol) -> Result<Listener, AdoptError> {
        Listener::adopt(fd.into(), protocol)
    }

    #[test]
    fn only_a_listening_tcp_socket_is_adopted_for_tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        assert_eq!(adopt(listener, Protocol::Tcp).unwrap().local_addr().unwrap(), addr.into());

        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(adopt(file, Protocol::Tcp), Err(AdoptError::NotASocket(_))));
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(adopt(udp, Protocol::Tcp), Err(AdoptError::WrongKind(Protocol::Tcp))));
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(matches!(adopt(unix, Protocol::Tcp), Err(AdoptError::WrongKind(Protocol::Tcp))));
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(matches!(Listener::adopt_any(unix.into()), Err(AdoptError::NotListening(Protocol::Tcp))));
        let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let other = idle.try_clone().unwrap();
        assert!(matches!(adopt(idle, Protocol::Tcp), Err(AdoptError::NotListening(Protocol::Tcp))));
        assert!(!other.nonblocking().unwrap(), "whoever has it, too, can go on");
    }

    #[test]
    fn a_connection_has_the_timers_that_its_mapping_asks_for() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let of_socket = SockRef::from(&socket);
        set_stream_options(&of_socket).unwrap();
        let set = |limits: Limits| set_timers(&of_socket, &limits).unwrap();
        set(Limits::default());
        assert_eq!((socket.keepalive().unwrap(), socket.tcp_keepalive_time().unwrap()), (true, KEEPALIVE));
        assert_eq!((socket.tcp_keepalive_interval().unwrap(), Probes::TIME), (KEEPALIVE, KEEPALIVE));
        let keepalive = "1m interval 10s count 5".parse().unwrap();
        set(Limits { keepalive, tcp_user_timeout: Some(Duration::from_millis(1500)), ..Limits::default() });
        let times = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        assert_eq!(times, (Duration::from_mins(1), Duration::from_secs(10)));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 5);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_millis(1500)));
        set(Limits { keepalive: Keepalive::Off, ..Limits::default() });
        assert!(!socket.keepalive().unwrap());
    }

    #[test]
    fn an_address_that_is_not_there_takes_freebind_and_the_error_says_so() {
        let backend: rproxy_mapping::addr::BackendAddr = "192.0.2.1:80".parse().unwrap();
        for host in ["203.0.113.77:0", "[2001:db8::77]:0"] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let host = host.parse().unwrap();
                let mapping = PortMapping { protocol, host, backend: backend.clone(), v6only: false };
                let error = Listener::bind(&mapping, &Limits::default()).unwrap_err();
                assert_eq!(error.hint("--freebind"), "; --freebind binds it before it is there");
                Listener::bind(&mapping, &Limits { freebind: true, ..Limits::default() }).unwrap();
            }
        }
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = taken.local_addr().unwrap().into();
        let mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
        assert_eq!(Listener::bind(&mapping, &Limits::default()).unwrap_err().hint("--freebind"), "");
    }

    #[test]
    fn a_udp_socket_is_adopted_for_udp() {
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let addr = udp.local_addr().unwrap();
        // Whoever bound it may have enabled the error queue, which is never read here.
        setsockopt(&udp, sockopt::Ipv6RecvErr, &true).unwrap();
        let Listener::Udp(adopted) = adopt(udp, Protocol::Udp).unwrap() else { panic!("it is one for UDP") };
        assert_eq!(adopted.local_addr().unwrap(), addr);
        assert!(!getsockopt(&adopted, sockopt::Ipv6RecvErr).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(matches!(adopt(tcp, Protocol::Udp), Err(AdoptError::WrongKind(Protocol::Udp))));
    }
}
