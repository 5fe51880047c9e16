//! Downloads over QUIC, each over a connection of its own.

use std::net::SocketAddr;
use std::time::Instant;

use quinn::{Connection, Endpoint};
use tokio::time::timeout_at;

use super::quic::{Clients, connect, losses, sent_by_backend};
use super::{LoadError, MESSAGE, Target, measure};
use crate::message::{self, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::{Checker, Wrong};
use crate::quic::Sent;

/// Bytes of a download: many times what a connection has in flight, so that its start does not dominate.
const SIZE: u32 = 20_000_000;

/// Measures what `connections` clients download, each [`SIZE`] bytes at a time, and what the backend sends in vain. The last
/// downloads are cut short when the time is over.
pub(crate) fn quic_down(target: Target<'_>, connections: usize) -> Result<Values, LoadError> {
    let clients = Clients::shares(target, connections)?;
    let (shares, span) = measure(target, clients, |clients| {
        let end = Instant::now() + target.duration;
        let tallies = clients.each(|endpoint| download(endpoint, target.address, end))?;
        Ok((clients, tallies))
    })?;
    let mut all = Tally::default();
    for tally in shares.iter().flat_map(|(_clients, tallies)| tallies) {
        all.bytes += tally.bytes;
        all.sent += tally.sent;
    }
    let mut values = vec![(Metric::Throughput, span.rate(all.bytes) * 8.0 / 1e9)];
    values.extend(span.costs(Unit::Gb, all.bytes as f64 / 1e9));
    values.extend(losses(all.sent, span.elapsed));
    Ok(values)
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    bytes: u64,
    /// By the backend; a client only sends acknowledgements.
    sent: Sent,
}

/// Downloads again and again.
async fn download(endpoint: Endpoint, address: SocketAddr, end: Instant) -> Result<Tally, LoadError> {
    let mut tally = Tally::default();
    let mut number = 0;
    while Instant::now() < end {
        let connection = connect(&endpoint, address).await?;
        tally.bytes += download_one(&connection, number, end).await?;
        tally.sent += sent_by_backend(&connection).await?;
        connection.close(0_u32.into(), &[]);
        number += 1;
    }
    Ok(tally)
}

/// Returns how many bytes have arrived until `end`.
async fn download_one(connection: &Connection, number: u64, end: Instant) -> Result<u64, LoadError> {
    let mut request = [0; MESSAGE];
    message::write(&mut request, service::GET, SIZE, number);
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&request).await?;
    drop(send);
    let (mut checker, mut bytes) = (Checker::default(), 0);
    checker.restart(message::place(SIZE, number));
    while let Ok(read) = timeout_at(end.into(), recv.read_chunk(usize::MAX, true)).await {
        let Some(chunk) = read? else {
            let whole = bytes == u64::from(SIZE);
            let wrong = || Wrong(format!("a download of {SIZE} bytes ended after {bytes}"));
            return whole.then_some(bytes).ok_or_else(|| wrong().into());
        };
        checker.check(&chunk.bytes)?;
        bytes += chunk.bytes.len() as u64;
    }
    Ok(bytes)
}
