//! The new process's side of an upgrade.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{F_GETFL, OFlag, fcntl};
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::interfaces::NoInterfaces;
use rproxy_mapping::name::Name;
use rproxy_mapping::wire::FieldErrors;
use rproxy_mapping::{Mapping, PortMapping};
use rproxy_sys::watch::Watched;
use socket2::{Domain, SockRef, Type};
use tokio::io::Interest;
use tokio::time::timeout;

use super::channel::Channel;
use super::launcher::claim_channel;
use super::{Flows, Hello, Offer, OfferedAttach, OfferedFlow, OfferedMapping, UpgradeError, VERSION, Word};
use crate::bind::listen::{AdoptError, Listener};
use crate::bind::unix_socket::UnixSocket;
use crate::bind::{Bound, BoundPort};
use crate::engine::Server;
use crate::engine::old_processes::OldProcesses;
use crate::metrics::listener::MetricsListener;
use crate::plane::attachments::{Attachments, Shim};
use crate::plane::{AttachOptions, socket};
use crate::proxy_protocol::Endpoints;
use crate::state::task::{LiveFlow, LiveFlows};

/// How long the old process may take for its next step. It does not wait longer for this one either.
const NEXT_WORD: Duration = Duration::from_secs(15);

/// The old process. It continues to serve if this is dropped before `hand_over_to` has returned.
pub struct OldProcess {
    channel: Channel,
    /// The names of the mappings, in the order of the offer.
    names: Vec<Name>,
    /// Those of the mappings whose files become this process's own.
    files: Vec<Name>,
    /// The channels to processes that are older still.
    older: Vec<OwnedFd>,
}

/// What the old process passes.
pub struct Sockets {
    /// The mappings and their sockets.
    pub bound: Vec<Bound>,
    /// The control socket.
    pub control: Option<UnixSocket>,
    /// The socket of the metrics.
    pub metrics: Option<MetricsListener>,
    /// The shims that have connected, if ports can be attached.
    pub attach: Option<Attachments>,
    /// The old process, which also has these sockets.
    pub old: OldProcess,
}

/// Returns the socket to the old process, if this one was started to take over. Call it before anything else
/// opens a file.
///
/// # Errors
/// [`UpgradeError`]: the process was started to take over, but has no such socket.
pub fn claim() -> Result<Option<OwnedFd>, UpgradeError> {
    claim_channel().transpose().map_err(UpgradeError::talk("find the old process"))
}

/// Receives what the old process at the other end of `socket` serves. If the mappings cannot change, they
/// must equal `fixed`. The control socket must be bound to `control`.
///
/// # Errors
/// [`UpgradeError`]
///
/// # Panics
/// Outside a tokio runtime.
pub async fn take_over(
    socket: OwnedFd,
    fixed: Option<&[Mapping]>,
    control: Option<&Path>,
) -> Result<Sockets, UpgradeError> {
    let channel = Channel::new(socket).map_err(UpgradeError::talk("talk to the old process"))?;
    let Hello { version } = in_time(channel.receive()).await?;
    if version != VERSION {
        let reason = format!("it uses version {version} of the handover, and this program version {VERSION}");
        return Err(UpgradeError::Offer(reason));
    }
    let Offer { control: has_control, metrics, attach, old_processes: older, mappings } =
        in_time(channel.receive()).await?;
    let mappings: Vec<Offered> = mappings.iter().map(Offered::read).collect::<Result<_, _>>()?;
    if let Some(fixed) = fixed {
        let requested = mappings.iter().filter(|offered| offered.process.is_none());
        refuse_others(&requested.map(|offered| offered.mapping.clone()).collect::<Vec<_>>(), fixed)?;
    }
    let names = distinct_names(mappings.iter().map(|offered| &offered.mapping))?;
    let files = mappings.iter().filter(|offered| offered.owns_file);
    let files = files.map(|offered| offered.mapping.name()).collect();
    if has_control != control.is_some() {
        return Err(refuse("only one of the processes has a control socket"));
    }
    let shims = mappings.iter().filter(|offered| offered.process.is_some()).count();
    let waiting = attach.as_ref().map_or(0, |attach| attach.waiting.len());
    let count = mappings.iter().map(|offered| offered.mapping.sockets()).sum::<usize>();
    let own = usize::from(has_control) + usize::from(metrics.is_some()) + usize::from(attach.is_some());
    let count = own + count + shims + waiting + older;
    let mut sockets = in_time(channel.receive_descriptors(count)).await?.into_iter();
    let mut next = || sockets.next().ok_or_else(|| refuse("it sent too few sockets"));
    let control =
        control.map(|path| UnixSocket::adopt("--control", next()?, path).map_err(refuse)).transpose()?;
    let metrics = metrics.map(|addr| adopt_metrics(next()?, &addr)).transpose()?;
    let attach = match attach {
        Some(attach) => Some((next()?, attach)),
        None if shims > 0 => return Err(refuse("ports were attached to it, and it has no socket for that")),
        None => None,
    };
    let bound: Vec<Bound> =
        mappings.into_iter().map(|offered| offered.adopt(&mut sockets)).collect::<Result<_, _>>()?;
    Bound::refuse_loops(&bound).map_err(refuse)?;
    let attach =
        attach.map(|(listener, attach)| attachments(listener, attach, &bound, &mut sockets)).transpose()?;
    Ok(Sockets {
        bound,
        control,
        metrics,
        attach,
        old: OldProcess { channel, names, files, older: sockets.collect() },
    })
}

