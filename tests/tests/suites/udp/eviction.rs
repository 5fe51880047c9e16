//! Which UDP flow is evicted at the limit: new ones before established ones, and the longest idle first. The test
//! controls the backend and all clients; a client whose flow was evicted gets another port.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::udp;

/// Flows at a time.
const CAP: usize = 40;

/// A client that is not answered is taken for one that means it when it still sends after this long; a
/// little more, for the proxy counts from the arrival of the first datagram.
const LASTING: Duration = Duration::from_millis(1_200);

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("single datagrams evict no established flow", || flood_spares_established(1, 0)),
        case("pairs of datagrams evict no established flow", || flood_spares_established(2, 0)),
        case("replies alone establish no flow", || flood_spares_established(1, 2)),
        case("clients that continue after a reply evict no established flow", others_go_on),
        case("a flow that only sends for a while is established", lasting_flow_is_established),
        case("flows that only send for a moment are not", brief_flows_are_not),
        case("a new client is served when all flows are established", full_of_established_flows),
    ]
}

struct Cap {
    proxy: Standalone,
    backend: UdpSocket,
}

impl Cap {
    /// A relay with room for [`CAP`] flows, which one source may take all.
    fn new() -> Self {
        let backend = udp::local();
        let cap = CAP.to_string();
        let limits = ["--udp-max-flows", &cap, "--udp-max-flows-per-source", &cap];
        let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.local_addr().unwrap(), &limits);
        Self { proxy, backend }
    }

    /// Sends a question; returns the address of the client's flow.
    #[track_caller]
    fn send(&self, client: &UdpSocket) -> SocketAddr {
        client.send_to(b"question", self.proxy.address()).unwrap();
        udp::receive(&self.backend).1
    }

    #[track_caller]
    fn answer(&self, client: &UdpSocket, flow: SocketAddr) {
        self.backend.send_to(b"answer", flow).unwrap();
        assert_eq!(udp::receive(client), (b"answer".to_vec(), self.proxy.address()));
    }

    /// A client that has sent something after an answer, and its flow.
    #[track_caller]
    fn established(&self) -> (UdpSocket, SocketAddr) {
        let client = udp::local();
        let flow = self.send(&client);
        self.answer(&client, flow);
        assert_eq!(self.send(&client), flow);
        (client, flow)
    }

    /// Has five times as many clients as there is room for send some questions, one after the other, and
    /// get some answers when they are through.
    #[track_caller]
    fn flood(&self, questions: usize, answers: usize) {
        for _ in 0..5 * CAP {
            let client = udp::local();
            let flows: Vec<_> = (0..questions).map(|_| self.send(&client)).collect();
            (0..answers).for_each(|_| self.answer(&client, flows[0]));
        }
    }
}

/// The established flows have been idle for longer than any of the flood. They are half of what fits, so that
/// it does not matter if this machine halts for long enough to make a pair of datagrams a lasting flow.
fn flood_spares_established(questions: usize, answers: usize) {
    let cap = Cap::new();
    let established: Vec<_> = (0..CAP / 2).map(|_| cap.established()).collect();
    cap.flood(questions, answers);
    for (client, flow) in &established {
        assert_eq!(cap.send(client), *flow, "an established flow was displaced");
    }
}

/// As syslog and metrics are sent.
fn lasting_flow_is_established() {
    let cap = Cap::new();
    let client = udp::local();
    let flow = cap.send(&client);
    thread::sleep(LASTING);
    assert_eq!(cap.send(&client), flow);
    cap.flood(1, 0);
    assert_eq!(cap.send(&client), flow, "the flow was displaced");
}

/// Some of many, lest a halt of this machine or a port that comes again by chance decide.
fn brief_flows_are_not() {
    let cap = Cap::new();
    let brief: Vec<_> =
        (0..CAP / 2).map(|_| udp::local()).map(|client| (cap.send(&client), client)).collect();
    for (flow, client) in &brief {
        assert_eq!(cap.send(client), *flow);
    }
    cap.flood(1, 0);
    assert!(brief.iter().any(|(flow, client)| cap.send(client) != *flow), "flows of a moment have stayed");
}

/// Flows that may be established. The others are for new ones.
const ESTABLISHED: usize = CAP - CAP / 8;

/// Whether they are meant or not: a client cannot be told from one whose address is forged by someone who guesses
/// when the backend has answered.
fn others_go_on() {
    let cap = Cap::new();
    let established: Vec<_> = (0..ESTABLISHED).map(|_| cap.established()).collect();
    for _ in 0..5 * CAP {
        cap.established();
    }
    for (client, flow) in &established {
        assert_eq!(cap.send(client), *flow, "an established flow was displaced");
    }
}

/// It comes to a second exchange in the share of new ones; the longest idle there has made room.
fn full_of_established_flows() {
    let cap = Cap::new();
    let mut others: Vec<_> = (0..CAP).map(|_| cap.established()).collect();
    let (client, flow) = cap.established();
    let (longest_idle, displaced) = others.remove(ESTABLISHED);
    for (other, flow) in &others {
        assert_eq!(cap.send(other), *flow, "another flow than the longest idle was displaced");
    }
    assert_eq!(cap.send(&client), flow);
    let _taken = UdpSocket::bind(displaced).unwrap();
    assert_ne!(cap.send(&longest_idle), displaced);
}
