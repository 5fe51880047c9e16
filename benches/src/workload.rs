//! The workloads and their names.

use std::fmt;
use std::str::FromStr;

/// The direction of a bulk transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the client to the backend.
    Up,
    /// From the backend to the client.
    Down,
}

/// A workload; `benches/README.md` describes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Streams at full speed.
    TcpBulk {
        /// Connections.
        streams: usize,
        /// The direction.
        direction: Direction,
    },
    /// Small requests and responses on the same connections.
    TcpRr {
        /// Connections, each with one request in flight.
        connections: usize,
    },
    /// Like `TcpRr`, with a new connection for each request.
    TcpCrr {
        /// Connections at a time.
        connections: usize,
    },
    /// Like `TcpRr`, with a large response.
    TcpGet {
        /// Bytes of a response.
        size: u32,
        /// Connections, each with one request in flight.
        connections: usize,
    },
    /// Connections that are idle after one exchange.
    TcpIdle {
        /// Connections.
        connections: usize,
    },
    /// Datagrams that are echoed.
    UdpRr {
        /// Sockets of the client.
        flows: usize,
        /// Datagrams in flight per socket.
        window: usize,
        /// Bytes of a datagram.
        size: usize,
    },
    /// `udp-rr-64x8-64B` over several ports.
    UdpPorts {
        /// Ports.
        ports: u16,
    },
    /// Datagrams in one direction, as fast as the client can send.
    UdpBulk {
        /// Bytes of a datagram.
        size: usize,
        /// Whether each call sends a GSO batch, as QUIC stacks do.
        gso: bool,
    },
    /// Datagrams from the backend, in GSO batches, as many as the client grants.
    UdpDown {
        /// Sockets of the client.
        flows: usize,
    },
    /// Downloads over QUIC.
    QuicDown {
        /// Connections at a time.
        connections: usize,
    },
    /// Small requests and responses over QUIC.
    QuicRr {
        /// Connections.
        connections: usize,
        /// Requests in flight per connection, each in its own stream.
        window: usize,
    },
    /// From exec to ready.
    Start,
    /// The resource use of idle mappings.
    Footprint,
    /// `tcp-rr-64` beside idle connections.
    ScaleTcp {
        /// Idle connections.
        idle: usize,
    },
    /// `udp-rr-64x8-64B` beside idle flows.
    ScaleUdp {
        /// Idle flows.
        idle: usize,
    },
    /// From exec to ready with many mappings in one process.
    ScaleMappings {
        /// Mappings.
        count: usize,
    },
}

use Direction::{Down, Up};

impl Workload {
    /// The workloads of a run without `--only`.
    pub(crate) fn all() -> Vec<Self> {
        let bulk = |streams| [Up, Down].map(|direction| Self::TcpBulk { streams, direction });
        let udp_rr = |(flows, window)| [64, 1400].map(|size| Self::UdpRr { flows, window, size });
        let mut all = Vec::new();
        all.extend([1, 8, 64].into_iter().flat_map(bulk));
        all.extend([1, 64, 1000].map(|connections| Self::TcpRr { connections }));
        all.push(Self::TcpCrr { connections: 64 });
        let get = |size| [4, 64].map(|connections| Self::TcpGet { size, connections });
        all.extend([16, 64, 256, 1024].into_iter().flat_map(|kibibytes| get(kibibytes * 1024)));
        all.push(Self::TcpIdle { connections: 2000 });
        all.extend([(1, 64), (64, 8), (1000, 1)].into_iter().flat_map(udp_rr));
        all.push(Self::UdpPorts { ports: 2 });
        all.extend([false, true].map(|gso| Self::UdpBulk { size: 1400, gso }));
        all.extend([1, 8].map(|flows| Self::UdpDown { flows }));
        all.extend([1, 8].map(|connections| Self::QuicDown { connections }));
        all.extend([(1, 64), (64, 1)].map(|(connections, window)| Self::QuicRr { connections, window }));
        all.extend([Self::Start, Self::Footprint]);
        all.extend([0, 1000, 4000, 7936].map(|idle| Self::ScaleTcp { idle }));
        all.extend([0, 1000, 10_000].map(|idle| Self::ScaleUdp { idle }));
        all.extend([1, 100, 1000, 10_000].map(|count| Self::ScaleMappings { count }));
        all
    }

