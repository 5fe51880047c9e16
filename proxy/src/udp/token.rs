//! Identifies the socket of an event of the relay's epoll instance, and selects the events to watch for.

use std::os::fd::BorrowedFd;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use tracing::error;

use super::table::FlowId;
use crate::runtime::poll::LISTENER;

/// The socket of an event of the epoll instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Listener(usize),
    /// A flow's socket towards the backend.
    Flow(FlowId),
    /// A flow's client socket.
    Client(FlowId),
}

/// Set in the number of a [`Token::Client`]; the ids of flows do not use this bit.
const CLIENT: u64 = 1 << 62;

impl Token {
    fn to_u64(self) -> u64 {
        match self {
            Self::Listener(index) => LISTENER | index as u64,
            Self::Flow(id) => id.to_u64(),
            Self::Client(id) => CLIENT | id.to_u64(),
        }
    }

    pub(super) fn from_u64(number: u64) -> Self {
        match (number & LISTENER, number & CLIENT) {
            (0, 0) => Self::Flow(FlowId::from_u64(number)),
            (0, _) => Self::Client(FlowId::from_u64(number & !CLIENT)),
            _ => Self::Listener(usize::try_from(number & !LISTENER).unwrap_or(usize::MAX)),
        }
    }
}

/// The events that a socket is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// It is readable.
    pub(super) receive: bool,
    /// It is writable, because datagrams are queued.
    pub(super) send: bool,
}

impl Wanted {
    /// The events for a socket with an empty queue.
    pub(super) const RECEIVE: Self = Self { receive: true, send: false };
}

/// Changes the events that a socket is watched for.
pub(super) fn interest(epoll: &Epoll, socket: BorrowedFd<'_>, token: Token, wanted: Wanted) {
    if let Err(error) = epoll.modify(socket, &mut event(token, wanted)) {
        error!(%error, ?token, "cannot change what a UDP socket is watched for");
    }
}

pub(super) fn event(token: Token, wanted: Wanted) -> EpollEvent {
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, wanted.receive);
    flags.set(EpollFlags::EPOLLOUT, wanted.send);
    flags.insert(EpollFlags::EPOLLRDHUP);
    EpollEvent::new(flags, token.to_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_number() {
        let largest = FlowId::from_u64(CLIENT - 1);
        let tokens =
            [Token::Listener(0), Token::Listener(1 << 31), Token::Flow(largest), Token::Client(largest)];
        for token in
            tokens.into_iter().chain([Token::Flow(FlowId::from_u64(0)), Token::Client(FlowId::from_u64(7))])
        {
            assert_eq!(Token::from_u64(token.to_u64()), token);
        }
    }
}
