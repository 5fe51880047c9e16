//! The engine: bound mappings, the tasks that serve them, and how they end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rproxy_sys::watch::Watched;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::bound::{Bound, BoundPort};
use crate::limits::Limits;
use crate::listen::Listener;
use crate::tcp::{Service, accept};
use crate::udp::relay::UdpRelay;
use crate::worker::Workers;

/// A running set of mappings.
#[derive(Debug)]
pub struct Server {
    workers: Arc<Workers>,
    listeners: Vec<Arc<Watched>>,
    acceptors: Vec<JoinHandle<()>>,
    udp: Option<JoinHandle<()>>,
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
    pub fn start(mappings: Vec<Bound>) -> io::Result<Self> {
        let ports = mappings.into_iter().flat_map(|Bound { mapping, ports }| {
            ports.into_iter().map(move |port| (port, mapping.limits().clone()))
        });
        Self::start_ports(ports)
    }

    /// Starts to serve bound ports, each under its own limits, as [`Server::start`] does.
    ///
    /// # Errors
    /// What epoll_ctl(2) answered for a listener.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_ports(ports: impl IntoIterator<Item = (BoundPort, Limits)>) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let mut server = Self {
            workers: Arc::new(Workers::new(Handle::current())),
            listeners: Vec::new(),
            acceptors: Vec::new(),
            udp: None,
            stop,
        };
        let mut udp = None;
        for (BoundPort { forward: mapping, listener }, limits) in ports {
            info!(%mapping, "serving");
            match listener {
                Listener::Tcp(listener) => {
                    let listener = Watched::new(listener, Interest::READABLE)?;
                    server.accept(listener, Service { mapping, limits }, stopped.clone());
                }
                Listener::Udp(socket) => {
                    let relay = match &mut udp {
                        Some(relay) => relay,
                        none => none.insert(UdpRelay::new(&limits)?),
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
