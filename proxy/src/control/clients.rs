//! The clients of the control socket, which are limited in number, time and bytes.
//!
//! A client runs as the user of this process, or as root. Each has a task that reads one request at a time,
//! forwards it and writes the response, with deadlines. No thread that relays runs these tasks.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;
use rproxy_sys::memory::release_unused;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::answers::Response;
use super::lines::{Line, Lines};
use super::protocol::{self, Refusal, RefusalKind, Request};
use crate::log::limit::LogLimit;
use crate::runtime::descriptors::{explain, has_run_out};
use crate::runtime::spare::Spare;

/// The maximum number of clients. Another one is refused with an error.
const CLIENTS: usize = 16;

/// How long a client may take to send its next request, from the first byte or the last response on, and to
/// read a response.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// The delay after a failed accept, mostly because descriptors are exhausted.
const PAUSE: Duration = Duration::from_millis(100);

/// The size in bytes from which a line is considered large: it holds hundreds of mappings, and takes many
/// times its own memory.
const LARGE: usize = 64 * 1024;

/// The number of sockets from which a request is considered large, too.
const MANY: usize = 256;

/// A request, and the channel for its reply.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) request: Request,
    /// The descriptors that came with it.
    pub(crate) sockets: Vec<OwnedFd>,
    pub(crate) answer: oneshot::Sender<Reply>,
}

/// The outcome of a request.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) result: Result<Response, Refusal>,
    /// Dropped once the response is sent or the client is gone.
    pub(crate) until_told: oneshot::Sender<()>,
}

/// Serves the clients of `listener` and sends their requests to `calls`, until the receiver is dropped.
///
/// # Errors
/// Those of epoll_ctl(2).
pub(crate) async fn serve(listener: StdListener, calls: mpsc::Sender<Call>) -> io::Result<()> {
    static FAILED: LogLimit = LogLimit::new();

    let listener = UnixListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    let spare = Spare::of(&listener);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = calls.closed() => return Ok(()),
        };
        let client = match accepted {
            Ok((client, _address)) => client,
            Err(error) if has_run_out(&error) && spare.release() => continue,
            Err(error) => {
                if let Some(suppressed) = FAILED.permit() {
                    warn!(error = explain(&error, 1), suppressed, "cannot accept a control client");
                }
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(refusal) = check_peer(&client) {
            send_away(&client, refusal);
            continue;
        }
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let (calls, spare) = (calls.clone(), spare.clone());
                tokio::spawn(async move {
                    let (mut reader, mut writer) = client.into_split();
                    if let Err(error) = converse(&mut reader, &mut writer, &calls).await {
                        debug!(%error, "control client gone");
                    }
                    spare.refill(|| end(reader, writer));
                    drop(place);
                });
            }
            Err(_full) => {
                let message = format!("{CLIENTS} clients are connected already; try again");
                send_away(&client, Refusal::new(RefusalKind::Busy, message));
            }
        }
    }
}

/// Checks that the peer runs as our user or root (`SO_PEERCRED`, unix(7)).
fn check_peer(client: &UnixStream) -> Result<(), Refusal> {
    let denied = |message: String| Refusal::new(RefusalKind::Denied, message);
    let peer =
        client.peer_cred().map_err(|error| denied(format!("cannot find out who connects: {error}")))?;
    if peer.uid() == 0 || peer.uid() == geteuid().as_raw() {
        return Ok(());
    }
    let (user, own) = (peer.uid(), geteuid());
    Err(denied(format!(
        "user {user} may not control this process; its own user ({own}) and root may: use sudo"
    )))
}

/// Sends a refusal without waiting.
fn send_away(client: &UnixStream, refusal: Refusal) {
    static REFUSED: LogLimit = LogLimit::new();

    if let Some(suppressed) = REFUSED.permit() {
        warn!(reason = refusal.message, suppressed, "control client refused");
    }
    let line = protocol::answer(None, Err(refusal)) + "\n";
    drop(client.try_write(line.as_bytes()));
}

/// Ends a client's connection, and returns its descriptor.
fn end(reader: OwnedReadHalf, writer: OwnedWriteHalf) -> Option<OwnedFd> {
    let client = reader.reunite(writer).ok()?.into_std().ok()?;
    client.shutdown(Shutdown::Both).ok()?;
    Some(client.into())
}

/// Responds to the requests of a client, one after the other.
async fn converse(
    reader: &mut OwnedReadHalf,
    writer: &mut OwnedWriteHalf,
    calls: &mpsc::Sender<Call>,
) -> io::Result<()> {
    let mut lines = Lines::default();
    loop {
        let answer = match timeout(CLIENT_TIMEOUT, lines.next(reader.as_ref())).await? {
            Ok(None) => return Ok(()),
            Ok(Some(line)) => respond(line, calls).await,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let line = protocol::answer(None, Err(Refusal::bad_request(error.to_string()))) + "\n";
                timeout(CLIENT_TIMEOUT, writer.write_all(line.as_bytes())).await??;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        timeout(CLIENT_TIMEOUT, writer.write_all(answer.text.as_bytes())).await??;
        if answer.is_large {
            drop(answer);
            release_unused();
        }
    }
}

/// A response to a client.
struct Answer {
    text: String,
    /// Whether it, or its request, took more memory than the process should keep.
    is_large: bool,
    /// See [`Reply`].
    _until_told: Option<oneshot::Sender<()>>,
}

async fn respond(line: Line, calls: &mpsc::Sender<Call>) -> Answer {
    let Line { text, descriptors, is_incomplete } = line;
    let (asked, sockets) = (text.len(), descriptors.len());
    let (id, request) = protocol::decode(&text);
    drop(text);
    let reply = match request {
        Ok(_request) if is_incomplete => Err(not_received(descriptors.len())),
        Ok(request) => call_with(request, descriptors, calls).await,
        Err(refusal) => Err(refusal),
    };
    let (result, until_told) = match reply {
        Ok(Reply { result, until_told }) => (result, Some(until_told)),
        Err(refusal) => (Err(refusal), None),
    };
    let text = protocol::answer(id, result) + "\n";
    let is_large = asked.max(text.len()) > LARGE || sockets > MANY;
    Answer { is_large, text, _until_told: until_told }
}

/// The refusal of a request of whose sockets only some could be received.
fn not_received(received: usize) -> Refusal {
    let error = explain(&io::Error::from_raw_os_error(nix::libc::EMFILE), 1);
    let message = format!("only {received} of the sockets of the request could be received: {error}");
    Refusal::new(RefusalKind::Socket, message)
}

/// Has the receiver of `calls` execute a request.
pub(crate) async fn call(request: Request, calls: &mpsc::Sender<Call>) -> Result<Reply, Refusal> {
    call_with(request, Vec::new(), calls).await
}

/// Like [`call`], with the sockets that came with the request.
async fn call_with(
    request: Request,
    sockets: Vec<OwnedFd>,
    calls: &mpsc::Sender<Call>,
) -> Result<Reply, Refusal> {
    let ending = || Refusal::new(RefusalKind::Failed, "rproxy is ending");
    let (answer, answered) = oneshot::channel();
    calls.send(Call { request, sockets, answer }).await.map_err(|_gone| ending())?;
    answered.await.map_err(|_gone| ending())
}
