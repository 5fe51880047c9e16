//! The story as its transcripts show it: S1 to S17.

use std::time::Duration;

use netns_setup::observe;
use nix::sys::signal::Signal;
use serde_json::Value;
use testkit::netns::Namespace;
use testkit::process::{Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CONTAINER_V4, HOST_V4, HOST_V6};

use super::stage::{Backend, Stage, assert_out_of_reach, assert_same, case, for_each_firewall, serve};

pub(crate) fn cases() -> Vec<Case> {
    let nginx = &[Need::Program("nginx"), Need::Program("curl")];
    let mut cases = for_each_firewall("the demonstration", demonstration);
    cases.extend([
        case("an interrupted demonstration cleans up", interrupted_demonstration),
        case("a container has the story's interface", interface),
        case("addresses come in order and are not reused at once", addresses_in_order),
        case("brctl shows one bridge with a veth for each container", bridge)
            .needs(&[Need::Program("brctl")]),
        case("a published port is one dual-stack socket", dual_stack_socket).needs(&[Need::Program("ss")]),
        case("every form of -p", every_form),
        case("inspect has Docker's shape", inspect_shape),
        case("curl -I gets nginx", curl_gets_nginx).needs(nginx),
        case("nothing is reachable without a mapping", nothing_without_mapping),
        case("running twice changes nothing", twice),
        case("packets inside the host are large", big_tcp),
        case("a container is found by its process", by_process),
        case("a host that learns its routes is warned", router_advertisements)
            .needs(&[Need::Program("sysctl")]),
    ]);
    cases
}

fn demonstration(stage: &Stage, backend: Backend) {
    let before = stage.dump();
    let shown = stage.ok(&format!("demo {}", backend.option()));
    for part in [
        "outside, IPv4                        http://10.0.0.11:80/  HTTP/1.0 200 OK: hello from the container, 10.0.0.12",
        "outside, IPv6                        http://[fd00:10::11]:80/  HTTP/1.0 200 OK",
        "loopback, IPv6                       http://[::1]:80/  HTTP/1.0 200 OK",
        "hairpin                              http://10.0.0.11:80/  HTTP/1.0 200 OK",
        "container to outside                 http://10.0.0.12:8000/  HTTP/1.0 200 OK: hello from outside, 10.0.0.11",
        "http://172.17.0.2:80/  closed, as it should be",
        "outside, as the client               http://10.0.0.11:8080/  HTTP/1.0 200 OK: hello from the container, 10.0.0.12",
        "everything that netns-setup created is removed",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    assert_same(&stage.dump(), &before, "demo");
}

fn interrupted_demonstration(stage: &Stage) {
    let before = stage.dump();
    let mut command = std::process::Command::new(netns_setup());
    command.arg("demo");
    let demo = stage.host.spawn(command);
    demo.wait_for_line(Stream::Stdout, |line| line.starts_with("*:80/tcp -> 172.17.0.2:80"));
    let supervisors = children(&demo.pid().to_string(), "netns-setup\n");
    assert_eq!(supervisors.len(), 1, "one supervisor runs: {supervisors:?}");
    let relays = children(&supervisors[0], "rproxy\n");
    assert_eq!(relays.len(), 1, "one relay runs: {relays:?}");
    demo.signal(Signal::SIGINT);
    let output = demo.into_output();
    assert_eq!(output.status.code(), Some(130), "{output:#?}");
    assert!(output.stdout.contains("everything that netns-setup created is removed"), "{output:#?}");
    assert!(!std::path::Path::new(&format!("/proc/{}", relays[0])).exists(), "the relay goes on");
    assert_same(&stage.dump(), &before, "demo");
}

/// The children of a process that are called `name`.
fn children(parent: &str, name: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).unwrap();
    let children = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap());
    let all = children.flat_map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let is_called =
        |pid: &String| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == name);
    all.filter(is_called).collect()
}