/// A mapping of the old process, or a port that is attached to it.
struct Offered {
    mapping: Mapping,
    owns_file: bool,
    process: Option<u32>,
}

impl Offered {
    fn read(offered: &OfferedMapping) -> Result<Self, UpgradeError> {
        let OfferedMapping { mapping, resolved, addresses, owns_file, process } = offered;
        let mapping = mapping.read(&NoInterfaces, ScopedIp::ANY).map_err(refuse)?.resolved(resolved);
        let addresses: Result<Vec<ScopedIp>, _> = addresses.iter().map(|ip| ip.parse()).collect();
        let mapping = mapping.listening_at(&addresses.map_err(refuse)?);
        let process = *process;
        let port = process.and_then(|_process| mapping.port_mappings().next());
        let mapping = match port {
            Some(port) => mapping.named(Name::attached(port.protocol, &port.host)),
            None => mapping,
        };
        Ok(Self { mapping, owns_file: *owns_file, process })
    }

    fn adopt(self, sockets: impl Iterator<Item = OwnedFd>) -> Result<Bound, UpgradeError> {
        Ok(Bound { process: self.process, ..adopt(self.mapping, sockets)? })
    }
}

/// The socket of the metrics, which are served at `addr`.
fn adopt_metrics(socket: OwnedFd, addr: &str) -> Result<MetricsListener, UpgradeError> {
    MetricsListener::adopt(socket, addr.parse().map_err(refuse)?).map_err(refuse)
}

/// What shims have attached to the old process, whose `connections` are in the order of the offer.
fn attachments(
    listener: OwnedFd,
    OfferedAttach { name, limits, waiting }: OfferedAttach,
    bound: &[Bound],
    connections: impl Iterator<Item = OwnedFd>,
) -> Result<Attachments, UpgradeError> {
    let listener = socket::adopt(listener, &name).map_err(refuse)?;
    let mut wrong = FieldErrors::default();
    let limits = limits.read(&mut wrong).ok_or_else(|| refuse(wrong))?;
    let attached = bound.iter().filter_map(|bound| Some((bound.process?, Some(bound.mapping.name()))));
    let waiting = waiting.into_iter().map(|process| (process, None));
    let shims = attached.chain(waiting).zip(connections);
    let shims = shims.map(|((process, port), connection)| Shim { connection, process, port }).collect();
    Ok(Attachments { options: AttachOptions { name, limits }, listener, shims })
}

fn refuse(reason: impl ToString) -> UpgradeError {
    UpgradeError::Offer(reason.to_string())
}

/// Refuses mappings other than those of the command line.
fn refuse_others(offered: &[Mapping], fixed: &[Mapping]) -> Result<(), UpgradeError> {
    let other = offered.iter().find(|mapping| !fixed.contains(mapping));
    match other {
        Some(other) => Err(refuse(format!("its mapping {other} is not on the command line"))),
        None if offered.len() != fixed.len() => {
            Err(refuse("it does not serve all mappings of the command line"))
        }
        None => Ok(()),
    }
}

