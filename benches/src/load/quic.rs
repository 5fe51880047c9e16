//! Clients of QUIC: each has an endpoint, and so a socket, of its own, as different clients have.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::{Connection, ConnectionError, Endpoint, IdleTimeout, ReadError, ReadToEndError, WriteError};
use tokio::runtime::{self, Runtime};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::udp_rr::unconnected;
use super::{CONNECT, GRACE, LoadError, MESSAGE, Target, shares};
use crate::message::{self, service};
use crate::metric::{Metric, Values};
use crate::pattern::Wrong;
use crate::quic::{self, NAME, REPORT, Sent};

/// How long the ends of connections may take.
const END: Duration = Duration::from_secs(1);

/// A thread's share of the clients. Dropping it ends their connections, so that the backend need not wait for them.
pub(super) struct Clients {
    runtime: Runtime,
    endpoints: Vec<Endpoint>,
}

impl Clients {
    /// Distributes `count` clients to the threads of `target`.
    pub(super) fn shares(target: Target<'_>, count: usize) -> Result<Vec<Self>, LoadError> {
        let silence = IdleTimeout::try_from(GRACE).map_err(|error| setting_up(io::Error::other(error)))?;
        let config = quic::client(silence).map_err(setting_up)?;
        let share = |share: Vec<usize>| {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(setting_up)?;
            let entered = runtime.enter();
            let endpoints = share.into_iter().map(|_| {
                let mut endpoint = quic::endpoint(unconnected(target.address)?, None).map_err(setting_up)?;
                endpoint.set_default_client_config(config.clone());
                Ok(endpoint)
            });
            let endpoints = endpoints.collect::<Result<_, LoadError>>()?;
            drop(entered);
            Ok(Self { runtime, endpoints })
        };
        shares(count, target.threads).into_iter().map(share).collect()
    }

    /// Runs `task` for each client, all at a time.
    pub(super) fn each<T, F>(&self, task: impl Fn(Endpoint) -> F) -> Result<Vec<T>, LoadError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, LoadError>> + Send + 'static,
    {
        self.all(self.endpoints.iter().cloned().map(task))
    }

    /// Runs `tasks`, all at a time.
    pub(super) fn all<T, F>(&self, tasks: impl Iterator<Item = F>) -> Result<Vec<T>, LoadError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, LoadError>> + Send + 'static,
    {
        self.runtime.block_on(async {
            let tasks: JoinSet<_> = tasks.collect();
            tasks.join_all().await.into_iter().collect()
        })
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        let ends = async {
            for endpoint in &self.endpoints {
                endpoint.close(0_u32.into(), &[]);
            }
            for endpoint in &self.endpoints {
                endpoint.wait_idle().await;
            }
        };
        // A backend that has not heard of it forgets the connection after its own timeout.
        drop(self.runtime.block_on(async { timeout(END, ends).await }));
    }
}

fn setting_up(source: io::Error) -> LoadError {
    LoadError::Io { step: "set a QUIC client up", source }
}

/// Opens a connection.
pub(super) async fn connect(endpoint: &Endpoint, address: SocketAddr) -> Result<Connection, LoadError> {
    let connecting = endpoint.connect(address, NAME).map_err(|error| setting_up(io::Error::other(error)))?;
    match timeout(CONNECT, connecting).await {
        Ok(Err(ConnectionError::TimedOut)) | Err(_) => {
            let what = format!("no QUIC server at {address}; `serve` prints the port of its own");
            Err(LoadError::Stalled(what))
        }
        Ok(connection) => Ok(connection?),
    }
}

