//! Downloads in datagrams: clients grant what may be sent; see [`crate::load::udp_down`].

use std::collections::HashMap;
use std::net::UdpSocket;

use nix::sys::socket::SockaddrIn;

use crate::batch::{BATCH, Batch};
use crate::load::{DATAGRAM, WINDOW};
use crate::message::{self, HEADER, service};

/// The downloads of a thread.
pub(super) struct Downloads {
    /// The number of the next datagram of each flow.
    next: HashMap<u32, u64>,
    batch: Batch,
}

impl Downloads {
    pub(super) fn new() -> Self {
        Self { next: HashMap::new(), batch: Batch::new() }
    }

    /// Sends what `request` grants, in GSO batches; returns the flow and how many datagrams were sent. Of grants that were
    /// lost, a window is left.
    pub(super) fn pull(
        &mut self,
        socket: &UdpSocket,
        request: &[u8],
        client: Option<SockaddrIn>,
    ) -> Option<(u32, u64)> {
        if request.len() != HEADER || request[0] != service::PULL {
            return None;
        }
        let (flow, limit) = (message::argument(request), message::number(request));
        let next = self.next.entry(flow).or_insert(0);
        let (first, mut sent) = ((*next).max(limit.saturating_sub(WINDOW)), 0);
        *next = limit.max(*next);
        for start in (first..limit).step_by(BATCH) {
            self.batch.clear();
            for number in (start..limit).take(BATCH) {
                message::write(self.batch.push_to(DATAGRAM, client), service::PULL, flow, number);
            }
            // An ICMP error for an earlier datagram, whose client is gone.
            sent += self.batch.send_as_one(socket).unwrap_or(0) as u64;
        }
        Some((flow, sent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_served_once_and_lost_ones_leave_a_window() {
        let [server, client] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        server.connect(client.local_addr().unwrap()).unwrap();
        let mut downloads = Downloads::new();
        let mut pull = |limit| {
            let mut request = [0; HEADER];
            message::write(&mut request, service::PULL, 7, limit);
            downloads.pull(&server, &request, None)
        };
        assert_eq!(pull(40), Some((7, 40)));
        assert_eq!(pull(40), Some((7, 0)));
        assert_eq!(pull(10), Some((7, 0)));
        assert_eq!(pull(41), Some((7, 1)));
        assert_eq!(pull(41 + 10 * WINDOW), Some((7, WINDOW)));
        assert_eq!(downloads.pull(&server, b"no request at all", None), None);
        let mut datagram = [0; 2048];
        assert_eq!(client.recv(&mut datagram).unwrap(), DATAGRAM);
        message::check(&datagram[..DATAGRAM], service::PULL, 7, 0).unwrap();
    }
}