    /// The workloads of a quick run: one of each kind.
    pub(crate) fn quick() -> Vec<Self> {
        vec![
            Self::TcpBulk { streams: 1, direction: Up },
            Self::TcpBulk { streams: 8, direction: Down },
            Self::TcpRr { connections: 64 },
            Self::TcpCrr { connections: 64 },
            Self::TcpGet { size: 64 * 1024, connections: 64 },
            Self::TcpGet { size: 256 * 1024, connections: 4 },
            Self::UdpRr { flows: 64, window: 8, size: 64 },
            Self::UdpRr { flows: 1000, window: 1, size: 64 },
            Self::Start,
            Self::Footprint,
        ]
    }

    /// The workloads that an item of `--only` selects: one, or a group such as `tcp-bulk`.
    ///
    /// # Errors
    /// [`UnknownWorkload`]
    pub(crate) fn select(name: &str) -> Result<Vec<Self>, UnknownWorkload> {
        if let Ok(one) = name.parse() {
            return Ok(vec![one]);
        }
        let group = format!("{name}-");
        let members: Vec<_> =
            Self::all().into_iter().filter(|member| member.to_string().starts_with(&group)).collect();
        match members.is_empty() {
            true => Err(UnknownWorkload(name.into())),
            false => Ok(members),
        }
    }

    /// Whether it uses UDP.
    pub(crate) fn is_udp(self) -> bool {
        matches!(
            self,
            Self::UdpRr { .. }
                | Self::UdpPorts { .. }
                | Self::UdpBulk { .. }
                | Self::UdpDown { .. }
                | Self::QuicDown { .. }
                | Self::QuicRr { .. }
                | Self::ScaleUdp { .. }
        )
    }

    /// Whether it uses QUIC, for which the backend has a port of its own.
    pub(crate) fn is_quic(self) -> bool {
        matches!(self, Self::QuicDown { .. } | Self::QuicRr { .. })
    }

    /// The first point of its curve, which is the reference for the others.
    pub(crate) fn base(self) -> Option<Self> {
        match self {
            Self::ScaleTcp { .. } => Some(Self::ScaleTcp { idle: 0 }),
            Self::ScaleUdp { .. } => Some(Self::ScaleUdp { idle: 0 }),
            Self::ScaleMappings { .. } => Some(Self::ScaleMappings { count: 1 }),
            _ => None,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TcpBulk { streams, direction: Up } => write!(f, "tcp-bulk-{streams}-up"),
            Self::TcpBulk { streams, direction: Down } => write!(f, "tcp-bulk-{streams}-down"),
            Self::TcpRr { connections } => write!(f, "tcp-rr-{connections}"),
            Self::TcpCrr { connections } => write!(f, "tcp-crr-{connections}"),
            Self::TcpGet { size, connections } => write!(f, "tcp-get-{}-{connections}", Size(*size)),
            Self::TcpIdle { connections } => write!(f, "tcp-idle-{connections}"),
            Self::UdpRr { flows, window, size } => write!(f, "udp-rr-{flows}x{window}-{size}B"),
            Self::UdpPorts { ports } => write!(f, "udp-ports-{ports}"),
            Self::UdpBulk { size, gso: false } => write!(f, "udp-bulk-{size}B"),
            Self::UdpBulk { size, gso: true } => write!(f, "udp-bulk-{size}B-gso"),
            Self::UdpDown { flows } => write!(f, "udp-bulk-{flows}-down"),
            Self::QuicDown { connections } => write!(f, "quic-down-{connections}"),
            Self::QuicRr { connections, window } => write!(f, "quic-rr-{connections}x{window}"),
            Self::Start => f.write_str("start"),
            Self::Footprint => f.write_str("footprint"),
            Self::ScaleTcp { idle } => write!(f, "scale-tcp-{idle}"),
            Self::ScaleUdp { idle } => write!(f, "scale-udp-{idle}"),
            Self::ScaleMappings { count } => write!(f, "scale-mappings-{count}"),
        }
    }
}

/// No workload has this name.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no workload or group is called '{0}'; `list` shows them")]
pub(crate) struct UnknownWorkload(String);

impl FromStr for Workload {
    type Err = UnknownWorkload;

