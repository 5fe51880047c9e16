//! UDP clients and backends. None waits forever, and none sends more than a default-sized socket buffer
//! holds, so any loss is the fault of the program under test.

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use socket2::SockRef;

use crate::netns::Namespace;
use crate::pattern::Pattern;
use crate::process::Process;
use crate::rproxy::Standalone;
use crate::{PATIENCE, eventually};

/// The largest IPv4 datagram: 64 KiB minus one byte and the headers.
pub const LARGEST_V4: usize = 65_507;
/// The largest IPv6 datagram; the length field of IPv6 does not include its own header.
pub const LARGEST_V6: usize = 65_527;

/// The datagrams that [`assert_all_echo`] keeps in flight, by [`cost`]: well below `net.core.rmem_default`
/// (212,992).
const WINDOW: usize = 96 * 1024;

/// The requested buffer size. The result is limited by `net.core.rmem_max`, unless the process is privileged.
const BUFFER: usize = 4 * 1024 * 1024;

/// A socket on a free port of `ip`, with [`PATIENCE`] as its receive timeout.
#[track_caller]
pub fn client(ip: impl Into<IpAddr>) -> UdpSocket {
    bind(SocketAddr::new(ip.into(), 0))
}

/// A socket on `address`, with [`PATIENCE`] as its receive timeout.
#[track_caller]
pub fn bind(address: SocketAddr) -> UdpSocket {
    match UdpSocket::bind(address) {
        Ok(socket) => patient(socket),
        Err(error) => panic!("cannot bind {address}: {error}"),
    }
}

/// Like [`bind`], inside a namespace.
#[track_caller]
pub fn bind_in(namespace: &Namespace, address: impl Into<SocketAddr>) -> UdpSocket {
    let address = address.into();
    namespace.run(|| bind(address))
}

/// Relays `host`, an address and port, to `backend`, inside a namespace.
#[track_caller]
pub fn relay_in(
    namespace: &Namespace,
    host: &str,
    backend: impl Into<SocketAddr>,
    more_arguments: &[&str],
) -> Standalone {
    let backend = backend.into().to_string();
    let mapping = ["--proto", "udp", "--host", host, "--to", &backend];
    Standalone::start_in(namespace, &[&mapping, more_arguments].concat())
}

/// Like [`relay_in`], in the current namespace and on a free port.
#[track_caller]
pub fn relay(host: impl Into<IpAddr>, backend: SocketAddr, more_arguments: &[&str]) -> Standalone {
    let (host, backend) = (SocketAddr::new(host.into(), 0).to_string(), backend.to_string());
    let mapping = ["--proto", "udp", "--host", &host, "--to", &backend];
    Standalone::start(&[&mapping, more_arguments].concat())
}

/// Sets [`PATIENCE`] as the receive timeout of a socket.
pub fn patient(socket: UdpSocket) -> UdpSocket {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        SockRef::from(&socket).set_recv_buffer_size(BUFFER).unwrap();
    }
    socket
}

/// As [`client`], on the IPv4 loopback address.
#[track_caller]
pub fn local() -> UdpSocket {
    client(Ipv4Addr::LOCALHOST)
}

/// The address of a socket.
pub fn address(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().unwrap()
}

/// The port of a socket.
pub fn local_port(socket: &UdpSocket) -> u16 {
    address(socket).port()
}

/// Waits for a datagram; returns it and its sender.
#[track_caller]
pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                buffer.truncate(len);
                return (buffer, from);
            }
            // A receive with a timeout is not restarted after the process was suspended.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("no datagram: {error}"),
        }
    }
}

/// Whether nothing arrives for a moment.
pub fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let result = socket.recv_from(&mut [0]);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Receives everything until nothing arrives for a moment.
pub fn receive_all(socket: &UdpSocket) {
    while !is_silent(socket) {}
}

/// Sends a datagram and waits for a reply.
#[track_caller]
pub fn ask(socket: &UdpSocket, to: SocketAddr, request: &[u8]) -> (Vec<u8>, SocketAddr) {
    socket.send_to(request, to).unwrap();
    receive(socket)
}

/// Checks that a datagram is echoed unchanged by the address that it was sent to.
#[track_caller]
pub fn assert_echoes(socket: &UdpSocket, to: SocketAddr, request: &[u8]) {
    let (answer, from) = ask(socket, to, request);
    assert_eq!(from, to, "the answer comes from another address");
    assert_eq!(answer.len(), request.len());
    assert!(answer == request, "{} other bytes", request.len());
}

/// Asks a [`Backend::naming`] behind a proxy for the client's address there, which is that of its flow.
#[track_caller]
pub fn flow_of(socket: &UdpSocket, to: SocketAddr) -> SocketAddr {
    let (answer, from) = ask(socket, to, b"who am I?");
    assert_eq!(from, to, "the answer comes from another address");
    String::from_utf8(answer).unwrap().parse().unwrap()
}

/// Sends a datagram of each size, with the content that [`pattern`] returns for its number, and checks that
/// all are echoed unchanged and in order. Several are in flight at a time, as many as socket buffers are
/// certain to hold.
#[track_caller]
pub fn assert_all_echo(socket: &UdpSocket, to: SocketAddr, sizes: impl IntoIterator<Item = usize>) {
    let mut waiting = VecDeque::new();
    let mut under_way = 0;
    for (number, size) in sizes.into_iter().enumerate() {
        while under_way + cost(size) > WINDOW
            && let Some((number, size)) = waiting.pop_front()
        {
            assert_comes(socket, to, number, size);
            under_way -= cost(size);
        }
        if let Err(error) = socket.send_to(&pattern(number, size), to) {
            panic!("cannot send {size} bytes: {error}");
        }
        waiting.push_back((number, size));
        under_way += cost(size);
    }
    for (number, size) in waiting {
        assert_comes(socket, to, number, size);
    }
}

