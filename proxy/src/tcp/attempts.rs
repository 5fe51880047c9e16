//! Connects to the addresses of a name in turn (RFC 8305, section 5): to the next one as soon as one fails, or when none has
//! answered for a while. The first connection wins, and the other attempts end.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::backend::NamedHost;
use socket2::Socket;
use tokio::time::{sleep, timeout};

use super::dial::{self, DialError};
use super::stream::Stream;
use super::{report_other_source, source};
use crate::names::suspects;
use crate::state::client::ClientAddr;
use crate::state::{ConnectionGuard, Target};

/// The time between two attempts, while none has failed (RFC 8305, section 8: "Connection Attempt Delay").
const DELAY: Duration = Duration::from_millis(250);

type Connected = Result<(Stream, Arc<Target>), DialError>;

/// Connects to one of the addresses of `host`, to the first one with `socket`, on behalf of `client` at `peer`. Returns also
/// the target with the address that was reached.
pub(super) async fn dial_named(
    socket: Socket,
    host: &NamedHost,
    client: &Stream,
    peer: ClientAddr,
    guard: &ConnectionGuard,
) -> Connected {
    let target = guard.target();
    let first = &target.port_mapping.backend;
    if first.is_nowhere() {
        suspects::report(host.name());
        return Err(DialError::Unresolved { host: host.name().clone() });
    }
    let others = host.addresses().iter().filter(|ip| **ip != first.host().ip());
    let others = others.map(|ip| (Arc::new(target.at(*ip)), None));
    let targets = std::iter::once((target.clone(), Some(socket))).chain(others);
    let attempts = targets.map(|(target, socket)| attempt(target, socket, client, peer, guard));
    // An SCTP association whose handshake is not complete must not be left (see `dial`).
    let delay = (target.port_mapping.protocol == Protocol::Tcp).then_some(DELAY);
    let connected = first_of(attempts, delay, || suspects::report(host.name()));
    let Some(limit) = guard.limits().connect_timeout else { return connected.await };
    timeout(limit, connected).await.unwrap_or_else(|_late| {
        suspects::report(host.name());
        Err(DialError::Timeout { addr: first.clone(), limit })
    })
}

/// Connects to `target`.
async fn attempt(
    target: Arc<Target>,
    socket: Option<Socket>,
    client: &Stream,
    peer: ClientAddr,
    guard: &ConnectionGuard,
) -> Connected {
    let backend = &target.port_mapping.backend;
    let addr = || backend.clone();
    let opened = socket.map_or_else(|| dial::open_for(&target), Ok);
    let socket = opened.map_err(|source| DialError::Open { addr: addr(), source })?;
    let socket = source::prepare(socket, &target, peer, |reason| report_other_source(peer, guard, reason));
    let socket = socket.map_err(|source| DialError::Source { addr: addr(), source })?;
    let stream = dial::dial(socket, backend, target.port_mapping.protocol, None, client).await?;
    Ok((stream, target))
}

/// Runs `attempts`, each once the one before has failed, or `delay` after it, and returns the first success. Calls `failed`
/// for each that fails. If all do, returns why the last one did.
async fn first_of<T, A: Future<Output = Result<T, DialError>>>(
    mut attempts: impl Iterator<Item = A>,
    delay: Option<Duration>,
    failed: impl Fn(),
) -> Result<T, DialError> {
    let mut running: Vec<Pin<Box<A>>> = attempts.next().into_iter().map(Box::pin).collect();
    let mut next = attempts.next();
    loop {
        let late = async {
            match delay.filter(|_delay| next.is_some()) {
                Some(delay) => sleep(delay).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            ended = any(&mut running) => match ended {
                Err(error) if !matches!(error, DialError::ClientReset { .. }) => {
                    failed();
                    if running.is_empty() && next.is_none() {
                        return Err(error);
                    }
                }
                result => return result,
            },
            () = late => {}
        }
        running.extend(next.take().map(Box::pin));
        next = attempts.next();
    }
}

/// Waits until one of some attempts ends, and takes it out.
async fn any<T, A: Future<Output = T>>(running: &mut Vec<Pin<Box<A>>>) -> T {
    poll_fn(|context| {
        for index in 0..running.len() {
            if let Poll::Ready(result) = running[index].as_mut().poll(context) {
                drop(running.swap_remove(index));
                return Poll::Ready(result);
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use super::*;
    use crate::runtime::new_runtime;

    fn refused() -> DialError {
        DialError::Connect {
            addr: "127.0.0.1:1".parse().unwrap(),
            source: io::ErrorKind::ConnectionRefused.into(),
        }
    }

    /// An attempt that answers after this many milliseconds, or never.
    async fn after(milliseconds: Option<u64>, result: Result<u8, DialError>) -> Result<u8, DialError> {
        match milliseconds {
            Some(milliseconds) => sleep(Duration::from_millis(milliseconds)).await,
            None => std::future::pending().await,
        }
        result
    }

    fn run(
        attempts: Vec<(Option<u64>, Result<u8, DialError>)>,
        delay: Option<Duration>,
    ) -> (Result<u8, DialError>, usize) {
        let failures = Cell::new(0);
        let attempts = attempts.into_iter().map(|(time, result)| after(time, result));
        let all = first_of(attempts, delay, || failures.set(failures.get() + 1));
        let result = new_runtime().unwrap().block_on(all);
        (result, failures.get())
    }

    #[test]
    fn what_fails_or_is_silent_is_passed_over() {
        let delay = Some(Duration::from_millis(5));
        let (result, failures) = run(vec![(Some(0), Err(refused())), (Some(0), Ok(2))], None);
        assert!(matches!((result, failures), (Ok(2), 1)));
        let (result, failures) = run(vec![(None, Ok(1)), (Some(0), Err(refused())), (Some(0), Ok(3))], delay);
        assert!(matches!((result, failures), (Ok(3), 1)));
        let (result, failures) = run(vec![(Some(0), Err(refused())), (Some(1), Err(refused()))], delay);
        assert!(matches!((result, failures), (Err(DialError::Connect { .. }), 2)));
    }

    #[test]
    fn an_attempt_goes_on_while_the_next_one_is_under_way() {
        let (result, failures) =
            run(vec![(Some(40), Ok(1)), (None, Ok(2)), (None, Ok(3))], Some(Duration::from_millis(5)));
        assert!(matches!((result, failures), (Ok(1), 0)));
    }

    #[test]
    fn nobody_is_connected_for_a_client_that_is_gone() {
        let gone = DialError::ClientReset { addr: "127.0.0.1:1".parse().unwrap() };
        let (result, failures) = run(vec![(Some(0), Err(gone)), (Some(0), Ok(2))], None);
        assert!(matches!((result, failures), (Err(DialError::ClientReset { .. }), 0)));
    }
}
