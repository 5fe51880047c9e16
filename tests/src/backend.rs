//! TCP servers for a proxy to relay to, inside the test's own process.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};

use socket2::SockRef;

use crate::netns::Namespace;

/// A TCP server with a thread for each connection. Dropping it closes every connection.
pub struct TcpBackend {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    streams: Arc<Mutex<Vec<Weak<TcpStream>>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl TcpBackend {
    /// Serves the connections that `listener` accepts. A connection closes when its handler returns. The
    /// handler's result is ignored; a test that checks how a connection ended has the handler report it.
    pub fn serve(
        listener: TcpListener,
        handler: impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let listener = Arc::new(listener);
        let streams = Arc::new(Mutex::new(Vec::new()));
        let acceptor = {
            let (listener, streams) = (Arc::clone(&listener), Arc::clone(&streams));
            thread::spawn(move || accept(&listener, &streams, &Arc::new(handler)))
        };
        Self { address, listener, streams, acceptor: Some(acceptor) }
    }

    /// Serves on a free port of the IPv4 loopback address.
    pub fn local(handler: impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self::serve(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), handler)
    }

    /// Sends back what it reads, on a free port of the IPv4 loopback address.
    pub fn echo() -> Self {
        Self::echo_at((Ipv4Addr::LOCALHOST, 0))
    }

    /// As [`Self::echo`], at another address.
    ///
    /// # Panics
    /// When it cannot listen there.
    #[track_caller]
    pub fn echo_at(address: impl ToSocketAddrs) -> Self {
        Self::serve(TcpListener::bind(address).unwrap(), echo)
    }

    /// As [`Self::echo_at`], inside a namespace.
    #[track_caller]
    pub fn echo_in(namespace: &Namespace, address: impl ToSocketAddrs + Send) -> Self {
        namespace.run(|| Self::echo_at(address))
    }

    /// Like [`Self::local`], but sends a letter to each client before it echoes.
    pub fn lettered(letter: u8) -> Self {
        Self::local(move |mut stream| {
            stream.write_all(&[letter])?;
            echo(stream)
        })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TcpBackend {
    fn drop(&mut self) {
        // Wakes `accept`, which then fails. Closing the file descriptor would not.
        SockRef::from(&*self.listener).shutdown(Shutdown::Both).ok();
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
        for stream in self.streams.lock().unwrap().iter().filter_map(Weak::upgrade) {
            stream.shutdown(Shutdown::Both).ok();
        }
    }
}

fn accept(
    listener: &TcpListener,
    streams: &Mutex<Vec<Weak<TcpStream>>>,
    handler: &Arc<impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static>,
) {
    while let Ok((stream, _)) = listener.accept() {
        let stream = Arc::new(stream);
        streams.lock().unwrap().push(Arc::downgrade(&stream));
        let handler = Arc::clone(handler);
        thread::spawn(move || handler(&stream));
    }
}

/// Echoes data as it arrives, and closes after the client.
pub fn echo(mut stream: &TcpStream) -> io::Result<()> {
    io::copy(&mut { stream }, &mut stream).map(drop)
}

/// Reads until the client's end of stream, and only then echoes everything.
pub fn answer_at_eof(mut stream: &TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    stream.read_to_end(&mut request)?;
    stream.write_all(&request)
}
