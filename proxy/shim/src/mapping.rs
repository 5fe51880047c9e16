//! What the flags ask for, if a plane could serve it.

use core::net::SocketAddr;

use rproxy_shim::flags::Flags;
use rproxy_shim::message::{Attach, TCP, UDP};
use rproxy_sys_raw::process::Arguments;
use rproxy_sys_raw::socket::interface_index;

/// A published port.
pub(crate) struct Mapping {
    /// The protocol number.
    pub(crate) protocol: u8,
    /// Where clients connect to, unless a socket was passed.
    pub(crate) host: SocketAddr,
    /// Where they are relayed to.
    pub(crate) attach: Attach,
    /// Whether the socket was passed.
    pub(crate) use_listen_fd: bool,
    /// The number of arguments after which a flag can be inserted.
    pub(crate) flags: usize,
}

impl Mapping {
    /// Parses the arguments. `None` means that `rproxy` has to answer: they are wrong, or ask for something else.
    pub(crate) fn parse(arguments: &Arguments) -> Option<Self> {
        let flags = Flags::parse(arguments.iter(), interface_index).ok().filter(|flags| !flags.version)?;
        let protocol = match flags.proto {
            "tcp" => TCP,
            "udp" => UDP,
            _ => return None,
        };
        let host = flags.host_ip.at(flags.host_port.try_into().ok()?);
        let backend = flags.container_ip.at(flags.container_port.try_into().ok()?);
        Some(Self {
            protocol,
            host,
            attach: Attach { protocol, backend },
            use_listen_fd: flags.use_listen_fd,
            flags: flags.count,
        })
    }
}
