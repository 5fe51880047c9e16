//! The connection of the page to the process: when it ends, and who gets none.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use testkit::backend::TcpBackend;
use testkit::browser::Browser;
use testkit::client;
use testkit::controlled::{Controlled, mapping};
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::upgradable::{Program, upgrade};

use super::scene::{ADDRESS, URL, address};

/// The maximum number of viewers.
const VIEWERS: usize = 16;

/// The state of the connection, as the page has it.
const STATUS: &str = "document.getElementById('status-text').innerText";

/// Runs a test inside a new namespace.
fn in_namespace(test: impl FnOnce() + Send) {
    Namespace::new().run(test);
}

fn start() -> Controlled {
    Controlled::start(&["--metrics", ADDRESS])
}

/// A browser that shows the page.
#[track_caller]
fn open() -> Browser {
    let browser = Browser::start();
    browser.open(URL);
    browser.wait_for(STATUS, "Live");
    browser
}

pub(super) fn ends_and_returns() {
    in_namespace(|| {
        let proxy = start();
        let browser = open();
        drop(proxy);
        browser.wait_for(STATUS, "Connection lost");
        let notice = browser.text("#notice");
        assert!(
            notice.starts_with("No answer from rproxy since") && notice.contains("Retry now"),
            "{notice}"
        );
        browser.wait_for("document.title.startsWith('Lost')", true);
        let backend = TcpBackend::echo();
        let proxy = start();
        proxy.apply(&[mapping("back", "tcp", address(8001), backend.address())]).success();
        browser.click("#retry");
        browser.wait_for(STATUS, "Live");
        browser.wait_for("document.getElementById('notice').hidden", true);
        browser.wait_for("document.querySelector('#view-mappings .row a')?.innerText", "back");
    });
}

pub(super) fn drains() {
    in_namespace(|| {
        let (proxy, backend) = (start(), TcpBackend::echo());
        proxy.apply(&[mapping("web", "tcp", address(8001), backend.address())]).success();
        let client = client::connect(address(8001));
        client::ping(&client);
        let browser = open();
        proxy.process.signal(Signal::SIGTERM);
        eventually("the reason", || browser.text("body").contains("rproxy is ending"));
        client::ping(&client);
        drop(client);
        assert!(proxy.process.wait().success());
        let again = start();
        browser.wait_for(STATUS, "Live");
        drop(again);
    });
}

pub(super) fn upgrades() {
    in_namespace(|| {
        let program = Program::new();
        let control = program.control();
        let first = program.start(&["--control", control.to_str().unwrap(), "--metrics", ADDRESS]);
        let browser = open();
        browser.click("#tab-process");
        let shows = |pid: String| browser.text("#view-process").contains(&pid);
        eventually("the first process", || shows(first.pid().to_string()));
        let go = program.path().with_extension("go");
        program.replace(&format!("while [ ! -e {} ]; do sleep 0.05; done; exit 1", go.display()));
        first.signal(Signal::SIGUSR2);
        eventually("an upgrade that is under way", || shows("under way".to_owned()));
        std::fs::write(go, []).unwrap();
        eventually("one that has failed", || shows("this process goes on".to_owned()));
        program.repair();
        let second = upgrade(&first, 0, first.pid());
        eventually("the second process", || shows(second.to_string()));
        browser.wait_for(STATUS, "Live");
    });
}

/// A viewer that is no browser.
struct Viewer(BufReader<TcpStream>);

impl Viewer {
    /// Connects, with hardly any room for what it has not read, and returns the status of the response.
    fn connect() -> (Self, u16) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 * 1024).unwrap();
        socket.connect(&ADDRESS.parse::<SocketAddr>().unwrap().into()).unwrap();
        let mut stream = client::patient(socket.into());
        stream.write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut viewer = Self(BufReader::new(stream));
        let status = viewer.line().split(' ').nth(1).unwrap().parse().unwrap();
        (viewer, status)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    /// Reads up to the next event of this kind.
    fn until(&mut self, kind: &str) {
        while !self.line().starts_with(&format!("event: {kind}")) {}
    }
}

pub(super) fn too_many() {
    in_namespace(|| {
        let proxy = start();
        let mut viewers: Vec<_> = (0..VIEWERS).map(|_| Viewer::connect()).collect();
        assert!(viewers.iter().all(|(_viewer, status)| *status == 200));
        let (mut another, status) = Viewer::connect();
        assert_eq!(status, 503);
        while another.line() != "\r\n" {}
        let mut reason = String::new();
        another.0.read_to_string(&mut reason).ok();
        assert!(reason.contains("16 viewers are connected already"), "{reason}");
        // All of them get what changes.
        viewers.iter_mut().for_each(|(viewer, _status)| viewer.until("state"));
        viewers.iter_mut().for_each(|(viewer, _status)| viewer.until("changes"));
        // One leaves.
        drop(viewers.pop());
        eventually("there is room again", || Viewer::connect().1 == 200);
        drop(viewers);
        // Events that no buffer holds, for viewers that do not read.
        let idle: Vec<_> = (0..VIEWERS).map(|_| Viewer::connect()).collect();
        let mut turn = 0;
        eventually("places are given to others", || {
            turn += 1;
            let backend = address(1 + turn % 2);
            let name = |n: u16| format!("{}{n}", "m".repeat(100));
            let mappings: Vec<_> =
                (0..7_000).map(|n| mapping(&name(n), "tcp", address(10_000 + n), backend)).collect();
            proxy.apply(&mappings).success();
            Viewer::connect().1 == 200
        });
        drop(idle);
    });
}
