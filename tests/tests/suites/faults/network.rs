//! Faults of the network between the proxy and its peers.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use serde_json::json;

use testkit::client::{self, End};
use testkit::process;
use testkit::require::Need;
use testkit::suite::Case;

use super::case;
use super::scene::{FRONT, Scene};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a backend's address is removed and restored", address_gone),
        case("a link goes down, and up", link_down),
        case("the path gets a smaller MTU", smaller_mtu),
        case("SYN bursts beyond the backlog", syn_burst).needs(&[Need::Program("sysctl")]),
    ]
}

fn address_gone() {
    let scene = Scene::new(json!({ "connect_timeout": "500ms" }));
    let _backend = scene.echo();
    scene.under_load(|| {
        let client = scene.connect();
        client::exchange(&client, 1, 1000);
        scene.topology.container.ip("address del 172.17.0.2/16 dev eth0");
        for _ in 0..3 {
            assert_eq!(scene.end(), (vec![], End::Reset));
        }
        (&client).write_all(b"x").unwrap();
        scene.topology.container.address("eth0", "172.17.0.2/16");
        // What was lost meanwhile is sent again.
        (&client).read_exact(&mut [0]).unwrap();
        client::exchange(&client, 2, 100_000);
        scene.assert_serves();
    });
    scene.assert_nothing_left();
    assert_eq!(scene.stats()["connections_total"], 5);
}

/// The interface of the first container, on the host.
const PORT: &str = "veth0002";

fn link_down() {
    let scene = Scene::new(json!({ "connect_timeout": "500ms" }));
    let _backend = scene.echo();
    scene.under_load(|| {
        let client = scene.connect();
        client::exchange(&client, 1, 1000);
        scene.topology.host.ip(&format!("link set dev {PORT} down"));
        assert_eq!(scene.end(), (vec![], End::Reset));
        (&client).write_all(b"x").unwrap();
        scene.topology.host.ip(&format!("link set dev {PORT} up"));
        (&client).read_exact(&mut [0]).unwrap();
        client::exchange(&client, 2, 100_000);
        scene.assert_serves();
    });
    scene.assert_nothing_left();
    assert_eq!(scene.stats()["connections_total"], 3);
}

fn smaller_mtu() {
    let scene = Scene::new(json!({}));
    let _backend = scene.echo();
    scene.under_load(|| {
        let client = scene.connect();
        client::exchange(&client, 1, 1_000_000);
        // First where packets are made, so that none is made that does not fit.
        scene.topology.host.ip(&format!("link set dev {PORT} mtu 600"));
        scene.topology.container.ip("link set dev eth0 mtu 600");
        client::exchange(&client, 2, 1_000_000);
        let new = scene.connect();
        client::exchange(&new, 3, 1_000_000);
    });
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!([&stats["bytes_in"], &stats["bytes_out"]], [3_000_000, 3_000_000]);
    assert_eq!(stats["errors"], json!({}));
}

fn syn_burst() {
    // The backlog is what the kernel allows when the listener is bound.
    let script = "sysctl -qw net.core.somaxconn=8 && exec \"$0\" \"$@\"";
    let scene = Scene::with(json!({}), &[], |command| process::in_shell(script, &command));
    let _backend = scene.echo();
    // Each time that they send their SYNs again, after one, three and seven seconds, some eight fit.
    let count = 30;
    scene.proxy.process.pause();
    let clients: Vec<TcpStream> =
        scene.topology.client.run(|| (0..count).map(|_| begin_to_connect()).collect());
    scene.proxy.process.resume();
    scene.under_load(|| {
        thread::scope(|scope| {
            for client in clients {
                scope.spawn(|| {
                    let mut client = client::patient(client);
                    client.set_nonblocking(false).unwrap();
                    wait_until_connected(&client);
                    client::exchange(&client, 1, 100);
                    client.shutdown(Shutdown::Write).unwrap();
                    assert_eq!(client.read(&mut [0]).unwrap(), 0);
                });
            }
        });
    });
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!((&stats["connections_total"], &stats["errors"]), (&json!(count), &json!({})));
    assert_eq!(stats["bytes_in"], 100 * count);
}

/// Sends a SYN, without waiting for its answer.
fn begin_to_connect() -> TcpStream {
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    let begun = connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(FRONT));
    assert!(begun.is_ok() || begun == Err(nix::errno::Errno::EINPROGRESS), "{begun:?}");
    socket.into()
}

fn wait_until_connected(client: &TcpStream) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(client), PollFlags::POLLOUT)];
    assert_eq!(poll(&mut fds, PollTimeout::from(20_000_u16)).unwrap(), 1, "not connected");
    assert!(client.take_error().unwrap().is_none());
}
