//! How many system calls serving takes: most of the relay's speed is calls that it does not make. They are counted, not
//! timed, so that a busy machine changes nothing; each bound has room for a call more here and there, and none for one
//! more per message.

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

mod idle;
mod tcp;
mod udp;

use std::process::ExitCode;

use rproxy_tests::require::Need;
use rproxy_tests::suite::{self, Case};

/// As the event loops of different crates, and of different machines, ask for events.
const WAITS: [&str; 3] = ["epoll_wait", "epoll_pwait", "epoll_pwait2"];

fn main() -> ExitCode {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Program("strace")]);
    let net = |name: &str, body: fn()| case(name, body).needs(&[Need::Root, Need::Program("ip")]);
    suite::run(vec![
        case("who is idle makes no call", idle::makes_none),
        case("a proxy of dockerd that is idle makes no call", idle::of_dockerd_makes_none),
        case("connections", tcp::connections),
        case("the handshake with the backend waits for the client's bytes", tcp::late_handshake),
        case("requests on a connection", tcp::requests),
        net("a transfer to the backend is spliced", tcp::transfer_to_backend),
        net("a transfer to the client is spliced", tcp::transfer_to_client),
        net("a steady transfer is woken up rarely", tcp::few_wake_ups),
        case("datagrams of one client", udp::of_one_client),
        case("datagrams of one size", udp::of_one_size),
        case("datagrams of many clients", udp::of_many_clients),
        case("answers of one size", udp::answers_of_one_size),
        case("answers to many clients", udp::answers_to_many_clients),
        case("a question and its answer", udp::question_and_answer),
        case("a new flow", udp::new_flow),
    ])
}
