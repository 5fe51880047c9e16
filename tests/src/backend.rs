//! Servers for a proxy to relay to, inside the test's own process.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};

use socket2::SockRef;

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

/// A UDP server that echoes every datagram.
pub struct UdpEcho {
    socket: Arc<UdpSocket>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    /// Serves the datagrams that `socket` receives.
    pub fn serve(socket: UdpSocket) -> Self {
        let socket = Arc::new(socket);
        let stopped = Arc::new(AtomicBool::new(false));
        let thread = {
            let (socket, stopped) = (Arc::clone(&socket), Arc::clone(&stopped));
            thread::spawn(move || echo_datagrams(&socket, &stopped))
        };
        Self { socket, stopped, thread: Some(thread) }
    }

    /// Serves on a free port of the IPv4 loopback address.
    pub fn local() -> Self {
        Self::serve(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
    }

    /// The address that it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Fails because the socket is not connected, but still wakes the thread that reads it.
        SockRef::from(&*self.socket).shutdown(Shutdown::Both).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn echo_datagrams(socket: &UdpSocket, stopped: &AtomicBool) {
    // The size of the largest datagram.
    let mut buffer = vec![0; 65_535];
    // Peeks first, because `recv_from` panics on the empty result without an address that a shutdown causes.
    while socket.peek(&mut []).is_ok() && !stopped.load(Ordering::Relaxed) {
        if let Ok((len, client)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..len], client).ok();
        }
    }
}
