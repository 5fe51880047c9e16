//! Small requests and responses over QUIC, each in a stream of its own, as those of HTTP/3 are.

use std::time::Instant;

use hdrhistogram::Histogram;
use quinn::Connection;

use super::quic::{Clients, ask, connect, losses, sent_by_backend};
use super::{LoadError, MESSAGE, Target, latencies, measure, quantiles, record};
use crate::message::{self, service};
use crate::metric::{Metric, Unit, Values};
use crate::quic::Sent;

/// Measures how many requests `connections` connections complete, each with `window` of them in flight, and what both ends send
/// in vain.
pub(crate) fn quic_rr(target: Target<'_>, connections: usize, window: usize) -> Result<Values, LoadError> {
    let open = |clients: Clients| {
        let address = target.address;
        let connections = clients.each(|endpoint| async move { connect(&endpoint, address).await })?;
        Ok((clients, connections))
    };
    let shares = super::in_threads(Clients::shares(target, connections)?, open)?;
    let (shares, span) = measure(target, shares, |(clients, connections)| {
        let end = Instant::now() + target.duration;
        let of_connection = |connection: &Connection| {
            let connection = connection.clone();
            (0..window).map(move |slot| requests(connection.clone(), slot, end))
        };
        let latencies = clients.all(connections.iter().flat_map(of_connection))?;
        Ok((clients, connections, latencies))
    })?;
    let mut sent = Sent::default();
    for (clients, connections, _latencies) in &shares {
        let reports = connections.iter().cloned().map(|connection| async move {
            let backend = sent_by_backend(&connection).await?;
            Ok([backend, Sent::on(&connection)])
        });
        clients.all(reports)?.into_iter().flatten().for_each(|report| sent += report);
    }
    let histograms = || shares.iter().flat_map(|(_clients, _connections, histograms)| histograms);
    let responses: u64 = histograms().map(Histogram::len).sum();
    let mut values = vec![(Metric::Requests, span.rate(responses))];
    values.extend(span.costs(Unit::Request, responses as f64));
    values.extend(quantiles(histograms().cloned()));
    values.extend(losses(sent, span.elapsed));
    Ok(values)
}

/// One request after the other, numbered within their `slot` of the connection.
async fn requests(connection: Connection, slot: usize, end: Instant) -> Result<Histogram<u64>, LoadError> {
    let (mut tally, mut number) = (latencies(), 0);
    let slot = u32::try_from(slot).unwrap_or(u32::MAX);
    while Instant::now() < end {
        let (mut request, sent) = ([0; MESSAGE], Instant::now());
        message::write(&mut request, service::ECHO, slot, number);
        let response = ask(&connection, &request, MESSAGE).await?;
        record(&mut tally, sent.elapsed());
        message::check(&response, service::ECHO, slot, number)?;
        number += 1;
    }
    Ok(tally)
}