fn interface(stage: &Stage) {
    stage.ok("up");
    assert_eq!(stage.ok("attach web"), "172.17.0.2\n");
    let address: Value = serde_json::from_str(&stage.host("ip -n web -j address show dev eth0")).unwrap();
    let eth0 = &address[0];
    assert_eq!(eth0["address"], "02:42:ac:11:00:02");
    assert_eq!(eth0["mtu"], 1500);
    assert_eq!(eth0["addr_info"][0]["local"], "172.17.0.2");
    assert_eq!(eth0["addr_info"][0]["prefixlen"], 16);
    assert_eq!(eth0["addr_info"][0]["broadcast"], "172.17.255.255");
    assert!(stage.host("ip -n web link show dev lo").contains(",UP"));
    let routes = stage.host("ip -n web route");
    assert!(routes.contains("default via 172.17.0.1 dev eth0"), "{routes}");
    assert!(stage.host("ip netns list").contains("web"));
    stage.ok("detach web");
    assert!(!stage.host("ip netns list").contains("web"));
}

fn addresses_in_order(stage: &Stage) {
    stage.ok("up --subnet 172.17.0.0/29");
    for (name, ip) in [("a", 2), ("b", 3), ("c", 4)] {
        assert_eq!(stage.ok(&format!("attach {name}")), format!("172.17.0.{ip}\n"));
    }
    stage.ok("detach a");
    assert_eq!(stage.ok("attach d"), "172.17.0.5\n");
    assert_eq!(stage.ok("attach e --ip 172.17.0.2"), "172.17.0.2\n");
    assert_eq!(stage.ok("attach f"), "172.17.0.6\n");
    let (code, message) = stage.fails("attach g");
    assert_eq!(code, 1);
    assert!(message.contains("no free address in 172.17.0.0/29"), "{message}");
    stage.ok("detach b");
    assert_eq!(stage.ok("attach g"), "172.17.0.3\n");
}

fn bridge(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    stage.ok("attach db");
    let shown = stage.host("brctl show");
    let lines: Vec<Vec<&str>> = shown.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..3], ["docker0", "8000.0242ac110001", "no"], "{shown}");
    let ports = [lines[0][3], lines[1][0]];
    assert!(ports.iter().all(|port| port.starts_with("veth") && port.len() == 11), "{shown}");
    assert_eq!(lines.len(), 2, "{shown}");
}

fn dual_stack_socket(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80");
    let shown = stage.host("ss -Hlntp");
    let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 1, "{shown}");
    assert_eq!(lines[0][3], "*:80", "both families: {shown}");
    assert!(lines[0][5].contains("\"rproxy\""), "{shown}");
    for ip in [
        [127, 0, 0, 1].into(),
        HOST_V4.into(),
        HOST_V6.into(),
        std::net::IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    ] {
        super::stage::assert_reaches(&stage.host, ip, 80);
    }
}

fn every_form(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _servers = [80, 81, 443].map(|port| serve(&web, port));
    let printed =
        stage.ok("publish web -p 80:80 -p 443:443 -p 10.0.0.11:81:80 -p 10.0.0.11::80 -p 8000-8001:80-81");
    let ports: Vec<&str> = printed.lines().map(|line| line.split(" -> ").next().unwrap()).collect();
    assert_eq!(ports[..3], ["*:80/tcp", "*:443/tcp", "10.0.0.11:81/tcp"]);
    assert_eq!(ports[4..], ["*:8000/tcp", "*:8001/tcp"]);
    let random: u16 =
        ports[3].strip_prefix("10.0.0.11:").unwrap().strip_suffix("/tcp").unwrap().parse().unwrap();
    for port in [80, 443, 81, random, 8000, 8001] {
        super::stage::assert_reaches(&stage.client, HOST_V4, port);
    }
    assert_out_of_reach(&stage.host, [127, 0, 0, 1], 81);
    let list: Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    assert_eq!(list[0]["mappings"].as_array().unwrap().len(), 6);

    stage.ok("unpublish web -p 80:80 -p 8000-8001:80-81");
    assert_out_of_reach(&stage.client, HOST_V4, 80);
    super::stage::assert_reaches(&stage.client, HOST_V4, 443);

    stage.ok("attach exposing --expose 80 --expose 8080");
    let printed = stage.ok("publish exposing -P");
    assert_eq!(printed.lines().count(), 2, "{printed}");
    assert_eq!(stage.ok("publish exposing -P"), printed, "the second time changes nothing");
}

