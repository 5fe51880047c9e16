//! The UDP backend: one socket per thread, among which the kernel distributes the flows.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use socket2::{Domain, Protocol, Socket, Type};

use super::STOP_POLL;
use super::download::Downloads;
use crate::batch::{BATCH, Batch};
use crate::message::{self, HEADER, proxy_header, service};
use crate::sock::enlarge_udp_buffers;

pub(super) fn spawn(
    address: SocketAddrV4,
    threads: usize,
    stop: &Arc<AtomicBool>,
) -> io::Result<Vec<JoinHandle<()>>> {
    (0..threads)
        .map(|index| {
            let (socket, stop) = (bind(address)?, stop.clone());
            let run = move || serve(&socket, &stop);
            thread::Builder::new().name(format!("backend-udp-{index}")).spawn(run)
        })
        .collect()
}

pub(super) fn bind(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.set_read_timeout(Some(STOP_POLL))?;
    enlarge_udp_buffers(&socket);
    Ok(socket.into())
}

fn serve(socket: &UdpSocket, stop: &AtomicBool) {
    let (mut batch, mut downloads) = (Batch::new(), Downloads::new());
    let mut counts = HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        // An ICMP error for an earlier reply, whose client is gone.
        if batch.receive(socket, BATCH).is_err() {
            continue;
        }
        batch.cut(|datagram| proxy_header(datagram)..datagram.len());
        for (request, client) in batch.with_senders() {
            if let Some((flow, sent)) = downloads.pull(socket, request, client) {
                *counts.entry(flow).or_insert(0) += sent;
            }
        }
        batch.retain(|datagram| answer(datagram, &mut counts));
        batch.send(socket).ok();
    }
}

/// Turns a datagram into its reply; returns whether there is one.
fn answer(datagram: &mut [u8], counts: &mut HashMap<u32, u64>) -> bool {
    if datagram.len() < HEADER {
        return true;
    }
    let (flow, number) = (message::argument(datagram), message::number(datagram));
    match datagram[0] {
        service::SINK => {
            // A wrong datagram is not counted, and marks the sum as invalid.
            let right = message::check(datagram, service::SINK, flow, number).is_ok();
            let count = counts.entry(flow).or_insert(0);
            *count = if right { count.saturating_add(1) } else { WRONG };
            false
        }
        service::PULL => false,
        service::COUNT => {
            let count = counts.get(&flow).copied().unwrap_or(0);
            message::write(datagram, service::COUNT, flow, count);
            true
        }
        _ => true,
    }
}

/// The count of a flow in which a datagram was wrong. It stays, because additions saturate.
pub(crate) const WRONG: u64 = u64::MAX;
