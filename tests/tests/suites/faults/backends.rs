//! Faults of backends and clients.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::eventually;
use testkit::holdings::private_memory;
use testkit::pattern::Pattern;
use testkit::require::Need;
use testkit::rproxy::Standalone;
use testkit::suite::Case;

use super::case;
use super::roles;
use super::scene::{BACK, Scene};

/// Connections that something happens to.
const CLIENTS: usize = 24;

/// What the proxy has more of for a connection that is stalled, at the most: what it has read and nobody takes,
/// a buffer of up to 64 KiB, which leaves gaps of its size in the heap; in bulk mode it is in a pipe. It does not
/// depend on how much was sent.
const STALLED_KB: usize = 256;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a backend is killed, and started again", killed),
        case("a backend that accepts and never reads", hung),
        case("clients that never read", slow_clients),
        case("clients that reset at random moments", random_resets),
        case("a local port without a listener does not connect to itself", self_connect)
            .needs(&[Need::Program("sysctl")]),
    ]
}

fn killed() {
    let scene = Scene::new(json!({}));
    let role = ["echo", &BACK.to_string()];
    let backend = roles::start_in(&scene.topology.container, &role);
    scene.under_load(|| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scene.connect()).collect();
        clients.iter().for_each(|client| client::exchange(client, 1, 100_000));
        backend.signal(Signal::SIGKILL);
        backend.wait();
        for client in &clients {
            // What the kernel sends for a process that is gone depends on what it had read.
            let (received, _end) = client::read_to_end(client);
            assert!(received.is_empty());
        }
        drop(clients);
        for _ in 0..CLIENTS {
            assert_eq!(scene.end(), (vec![], End::Reset));
        }
        let _backend = roles::start_in(&scene.topology.container, &role);
        scene.assert_serves();
    });
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!(stats["connections_total"], 2 * CLIENTS + 1);
    assert_eq!(stats["errors"]["connect_refused"], CLIENTS);
    let bytes = json!(CLIENTS * 100_000 + b"hello".len());
    assert_eq!([&stats["bytes_in"], &stats["bytes_out"]], [&bytes, &bytes]);
}

/// Writes until nobody takes more; returns how much was taken.
fn write_until_stalled(mut stream: &TcpStream) -> usize {
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let chunk = [0; 65_536];
    let mut written = 0;
    // A timeout, after which less may have been written.
    while let Ok(len) = stream.write(&chunk) {
        written += len;
    }
    written
}

fn hung() {
    let scene = Scene::new(json!({}));
    let pid = scene.proxy.process.pid();
    let _backend = roles::start_in(&scene.topology.container, &["silent", &BACK.to_string()]);
    let before = private_memory(pid);
    scene.under_load(|| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scene.connect()).collect();
        thread::scope(|scope| {
            for client in &clients {
                scope.spawn(move || assert!(write_until_stalled(client) > 0));
            }
        });
        assert_bounded(before, private_memory(pid));
        assert_eq!(scene.stats()["connections"], CLIENTS);
        clients.into_iter().for_each(client::reset);
    });
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!(stats["connections_total"], CLIENTS);
    assert_eq!(stats["errors"], json!({ "reset": CLIENTS }));
}

fn slow_clients() {
    let scene = Scene::new(json!({}));
    let pid = scene.proxy.process.pid();
    // Longer than what sockets and a pipe hold between a backend and a client.
    let len = 24 * 1024 * 1024;
    let _backend = scene.topology.container.run(|| {
        TcpBackend::serve(TcpListener::bind(BACK).unwrap(), move |mut stream| {
            std::io::copy(&mut std::io::Read::take(Pattern::new(1), len), &mut stream).map(drop)
        })
    });
    let before = private_memory(pid);
    scene.under_load(|| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scene.connect()).collect();
        let mut taken = 0;
        eventually("nothing moves any more", || {
            let last = std::mem::replace(&mut taken, scene.stats()["bytes_out"].as_u64().unwrap());
            thread::sleep(Duration::from_millis(50));
            taken > 0 && taken == last
        });
        assert_bounded(before, private_memory(pid));
        let (reader, others) = clients.split_first().unwrap();
        let (received, end) = client::read_to_end(reader);
        let mut expected = vec![0; received.len()];
        Pattern::new(1).fill(&mut expected);
        assert_eq!((received.len() as u64, end), (len, End::Eof));
        assert!(received == expected, "other bytes");
        for other in others {
            client::reset(other.try_clone().unwrap());
        }
    });
    scene.assert_nothing_left();
    assert_eq!(scene.stats()["errors"], json!({ "reset": CLIENTS - 1 }));
}

#[track_caller]
fn assert_bounded(before: usize, now: usize) {
    // Some more for workers' own buffers and the allocator.
    let most = before + CLIENTS * STALLED_KB + 1024;
    assert!(now <= most, "{now} kB, {before} kB before");
}

fn random_resets() {
    let scene = Scene::new(json!({}));
    let _backend = scene.echo();
    let count: u64 = 200;
    scene.under_load(|| {
        thread::scope(|scope| {
            for first in 0..4 {
                let scene = &scene;
                scope.spawn(move || (first..count).step_by(4).for_each(|seed| reset_somewhere(scene, seed)));
            }
        });
    });
    scene.assert_nothing_left();
    scene.assert_serves();
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!(stats["connections_total"], count + 1);
    let errors = stats["errors"].as_object().unwrap();
    assert!(errors.keys().all(|kind| kind == "reset"), "{errors:?}");
}

/// Connects, sends and reads some, and resets with something on its way, or with nothing.
fn reset_somewhere(scene: &Scene, seed: u64) {
    let mut random = [0; 4];
    Pattern::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(&mut random);
    let mut client = scene.connect();
    let exchanges = u64::from(random[0] % 4);
    for round in 0..exchanges {
        client::exchange(&client, round, 1 + usize::from(random[1]) * 64);
    }
    // No more than the sockets hold, so that it need not be read.
    let rest = vec![0; usize::from(random[2]) * 128];
    client.write_all(&rest).unwrap();
    if random[3] % 2 == 0 {
        std::io::Read::read(&mut client, &mut [0; 100]).ok();
    }
    client::reset(client);
}

/// A dial of a local port that the kernel hands out may be given that very port, and is then connected to
/// itself (RFC 9293, 3.5).
fn self_connect() {
    let scene = Scene::new(json!({}));
    let host = &scene.topology.host;
    // Few enough ports for it to happen soon: connect(2) tries every other one first.
    host.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40003").unwrap());
    let itself: SocketAddr = (Ipv4Addr::LOCALHOST, 40_000).into();
    let arguments = ["--host", "127.0.0.1:90", "--to", &itself.to_string()];
    let proxy = Standalone::start_in(host, &arguments);
    for _ in 0..100 {
        let end = scene.topology.host.run(|| client::end_of(proxy.address()));
        assert_eq!(end, (vec![], End::Reset));
    }
}