#[track_caller]
fn assert_comes(socket: &UdpSocket, from: SocketAddr, number: usize, size: usize) {
    let (bytes, sender) = receive(socket);
    assert_eq!(sender, from, "it comes from another address");
    assert_eq!(bytes.len(), size, "length of datagram {number}");
    assert!(bytes == pattern(number, size), "datagram {number} of {size} bytes has changed");
}

/// The space that a datagram takes in a receive buffer, including the kernel's own structures.
fn cost(size: usize) -> usize {
    2 * size + 1024
}

/// The content of datagram `number`.
pub fn pattern(number: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(number as u64).fill(&mut bytes);
    bytes
}

/// Both ends of a relayed flow, controlled by the test.
pub struct Line<'a> {
    proxy: &'a Process,
    client: UdpSocket,
    /// The address that the client sends to.
    asked: SocketAddr,
    backend: UdpSocket,
    /// The address that the backend sends to.
    flow: SocketAddr,
}

impl<'a> Line<'a> {
    /// Opens a flow.
    #[track_caller]
    pub fn open(proxy: &'a Process, client: UdpSocket, asked: SocketAddr, backend: UdpSocket) -> Self {
        run_on_one_processor(proxy);
        client.send_to(b"hello", asked).unwrap();
        let (_, flow) = receive(&backend);
        Self { proxy, client, asked, backend, flow }
    }

    /// Lets the proxy find datagrams of these sizes from the client all at once, and checks that each reaches
    /// the backend, in order. Their sum must fit a socket buffer, or some would legitimately be lost.
    #[track_caller]
    pub fn burst_up(&self, sizes: &[usize]) {
        self.burst(&self.client, self.asked, sizes, &self.backend, self.flow);
    }

    /// Like [`Line::burst_up`], from the backend to the client.
    #[track_caller]
    pub fn burst_down(&self, sizes: &[usize]) {
        self.burst(&self.backend, self.flow, sizes, &self.client, self.asked);
    }

    #[track_caller]
    fn burst(&self, from: &UdpSocket, to: SocketAddr, sizes: &[usize], at: &UdpSocket, seen_as: SocketAddr) {
        assert!(sizes.iter().map(|size| cost(*size)).sum::<usize>() <= BUFFER, "more than buffers hold");
        self.proxy.pause();
        for (number, size) in sizes.iter().enumerate() {
            from.send_to(&pattern(number, *size), to).unwrap();
        }
        self.proxy.resume();
        for (number, size) in sizes.iter().enumerate() {
            assert_comes(at, seen_as, number, *size);
        }
    }
}

/// Has this thread and those of `process` run on one processor. The kernel keeps the order of what is sent from one; each
/// processor has a queue of its own for what it has sent over a veth (`enqueue_to_backlog` in net/core/dev.c), and a
/// thread may move from one to another between two datagrams.
fn run_on_one_processor(process: &Process) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let first = (0..CpuSet::count()).find(|number| allowed.is_set(*number).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap();
    let tasks = tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap());
    for task in tasks.chain([0]) {
        sched_setaffinity(Pid::from_raw(task), &one).unwrap();
    }
}

/// A UDP server with its own thread.
pub struct Backend {
    socket: Arc<UdpSocket>,
    received: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Calls `handler` for each datagram, with the socket, the bytes and the sender.
    pub fn serve(
        socket: UdpSocket,
        mut handler: impl FnMut(&UdpSocket, &[u8], SocketAddr) + Send + 'static,
    ) -> Self {
        let socket = Arc::new(socket);
        // A server that is only stopped by a shutdown need not wake up before.
        socket.set_read_timeout(None).unwrap();
        let (received, stopped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (socket, received, stopped) = (socket.clone(), received.clone(), stopped.clone());
            thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                // Peeks first: `recv_from` panics on the empty result without an address that a shutdown
                // causes.
                while socket.peek(&mut []).is_ok() && !stopped.load(Ordering::Relaxed) {
                    if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                        received.fetch_add(1, Ordering::Release);
                        handler(&socket, &buffer[..len], from);
                    }
                }
            })
        };
        Self { socket, received, stopped, thread: Some(thread) }
    }

    /// Echoes every datagram.
    pub fn echo(socket: UdpSocket) -> Self {
        Self::serve(socket, |socket, bytes, from| {
            socket.send_to(bytes, from).ok();
        })
    }

    /// Replies with the sender's address; for [`flow_of`].
    pub fn naming(socket: UdpSocket) -> Self {
        Self::serve(socket, |socket, _bytes, from| {
            socket.send_to(from.to_string().as_bytes(), from).ok();
        })
    }

    /// The address that it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// How many datagrams it has received.
    pub fn received(&self) -> usize {
        self.received.load(Ordering::Acquire)
    }

    /// Waits until it has received `count` datagrams since its start.
    #[track_caller]
    pub fn wait_for(&self, count: usize) {
        eventually(&format!("{count} datagrams at the backend"), || self.received() >= count);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Fails because the socket is not connected, but still wakes the thread that reads it.
        SockRef::from(&*self.socket).shutdown(Shutdown::Both).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
