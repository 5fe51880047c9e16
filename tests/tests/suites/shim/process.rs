//! The process: its descriptors, and its memory.

use std::fs;
use std::os::fd::AsRawFd;

use nix::unistd::Pid;

use testkit::docker_proxy::{DockerProxy, Status, mapping};
use testkit::fake_plane::{FakePlane, free_name};
use testkit::holdings::{Holdings, private_memory};
use testkit::require;
use testkit::suite::Case;

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("its memory", memory),
        case("missing standard streams", missing_streams),
        case("missing standard streams of rproxy", missing_streams_of_rproxy),
        case("descriptors that were not for it", other_descriptors),
        case("no status pipe", no_status_pipe),
        case("a file instead of the status pipe", file_instead_of_pipe),
    ]
}

/// What each process may take, in kB: its stack, and a page or two of the program that it has written to.
const MOST_PRIVATE: usize = 48;

fn memory() {
    let plane = FakePlane::new();
    let shims: Vec<_> = (0..20).map(|_| start_attached(&plane, "tcp")).collect();
    for (proxy, _host, _attachment) in &shims {
        let pid = proxy.process.pid();
        let private = private_memory(pid);
        assert!(private <= MOST_PRIVATE, "{private} kB are private to process {pid}");
        assert_eq!(Holdings::of(pid).threads, 1);
        // The listener, the connection, the signals, and the standard streams.
        assert_eq!(proxy.process.descriptors(), 6);
    }
}

/// Starts the shim in a shell with some redirections.
fn start_redirected(name: &str, redirections: &str, host: SocketAddr) -> DockerProxy {
    let script = format!("RPROXY_ATTACH={name} exec \"$0\" \"$@\" {redirections}");
    let shim = rproxy_shim().to_str().unwrap();
    let mut arguments = vec!["-c".to_owned(), script, shim.to_owned()];
    arguments.extend(mapping("tcp", host, container()));
    DockerProxy::start(&require::find("sh").unwrap(), &arguments, None)
}

/// What is open in a process, by number.
fn open_files(pid: Pid) -> Vec<(i32, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            // Others may be closed meanwhile.
            Some((number, fs::read_link(path).ok()?.to_str().unwrap().to_owned()))
        })
        .collect();
    files.sort();
    files
}

#[track_caller]
fn assert_null_streams(pid: Pid) {
    let files = open_files(pid);
    for number in 0..3 {
        assert!(files.contains(&(number, "/dev/null".to_owned())), "{files:?}");
    }
}

fn missing_streams() {
    let plane = FakePlane::new();
    let mut proxy = start_redirected(plane.name(), "<&- >&- 2>&-", free("tcp", "127.0.0.1"));
    let attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    assert_null_streams(proxy.process.pid());
    unpublish(&proxy, attachment);
}

fn missing_streams_of_rproxy() {
    let mut proxy = start_redirected(&free_name(), "<&- >&- 2>&-", free("tcp", "127.0.0.1"));
    assert_eq!(proxy.status(), Status::Ready);
    assert_replaced(&proxy);
    assert_null_streams(proxy.process.pid());
}

/// They are closed, also where `-use-listen-fd` would find a socket.
fn other_descriptors() {
    let plane = FakePlane::new();
    let redirections = "4</proc/self/status 5</proc/self/status 9</proc/self/status";
    let mut proxy = start_redirected(plane.name(), redirections, free("tcp", "127.0.0.1"));
    let _attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    assert_eq!(proxy.read_status_packet(), None, "more than the status");
    let files = open_files(proxy.process.pid());
    assert!(files.iter().all(|(_, name)| !name.ends_with("/status")), "{files:?}");
    assert_eq!(files.len(), 6, "{files:?}");
}

fn no_status_pipe() {
    let plane = FakePlane::new();
    let host = free("tcp", "127.0.0.1");
    let proxy = start_redirected(plane.name(), "3>&-", host);
    let attachment = plane.serve();
    unpublish(&proxy, attachment);
    assert_free("tcp", host);
}

/// Nothing is written to it.
fn file_instead_of_pipe() {
    let plane = FakePlane::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(file.as_raw_fd() > 2);
    let redirection = format!("3<>{}", file.path().display());
    let proxy = start_redirected(plane.name(), &redirection, free("tcp", "127.0.0.1"));
    let attachment = plane.serve();
    unpublish(&proxy, attachment);
    assert_eq!(fs::read(file.path()).unwrap(), b"");
}