fn inspect_shape(stage: &Stage) {
    stage.ok("up --subnet6 fd00:d0c::/64");
    stage.ok("attach web");
    let text = stage.ok("inspect web");
    let shown: Value = serde_json::from_str(&text).unwrap();
    let bridge = &shown[0]["NetworkSettings"]["Networks"]["bridge"];
    let keys = [
        "IPAMConfig",
        "Links",
        "Aliases",
        "NetworkID",
        "EndpointID",
        "Gateway",
        "IPAddress",
        "IPPrefixLen",
        "IPv6Gateway",
        "GlobalIPv6Address",
        "GlobalIPv6PrefixLen",
        "MacAddress",
        "DriverOpts",
    ];
    assert_eq!(bridge.as_object().unwrap().len(), keys.len());
    let order = keys.map(|key| text.find(&format!("\"{key}\":")).unwrap());
    assert!(order.is_sorted(), "{text}");
    for id in ["NetworkID", "EndpointID"] {
        let id = bridge[id].as_str().unwrap();
        assert!(id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    }
    for nothing in ["IPAMConfig", "Links", "Aliases", "DriverOpts"] {
        assert!(bridge[nothing].is_null());
    }
    assert_eq!(bridge["Gateway"], "172.17.0.1");
    assert_eq!(bridge["IPAddress"], "172.17.0.2");
    assert_eq!(bridge["IPPrefixLen"], 16);
    assert_eq!(bridge["MacAddress"], "02:42:ac:11:00:02");
    assert_eq!(bridge["IPv6Gateway"], "fd00:d0c::1");
    assert_eq!(bridge["GlobalIPv6Address"], "fd00:d0c::2");
    assert_eq!(bridge["GlobalIPv6PrefixLen"], 64);
}

/// nginx, as the story's container runs it. In one process: killing a master would leave its workers behind.
fn nginx(namespace: &Namespace, dir: &std::path::Path) -> Process {
    let config = dir.join("nginx.conf");
    let dir = dir.display();
    let text = format!(
        "daemon off; master_process off; user root; pid {dir}/pid; error_log stderr notice; events {{}}\n\
         http {{ access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;\n\
         uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;\n\
         server {{ listen 80; listen [::]:80; location / {{ return 200 hello; }} }} }}\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut command = require::command("nginx");
    command.arg("-e").arg("stderr").arg("-c").arg(&config);
    let process = namespace.spawn(command);
    process.wait_for_line(Stream::Stderr, |line| line.contains("getrlimit(RLIMIT_NOFILE)"));
    process
}

fn curl_gets_nginx(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let dir = tempfile::tempdir().unwrap();
    let _nginx = nginx(&web, dir.path());
    stage.ok("publish web -p 80:80");
    let head =
        |from: &Namespace, url: &str| from.command(&format!("curl -sS -I --max-time 20 {url}")).success();
    for (from, url) in [
        (&stage.host, format!("http://{CONTAINER_V4}/")),
        (&stage.client, format!("http://{HOST_V4}/")),
        (&stage.client, format!("http://[{HOST_V6}]/")),
        (&stage.host, "http://127.0.0.1/".to_owned()),
        (&web, format!("http://{HOST_V4}/")),
    ] {
        let answer = head(from, &url);
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{url}: {answer}");
        assert!(answer.contains("Server: nginx"), "{url}: {answer}");
    }
}

fn nothing_without_mapping(stage: &Stage) {
    stage.ok("up --subnet6 fd00:d0c::/64");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    assert_out_of_reach(&stage.client, CONTAINER_V4, 80);
    assert_out_of_reach(&stage.client, [0xfd00, 0xd0c, 0, 0, 0, 0, 0, 2], 80);
    super::stage::assert_reaches(&stage.host, CONTAINER_V4, 80);
    let _outside = serve(&stage.client, 9000);
    super::stage::assert_reaches(&web, CLIENT_V4, 9000);
}

fn twice(stage: &Stage) {
    stage.ok("up");
    let first = stage.dump();
    let again: Value = serde_json::from_str(&stage.ok("up --json")).unwrap();
    assert_eq!(again["changed"], false);
    assert_eq!(again["steps"].as_array().unwrap().len(), 0);
    assert_same(&stage.dump(), &first, "after all");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    let once = stage.ok("publish web -p 80:80 -p 10.0.0.11::80");
    let published = stage.dump();
    assert_eq!(stage.ok("publish web -p 80:80 -p 10.0.0.11::80"), once);
    assert_same(&stage.dump(), &published, "after all");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    stage.ok("down");
    assert_eq!(stage.ok("down"), "nothing was up\n");
}

fn big_tcp(stage: &Stage) {
    const MIB: usize = 1 << 20;
    stage.ok("up --subnet6 fd00:d0c::/64");
    let web = stage.attach("web");
    let sizes = |links: &str, name: &str| {
        let links: Value = serde_json::from_str(links).unwrap();
        let link = links.as_array().unwrap().iter().find(|link| link["ifname"] == name).unwrap();
        // Those of IPv4 are not among what every ip(8) prints.
        ["gso_max_size", "gro_max_size"].map(|key| link[key].as_u64().unwrap())
    };
    let large = 524_280;
    let v4 = |namespace: &Namespace, name: &str| {
        let side = namespace.run(|| observe::side().unwrap());
        side.link(name).unwrap().offload.gso_ipv4.unwrap()
    };
    assert_eq!([v4(&web, "eth0"), v4(&stage.host, "docker0")], [524_280; 2]);
    assert_eq!(sizes(&web.ip("-j -d link"), "eth0"), [65_536, large]);
    assert_eq!(sizes(&stage.host("ip -j -d link"), "docker0"), [large; 2]);
    // Out through a device that takes 64 KiB at most: what leaves has to arrive whole.
    let payload: Vec<u8> = (0..32 * MIB).map(|at| u8::try_from(at % 251).unwrap()).collect();
    for outside in ["0.0.0.0:9000", "[fd00:10::12]:9001"] {
        let listener = stage.client.run(|| std::net::TcpListener::bind(outside).unwrap());
        let target = if outside.starts_with('[') { outside.to_owned() } else { format!("{CLIENT_V4}:9000") };
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut all = Vec::new();
                std::io::Read::read_to_end(&mut listener.accept().unwrap().0, &mut all).unwrap();
                all
            });
            let mut stream = web.run(|| std::net::TcpStream::connect(&target).unwrap());
            stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
            std::io::Write::write_all(&mut stream, &payload).unwrap();
            drop(stream);
            reader.join().unwrap()
        });
        assert!(received == payload, "{target}: {} of {} bytes", received.len(), payload.len());
    }
    // A packet that is too large to forward is not lost for good, but each one costs TCP a retransmission.
    let (v4, v6) = stage.host.run(too_large_to_forward);
    assert_eq!((v4, v6), (0, 0), "packets over the MTU, IPv4 and IPv6");
}

