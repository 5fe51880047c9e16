//! The headers of the PROXY protocol in datagrams: those for a backend, and those of proxies in front.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use rproxy_mapping::addr::{Protocol, canonical};
use rproxy_mapping::proxy_protocol::{ProxyDatagrams, ProxyVersion};
use rproxy_sys::udp::{BATCH, GSO_BYTES, GSO_SEGMENTS, LocalAddr, RecvBatch};
use tracing::warn;

use super::gso::Chunk;
use super::key::FlowKey;
use super::routed::Routed;
use super::tally::Tally;
use crate::log::limit::LogLimit;
use crate::proxy_protocol::{Endpoints, HeaderError};
use crate::state::Target;
use crate::state::stats::FailureKind;
use crate::state::task::HeaderState;

/// The header in the datagrams of a flow to its backend.
#[derive(Debug)]
pub(super) struct FlowHeader {
    bytes: Box<[u8]>,
    datagrams: ProxyDatagrams,
    state: HeaderState,
}

impl FlowHeader {
    /// The header of a flow with this key, if `target` sends one. The client is the one that a proxy in front has `told`,
    /// or that of the key.
    pub(super) fn of(key: &FlowKey, told: Option<&Endpoints>, target: &Target) -> Option<Box<Self>> {
        let options = &target.policy.limits.proxy_protocol;
        options.send?;
        let endpoints = told.copied().unwrap_or_else(|| endpoints(key.client, key.local, target));
        // Version 1 has no datagrams.
        let bytes = endpoints.header(ProxyVersion::V2, Protocol::Udp).into();
        Some(Box::new(Self { bytes, datagrams: options.send_udp, state: HeaderState::Unsent }))
    }

    /// Which of the next datagrams begin with it.
    pub(super) fn is_in(&self) -> HeaderIn {
        match (self.datagrams, self.state) {
            (ProxyDatagrams::Each, _) => HeaderIn::All,
            (ProxyDatagrams::First, HeaderState::Unsent) => HeaderIn::First,
            (ProxyDatagrams::First, _) => HeaderIn::None,
        }
    }

    /// Whether an error of the socket, which has not been read yet, may tell that the header was lost.
    pub(super) fn is_awaited(&self) -> bool {
        self.datagrams == ProxyDatagrams::First && self.state != HeaderState::Unsent
    }

    /// The bytes of the header.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What is known of the backend's having got it.
    pub(super) fn state(&self) -> HeaderState {
        self.state
    }

    pub(super) fn set_state(&mut self, state: HeaderState) {
        self.state = state;
    }

    /// Records that the backend has replied.
    pub(super) fn note_answer(&mut self) {
        if self.state == HeaderState::Sent {
            self.state = HeaderState::Answered;
        }
    }

    /// Records that a datagram was lost with `error`. Before the first reply, it may be the one with the header. After
    /// that, only a refusal matters: whoever listens there next has not got it.
    pub(super) fn note_lost(&mut self, error: &io::Error) {
        if self.state == HeaderState::Sent || error.kind() == io::ErrorKind::ConnectionRefused {
            self.state = HeaderState::Unsent;
        }
    }
}

/// Which of the next datagrams of a flow begin with its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderIn {
    All,
    First,
    None,
}

/// The endpoints of a flow, as its listener has them.
fn endpoints(client: SocketAddr, local: Option<LocalAddr>, target: &Target) -> Endpoints {
    Endpoints::new(client, target.asked(local.map(|local| local.ip)))
}

/// Counts and logs that a datagram of a proxy does not begin with a header.
pub(super) fn refuse(peer: SocketAddr, target: &Target, error: &HeaderError) {
    static WRONG: LogLimit = LogLimit::new();

    target.policy.state.stats.count_of(Protocol::Udp, FailureKind::BadProxyHeader);
    if let Some(suppressed) = WRONG.permit() {
        let (peer, mapping) = (canonical(peer), target.name());
        warn!(client = %peer, %mapping, %error, suppressed, "datagram dropped: no header of its proxy");
    }
}

