//! Programs that speak the PROXY protocol, as backends and in front: nginx, HAProxy, and another `rproxy`.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

use tempfile::TempDir;

use testkit::netns::Namespace;
use testkit::process::{Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Ipv6,
    Need::Program("ip"),
    Need::Program("nginx"),
    Need::Program("haproxy"),
    Need::Program("curl"),
];

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(NEEDS);
    vec![
        case("nginx and HAProxy are told who the client is", receivers),
        case("nginx, HAProxy and rproxy tell it", senders),
        case("HAProxy checks a server through rproxy", checks),
    ]
}

/// A page that names the client and the address that it asked, as nginx has them from the header.
const NGINX: &str = "
    http {
        access_log off;
        client_body_temp_path body;
        server {
            listen 80 proxy_protocol;
            listen [::]:80 proxy_protocol;
            default_type text/plain;
            return 200 \"$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port\";
        }
    }";

/// The same of HAProxy.
const HAPROXY: &str = "
    frontend page
        mode http
        bind :::81 v4v6 accept-proxy
        http-request return status 200 content-type text/plain lf-string \"%[src] %[src_port] %[dst] %[dst_port]\"
";

/// What follows `global` in each configuration.
const HAPROXY_DEFAULTS: &str = "
    defaults
        timeout connect 10s
        timeout client 30s
        timeout server 30s
";

/// Where a Debian package puts the module for streams.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// nginx in the foreground, as a single process, with all of its files in a directory.
fn nginx(directory: &Path, config: &str) -> Command {
    let config = format!(
        "{config}\ndaemon off;\nmaster_process off;\nuser root;\npid nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    );
    fs::write(directory.join("nginx.conf"), config).unwrap();
    let mut command = require::command("nginx");
    command.arg("-p").arg(directory).args(["-c", "nginx.conf", "-e", "stderr"]);
    command
}

/// HAProxy in the foreground.
fn haproxy(directory: &Path, config: &str) -> Command {
    let file = directory.join("haproxy.cfg");
    fs::write(&file, format!("global\n    log stdout format raw local0\n{HAPROXY_DEFAULTS}{config}"))
        .unwrap();
    let mut command = require::command("haproxy");
    command.arg("-db").arg("-f").arg(file);
    command
}

/// Waits until a program in a namespace accepts connections at a port.
#[track_caller]
fn wait_for_port(namespace: &Namespace, process: &Process, port: u16) {
    let address = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port);
    while namespace.run(|| TcpStream::connect(address)).is_err() {
        assert!(process.is_running());
        thread::yield_now();
    }
}

/// The pages in the container: nginx at port 80, HAProxy at port 81.
struct Pages {
    topology: Topology,
    directory: TempDir,
    _programs: [Process; 2],
}

impl Pages {
    fn start() -> Self {
        let topology = Topology::new();
        let directory = tempfile::Builder::new().prefix("rproxy-pages-").tempdir().unwrap();
        let programs = [nginx(directory.path(), NGINX), haproxy(directory.path(), HAPROXY)];
        let programs = programs.map(|command| topology.container.spawn(command));
        for (program, port) in programs.iter().zip([80, 81]) {
            wait_for_port(&topology.container, program, port);
        }
        Self { topology, directory, _programs: programs }
    }

    /// A directory for another program.
    fn directory(&self, name: &str) -> std::path::PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Checks that clients of a port of the host find themselves on the page, over IPv4 and IPv6.
    #[track_caller]
    fn assert_tells(&self, port: u16) {
        static LOCAL_PORT: AtomicU16 = AtomicU16::new(20_000);

        let pairs: [(IpAddr, IpAddr); 2] =
            [(CLIENT_V4.into(), HOST_V4.into()), (CLIENT_V6.into(), HOST_V6.into())];
        for (client, host) in pairs {
            let local = LOCAL_PORT.fetch_add(1, Ordering::Relaxed);
            let url = format!("http://{}/", SocketAddr::new(host, port));
            let curl = format!("curl --silent --show-error --max-time 20 --local-port {local} {url}");
            let page = self.topology.client.command(&curl).success();
            assert_eq!(page, format!("{client} {local} {host} {port}"), "{url}");
        }
    }
}