fn by_process(stage: &Stage) {
    stage.ok("up");
    let container = Namespace::new();
    let mut sleep = require::command("sleep");
    sleep.arg("1000");
    let process = container.spawn(sleep);
    assert_eq!(stage.ok(&format!("attach web --pid {}", process.pid())), "172.17.0.2\n");
    assert!(container.ip("address show dev eth0").contains("172.17.0.2/16"));
    let _server = serve(&container, 80);
    assert_eq!(stage.ok("publish web -p 80:80"), "*:80/tcp -> 172.17.0.2:80\n");
    super::stage::assert_reaches(&stage.client, [10, 0, 0, 11], 80);
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    stage.ok("detach web");
    assert!(!container.ip("link show").contains("eth0"), "the namespace is the process's, and stays");
    let (code, message) = stage.fails("attach web --pid 999999999");
    assert_eq!((code, message.lines().count()), (1, 1), "{message}");
}

fn router_advertisements(stage: &Stage) {
    stage.host("sysctl -qw net.ipv6.conf.eth0.accept_ra=1");
    stage.host.ip("-6 route add default via fd00:10::12 dev eth0");
    let output = stage.run("up --subnet6 fd00:d0c::/64");
    assert!(output.stderr.contains("set accept_ra of eth0 to 2"), "{output:#?}");
    assert!(output.status.success(), "{output:#?}");
}

/// How many packets the calling thread's namespace could not forward for their size (proc_net_snmp, `FragFails`).
fn too_large_to_forward() -> (u64, u64) {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let (snmp, snmp6) = (read("snmp"), read("snmp6"));
    // The names of the counters in one line, their values in the next.
    let mut ip = snmp.lines().filter(|line| line.starts_with("Ip:")).map(str::split_whitespace);
    let (names, values) = (ip.next().unwrap(), ip.next().unwrap());
    let v4 = names.zip(values).find(|(name, _)| *name == "FragFails").unwrap().1;
    let v6 = snmp6.lines().find_map(|line| line.strip_prefix("Ip6FragFails")).unwrap();
    (v4.parse().unwrap(), v6.trim().parse().unwrap())
}
