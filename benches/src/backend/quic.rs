//! The QUIC backend: an endpoint per thread, among which the kernel distributes the flows. Each request has a stream of its own.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream};
use tokio::runtime;
use tokio::time::timeout;

use super::STOP_POLL;
use super::udp::bind;
use crate::load::MESSAGE;
use crate::message::{self, HEADER, service};
use crate::pattern;
use crate::quic::{self, Sent};

/// Returns the address, whose port may have been 0, and the threads.
pub(super) fn spawn(
    address: SocketAddrV4,
    threads: usize,
    stop: &Arc<AtomicBool>,
) -> io::Result<(SocketAddrV4, Vec<JoinHandle<()>>)> {
    let config = quic::server()?;
    let first = bind(address)?;
    let port = first.local_addr().as_ref().map_or(address.port(), SocketAddr::port);
    let address = SocketAddrV4::new(*address.ip(), port);
    let sockets = std::iter::once(Ok(first)).chain((1..threads).map(|_| bind(address)));
    let threads = sockets.enumerate().map(|(index, socket)| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let endpoint = quic::endpoint(socket?, Some(config.clone()))?;
        drop(entered);
        let stop = stop.clone();
        let run = move || runtime.block_on(serve(endpoint, &stop));
        thread::Builder::new().name(format!("backend-quic-{index}")).spawn(run)
    });
    Ok((address, threads.collect::<io::Result<_>>()?))
}

async fn serve(endpoint: Endpoint, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        if let Ok(Some(incoming)) = timeout(STOP_POLL, endpoint.accept()).await {
            tokio::spawn(connection(incoming));
        }
    }
}

async fn connection(incoming: Incoming) -> Result<(), ConnectionError> {
    let connection = incoming.await?;
    loop {
        let (send, recv) = connection.accept_bi().await?;
        tokio::spawn(answer(connection.clone(), send, recv));
    }
}

/// Answers the request of a stream. If that fails, the stream is reset or ends early, which is all that the client is told.
async fn answer(connection: Connection, mut send: SendStream, mut recv: RecvStream) -> Option<()> {
    let request = recv.read_to_end(MESSAGE).await.ok().filter(|request| request.len() >= HEADER)?;
    match request[0] {
        service::ECHO => send.write_all(&request).await.ok()?,
        service::GET => give(&mut send, &request).await?,
        service::SENT => send.write_all(&Sent::on(&connection).to_report()).await.ok()?,
        _ => return None,
    }
    send.finish().ok()
}

/// Sends as much of the pattern as `request` asks for.
async fn give(send: &mut SendStream, request: &[u8]) -> Option<()> {
    let (size, number) = (message::argument(request), message::number(request));
    message::check(request, service::GET, size, number).ok()?;
    let (mut place, mut left) = (message::place(size, number), size as usize);
    while left > 0 {
        let piece = pattern::from(place, left);
        send.write_chunk(Bytes::from_static(piece)).await.ok()?;
        place += piece.len() as u64;
        left -= piece.len();
    }
    Some(())
}
