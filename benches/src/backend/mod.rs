//! The backend: threads for TCP, for UDP and for QUIC, one of each per core. TCP and UDP have one port, QUIC the next.
//!
//! The first byte that a client sends selects the service; see [`crate::message::service`].

mod connection;
mod download;
mod get;
mod next;
mod quic;
mod tcp;
mod udp;

use std::io;
use std::net::{SocketAddrV4, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub(crate) use connection::BUFFER;
use socket2::{Domain, Protocol, Socket, Type};
pub(crate) use udp::WRONG;

/// How often an idle thread checks whether to stop.
const STOP_POLL: Duration = Duration::from_millis(200);

/// The length of the accept queue: more than any workload opens at once.
const BACKLOG: i32 = 16_384;

/// A running backend. Dropping it stops its threads.
pub(crate) struct Backend {
    address: SocketAddrV4,
    quic: SocketAddrV4,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The backend could not start.
#[derive(Debug, thiserror::Error)]
#[error("backend: cannot {step} on {address}: {source}")]
pub(crate) struct BackendError {
    step: &'static str,
    address: SocketAddrV4,
    source: io::Error,
}

impl Backend {
    /// Serves TCP and UDP on `address`, whose port may be 0, and QUIC on the next port, in the namespace of the calling thread.
    pub(crate) fn start(address: SocketAddrV4) -> Result<Self, BackendError> {
        let failed = |step| move |source| BackendError { step, address, source };
        let listener = listen(address).map_err(failed("listen"))?;
        let next = match address.port() {
            0 => Some(0),
            port => port.checked_add(1),
        };
        let next = next
            .ok_or_else(|| io::Error::other("QUIC needs the port after it"))
            .map_err(failed("serve QUIC"))?;
        let bound = listener.local_addr().map_err(failed("listen"))?;
        let address = SocketAddrV4::new(*address.ip(), bound.port());
        let failed = |step| move |source| BackendError { step, address, source };
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = tcp::spawn(listener, cores(), &stop).map_err(failed("serve TCP"))?;
        threads.extend(udp::spawn(address, cores(), &stop).map_err(failed("serve UDP"))?);
        let quic = quic::spawn(SocketAddrV4::new(*address.ip(), next), cores(), &stop);
        let (quic, of_quic) = quic.map_err(failed("serve QUIC"))?;
        threads.extend(of_quic);
        Ok(Self { address, quic, stop, threads })
    }

    /// The address that it serves.
    pub(crate) fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// The address that it serves QUIC on.
    pub(crate) fn quic(&self) -> SocketAddrV4 {
        self.quic
    }

    /// Serves until the process ends.
    pub(crate) fn serve(mut self) {
        for thread in self.threads.drain(..) {
            // A panic has been reported already.
            drop(thread.join());
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // As above.
            drop(thread.join());
        }
    }
}

/// The number of threads for each side of the load: one per core.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn listen(address: SocketAddrV4) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
