//! The socket that clients connect or send to.

use core::net::SocketAddr;

use rproxy_shim::listen::{BACKLOG, KEEPALIVE, UDP_RECEIVE_BUFFER, UDP_SEND_BUFFER};
use rproxy_shim::message::TCP;
use rproxy_sys_raw::errno::Errno;
use rproxy_sys_raw::fd::Fd;
use rproxy_sys_raw::socket::{self, AF_INET, AF_INET6, Opt, SOCK_DGRAM, SOCK_STREAM};

/// Where `rproxy` looks for a socket with `-use-listen-fd`, and where this process keeps it.
pub(crate) const LISTENER_FD: u16 = 4;

/// A listening TCP socket, or a bound UDP socket.
pub(crate) struct Listener {
    socket: Fd,
    is_tcp: bool,
}

impl Listener {
    /// Adopts the socket that the runtime has passed, without a change: whoever serves it sets its options. Returns
    /// `None` if it does not suit, which is for `rproxy` to report.
    pub(crate) fn adopt(protocol: u8) -> Option<Self> {
        let socket = Fd::claim(LISTENER_FD.into()).ok()?;
        let is_tcp = protocol == TCP;
        let option = |option| socket::get(&socket, option).ok();
        let suits = option(Opt::KIND) == Some(kind(is_tcp))
            && matches!(option(Opt::FAMILY), Some(AF_INET | AF_INET6))
            && (!is_tcp || option(Opt::IS_LISTENING) == Some(1));
        if suits {
            return Some(Self { socket, is_tcp });
        }
        // It stays open for `rproxy`.
        let _inherited = socket.set_inherited(true);
        core::mem::forget(socket);
        None
    }

    /// Binds an address. Returns `None` if that fails, which is for `rproxy` to report.
    pub(crate) fn bind(protocol: u8, host: SocketAddr) -> Option<Self> {
        let is_tcp = protocol == TCP;
        // Its number must not be that of the status pipe, which may be missing.
        let socket =
            socket::open(socket::family_of(host), kind(is_tcp)).ok()?.move_to(LISTENER_FD.into()).ok()?;
        let listener = Self { socket, is_tcp };
        listener.prepare(host).ok()?;
        Some(listener)
    }

    /// Sets the options that must be there before the first client, binds, and listens.
    fn prepare(&self, host: SocketAddr) -> Result<(), Errno> {
        let socket = &self.socket;
        if host.is_ipv6() {
            // As Go's "tcp6": the runtime starts a separate proxy for IPv4.
            socket::set(socket, Opt::V6_ONLY, 1)?;
        }
        if !self.is_tcp {
            set_datagram_options(socket, host.is_ipv6())?;
            return socket::bind(socket, &host.into());
        }
        // Connections of an earlier run may still be in TIME_WAIT on this port.
        socket::set(socket, Opt::REUSE_ADDRESS, 1)?;
        socket::bind(socket, &host.into())?;
        set_stream_options(socket)?;
        socket::listen(socket, BACKLOG)
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &Fd {
        &self.socket
    }

    /// Stops to listen, whoever else has the socket open. A UDP socket is closed once nobody has.
    pub(crate) fn shut_down(&self) {
        if self.is_tcp {
            let _done = socket::shut_down(&self.socket);
        }
    }
}

fn kind(is_tcp: bool) -> i32 {
    if is_tcp { SOCK_STREAM } else { SOCK_DGRAM }
}

/// Sets what accepted connections inherit: no Nagle delay, keepalive probes, urgent bytes in the stream, and a reset
/// on close, so that a connection that is cut does not look complete.
fn set_stream_options(socket: &Fd) -> Result<(), Errno> {
    let seconds = i32::try_from(KEEPALIVE.as_secs()).unwrap_or(i32::MAX);
    socket::reset_on_close(socket)?;
    socket::set(socket, Opt::NO_DELAY, 1)?;
    socket::set(socket, Opt::OUT_OF_BAND_INLINE, 1)?;
    socket::set(socket, Opt::KEEPALIVE, 1)?;
    socket::set(socket, Opt::KEEPALIVE_IDLE, seconds)?;
    socket::set(socket, Opt::KEEPALIVE_INTERVAL, seconds)
}

/// Makes a socket report the local address and the traffic class of each datagram, and drops, and gives it room for
/// bursts.
fn set_datagram_options(socket: &Fd, ipv6: bool) -> Result<(), Errno> {
    if ipv6 {
        socket::set(socket, Opt::REPORT_ADDRESS_V6, 1)?;
        socket::set(socket, Opt::REPORT_CLASS_V6, 1)?;
    }
    socket::set(socket, Opt::REPORT_ADDRESS_V4, 1)?;
    socket::set(socket, Opt::REPORT_CLASS_V4, 1)?;
    socket::set(socket, Opt::REPORT_DROPS, 1)?;
    // Not before Linux 5.0, and not necessary.
    let _coalesces = socket::set(socket, Opt::COALESCE, 1);
    for (forced, limited, bytes) in [
        (Opt::RECEIVE_BUFFER_FORCED, Opt::RECEIVE_BUFFER, UDP_RECEIVE_BUFFER),
        (Opt::SEND_BUFFER_FORCED, Opt::SEND_BUFFER, UDP_SEND_BUFFER),
    ] {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        socket::set(socket, forced, bytes).or_else(|_not_allowed| socket::set(socket, limited, bytes))?;
    }
    Ok(())
}
