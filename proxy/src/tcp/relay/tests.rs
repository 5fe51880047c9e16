//! Whole connections, between peers on threads of their own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use nix::libc;
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::limits::Limits;
use rproxy_sys::socket::accept;

use super::*;
use crate::bind::listen::set_stream_options;
use crate::runtime::new_runtime;
use crate::state::stats::Stats;
use crate::state::{MappingPolicy, Target};
use crate::tcp::dial::{self, Begun};

/// Without it, a relay that spins or waits in vain would hang the test.
const PATIENCE: Duration = Duration::from_secs(20);

/// Attempts to write in vain, this far apart, after which all buffers are full.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(5);

fn listener() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What became of a connection, and the counters of its mapping.
struct Relayed {
    outcome: Outcome,
    target: Arc<Target>,
}

impl Relayed {
    fn stats(&self) -> &Stats {
        &self.target.policy.state.stats
    }

    #[track_caller]
    fn assert_only_failure(&self, only: FailureKind, ending: Ending) {
        for kind in FailureKind::ALL {
            assert_eq!(self.stats().failure_kind(kind), u64::from(kind == only), "{kind:?}");
        }
        assert!(self.outcome.finish.failure.is_some());
        assert_eq!(self.outcome.finish.ending, ending);
    }
}

/// Relays one connection. The client has its connection from the start; the relay accepts it once `play` has
/// taken what the client's part returned, and the backend's part begins then.
fn relayed(
    limits: Limits,
    client: impl FnOnce(TcpStream) -> TcpStream,
    play: impl FnOnce(TcpStream, TcpStream) + Send + 'static,
) -> Relayed {
    relayed_from(listener(), limits, client, play)
}

/// Where clients connect to. A source that holds little never fills the copy buffer: what it sends is always copied.
fn front(holds_little: bool) -> TcpListener {
    let front = listener();
    if holds_little {
        SockRef::from(&front).set_recv_buffer_size(8 * 1024).unwrap();
    }
    front
}

fn relayed_from(
    front: TcpListener,
    limits: Limits,
    client: impl FnOnce(TcpStream) -> TcpStream,
    play: impl FnOnce(TcpStream, TcpStream) + Send + 'static,
) -> Relayed {
    let back = listener();
    set_stream_options(&SockRef::from(&front)).unwrap();
    let address = back.local_addr().unwrap().to_string();
    let host = front.local_addr().unwrap().to_string().parse().unwrap();
    let port_mapping =
        PortMapping { protocol: Protocol::Tcp, host, backend: address.parse().unwrap(), v6only: false };
    let policy = Arc::new(MappingPolicy { limits: limits.into(), state: Arc::default() });
    let target = Arc::new(Target::new(port_mapping, policy));
    let client = client(patient(TcpStream::connect(front.local_addr().unwrap()).unwrap()));
    let (done, is_done) = mpsc::channel();
    let of_relay = target.clone();
    // Not joined: a relay that never ends must not hang the test.
    thread::spawn(move || {
        let outcome = new_runtime().unwrap().block_on(serve(&front, &of_relay));
        done.send(outcome).unwrap();
    });
    let peers = thread::spawn(move || play(client, patient(back.accept().unwrap().0)));
    let outcome = is_done.recv_timeout(PATIENCE).expect("the relay ends");
    peers.join().unwrap();
    Relayed { outcome, target }
}

async fn serve(front: &TcpListener, target: &Arc<Target>) -> Outcome {
    let guard = ConnectionGuard::take(target);
    let client = Stream::new(accept(front.as_fd()).unwrap().0).unwrap();
    let PortMapping { backend, protocol, .. } = &target.port_mapping;
    let socket = Begun::Not(dial::open(guard.port_mapping()).unwrap());
    let backend = dial::dial(socket, backend, *protocol, None, &client).await.unwrap();
    backend.acknowledge();
    relay(&client, &backend, &guard, None).await
}

/// What is written at once. Much is spliced, if there is a lot of it from the start.
const LITTLE: usize = 1000;
const MUCH: usize = 64 * 1024;