fn distinct_names<'a>(mappings: impl Iterator<Item = &'a Mapping>) -> Result<Vec<Name>, UpgradeError> {
    let names: Vec<Name> = mappings.map(Mapping::name).collect();
    let mut sorted: Vec<&Name> = names.iter().collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(refuse(format!("two mappings are called {}", two[0]))),
        None => Ok(names),
    }
}

/// Pairs a mapping with its sockets, which may listen at other addresses than it requests: see `activation`.
fn adopt(mapping: Mapping, sockets: impl Iterator<Item = OwnedFd>) -> Result<Bound, UpgradeError> {
    let adopt = |(port_mapping, socket): (PortMapping, OwnedFd)| {
        let wrong = |error: &dyn std::fmt::Display| refuse(format!("the socket of {port_mapping}: {error}"));
        let listener = Listener::adopt_any(socket).map_err(|error| wrong(&error))?;
        if listener.protocol() != port_mapping.protocol {
            return Err(wrong(&AdoptError::WrongKind(port_mapping.protocol)));
        }
        Ok(BoundPort::adopt(port_mapping, listener))
    };
    // The ports come first in the zip, which then takes a socket only if there is a port for it.
    let ports = mapping.port_mappings().zip(sockets).map(adopt).collect::<Result<_, UpgradeError>>()?;
    Ok(Bound { mapping, ports, process: None })
}

impl OldProcess {
    /// Reports that everything is prepared, and serves what `server` was prepared for. When this returns, the
    /// old process no longer serves. Returns all processes that still have connections.
    ///
    /// # Errors
    /// [`UpgradeError`]: the old process continues to serve, and this one must exit.
    pub(crate) async fn hand_over_to(self, server: &Server) -> Result<OldProcesses, UpgradeError> {
        let Self { channel, names, files, older } = self;
        let interest = Interest::READABLE | Interest::WRITABLE;
        let older = older.into_iter().map(|socket| Watched::new(socket, interest));
        let mut older: Vec<Watched> =
            older.collect::<Result<_, _>>().map_err(UpgradeError::talk("watch an older process"))?;
        in_time(channel.send(&Word::Prepared)).await?;
        let listeners = server.udp_listeners_of(&names);
        let mut live_flows = LiveFlows::default();
        loop {
            let Flows { flows: some, ports, dropped } = in_time(channel.receive()).await?;
            if some.is_empty() {
                let number = |socket: usize| listeners.get(socket).copied().flatten();
                let dropped =
                    dropped.into_iter().filter_map(|(socket, count)| Some((number(socket)?, count)));
                (live_flows.ports, live_flows.dropped) = (ports, dropped.collect());
                break;
            }
            let sockets = in_time(channel.receive_descriptors(some.len())).await?;
            for (offered, socket) in some.into_iter().zip(sockets) {
                live_flows.flows.push(live_flow(&offered, socket, &listeners)?);
            }
        }
        server.start(live_flows);
        server.until_responsive().await;
        in_time(channel.send(&Word::Serving)).await?;
        match in_time(channel.receive()).await? {
            Word::Yours => {
                server.own_files_of(&files);
                older.push(channel.into_inner());
                Ok(OldProcesses::new(older))
            }
            word => Err(refuse(format!("it said {word:?}"))),
        }
    }
}

/// Converts a flow of one of the `listeners`, which are in the order of the offer.
fn live_flow(
    offered: &OfferedFlow,
    socket: OwnedFd,
    listeners: &[Option<usize>],
) -> Result<LiveFlow, UpgradeError> {
    let listener = listeners.get(offered.socket).copied().flatten();
    let listener = listener.ok_or_else(|| refuse("a flow without a UDP socket"))?;
    refuse_others_than_flows(&socket, offered.peer.is_none())
        .map_err(|error| refuse(format!("the flow of {}: {error}", offered.client)))?;
    let OfferedFlow { client, header, established: is_established, peer, dropped, .. } = *offered;
    let (local, socket) = (offered.local(), Arc::new(socket));
    let told = offered.told.map(|(source, destination)| Endpoints::new(source, destination));
    Ok(LiveFlow { listener, client, local, told, header, is_established, peer, dropped, socket })
}

/// Refuses anything but a non-blocking UDP socket, connected if `is_connected`.
fn refuse_others_than_flows(socket: &OwnedFd, is_connected: bool) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, F_GETFL)?);
    let socket = SockRef::from(socket);
    let address = if is_connected { socket.peer_addr()? } else { socket.local_addr()? };
    let is_one = socket.r#type()? == Type::DGRAM
        && matches!(address.domain(), Domain::IPV4 | Domain::IPV6)
        && flags.contains(OFlag::O_NONBLOCK);
    if is_one { Ok(()) } else { Err(io::Error::other("not a socket of a flow")) }
}

