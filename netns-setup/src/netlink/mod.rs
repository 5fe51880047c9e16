//! A minimal synchronous netlink client: one request and its response at a time.

pub mod address;
pub mod link;
pub mod route;
pub mod rule;
pub mod xfrm;

use std::io;

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use rproxy_sys::netlink::messages;

use crate::family::Family;

/// The maximum number of attempts to read a table that changes meanwhile.
const DUMP_ATTEMPTS: usize = 10;

/// A netlink error.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened, or failed.
    #[error("netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// This process may not change the network.
    #[error(
        "this process may not change the network: it needs CAP_NET_ADMIN in the user namespace that the network namespace belongs to; `unshare --map-root-user --net --mount` makes both"
    )]
    Denied,
    /// The kernel refused the request.
    #[error("{0}")]
    Refused(#[source] io::Error),
    /// The response could not be parsed.
    #[error("cannot read the kernel's answer: {0}")]
    Decode(String),
    /// The table changed during each attempt to read it.
    #[error("the kernel's tables change faster than they can be read: try again")]
    Unsettled,
    /// The kernel was built without policy routing.
    #[error("this kernel has no policy routing for {} (CONFIG_IP{}_MULTIPLE_TABLES)", .0.name(), .0.config())]
    NoPolicyRouting(Family),
    /// There is no such interface.
    #[error("there is no interface {0}")]
    NoLink(String),
}

impl NetlinkError {
    fn refused(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) if number == nix::errno::Errno::EPERM as i32 => Self::Denied,
            _ => Self::Refused(error),
        }
    }

    /// Whether the kernel refused with that error number.
    #[must_use]
    pub fn is(&self, errno: nix::errno::Errno) -> bool {
        matches!(self, Self::Refused(error) if error.raw_os_error() == Some(errno as i32))
    }
}

impl From<DecodeError> for NetlinkError {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error.to_string())
    }
}

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    sequence: u32,
}