fn receivers() {
    let pages = Pages::start();
    for version in ["v1", "v2"] {
        let mut arguments = vec!["--send-proxy".to_owned(), version.to_owned()];
        let backends =
            [IpAddr::from(CONTAINER_V4), CONTAINER_V6.into()].map(|ip| [80, 81].map(|port| (ip, port)));
        for ((ip, port), number) in backends.concat().into_iter().zip(8080..) {
            let to = SocketAddr::new(ip, port);
            arguments.extend([
                "--host".to_owned(),
                format!("[::]:{number}"),
                "--to".to_owned(),
                to.to_string(),
            ]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let _proxy = Standalone::start_in(&pages.topology.host, &arguments);
        (8080..8084).for_each(|port| pages.assert_tells(port));
    }
}

/// A relay on the host that believes proxies on the host, and tells the pages.
fn behind(pages: &Pages, version: &str) -> Standalone {
    let to = SocketAddr::from((CONTAINER_V4, 80)).to_string();
    let options =
        ["--accept-proxy", "127.0.0.0/8", "--send-proxy", version, "--host", "127.0.0.1:8080", "--to", &to];
    Standalone::start_in(&pages.topology.host, &options)
}

fn senders() {
    let pages = Pages::start();
    let haproxy = haproxy(
        &pages.directory("haproxy"),
        "
    listen one
        mode tcp
        bind :::91 v4v6
        server next 127.0.0.1:8080 send-proxy
    listen two
        mode tcp
        bind :::92 v4v6
        server next 127.0.0.1:8080 send-proxy-v2
    listen tlvs
        mode http
        unique-id-format %{+X}o\\ %ci:%cp_%fi:%fp_%Ts_%rt:%pid
        bind :::93 v4v6
        server next 127.0.0.1:8080 send-proxy-v2 proxy-v2-options crc32c,unique-id
",
    );
    assert!(
        Path::new(STREAM_MODULE).exists(),
        "libnginx-mod-stream is not installed (tests/run installs it)"
    );
    let nginx = nginx(
        &pages.directory("nginx"),
        &format!(
            "load_module {STREAM_MODULE};
            stream {{
                server {{ listen 94; listen [::]:94; proxy_pass 127.0.0.1:8080; proxy_protocol on; }}
            }}"
        ),
    );
    let host = &pages.topology.host;
    let programs = [haproxy, nginx].map(|command| host.spawn(command));
    let [one, two] = [("v1", "[::]:95"), ("v2", "[::]:96")].map(|(version, front)| {
        Standalone::start_in(host, &["--send-proxy", version, "--host", front, "--to", "127.0.0.1:8080"])
    });
    for (program, port) in programs.iter().zip([91, 94]) {
        wait_for_port(host, program, port);
    }
    for version in ["v1", "v2"] {
        let _behind = behind(&pages, version);
        (91..=96).for_each(|port| pages.assert_tells(port));
    }
    drop((one, two));
}

/// Its checks are connections of its own (`LOCAL`).
fn checks() {
    let pages = Pages::start();
    let _behind = behind(&pages, "v2");
    let haproxy = haproxy(
        &pages.directory("haproxy"),
        "
    listen checked
        mode http
        bind :::91 v4v6
        option log-health-checks
        log global
        option httpchk GET /
        http-check expect rstring ^127\\.0\\.0\\.1\\ [0-9]+\\ 127\\.0\\.0\\.1\\ 8080$
        server next 127.0.0.1:8080 check inter 100ms fall 1 rise 1 send-proxy-v2 check-send-proxy
",
    );
    let haproxy = pages.topology.host.spawn(haproxy);
    let told = haproxy.wait_for_line(Stream::Stdout, |line| line.contains("Health check"));
    assert!(told.contains("checked/next succeeded"), "{told}");
    pages.assert_tells(91);
}