/// Writes this much at a time until nothing more is taken, and returns how many bytes were.
fn fill(mut stream: &TcpStream, size: usize) -> u64 {
    let bytes = vec![7; size];
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    let mut in_vain = 0;
    while in_vain < ATTEMPTS {
        match stream.write(&bytes) {
            Ok(written) => (taken, in_vain) = (taken + written as u64, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                in_vain += 1;
                thread::sleep(PAUSE);
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    taken
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Takes what a peer has sent until it ends with a reset.
#[track_caller]
fn assert_reset(mut stream: &TcpStream) {
    let error = io::copy(&mut stream, &mut io::sink()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn both_directions_end_in_order_and_each_byte_is_counted() {
    let relayed = relayed(
        Limits::default(),
        |client| client,
        |mut client, mut backend| {
            client.write_all(b"request").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut request = Vec::new();
            backend.read_to_end(&mut request).unwrap();
            assert_eq!(request, b"request");
            backend.write_all(b"an answer").unwrap();
            drop(backend);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, b"an answer");
        },
    );
    let Outcome { to_backend, to_client, finish: Finish { ending, failure } } = &relayed.outcome;
    assert_eq!((*to_backend, *to_client, *ending), (7, 9, Ending::ClientClosed));
    assert!(failure.is_none(), "{failure:?}");
    assert_eq!([relayed.stats().bytes_in(), relayed.stats().bytes_out()], [7, 9]);
    assert!(FailureKind::ALL.iter().all(|kind| relayed.stats().failure_kind(*kind) == 0));
}

#[test]
fn a_conversation_goes_on_until_both_sides_end_it() {
    let relayed = relayed(
        Limits::default(),
        |client| client,
        |mut client, mut backend| {
            for number in 0..3 {
                for (mut from, mut to) in [(&client, &backend), (&backend, &client)] {
                    let mut received = [0];
                    from.write_all(&[number]).unwrap();
                    to.read_exact(&mut received).unwrap();
                    assert_eq!(received, [number]);
                }
            }
            // Each end is passed on by itself, the client's first.
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(backend.read(&mut [0]).unwrap(), 0);
            backend.write_all(b"an answer").unwrap();
            client.read_exact(&mut [0; 9]).unwrap();
            drop(backend);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        },
    );
    let Outcome { to_backend, to_client, finish } = &relayed.outcome;
    assert_eq!((*to_backend, *to_client, finish.ending), (3, 12, Ending::ClientClosed));
}

#[test]
fn what_a_backend_sent_before_its_reset_arrives() {
    let (counted, count) = mpsc::channel();
    let relayed = relayed(
        Limits::default(),
        |client| client,
        move |mut client, backend| {
            fill(&backend, LITTLE);
            reset(backend);
            let mut received = 0;
            let error = loop {
                match client.read(&mut [0; 64 * 1024]) {
                    Ok(0) => panic!("a reset is no orderly end"),
                    Ok(len) => received += len as u64,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            counted.send(received).unwrap();
        },
    );
    relayed.assert_only_failure(FailureKind::Broken, Ending::BackendReset);
    assert_eq!(count.recv().unwrap(), relayed.outcome.to_client, "all that the relay wrote");
}

#[test]
fn what_a_backend_sent_arrives_if_it_refuses_the_rest_of_a_request() {
    let (counted, count) = mpsc::channel();
    let relayed = relayed(
        Limits::default(),
        |client| client,
        move |mut client, backend| {
            fill(&backend, LITTLE);
            reset(backend);
            client.write_all(b"the rest").unwrap();
            let mut received = 0;
            while let Ok(len @ 1..) = client.read(&mut [0; 64 * 1024]) {
                received += len as u64;
            }
            counted.send(received).unwrap();
        },
    );
    relayed.assert_only_failure(FailureKind::Broken, Ending::BackendReset);
    assert_eq!(count.recv().unwrap(), relayed.outcome.to_client, "all that the relay wrote");
}

#[test]
fn what_waits_for_a_slow_peer_arrives_whole() {
    for is_filled in [false, true] {
        let (sent, is_sent) = mpsc::channel();
        let before = sent.clone();
        let prepare = move |client: TcpStream| {
            before.send(if is_filled { fill(&client, MUCH) } else { 0 }).unwrap();
            client
        };
        let relayed =
            relayed_from(front(!is_filled), Limits::default(), prepare, move |client, mut backend| {
                // All buffers are full before the backend reads.
                sent.send(fill(&client, if is_filled { MUCH } else { LITTLE })).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let received = io::copy(&mut backend, &mut io::sink()).unwrap();
                assert_eq!(received, is_sent.try_iter().sum::<u64>());
            });
        assert!(relayed.outcome.finish.failure.is_none(), "{:?}", relayed.outcome);
        assert!(relayed.outcome.to_backend > 0);
    }
}

#[test]
fn a_backend_that_resets_while_bytes_wait_for_it_resets_the_client() {
    for is_filled in [false, true] {
        let prepare = move |client: TcpStream| {
            if is_filled {
                fill(&client, MUCH);
            }
            client
        };
        let relayed = relayed_from(front(!is_filled), Limits::default(), prepare, move |client, backend| {
            fill(&client, if is_filled { MUCH } else { LITTLE });
            reset(backend);
            assert_reset(&client);
        });
        relayed.assert_only_failure(FailureKind::Broken, Ending::BackendReset);
    }
}

#[test]
fn a_client_that_resets_while_bytes_wait_for_it_resets_the_backend() {
    let relayed = relayed(
        Limits::default(),
        |client| client,
        |client, backend| {
            fill(&backend, LITTLE);
            reset(client);
            assert_reset(&backend);
        },
    );
    relayed.assert_only_failure(FailureKind::Broken, Ending::ClientReset);
}

#[test]
fn a_client_that_resets_while_its_own_bytes_wait_resets_the_backend() {
    for is_filled in [false, true] {
        let prepare = move |client: TcpStream| {
            if is_filled {
                fill(&client, MUCH);
            }
            client
        };
        let relayed = relayed_from(front(!is_filled), Limits::default(), prepare, move |client, backend| {
            fill(&client, if is_filled { MUCH } else { LITTLE });
            reset(client);
            // It does not read before: nothing more can be delivered.
            let failed = || SockRef::from(&backend).take_error().unwrap().is_some();
            for _ in 0..PATIENCE.as_millis() / PAUSE.as_millis() {
                if failed() {
                    return;
                }
                thread::sleep(PAUSE);
            }
            panic!("the backend is not reset");
        });
        relayed.assert_only_failure(FailureKind::Broken, Ending::ClientReset);
    }
}

#[test]
fn an_idle_connection_is_reset_on_both_sides() {
    let limits = Limits { idle_timeout: Some(Duration::from_millis(100)), ..Limits::default() };
    let relayed = relayed(
        limits,
        |client| client,
        |client, backend| {
            assert_reset(&client);
            assert_reset(&backend);
        },
    );
    relayed.assert_only_failure(FailureKind::Idle, Ending::Idle);
}

#[test]
fn a_connection_that_the_backend_ends_first_is_closed_by_it() {
    let relayed = relayed(
        Limits::default(),
        |client| client,
        |mut client, backend| {
            drop(backend);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            drop(client);
        },
    );
    let Finish { ending, failure } = &relayed.outcome.finish;
    assert_eq!(*ending, Ending::BackendClosed);
    assert!(failure.is_none(), "{failure:?}");
}

#[test]
fn a_failure_names_the_side_and_what_the_kernel_says_of_it() {
    for (side, errno, ending) in [
        (Side::Client, libc::ECONNRESET, Ending::ClientReset),
        (Side::Backend, libc::EPIPE, Ending::BackendReset),
        (Side::Client, libc::ETIMEDOUT, Ending::ClientTimeout),
        (Side::Backend, libc::ETIMEDOUT, Ending::BackendTimeout),
        (Side::Backend, libc::EHOSTUNREACH, Ending::BackendReset),
    ] {
        let finish = side.failed(io::Error::from_raw_os_error(errno));
        assert_eq!(finish.ending, ending);
    }
}