/// A reusable buffer for datagrams with headers: the kernel cuts a GSO batch into equal parts, so each part needs its
/// own header in place.
#[derive(Debug, Default)]
pub(super) struct HeadedBatch {
    bytes: Vec<u8>,
    chunks: ArrayVec<(Range<usize>, Chunk), BATCH>,
}

impl HeadedBatch {
    /// Copies some of `datagrams`, each behind `header`. Returns how many of them it has, at least one.
    pub(super) fn fill(
        &mut self,
        received: &RecvBatch,
        datagrams: &[Routed],
        header: &[u8],
        tally: &mut Tally,
    ) -> usize {
        self.bytes.clear();
        self.chunks.clear();
        for (index, datagram) in datagrams.iter().enumerate() {
            let Some((payload, chunk)) = datagram.payload(received) else {
                tally.cut();
                continue;
            };
            let parts = Parts::of(chunk, header.len());
            if parts.count(chunk) > self.chunks.remaining_capacity() && !self.chunks.is_empty() {
                return index;
            }
            self.append(payload, parts, header, chunk.class, tally);
        }
        datagrams.len()
    }

    /// Appends the datagrams of a chunk.
    fn append(&mut self, payload: &[u8], parts: Parts, header: &[u8], class: u8, tally: &mut Tally) {
        let mut rest = payload;
        loop {
            let (part, behind) = rest.split_at(parts.bytes.min(rest.len()));
            if self.chunks.is_full() {
                tally.overflow(rest.len().div_ceil(parts.size.max(1)).max(1) as u64);
                return;
            }
            let start = self.bytes.len();
            if part.is_empty() {
                self.bytes.extend(header);
            }
            for datagram in part.chunks(parts.size.max(1)) {
                self.bytes.extend(header);
                self.bytes.extend(datagram);
            }
            let range = start..self.bytes.len();
            let segment = u16::try_from(parts.size + header.len()).ok();
            self.chunks.push((range.clone(), Chunk { len: range.len(), segment, class }));
            if behind.is_empty() {
                return;
            }
            rest = behind;
        }
    }

    /// The datagrams with their headers.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (&[u8], Chunk)> {
        self.chunks.iter().map(|(range, chunk)| (&self.bytes[range.clone()], *chunk))
    }

    /// The memory that it uses, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.bytes.capacity()
    }

    /// Frees its memory.
    pub(super) fn give_back(&mut self) {
        self.chunks.clear();
        self.bytes = Vec::new();
    }
}

/// How a chunk is divided, so that each part fits a GSO batch with the headers of its datagrams.
#[derive(Clone, Copy, Debug)]
struct Parts {
    /// The size of each datagram.
    size: usize,
    /// The bytes of each part, without headers.
    bytes: usize,
}

impl Parts {
    fn of(chunk: Chunk, header: usize) -> Self {
        let size = chunk.size();
        let datagrams = (GSO_BYTES / (size + header)).clamp(1, GSO_SEGMENTS);
        Self { size, bytes: (datagrams * size).max(1) }
    }

    fn count(self, chunk: Chunk) -> usize {
        chunk.len.div_ceil(self.bytes).max(1)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use nix::libc;
    use rproxy_sys::udp::enable_gro;
    use socket2::SockRef;

    use super::*;
    use crate::udp::table::FlowId;

    const HEADER: &[u8] = b"header";

    /// Receives these datagrams, and the sizes with headers that they are sent in.
    fn headed(sizes: &[usize], gro: bool) -> (Vec<usize>, usize) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
        if gro {
            enable_gro(socket.as_fd()).unwrap();
        }
        socket.connect(socket.local_addr().unwrap()).unwrap();
        for (index, size) in sizes.iter().enumerate() {
            socket.send(&vec![u8::try_from(index).unwrap(); *size]).unwrap();
        }
        let mut received = RecvBatch::new();
        let count = received.recv(socket.as_fd(), 0, BATCH, false).unwrap();
        let datagrams: Vec<_> = (0..count).map(|slot| Routed::whole(FlowId::from_u64(1), slot)).collect();
        let mut batch = HeadedBatch::default();
        assert_eq!(batch.fill(&received, &datagrams, HEADER, &mut Tally::default()), count);
        let chunks = batch.chunks().flat_map(|(bytes, chunk)| {
            let size = chunk.segment.map_or(usize::MAX, usize::from);
            bytes.chunks(size).map(<[u8]>::to_vec).collect::<Vec<_>>()
        });
        let chunks: Vec<_> = chunks.collect();
        for (index, bytes) in chunks.iter().enumerate() {
            let payload = bytes.strip_prefix(HEADER).unwrap();
            assert!(payload.iter().all(|byte| usize::from(*byte) == index), "datagram {index}");
        }
        (chunks.iter().map(|bytes| bytes.len() - HEADER.len()).collect(), batch.chunks.len())
    }