/// Waits for the next message of the old process, for a limited time.
async fn in_time<T>(step: impl Future<Output = io::Result<T>>) -> Result<T, UpgradeError> {
    let talked = timeout(NEXT_WORD, step).await.unwrap_or_else(|late| Err(late.into()));
    talked.map_err(UpgradeError::talk("talk to the old process"))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, UdpSocket};

    use rproxy_mapping::wire::WireMapping;

    use super::*;
    use crate::state::task::HeaderState;

    fn mapping(json: &str) -> Mapping {
        serde_json::from_str::<WireMapping>(json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
    }

    #[test]
    fn fixed_mappings_are_all_there_and_no_others() {
        let [web, dns] = [r#""web""#, r#""dns""#].map(|name| {
            mapping(&format!(r#"{{"name":{name},"host_ports":"80","to":"192.0.2.1","to_ports":"80"}}"#))
        });
        let both = [web.clone(), dns.clone()];
        assert!(refuse_others(&both, &[dns.clone(), web.clone()]).is_ok());
        for (offered, fixed) in [(&both[..], &both[..1]), (&both[..1], &both[..])] {
            refuse_others(offered, fixed).unwrap_err();
        }
        distinct_names([&web, &dns].into_iter()).unwrap();
        distinct_names([&web, &web].into_iter()).unwrap_err();
    }

    #[test]
    fn sockets_have_to_be_what_their_mapping_says() {
        let tcp = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let udp = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        let both = || mapping(r#"{"to":"192.0.2.1","to_ports":"80","proto":"tcp+udp"}"#);
        assert_eq!(adopt(both(), [tcp(), udp()].into_iter()).unwrap().ports.len(), 2);
        for sockets in [vec![udp(), tcp()], vec![std::fs::File::open("/dev/null").unwrap().into()]] {
            adopt(both(), sockets.into_iter()).unwrap_err();
        }
        // At its actual address, it would lead back to itself.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let to_itself = mapping(&format!(r#"{{"to":"127.0.0.1","to_ports":"{port}"}}"#));
        let bound = adopt(to_itself, [listener.into()].into_iter()).unwrap();
        Bound::refuse_loops(&[bound]).unwrap_err();
    }

    #[test]
    fn a_flow_is_a_connected_socket_that_does_not_block() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(socket.local_addr().unwrap()).unwrap();
        let blocking = OwnedFd::from(connected.try_clone().unwrap());
        refuse_others_than_flows(&blocking, true).unwrap_err();
        connected.set_nonblocking(true).unwrap();
        refuse_others_than_flows(&connected.into(), true).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = OwnedFd::from(socket);
        refuse_others_than_flows(&socket, true).unwrap_err();
        refuse_others_than_flows(&socket, false).unwrap();
    }

    #[test]
    fn a_flow_is_taken_over_as_it_was_offered() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(socket.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        let ends = (addr("198.51.100.1:5"), addr("198.51.100.2:53"));
        for (established, peer, told) in [(true, None, Some(ends)), (false, Some(addr("192.0.2.2:9")), None)]
        {
            let client = "192.0.2.1:5".parse().unwrap();
            let header = if established { HeaderState::Answered } else { HeaderState::Unsent };
            let local = Some(("fe80::1".parse().unwrap(), 3));
            let offered =
                OfferedFlow { socket: 1, client, local, told, header, established, peer, dropped: 11 };
            let of_socket = || socket.try_clone().unwrap().into();
            let flow = live_flow(&offered, of_socket(), &[None, Some(7)]).unwrap();
            assert_eq!((flow.listener, flow.client, flow.local), (7, client, offered.local()));
            assert_eq!((flow.is_established, flow.peer, flow.dropped), (established, peer, 11));
            assert_eq!(flow.header, header);
            assert_eq!(flow.told, told.map(|(source, destination)| Endpoints::new(source, destination)));
            // What is offered at that place is no UDP socket.
            live_flow(&offered, of_socket(), &[Some(7), None]).unwrap_err();
            live_flow(&offered, of_socket(), &[Some(7)]).unwrap_err();
        }
    }
}