impl Client {
    /// Opens a connection for `protocol`, such as `NETLINK_ROUTE`.
    ///
    /// # Errors
    /// If the kernel lacks the protocol.
    pub fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol).map_err(NetlinkError::Socket)?;
        socket.bind_auto().map_err(NetlinkError::Socket)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(NetlinkError::Socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Requests a change and waits until it is made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn change<M>(&mut self, message: M, flags: u16) -> Result<(), NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        let mut refused = None;
        self.receive::<M>(|payload, _| match payload {
            NetlinkPayload::Error(error) => {
                refused = error.code.map(|_| error.to_io());
                false
            }
            _ => true,
        })?;
        refused.map_or(Ok(()), |error| Err(NetlinkError::refused(error)))
    }

    /// Reads one object.
    ///
    /// # Errors
    /// If the kernel refuses, for example because there is no such object.
    pub fn get<M>(&mut self, message: M) -> Result<M, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST)?;
        let mut answer = Err(NetlinkError::Decode("it is empty".to_owned()));
        self.receive::<M>(|payload, _| {
            match payload {
                NetlinkPayload::InnerMessage(message) => answer = Ok(message),
                NetlinkPayload::Error(error) => answer = Err(NetlinkError::refused(error.to_io())),
                _ => return true,
            }
            false
        })?;
        answer
    }

    /// Reads a whole table.
    ///
    /// # Errors
    /// If the kernel refuses, or the table changes during each attempt.
    pub fn dump<M>(&mut self, message: &M) -> Result<Vec<M>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
        NetlinkPayload<M>: From<M>,
    {
        for _attempt in 0..DUMP_ATTEMPTS {
            if let Some(messages) = self.dump_once(message.clone())? {
                return Ok(messages);
            }
        }
        Err(NetlinkError::Unsettled)
    }

    fn dump_once<M>(&mut self, message: M) -> Result<Option<Vec<M>>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut messages, mut interrupted, mut refused) = (Vec::new(), false, None);
        self.receive::<M>(|payload, header| {
            interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
            match payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Done(_) => return false,
                NetlinkPayload::Error(error) => {
                    refused = error.code.map(|_| error.to_io());
                    return false;
                }
                _ => {}
            }
            true
        })?;
        match refused {
            Some(error) => Err(NetlinkError::refused(error)),
            None => Ok((!interrupted).then_some(messages)),
        }
    }

    fn send<M>(&mut self, message: M, flags: u16) -> Result<(), NetlinkError>
    where
        M: NetlinkSerializable,
        NetlinkPayload<M>: From<M>,
    {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop).map_err(NetlinkError::Socket)
    }

    /// Calls `each` with each response to the last request until it returns false.
    fn receive<M: NetlinkDeserializable>(
        &self,
        mut each: impl FnMut(NetlinkPayload<M>, &NetlinkHeader) -> bool,
    ) -> Result<(), NetlinkError> {
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(NetlinkError::Socket)?;
            for message in messages::<M>(&bytes) {
                let message = message?;
                let ours = message.header.sequence_number == self.sequence;
                if ours && !each(message.payload, &message.header) {
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::RouteNetlinkMessage;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;

    /// Responses of the kernel about a namespace with a bridge, a veth pair and routes, and an error.
    const ANSWERS: [&[u8]; 7] = [
        include_bytes!("../../testdata/netlink/links.bin"),
        include_bytes!("../../testdata/netlink/addresses.bin"),
        include_bytes!("../../testdata/netlink/routes.bin"),
        include_bytes!("../../testdata/netlink/routes6.bin"),
        include_bytes!("../../testdata/netlink/refusal.bin"),
        include_bytes!("../../testdata/netlink/rules.bin"),
        include_bytes!("../../testdata/netlink/routes-local.bin"),
    ];

    /// Parses a datagram like the commands do, and records the result.
    fn found(datagram: &[u8]) -> Vec<String> {
        let read = |message: Result<NetlinkMessage<_>, _>| match message?.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                Ok(format!("{:?}", link::read(message)))
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                Ok(format!("{:?}", address::read(&message)))
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) => {
                Ok(format!("{:?} {:?}", route::read(&message), route::read_local(&message, Family::V4)))
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(message)) => {
                let rule = rule::read(&message);
                let is_ours = rule.is_ours(&"docker0".parse().expect("it is a name"));
                Ok(format!("{rule}{}", if is_ours { " (ours)" } else { "" }))
            }
            NetlinkPayload::Error(error) => Err(NetlinkError::Refused(error.to_io())),
            other => Ok(format!("{other:?}")),
        };
        messages::<RouteNetlinkMessage>(datagram)
            .map(|message| read(message).unwrap_or_else(|error| error.to_string()))
            .collect()
    }

    #[test]
    fn the_kernels_answers_are_understood() {
        let [links, addresses, routes, routes6, refusal, rules, local] =
            ANSWERS.map(|answer| found(answer).join("\n"));
        for name in ["lo", "br0", "v0", "v1"] {
            assert!(links.contains(&format!("name: \"{name}\"")), "{links}");
        }
        assert!(links.contains("hairpin: true") && links.contains("kind: Some(\"veth\")"), "{links}");
        assert!(addresses.contains("10.0.0.1"), "{addresses}");
        assert!(routes.contains("gateway: Some(10.0.0.2)"), "{routes}");
        assert!(routes6.contains("gateway: Some(fd00::2)"), "{routes6}");
        assert!(refusal.contains("No such device"), "{refusal}");
        let expected = [
            "0: from all lookup local",
            "7: not from 10.0.0.0/8 fwmark 0x4d lookup 12",
            "8: from all … blackhole",
            "9: from all … goto 32766",
            "10: from all nop",
            "50: from all fwmark 0x1000/0x1000 iif docker0 lookup 4096 (ours)",
            "32766: from all lookup main",
            "32767: from all lookup default",
        ];
        assert!(rules.starts_with(&expected.join("\n")), "{rules}");
        assert!(local.contains("is_local: true, destination: None, oif: Some(1)"), "{local}");
        assert!(local.contains("destination: Some(Cidr { ip: 10.9.0.0, prefix: 16 })"), "{local}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn a_damaged_answer_does_no_harm(
            answer in select(ANSWERS.to_vec()),
            changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..6),
            cut in any::<Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut datagram = answer.to_vec();
            for (at, byte) in changes {
                datagram[at.index(answer.len())] = byte;
            }
            let end = if is_cut { cut.index(answer.len()) } else { answer.len() };
            found(&datagram[..end]);
        }
    }
}
