//! The HTTP server (hyper), limited in connections, time and bytes.
//!
//! Whoever reaches the address may connect, so the limits hold for anyone: [`CLIENTS`] connections, of which the idle ones
//! make room for others; [`TIMEOUT`] for each request to arrive and for each pause of a client that reads.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tracing::{debug, warn};

use super::listener::Acceptor;
use super::response::Body;
use super::routes::Routes;
use crate::log::limit::LogLimit;
use crate::runtime::descriptors::{explain, has_run_out};
use crate::runtime::spare::Spare;

/// The maximum number of connections.
const CLIENTS: usize = 64;

/// How long a client may take to send the next request, from the connection or the last response on, and how long it may
/// pause while it reads a response. Prometheus connects again after that.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client may take for one response before its connection can be needed for another client.
const FAIR_TIME: Duration = Duration::from_secs(60);

/// How long a response may take to end once another process serves the address.
const LAST_RESPONSE: Duration = Duration::from_secs(5);

/// The maximum length of the head of a request, in bytes. Browsers send less than 4 kB, without cookies of others.
const LONGEST_HEAD: usize = 16 * 1024;

/// The delay after a failed accept, mostly because descriptors are exhausted.
const PAUSE: Duration = Duration::from_millis(100);

/// What a client gets that finds no place.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\n\
    Retry-After: 1\r\nConnection: close\r\n\r\ntoo many connections are open\n";

/// Serves HTTP until this is dropped, which lets responses under way end.
///
/// # Errors
/// Those of epoll_ctl(2).
pub(crate) async fn serve(acceptor: Acceptor, routes: Routes) -> io::Result<Infallible> {
    match acceptor {
        Acceptor::Tcp(listener) => Clients::accept_from(TcpListener::from_std(listener)?, routes).await,
        Acceptor::Unix(listener) => Clients::accept_from(UnixListener::from_std(listener)?, routes).await,
    }
}

/// A listening socket.
trait Listen: AsFd + Send + Sync {
    type Stream: Transport;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listen for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _peer)| stream)
    }
}

impl Listen for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _peer)| stream)
    }
}

/// The connection of a client.
trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Writes without waiting, as much as there is room for.
    fn write_now(&self, bytes: &[u8]);

    /// Ends the connection, and returns its descriptor.
    fn end(self) -> Option<OwnedFd>;
}

impl Transport for TcpStream {
    fn write_now(&self, bytes: &[u8]) {
        drop(self.try_write(bytes));
    }

    fn end(self) -> Option<OwnedFd> {
        self.into_std().ok().map(shut_down)
    }
}

impl Transport for UnixStream {
    fn write_now(&self, bytes: &[u8]) {
        drop(self.try_write(bytes));
    }

    fn end(self) -> Option<OwnedFd> {
        self.into_std().ok().map(shut_down)
    }
}

fn shut_down(socket: impl Into<OwnedFd>) -> OwnedFd {
    let socket = socket.into();
    // The client may have ended it already.
    drop(SockRef::from(&socket).shutdown(Shutdown::Both));
    socket
}

/// The connected clients.
struct Clients {
    routes: Routes,
    spare: Spare,
    /// In the order of their arrival; some may be gone.
    connected: VecDeque<Client>,
}

/// A connected client.
struct Client {
    /// Ends the connection at once if it gets a message, and after the response under way if it is dropped.
    end: oneshot::Sender<()>,
    /// Whether a request is being answered.
    is_busy: Arc<AtomicBool>,
    since: Instant,
}

impl Clients {
    async fn accept_from(listener: impl Listen, routes: Routes) -> io::Result<Infallible> {
        static FAILED: LogLimit = LogLimit::new();

        let mut clients = Self { routes, spare: Spare::of(&listener), connected: VecDeque::new() };
        loop {
            match listener.next().await {
                Ok(stream) => clients.admit(stream),
                Err(error) if has_run_out(&error) && clients.spare.release() => {}
                Err(error) => {
                    if let Some(suppressed) = FAILED.permit() {
                        warn!(
                            error = explain(&error, 1),
                            suppressed, "cannot accept a client of the metrics"
                        );
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn admit<T: Transport>(&mut self, stream: T) {
        static REFUSED: LogLimit = LogLimit::new();

        if !self.make_room() {
            if let Some(suppressed) = REFUSED.permit() {
                warn!(clients = CLIENTS, suppressed, "client of the metrics refused: too many are connected");
            }
            stream.write_now(FULL);
            self.spare.refill(|| stream.end());
            return;
        }
        let (end, ended) = oneshot::channel();
        let is_busy = Arc::<AtomicBool>::default();
        self.connected.push_back(Client { end, is_busy: is_busy.clone(), since: Instant::now() });
        let (routes, spare) = (self.routes.clone(), self.spare.clone());
        tokio::spawn(async move {
            let stream = converse(stream, routes, is_busy, ended).await;
            spare.refill(|| stream.end());
        });
    }

    /// Makes room for another client, if necessary at the expense of the oldest one that sends no request, or has taken
    /// very long for a response. Returns whether there is room.
    fn make_room(&mut self) -> bool {
        if self.connected.len() < CLIENTS {
            return true;
        }
        self.connected.retain(|client| !client.end.is_closed());
        if self.connected.len() < CLIENTS {
            return true;
        }
        let idle = |client: &Client| !client.is_busy.load(Ordering::Relaxed);
        let slow = |client: &Client| client.since.elapsed() > FAIR_TIME;
        let least = self.connected.iter().position(idle).or_else(|| self.connected.iter().position(slow));
        // It may have ended just now.
        least.and_then(|index| self.connected.remove(index)).map(|client| client.end.send(())).is_some()
    }
}

/// Marks a client as one whose request is being answered, until dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn new(is_busy: &Arc<AtomicBool>) -> Self {
        is_busy.store(true, Ordering::Relaxed);
        Self(is_busy.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A body that marks its client as busy until it is handed to the connection in full.
struct Marked {
    body: Body,
    _busy: Busy,
}

impl hyper::body::Body for Marked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Answers the requests of a client until it leaves or has to. Returns its connection.
async fn converse<T: Transport>(
    mut stream: T,
    routes: Routes,
    is_busy: Arc<AtomicBool>,
    ended: oneshot::Receiver<()>,
) -> T {
    let mut limited = TimeoutStream::new(&mut stream);
    limited.set_write_timeout(Some(TIMEOUT));
    let service = service_fn(|request| {
        let (routes, busy) = (routes.clone(), Busy::new(&is_busy));
        async move {
            let response = routes.answer(request).await;
            Ok::<_, Infallible>(response.map(|body| Marked { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIMEOUT)
        .max_header_size(LONGEST_HEAD)
        .max_buf_size(2 * LONGEST_HEAD)
        // Clients that have sent everything may still read.
        .half_close(true)
        .serve_connection(TokioIo::new(Box::pin(limited)), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        left = ended => match left {
            Ok(()) => Ok(()),
            Err(_server_is_gone) => {
                connection.as_mut().graceful_shutdown();
                timeout(LAST_RESPONSE, connection).await.unwrap_or(Ok(()))
            }
        },
    };
    if let Err(error) = result {
        debug!(%error, "client of the metrics gone");
    }
    stream
}