    /// Accepts any numbers, not only those in [`Workload::all`].
    fn from_str(name: &str) -> Result<Self, UnknownWorkload> {
        let known = match name.split('-').collect::<Vec<_>>()[..] {
            ["tcp", "bulk", n, "up"] => number(n).map(|streams| Self::TcpBulk { streams, direction: Up }),
            ["tcp", "bulk", n, "down"] => number(n).map(|streams| Self::TcpBulk { streams, direction: Down }),
            ["tcp", "rr", n] => number(n).map(|connections| Self::TcpRr { connections }),
            ["tcp", "crr", n] => number(n).map(|connections| Self::TcpCrr { connections }),
            ["tcp", "get", size, n] => Size::parse(size)
                .and_then(|Size(size)| number(n).map(|connections| Self::TcpGet { size, connections })),
            ["tcp", "idle", n] => number(n).map(|connections| Self::TcpIdle { connections }),
            ["udp", "rr", shape, size] => udp_shape(shape, size),
            ["udp", "ports", n] => {
                n.parse().ok().filter(|ports| (1..=64).contains(ports)).map(|ports| Self::UdpPorts { ports })
            }
            ["udp", "bulk", n] => size(n).map(|size| Self::UdpBulk { size, gso: false }),
            ["udp", "bulk", n, "gso"] => size(n).map(|size| Self::UdpBulk { size, gso: true }),
            ["udp", "bulk", n, "down"] => {
                number(n).filter(|flows| *flows <= 256).map(|flows| Self::UdpDown { flows })
            }
            ["quic", "down", n] => number(n).map(|connections| Self::QuicDown { connections }),
            ["quic", "rr", shape] => quic_shape(shape),
            ["start"] => Some(Self::Start),
            ["footprint"] => Some(Self::Footprint),
            ["scale", "tcp", n] => n.parse().ok().map(|idle| Self::ScaleTcp { idle }),
            ["scale", "udp", n] => n.parse().ok().map(|idle| Self::ScaleUdp { idle }),
            ["scale", "mappings", n] => number(n).map(|count| Self::ScaleMappings { count }),
            _ => None,
        };
        known.ok_or_else(|| UnknownWorkload(name.into()))
    }
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number| *number > 0)
}

/// A number of bytes, such as `1500`, `16k` or `1m`.
struct Size(u32);

impl Size {
    const UNITS: [(&'static str, u32); 2] = [("m", 1 << 20), ("k", 1 << 10)];

    fn parse(text: &str) -> Option<Self> {
        let unit = Self::UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
        let (count, unit) = unit.unwrap_or((text, 1));
        let bytes = count.parse::<u32>().ok()?.checked_mul(unit)?;
        (bytes > 0).then_some(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = Self::UNITS.iter().find(|(_name, unit)| self.0.is_multiple_of(*unit));
        let (name, unit) = whole.unwrap_or(&("", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// `64B`: at least the shortest message, and at most what fits into a packet.
fn size(text: &str) -> Option<usize> {
    number(text.strip_suffix('B')?).filter(|size| (crate::message::HEADER..=1472).contains(size))
}

fn udp_shape(shape: &str, bytes: &str) -> Option<Workload> {
    let (flows, window) = shape.split_once('x')?;
    Some(Workload::UdpRr { flows: number(flows)?, window: number(window)?, size: size(bytes)? })
}

/// `64x8`: as many streams at a time as servers commonly permit.
fn quic_shape(shape: &str) -> Option<Workload> {
    let (connections, window) = shape.split_once('x')?;
    let window = number(window).filter(|window| *window <= 100)?;
    Some(Workload::QuicRr { connections: number(connections)?, window })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_workloads() {
        for workload in Workload::all() {
            assert_eq!(workload.to_string().parse::<Workload>().unwrap(), workload);
        }
        assert_eq!("tcp-rr-7".parse::<Workload>().unwrap(), Workload::TcpRr { connections: 7 });
        let get = Workload::TcpGet { size: 1500, connections: 7 };
        assert_eq!("tcp-get-1500-7".parse::<Workload>().unwrap(), get);
    }

    #[test]
    fn groups_select_their_members() {
        assert_eq!(Workload::select("tcp-bulk").unwrap().len(), 6);
        assert_eq!(Workload::select("udp-rr-64x8").unwrap().len(), 2);
        assert_eq!(Workload::select("quic").unwrap().len(), 4);
        assert_eq!(Workload::select("start").unwrap(), [Workload::Start]);
        for wrong in [
            "",
            "tcp-rr-0",
            "tcp-bulk-1-left",
            "tcp-get-0k-1",
            "tcp-get-4g-1",
            "udp-rr-1x1-8B",
            "udp-bulk-0-down",
            "udp-bulk-257-down",
            "udp-bulk-1-up",
            "quic-down-0",
            "quic-down-1-up",
            "quic-rr-1",
            "quic-rr-0x1",
            "quic-rr-1x101",
            "udp",
            "tcp-b",
        ] {
            let selected = Workload::select(wrong);
            assert!(selected.is_err() || wrong == "udp", "{wrong}: {selected:?}");
        }
    }
}
