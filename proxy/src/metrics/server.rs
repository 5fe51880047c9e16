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
use hyper::header::CONNECTION;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rproxy_sys::memory::release_unused;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, oneshot};
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

/// How long a client whose request was refused may go on sending it.
const LINGER: Duration = Duration::from_secs(1);

/// A response of as many bytes leaves memory behind that is worth releasing.
const LARGE: usize = 64 * 1024;

/// How long memory is not released, so that other responses can use it.
const RELEASE_DELAY: Duration = Duration::from_secs(1);

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
    memory: Memory,
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
        let (memory, spare) = (Memory::default(), Spare::of(&listener));
        let mut clients = Self { routes, spare, memory: memory.clone(), connected: VecDeque::new() };
        tokio::select! {
            never = clients.accept_all(listener) => never,
            never = memory.release_all() => never,
        }
    }

    async fn accept_all(&mut self, listener: impl Listen) -> io::Result<Infallible> {
        static FAILED: LogLimit = LogLimit::new();

        loop {
            match listener.next().await {
                Ok(stream) => self.admit(stream),
                Err(error) if has_run_out(&error) && self.spare.release() => {}
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
        let marks = Marks { is_busy, is_cut_short: AtomicBool::new(false), memory: self.memory.clone() };
        tokio::spawn(async move {
            let stream = converse(stream, routes, marks, ended).await;
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

/// The memory that responses leave behind. The C library keeps it, as much as all clients together have needed.
#[derive(Clone, Default)]
struct Memory(Arc<Notify>);

impl Memory {
    /// Releases memory after large responses.
    async fn release_all(&self) -> io::Result<Infallible> {
        loop {
            self.0.notified().await;
            sleep(RELEASE_DELAY).await;
            release_unused();
        }
    }
}

/// The bytes of a response, whose memory is released once this is dropped.
struct Sent {
    bytes: usize,
    memory: Memory,
}

impl Drop for Sent {
    fn drop(&mut self) {
        if self.bytes >= LARGE {
            self.memory.0.notify_one();
        }
    }
}

/// What the responses to a client change.
struct Marks {
    is_busy: Arc<AtomicBool>,
    /// Set if a request was refused before all of it was read.
    is_cut_short: AtomicBool,
    memory: Memory,
}

impl Marks {
    fn mark(&self, body: Body, busy: Busy) -> Marked {
        Marked { body, sent: Sent { bytes: 0, memory: self.memory.clone() }, _busy: busy }
    }
}

/// A body that marks its client as busy until it is handed to the connection in full.
struct Marked {
    body: Body,
    sent: Sent,
    _busy: Busy,
}

impl hyper::body::Body for Marked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &frame {
            self.sent.bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        frame
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
    marks: Marks,
    ended: oneshot::Receiver<()>,
) -> T {
    let mut limited = TimeoutStream::new(&mut stream);
    limited.set_write_timeout(Some(TIMEOUT));
    let service = service_fn(|request| {
        let (routes, busy, marks) = (&routes, Busy::new(&marks.is_busy), &marks);
        async move {
            let response = routes.answer(request).await;
            if response.headers().contains_key(CONNECTION) {
                marks.is_cut_short.store(true, Ordering::Relaxed);
            }
            Ok::<_, Infallible>(response.map(|body| marks.mark(body, busy)))
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
    if marks.is_cut_short.load(Ordering::Relaxed) {
        drop(timeout(LINGER, discard(&mut stream)).await);
    }
    stream
}

/// Discards what a client still sends: closing a socket with unread data resets it, and the response could be lost.
async fn discard(stream: &mut impl Transport) -> io::Result<()> {
    stream.shutdown().await?;
    let mut rest = vec![0; LONGEST_HEAD];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}