    #[test]
    fn each_datagram_has_its_header_and_its_size() {
        for sizes in [&[0][..], &[1], &[0, 5, 0], &[1400, 1400, 3], &[65_000, 1, 65_507]] {
            assert_eq!(headed(sizes, false), (sizes.to_vec(), sizes.len()));
        }
    }

    /// Those that arrived as one GSO batch are sent as one.
    fn chunk(len: usize, segment: u16) -> Chunk {
        Chunk { len, segment: Some(segment), class: 0 }
    }

    #[test]
    fn a_gso_batch_stays_one_unless_its_headers_make_it_too_long() {
        let parts = |chunk: Chunk| Parts::of(chunk, 28).count(chunk);
        assert_eq!(parts(chunk(64 * 64, 64)), 1);
        assert_eq!(parts(chunk(46 * 1400, 1400)), 2, "it is almost 64 kB long without");
        assert_eq!(parts(chunk(45 * 1400, 1400)), 1);
        assert_eq!(parts(chunk(100 * 10, 10)), 2, "more than the kernel takes");
        assert_eq!(parts(Chunk { len: 65_507, segment: None, class: 0 }), 1);
        assert_eq!(parts(Chunk { len: 0, segment: None, class: 0 }), 1);
    }

    #[test]
    fn what_does_not_fit_is_left_for_the_next_time() {
        let sizes: Vec<usize> = (0..BATCH).map(|_| 10).collect();
        assert_eq!(headed(&sizes, false), (sizes.clone(), BATCH));
        let mut batch = HeadedBatch::default();
        let payload = vec![0; 40 * 1400];
        for _ in 0..BATCH / 2 {
            batch.append(&payload, Parts { size: 1400, bytes: 30 * 1400 }, HEADER, 0, &mut Tally::default());
        }
        assert!(batch.chunks.is_full());
        let mut tally = Tally::default();
        batch.append(&payload, Parts { size: 1400, bytes: 30 * 1400 }, HEADER, 0, &mut tally);
        assert!(format!("{tally:?}").contains("no_buffer: 40"), "{tally:?}");
    }

    #[test]
    fn the_first_datagram_has_the_header_until_the_backend_has_it() {
        let header = |datagrams| FlowHeader { bytes: HEADER.into(), datagrams, state: HeaderState::Unsent };
        let [too_large, refused] = [libc::EMSGSIZE, libc::ECONNREFUSED].map(io::Error::from_raw_os_error);
        let mut first = header(ProxyDatagrams::First);
        assert_eq!(first.is_in(), HeaderIn::First);
        first.set_state(HeaderState::Sent);
        assert_eq!(first.is_in(), HeaderIn::None);
        first.note_lost(&too_large);
        assert_eq!(first.is_in(), HeaderIn::First, "it may be the one with the header");
        first.note_answer();
        assert_eq!(first.is_in(), HeaderIn::First, "a reply of before");
        first.set_state(HeaderState::Sent);
        first.note_answer();
        first.note_lost(&too_large);
        assert_eq!(first.is_in(), HeaderIn::None, "the backend has it");
        first.note_lost(&refused);
        assert_eq!(first.is_in(), HeaderIn::First, "there will be another backend");
        let mut each = header(ProxyDatagrams::Each);
        each.set_state(HeaderState::Answered);
        assert_eq!(each.is_in(), HeaderIn::All);
    }
}