/// Sends `request` in a stream of its own, and returns the response, of at most `limit` bytes.
pub(super) async fn ask(connection: &Connection, request: &[u8], limit: usize) -> Result<Vec<u8>, LoadError> {
    let response = async {
        let (mut send, mut recv) = connection.open_bi().await?;
        send.write_all(request).await?;
        send.finish().map_err(io::Error::other).map_err(LoadError::io("end a request"))?;
        match recv.read_to_end(limit).await {
            Ok(response) => Ok(response),
            Err(ReadToEndError::TooLong) => {
                Err(Wrong(format!("a response of more than {limit} bytes")).into())
            }
            Err(ReadToEndError::Read(error)) => Err(error.into()),
        }
    };
    let stalled = |_elapsed| LoadError::Stalled("a QUIC request has no complete response".into());
    timeout(GRACE, response).await.map_err(stalled)?
}

/// What the backend has sent on `connection`, and what of that was lost.
pub(super) async fn sent_by_backend(connection: &Connection) -> Result<Sent, LoadError> {
    let mut request = [0; MESSAGE];
    message::write(&mut request, service::SENT, 0, 0);
    let report = ask(connection, &request, REPORT).await?;
    let sent = Sent::from_report(&report);
    Ok(sent.ok_or_else(|| Wrong(format!("a report of {} bytes instead of {REPORT}", report.len())))?)
}

/// The part of `sent` that was lost, and how often the congestion window was reduced for that.
pub(super) fn losses(sent: Sent, elapsed: Duration) -> Values {
    let lost = sent.lost as f64 * 100.0 / sent.packets.max(1) as f64;
    vec![(Metric::Loss, lost), (Metric::Congestion, sent.congestion as f64 / elapsed.as_secs_f64())]
}

impl From<ConnectionError> for LoadError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::Stalled("a QUIC connection is silent".into()),
            error => Self::Io { step: "keep a QUIC connection", source: error.into() },
        }
    }
}

impl From<WriteError> for LoadError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => error.into(),
            error => Self::Io { step: "send a request", source: error.into() },
        }
    }
}

impl From<ReadError> for LoadError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => error.into(),
            error => Self::Io { step: "receive a response", source: error.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::sync::mpsc::{self, TryRecvError};
    use std::thread;

    use quinn::Incoming;

    use super::*;
    use crate::account::CpuTimes;
    use crate::load::{quic_down, quic_rr};

    async fn answer_all(incoming: Incoming, answer: &[u8]) -> Result<(), LoadError> {
        let connection = incoming.await?;
        loop {
            let (mut send, mut recv) = connection.accept_bi().await?;
            drop(recv.read_to_end(MESSAGE).await);
            send.write_all(answer).await?;
        }
    }

    /// Answers each request with `answer`, until `stop` is dropped.
    async fn serve(socket: UdpSocket, answer: &'static [u8], stop: mpsc::Receiver<()>) {
        let endpoint = quic::endpoint(socket, Some(quic::server().unwrap())).unwrap();
        while stop.try_recv() == Err(TryRecvError::Empty) {
            let Ok(Some(incoming)) = timeout(Duration::from_millis(50), endpoint.accept()).await else {
                continue;
            };
            tokio::spawn(answer_all(incoming, answer));
        }
    }

    /// Runs `load` against a server that gives this `answer`.
    fn error_of(answer: &'static [u8], load: impl Fn(Target<'_>) -> Result<Values, LoadError>) -> LoadError {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let target =
            Target { address, duration: Duration::from_secs(5), threads: 1, cpu: &CpuTimes::default };
        let (stop, stopped) = mpsc::channel();
        thread::scope(|scope| {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            scope.spawn(move || runtime.block_on(serve(socket, answer, stopped)));
            let result = load(target);
            drop(stop);
            result.unwrap_err()
        })
    }

    #[test]
    fn wrong_answers_are_found() {
        for answer in [&[][..], &[0; MESSAGE], &[0; 2 * MESSAGE]] {
            let down = error_of(answer, |target| quic_down(target, 1));
            assert!(down.is_wrong(), "{} bytes: {down}", answer.len());
            let rr = error_of(answer, |target| quic_rr(target, 1, 2));
            assert!(rr.is_wrong(), "{} bytes: {rr}", answer.len());
        }
    }
}
