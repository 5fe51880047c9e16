//! The backend: a TCP thread per core and one UDP thread, all on one port.
//!
//! The first byte that a client sends selects the service; see [`crate::message::service`].

mod connection;
mod download;
mod get;
mod next;
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
    /// Serves TCP and UDP on `address`, whose port may be 0, in the namespace of the calling thread.
    pub(crate) fn start(address: SocketAddrV4) -> Result<Self, BackendError> {
        let failed = |step| move |source| BackendError { step, address, source };
        let listener = listen(address).map_err(failed("listen"))?;
        let bound = listener.local_addr().map_err(failed("listen"))?;
        let address = SocketAddrV4::new(*address.ip(), bound.port());
        let failed = |step| move |source| BackendError { step, address, source };
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = tcp::spawn(listener, cores(), &stop).map_err(failed("serve TCP"))?;
        threads.extend(udp::spawn(address, cores(), &stop).map_err(failed("serve UDP"))?);
        Ok(Self { address, stop, threads })
    }

    /// The address that it serves.
    pub(crate) fn address(&self) -> SocketAddrV4 {
        self.address
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
