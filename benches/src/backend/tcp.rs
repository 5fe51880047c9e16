//! The TCP backend: connections are assigned to the threads in rotation, and stay there.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::STOP_POLL;
use super::connection::{BUFFER, Connection};
use super::next::Next;
use crate::sock::{Events, Interest, Poll};

/// The token of the listener; no descriptor has this number.
const LISTENER: usize = usize::MAX;

/// A thread's connections, as seen by the accepting thread, which adds a connection directly to the other
/// thread's epoll instance. No wake-up is needed before its first data.
struct Shard {
    poll: Poll,
    arrived: Mutex<Vec<TcpStream>>,
}

pub(super) fn spawn(
    listener: TcpListener,
    threads: usize,
    stop: &Arc<AtomicBool>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let shard = |_| Ok(Shard { poll: Poll::new()?, arrived: Mutex::default() });
    let shards: Arc<Vec<Shard>> = Arc::new((0..threads).map(shard).collect::<io::Result<_>>()?);
    shards[0].poll.add(&listener, Interest::EPOLLIN, LISTENER)?;
    let mut listener = Some(listener);
    (0..threads)
        .map(|index| {
            let (shards, stop, listener) = (shards.clone(), stop.clone(), listener.take());
            let run = move || serve(&shards, index, listener.as_ref(), &stop);
            thread::Builder::new().name(format!("backend-tcp-{index}")).spawn(run)
        })
        .collect()
}

fn serve(shards: &[Shard], index: usize, listener: Option<&TcpListener>, stop: &AtomicBool) {
    let mut worker = Worker { shard: &shards[index], connections: HashMap::new() };
    let (mut events, mut buffer) = (Events::new(), vec![0; BUFFER]);
    let mut accepted = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(ready) = worker.shard.poll.wait(&mut events, STOP_POLL) else { return };
        for (token, readiness) in ready {
            match listener {
                Some(listener) if token == LISTENER => accept(listener, shards, &mut accepted),
                _ => worker.step(token, readiness, &mut buffer),
            }
        }
    }
}

fn accept(listener: &TcpListener, shards: &[Shard], accepted: &mut usize) {
    while let Ok((stream, _)) = listener.accept() {
        let shard = &shards[*accepted % shards.len()];
        *accepted += 1;
        let token = token(&stream);
        // A response is written with one call, so Nagle's algorithm could only delay it.
        let nodelay = stream.set_nodelay(true);
        let mut arrived = shard.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        if nodelay.is_ok() && shard.poll.add(&stream, Interest::EPOLLIN, token).is_ok() {
            arrived.push(stream);
        }
    }
}

struct Worker<'a> {
    shard: &'a Shard,
    connections: HashMap<usize, Connection>,
}

impl Worker<'_> {
    /// Services a connection. If it fails or ends, it is closed, which is all that its client is told.
    fn step(&mut self, token: usize, readiness: Interest, buffer: &mut [u8]) {
        if !self.connections.contains_key(&token) {
            let mut arrived = self.shard.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            let arrived = arrived.drain(..).map(|stream| (self::token(&stream), Connection::new(stream)));
            self.connections.extend(arrived);
        }
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let next = connection.step(readiness, buffer).and_then(|next| {
            if let Next::Wait(interest) = next {
                self.shard.poll.modify(connection.stream(), interest, token)?;
            }
            Ok(next)
        });
        if matches!(next, Ok(Next::Close) | Err(_)) {
            self.connections.remove(&token);
        }
    }
}

fn token(stream: &TcpStream) -> usize {
    let fd: RawFd = stream.as_raw_fd();
    // Descriptors are not negative.
    usize::try_from(fd).unwrap_or_default()
}
