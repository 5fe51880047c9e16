//! The engine: bound mappings, the tasks that serve them, and how they end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rproxy_sys::watch::Watched;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::addr::Protocol;
use crate::listen::{BindError, Listener};
use crate::mapping::{Limits, Mapping};
use crate::tcp::{Service, accept};
use crate::udp::relay::UdpRelay;
use crate::udp::stale;
use crate::worker::Workers;

/// A mapping whose host address is bound: from here on, clients can connect.
#[derive(Debug)]
pub struct Bound {
    mapping: Mapping,
    listener: Listener,
}

impl Bound {
    /// Binds the host address of `mapping`.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(mapping: Mapping) -> Result<Self, BindError> {
        let listener = Listener::bind(&mapping)?;
        Ok(Self { mapping, listener })
    }

    /// Uses `listener` for `mapping`; where it listens is the business of whoever bound it.
    pub fn adopt(mapping: Mapping, listener: Listener) -> Self {
        Self { mapping, listener }
    }

    /// For UDP: makes the kernel forget flows that other means of publishing, or none, pinned
    /// elsewhere before. A runtime that publishes by several means does this itself.
    pub fn forget_stale_flows(bound: &[Self]) {
        let udp = bound.iter().filter(|bound| bound.mapping.protocol == Protocol::Udp);
        let published: Vec<_> =
            udp.filter_map(|bound| Some((bound.local_addr().ok()?, bound.mapping.v6only))).collect();
        stale::forget_flows_to(&published);
    }

    /// The mapping as it was asked for.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The address that clients connect to, with the real port.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A running set of mappings.
#[derive(Debug)]
pub struct Server {
    workers: Arc<Workers>,
    listeners: Vec<Arc<Watched>>,
    acceptors: Vec<JoinHandle<()>>,
    udp: Option<JoinHandle<io::Result<()>>>,
    stop: watch::Sender<()>,
}

impl Server {
    /// Starts to serve `mappings` on the runtime of the calling thread, and on others when needed.
    ///
    /// # Errors
    /// What epoll_ctl(2) answered for a listener.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(mappings: Vec<Bound>, limits: Limits) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let mut server = Self {
            workers: Arc::new(Workers::new(Handle::current())),
            listeners: Vec::new(),
            acceptors: Vec::new(),
            udp: None,
            stop,
        };
        let mut udp = None;
        let beside_tcp = mappings.iter().any(|bound| bound.mapping.protocol == Protocol::Tcp);
        for Bound { mapping, listener } in mappings {
            info!(%mapping, "serving");
            match listener {
                Listener::Tcp(listener) => {
                    let listener = Watched::new(listener, Interest::READABLE)?;
                    server.accept(listener, Service { mapping, limits }, stopped.clone());
                }
                Listener::Udp(socket) => {
                    let relay = match &mut udp {
                        Some(relay) => relay,
                        none => none.insert(UdpRelay::new(&limits, beside_tcp)?),
                    };
                    relay.add(mapping, socket)?;
                }
            }
        }
        server.udp = udp.map(|relay| tokio::spawn(relay.run(stopped)));
        Ok(server)
    }

    fn accept(&mut self, listener: Watched, service: Service, stopped: watch::Receiver<()>) {
        let listener = Arc::new(listener);
        self.listeners.push(listener.clone());
        let workers = self.workers.clone();
        self.acceptors.push(tokio::spawn(accept::accept_until(stopped, listener, service.into(), workers)));
    }

    /// Waits for what must not happen: that nobody serves UDP any more, though nobody asked for it to
    /// end.
    pub async fn failed(&mut self) -> ServeError {
        match &mut self.udp {
            Some(udp) => match udp.await {
                Ok(Ok(())) => ServeError::Ended,
                Ok(Err(error)) => ServeError::Udp(error),
                // A panic has been reported where it happened.
                Err(_panic) => ServeError::Ended,
            },
            None => std::future::pending().await,
        }
    }

    /// Stops accepting, and gives the connections and flows `timeout` to end by themselves.
    pub async fn drain(self, timeout: Duration) {
        let Self { workers, listeners, acceptors, udp, stop } = self;
        drop((stop, listeners));
        for acceptor in acceptors {
            // A panic there has been reported where it happened, and stops nothing here.
            drop(acceptor.await);
        }
        info!(connections = workers.connections(), ?timeout, "draining");
        let ended = async {
            workers.until_idle().await;
            if let Some(udp) = udp {
                drop(udp.await);
            }
        };
        if tokio::time::timeout(timeout, ended).await.is_err() {
            warn!(connections = workers.connections(), "drain timeout: cutting what is left");
        }
    }

    /// Ends at once. The listeners stop to listen even if another process has them open too (a
    /// runtime that bound them for us): no client is left waiting for someone to accept it.
    pub fn abandon(self) {
        for listener in &self.listeners {
            if let Err(error) = SockRef::from(listener.as_ref()).shutdown(std::net::Shutdown::Both) {
                warn!(%error, "cannot shut a listener down");
            }
        }
    }
}

/// Why a server cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Waiting for datagrams failed.
    #[error("cannot wait for datagrams: {0}")]
    Udp(#[source] io::Error),
    /// The task that serves UDP is gone.
    #[error("the UDP relay ended by itself")]
    Ended,
}
