//! Debian's nginx in a container, published by `rproxy` on the host, and used by curl on another host.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, TcpStream};
use std::path::Path;
use std::thread;

use tempfile::TempDir;

use testkit::pattern::Pattern;
use testkit::process::{Output, Process};
use testkit::require::{self, Need};
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::{CONTAINER_V4, HOST_V4, HOST_V6, Topology};

const NEEDS: &[Need] =
    &[Need::Root, Need::Ipv6, Need::Program("ip"), Need::Program("nginx"), Need::Program("curl")];

const PAGE: &str = "Welcome to the container\n";

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(NEEDS);
    vec![
        case("the page, over IPv4 and IPv6", page),
        case("only what is published is reachable", only_what_is_published),
        case("a keep-alive connection is used again", keep_alive),
        case("fifty requests at once", fifty_at_once),
        case("100 MB are downloaded whole", large_file),
        case("100 MB are uploaded whole", large_upload),
    ]
}

/// nginx in the container of the standard topology, and `rproxy` on the host.
struct Site {
    topology: Topology,
    directory: TempDir,
    _nginx: Process,
    _proxy: Standalone,
}

impl Site {
    fn publish() -> Self {
        let topology = Topology::new();
        let directory = tempfile::Builder::new().prefix("rproxy-nginx-").tempdir().unwrap();
        let nginx = topology.container.spawn(nginx(directory.path()));
        while topology.host.run(|| TcpStream::connect((CONTAINER_V4, 80))).is_err() {
            assert!(nginx.is_running());
            thread::yield_now();
        }
        let target = format!("{CONTAINER_V4}:80");
        let proxy = Standalone::start_in(&topology.host, &["--host", "[::]:80", "--to", &target]);
        Self { topology, directory, _nginx: nginx, _proxy: proxy }
    }

    /// Runs curl with blank-separated arguments on the outside host.
    fn curl(&self, arguments: &str) -> Output {
        self.topology.client.command(&format!("curl --silent --show-error --max-time 20 {arguments}"))
    }
}

/// nginx in the foreground, as a single process, with all of its files in one directory.
fn nginx(directory: &Path) -> std::process::Command {
    fs::create_dir(directory.join("www")).unwrap();
    fs::write(directory.join("www/index.html"), PAGE).unwrap();
    let config = "daemon off;
        master_process off;
        user root;
        pid nginx.pid;
        error_log stderr;
        events {}
        http {
            access_log off;
            client_body_temp_path body;
            client_max_body_size 0;
            server {
                listen 80;
                listen [::]:80;
                root www;
                location /upload/ { dav_methods PUT; root taken; create_full_put_path on; }
            }
        }";
    fs::write(directory.join("nginx.conf"), config).unwrap();
    let mut command = require::command("nginx");
    command.arg("-p").arg(directory).args(["-c", "nginx.conf", "-e", "stderr"]);
    command
}

fn urls() -> [String; 2] {
    [format!("http://{HOST_V4}/"), format!("http://[{HOST_V6}]/")]
}

fn page() {
    let site = Site::publish();
    for url in urls() {
        assert_eq!(site.curl(&url).success(), PAGE);
        let head = site.curl(&format!("--head {url}")).success();
        assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("Server: nginx"), "{head}");
    }
}

fn only_what_is_published() {
    let site = Site::publish();
    let refused = 7;
    assert_eq!(site.curl(&format!("http://{HOST_V4}:81/")).status.code(), Some(refused));
    let container = IpAddr::from(CONTAINER_V4);
    assert!(!site.curl(&format!("http://{container}/")).status.success());
}

fn keep_alive() {
    let site = Site::publish();
    for url in urls() {
        let connects = site.curl(&format!("--write-out %{{num_connects}} {url} {url} {url}")).success();
        assert_eq!(connects, format!("{PAGE}1{PAGE}0{PAGE}0"));
    }
}

fn fifty_at_once() {
    let site = Site::publish();
    let [v4, v6] = urls().map(|url| format!("{url}?[1-25]"));
    let all = site.curl(&format!("--parallel --parallel-immediate --parallel-max 50 {v4} --next {v6}"));
    assert_eq!(all.success(), PAGE.repeat(50));
}

fn write_large_file(path: &Path) {
    let mut file = File::create(path).unwrap();
    io::copy(&mut Pattern::new(1).take(100_000_000), &mut file).unwrap();
}

fn checksum(path: &Path) -> String {
    let mut sum = require::command("sha256sum");
    sum.stdin(File::open(path).unwrap());
    String::from_utf8(sum.output().unwrap().stdout).unwrap()
}

fn large_file() {
    let site = Site::publish();
    let file = site.directory.path().join("www/large");
    write_large_file(&file);
    for (url, name) in urls().iter().zip(["v4", "v6"]) {
        let copy = site.directory.path().join(name);
        site.curl(&format!("{url}large --output {}", copy.display())).success();
        assert_eq!(checksum(&copy), checksum(&file));
    }
}

fn large_upload() {
    let site = Site::publish();
    let file = site.directory.path().join("large");
    write_large_file(&file);
    for (url, name) in urls().iter().zip(["v4", "v6"]) {
        site.curl(&format!("--upload-file {} {url}upload/{name}", file.display())).success();
        let taken = site.directory.path().join("taken/upload").join(name);
        assert_eq!(checksum(&taken), checksum(&file));
    }
}
