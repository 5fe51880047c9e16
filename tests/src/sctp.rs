//! One-to-one SCTP sockets, as servers and clients of a proxy.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rproxy_sys::sctp::{self, Label, Received};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::PATIENCE;
use crate::process;
use crate::require;

/// Room for a message.
const LONGEST: usize = 256 * 1024;

/// Whether this kernel has SCTP, or loads its module now.
pub fn is_there() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::SCTP)).is_ok()
}

/// The local and the remote port of each association of this network namespace.
pub fn association_ports() -> impl Iterator<Item = [u16; 2]> {
    /// Where they are in a line (`sctp_assocs_seq_show` in net/sctp/proc.c).
    const LOCAL: usize = 11;
    let lines = std::fs::read_to_string("/proc/net/sctp/assocs").unwrap();
    let ports = |line: &str| {
        let mut fields = line.split_whitespace().skip(LOCAL).map(|field| field.parse().unwrap());
        [fields.next().unwrap(), fields.next().unwrap()]
    };
    lines.lines().skip(1).map(ports).collect::<Vec<_>>().into_iter()
}

/// Unloads the module, and prevents that it is loaded again by itself.
pub fn unload() {
    std::fs::write("/proc/sys/kernel/modprobe", "/none\n").unwrap();
    let mut modprobe = require::command("modprobe");
    modprobe.args(["-r", "sctp"]);
    process::run(modprobe);
}

/// Loads it again, and leaves it to the kernel from now on.
pub fn load() {
    std::fs::write("/proc/sys/kernel/modprobe", "/sbin/modprobe\n").unwrap();
    let mut modprobe = require::command("modprobe");
    modprobe.arg("sctp");
    process::run(modprobe).success();
}

/// A connection, or the client's end of one.
pub struct Peer(Socket);

impl Peer {
    /// Connects to `address`.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = new_socket(address);
        socket.connect_timeout(&address.into(), PATIENCE)?;
        socket.set_nonblocking(false)?;
        Ok(Self(socket))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&self, message: &[u8], label: Label) -> io::Result<()> {
        sctp::send(self.0.as_fd(), message, label)
    }

    /// Receives a message; `None` at the end.
    ///
    /// # Errors
    /// Those of recvmsg(2), or `WouldBlock` if there is none for long.
    pub fn receive(&self) -> io::Result<Option<(Vec<u8>, Label)>> {
        let mut buffer = vec![0; LONGEST];
        loop {
            match sctp::receive(self.0.as_fd(), &mut buffer)? {
                Received::Data(len, label) => {
                    buffer.truncate(len);
                    return Ok(Some((buffer, label)));
                }
                Received::Notification => {}
                Received::End => return Ok(None),
            }
        }
    }

    /// Sends a message and expects it back, with its label.
    #[track_caller]
    pub fn assert_echoes(&self, message: &[u8], label: Label) {
        self.send(message, label).unwrap();
        let (echo, same) = self.receive().unwrap().expect("an echo");
        assert!(echo == message, "{} bytes, and not the {} sent", echo.len(), message.len());
        assert_eq!(same, label);
    }

    /// Shuts the association down, once the peer has received everything.
    pub fn shut_down(&self) {
        self.0.shutdown(Shutdown::Write).unwrap();
    }

    /// Makes a close abort the association.
    pub fn abort(self) {
        self.0.set_linger(Some(Duration::ZERO)).unwrap();
    }
}

fn new_socket(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::SCTP)).expect("SCTP");
    sctp::prepare(socket.as_fd(), sctp::STREAMS).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A listening socket at a free port of `address`.
pub fn listen(address: SocketAddr) -> Socket {
    let socket = new_socket(address);
    socket.bind(&address.into()).unwrap();
    socket.listen(64).unwrap();
    socket
}

/// The address of a socket.
pub fn address_of(socket: &Socket) -> SocketAddr {
    socket.local_addr().ok().as_ref().and_then(SockAddr::as_socket).unwrap()
}

/// A server that serves connections one after the other, until it is dropped with the process.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    _thread: JoinHandle<()>,
}

impl Server {
    /// Serves each connection by `handler`.
    pub fn serve(address: SocketAddr, handler: impl Fn(&Peer) + Send + 'static) -> Self {
        let socket = listen(address);
        let address = address_of(&socket);
        let thread = thread::spawn(move || {
            loop {
                match socket.accept() {
                    Ok((accepted, _peer)) => {
                        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
                        handler(&Peer(accepted));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Self { address, _thread: thread }
    }

    /// Sends back each message, with its label.
    pub fn echo(address: SocketAddr) -> Self {
        Self::serve(address, |peer| {
            while let Ok(Some((message, label))) = peer.receive() {
                if peer.send(&message, label).is_err() {
                    break;
                }
            }
        })
    }
}
