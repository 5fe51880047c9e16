//! A stand-in for `rproxy --attach`: it accepts shims, and answers what a test wants.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use rproxy_shim::message::{Answer, Attach, LONGEST, Request};
use rproxy_sys::pass::{receive, send_packet};
use socket2::SockRef;

use crate::PATIENCE;

/// A name that nobody listens at.
pub fn free_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("rproxy-tests-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A listener for shims.
pub struct FakePlane {
    listener: OwnedFd,
    name: String,
}

/// A shim that has attached a port. Dropping it is what the death of the plane is.
pub struct Attachment {
    connection: OwnedFd,
    /// What it has asked for.
    pub attach: Attach,
    /// The socket that it has passed.
    pub socket: OwnedFd,
}

impl FakePlane {
    /// Listens at a name of its own.
    pub fn new() -> Self {
        Self::listen(&free_name(), Backlog::MAXCONN)
    }

    /// Listens at `name`.
    #[track_caller]
    pub fn at(name: &str) -> Self {
        Self::listen(name, Backlog::MAXCONN)
    }

    /// Listens at `name`, with a queue of this length.
    #[track_caller]
    pub fn listen(name: &str, backlog: Backlog) -> Self {
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).unwrap();
        listen(&listener, backlog).unwrap();
        Self { listener, name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for a connection, and accepts it.
    #[track_caller]
    pub fn connection(&self) -> OwnedFd {
        wait_readable(self.listener.as_fd());
        SockRef::from(&self.listener).accept().unwrap().0.into()
    }

    /// Waits for a shim that attaches a port.
    #[track_caller]
    pub fn accept(&self) -> Attachment {
        let connection = self.connection();
        let (request, mut sockets) = read(connection.as_fd()).expect("the shim closed its connection");
        let Request::Attach(attach) = request else { panic!("not a request to attach: {request:?}") };
        assert_eq!(sockets.len(), 1);
        Attachment { connection, attach, socket: sockets.remove(0) }
    }

    /// Waits for a shim that attaches a port, and says that it is served.
    #[track_caller]
    pub fn serve(&self) -> Attachment {
        let attachment = self.accept();
        attachment.answer(Answer::Serving);
        attachment
    }
}

impl Default for FakePlane {
    fn default() -> Self {
        Self::new()
    }
}

impl Attachment {
    /// Answers.
    #[track_caller]
    pub fn answer(&self, answer: Answer<'_>) {
        self.send(answer.encode().as_bytes());
    }

    /// Sends a packet, which need not be an answer.
    #[track_caller]
    pub fn send(&self, packet: &[u8]) {
        send_packet(self.connection.as_fd(), packet).unwrap();
    }

    /// Waits for the next request; `None` if the shim is gone.
    #[track_caller]
    pub fn next(&self) -> Option<Request> {
        let (request, sockets) = read(self.connection.as_fd())?;
        assert!(sockets.is_empty(), "a socket that was not expected");
        Some(request)
    }

    /// Closes the socket, and says so.
    #[track_caller]
    pub fn detached(self) {
        drop(self.socket);
        send_packet(self.connection.as_fd(), Answer::Detached.encode().as_bytes()).unwrap();
    }
}

/// Waits for a request and its sockets; `None` at the end.
#[track_caller]
fn read(connection: BorrowedFd<'_>) -> Option<(Request, Vec<OwnedFd>)> {
    wait_readable(connection);
    let mut buffer = [0; LONGEST];
    let received = receive(connection, &mut buffer).ok().filter(|received| received.length > 0)?;
    Some((Request::decode(&buffer[..received.length]).unwrap(), received.descriptors))
}

#[track_caller]
fn wait_readable(fd: BorrowedFd<'_>) {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(ready, 1, "nothing has arrived");
}
