//! Attached ports in the configuration file and at the control socket.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use nix::sys::signal::Signal;
use rproxy_shim::message::Reason;
use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::process::{self, Output, Process, Stream};
use testkit::rproxy;
use testkit::shim::{Reply, Shim};
use testkit::suite::Case;
use testkit::{eventually, require, udp};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("list and stats show where they are from", shown),
        case("what is listed can be applied, and leaves them alone", listed_can_be_applied),
        case("changes by clients are refused with the reason", changes_are_refused),
        case("the names of attached ports are for nothing else", reserved_names),
        case("a configuration has their limits, and a reload changes them", reload),
        case("a reload does not switch attaching on or off, or change the name", fixed_at_start),
        case("the command line takes precedence", command_line),
        case("check-config and --print-config know them", printed),
        case("ctl apply says that it applies only mappings", applied_by_ctl),
    ]
}

/// An abstract name that no other case uses, as each runs in a process of its own.
fn own_name() -> String {
    format!("rproxy-suite-{}", std::process::id())
}

/// A TCP port that a shim has attached.
struct Port {
    shim: Shim,
    address: SocketAddr,
    _listener: TcpListener,
}

impl Port {
    #[track_caller]
    fn attach(name: &str, backend: SocketAddr) -> Self {
        let listener = TcpListener::bind(own_address()).unwrap();
        let shim = Shim::connect(name).unwrap();
        assert_eq!(shim.attach_tcp(&listener, backend), Reply::Serving);
        Self { shim, address: listener.local_addr().unwrap(), _listener: listener }
    }

    fn name(&self) -> String {
        format!("docker/tcp/{}", self.address)
    }
}

#[track_caller]
fn attaching() -> (Controlled, String) {
    let name = own_name();
    (Controlled::start(&[&format!("--attach={name}")]), name)
}

/// The entry called `name` in the answer to `list` or `stats`.
#[track_caller]
fn entry(proxy: &Controlled, what: &str, name: &str) -> Value {
    let answer = proxy.json(&[what]);
    let found = answer["mappings"].as_array().unwrap().iter().find(|entry| entry["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {answer}")).clone()
}

fn shown() {
    let backend = TcpBackend::echo();
    let (proxy, name) = attaching();
    let port = Port::attach(&name, backend.address());
    let dns = udp::bind(own_address());
    let of_dns = Shim::connect(&name).unwrap();
    assert_eq!(of_dns.attach_udp(&dns, "192.0.2.1:53".parse().unwrap()), Reply::Serving);
    let web = own_address();
    proxy.apply(&[mapping("web", "tcp", web, backend.address())]).success();
    client::assert_echoes(port.address);

    let own = std::process::id();
    let names = [port.name(), format!("docker/udp/{}", udp::address(&dns))];
    for (name, to) in names.iter().zip([backend.address(), "192.0.2.1:53".parse().unwrap()]) {
        for what in ["list", "stats"] {
            let entry = entry(&proxy, what, name);
            assert_eq!((&entry["origin"], &entry["process"]), (&json!("docker"), &json!(own)), "{entry}");
        }
        let listed = entry(&proxy, "list", name);
        assert_eq!((&listed["to"], &listed["to_ports"]), (&json!(to.ip()), &json!(to.port().to_string())));
    }
    for what in ["list", "stats"] {
        let requested = entry(&proxy, what, "web");
        assert_eq!((&requested["origin"], &requested["process"]), (&Value::Null, &Value::Null));
        let table = proxy.ctl(&[what]).success();
        assert!(table.lines().next().unwrap().contains("ORIGIN"), "{table}");
        let row = table.lines().find(|line| line.starts_with(&port.name())).unwrap();
        assert!(row.contains(&format!("docker, process {own}")), "{table}");
    }
    assert_eq!(proxy.stats(&port.name())["connections_total"], 1);
    assert_eq!(port.shim.detach(Reason::Unpublished), Reply::Detached);
    drop(of_dns);
    eventually("neither is listed", || proxy.json(&["list"])["mappings"].as_array().unwrap().len() == 1);
    assert!(!proxy.ctl(&["list"]).success().contains("ORIGIN"));
}

/// Runs `rproxy ctl list` with `format`, and `rproxy ctl apply -` on its output.
#[track_caller]
fn list_and_apply(proxy: &Controlled, format: &str) -> Value {
    let script = "set -e; \"$1\" ctl --control \"$2\" list \"$3\" >\"$2.list\"; \
                  \"$1\" ctl --json --control \"$2\" apply - <\"$2.list\"";
    let mut command = require::command("sh");
    command.args(["-c", script, "sh"]).arg(rproxy::rproxy()).arg(proxy.socket()).arg(format);
    serde_json::from_str(&process::run(command).success()).unwrap()
}

fn listed_can_be_applied() {
    let backend = TcpBackend::echo();
    let (proxy, name) = attaching();
    let port = Port::attach(&name, backend.address());
    let connection = client::patient(std::net::TcpStream::connect(port.address).unwrap());
    client::ping(&connection);
    let before = entry(&proxy, "list", &port.name());
    for mappings in [&[][..], &[mapping("web", "tcp", own_address(), backend.address())]] {
        proxy.apply(mappings).success();
        for format in ["--json", "--toml"] {
            let unchanged = json!({ "added": 0, "changed": 0, "removed": 0, "unchanged": mappings.len() });
            assert_eq!(list_and_apply(&proxy, format), unchanged, "{format}");
            assert_eq!(entry(&proxy, "list", &port.name()), before);
        }
        let list = proxy.json(&["list"])["mappings"].take();
        let answer = proxy.connect().ask(&json!({ "v": 1, "do": { "apply": { "mappings": list } } }));
        assert_eq!(answer["ok"]["unchanged"], mappings.len(), "{answer}");
    }
    client::ping(&connection);
    client::assert_echoes(port.address);
    // A list that was saved before the port was unpublished.
    let saved = proxy.file("saved.json", &proxy.json(&["list"]).to_string());
    assert_eq!(port.shim.detach(Reason::Unpublished), Reply::Detached);
    let applied = proxy.json(&["apply", saved.to_str().unwrap()]);
    assert_eq!(applied, json!({ "added": 0, "changed": 0, "removed": 0, "unchanged": 1 }));
}

fn changes_are_refused() {
    let backend = TcpBackend::echo();
    let (proxy, name) = attaching();
    let port = Port::attach(&name, backend.address());
    let reason = format!(
        "{} was attached by process {}, and is served until that ends; stop the container",
        port.name(),
        std::process::id()
    );
    let its = mapping(&port.name(), "tcp", own_address(), backend.address());
    let requests = [
        json!({ "remove": { "name": port.name() } }),
        json!({ "retarget": { "name": port.name(), "to": "192.0.2.1:80" } }),
        json!({ "add": { "mappings": [its] } }),
        json!({ "apply": { "mappings": [its] } }),
    ];
    for request in requests {
        let answer = proxy.connect().ask(&json!({ "v": 1, "do": request }));
        assert_eq!(
            answer["error"],
            json!({ "kind": "attached", "message": reason, "mapping": port.name() }),
            "{request}"
        );
    }
    for arguments in [&["remove", &port.name()][..], &["retarget", &port.name(), "--to", "192.0.2.1:80"]] {
        let output = proxy.ctl(arguments);
        assert_eq!((output.status.code(), output.stderr), (Some(1), format!("rproxy: {reason}\n")));
    }
    // Its port cannot be had under another name either.
    let taken = mapping("web", "tcp", port.address, backend.address());
    let answer = proxy.connect().ask(&json!({ "v": 1, "do": { "add": { "mappings": [taken] } } }));
    assert_eq!(answer["error"]["kind"], "overlap", "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains(&port.name()), "{answer}");
    client::assert_echoes(port.address);
}

fn reserved_names() {
    let (proxy, _name) = attaching();
    let name = "docker/tcp/0.0.0.0:80";
    let reserved = "names that start with docker/ are those of attached ports; choose another";
    let its = mapping(name, "tcp", own_address(), "192.0.2.1:80".parse().unwrap());
    for how in ["add", "apply"] {
        let answer = proxy.connect().ask(&json!({ "v": 1, "do": { how: { "mappings": [its] } } }));
        assert_eq!(answer["error"]["kind"], "bad_request");
        assert!(answer["error"]["message"].as_str().unwrap().ends_with(reserved), "{answer}");
    }
    let flags = ["--host", "127.0.0.1:0", "--to", "192.0.2.1:80", "--name", name];
    for output in [proxy.ctl(&[&["add"][..], &flags].concat()), process::run(rproxy::command(&flags))] {
        assert_eq!(output.status.code(), Some(2), "{output:#?}");
        assert!(output.stderr.contains(reserved) && output.stderr.lines().count() == 1, "{output:#?}");
    }
    for arguments in [&["remove", name][..], &["retarget", name, "--to", "192.0.2.1:80"]] {
        let output = proxy.ctl(arguments);
        assert!(output.stderr.contains("there is no mapping docker/tcp/0.0.0.0:80"), "{output:#?}");
    }
}

/// An `rproxy` with a configuration and a control socket.
struct Configured {
    proxy: Controlled,
    file: PathBuf,
    _dir: TempDir,
}

impl Configured {
    #[track_caller]
    fn start(text: &str, more_arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rproxy.toml");
        fs::write(&file, text).unwrap();
        let config = ["--config", file.to_str().unwrap()];
        let proxy = Controlled::start(&[&config, more_arguments].concat());
        Self { proxy, file, _dir: dir }
    }

    #[track_caller]
    fn reload(&self, text: &str) -> &Process {
        fs::write(&self.file, text).unwrap();
        self.proxy.process.signal(Signal::SIGHUP);
        &self.proxy.process
    }

    #[track_caller]
    fn reload_to(&self, text: &str, says: &str) {
        self.reload(text).wait_for_line(Stream::Stderr, |line| line.contains(says));
    }

    /// The limits with which a port is served.
    #[track_caller]
    fn limits(&self, port: &Port) -> Value {
        entry(&self.proxy, "list", &port.name())["limits"].clone()
    }
}

fn reload() {
    let backend = TcpBackend::echo();
    let name = own_name();
    let attach = |more: &str| format!("[attach]\nname = '{name}'\n{more}\n");
    let defaults = "[defaults]\nidle_timeout = '1h'\nudp_timeout = '5s'\n";
    let served =
        Configured::start(&format!("{}{defaults}", attach("max_connections = 7\nidle_timeout = '2h'")), &[]);
    let before = Port::attach(&name, backend.address());
    assert_eq!(
        served.limits(&before),
        json!({ "idle_timeout": "2h", "udp_timeout": "5s", "max_connections": 7 })
    );
    let connection = client::patient(std::net::TcpStream::connect(before.address).unwrap());
    client::ping(&connection);

    let denied = attach("max_connections = 8\ndeny = ['192.0.2.0/24']");
    served.reload_to(&format!("{denied}{defaults}"), "added=0 changed=1 removed=0 unchanged=0");
    let expected = json!({
        "idle_timeout": "1h", "udp_timeout": "5s", "max_connections": 8, "deny": ["192.0.2.0/24"],
    });
    let after = Port::attach(&name, backend.address());
    for port in [&before, &after] {
        assert_eq!(served.limits(port), expected);
        client::assert_echoes(port.address);
    }
    client::ping(&connection);

    // Without a limit of its own, a port has an eighth of the descriptors.
    served.proxy.process.limit_descriptors(4096);
    served.reload_to(&attach(""), "added=0 changed=2 removed=0 unchanged=0");
    assert_eq!(served.limits(&before), json!({ "max_connections": 512 }));
    assert_eq!(served.limits(&before), served.limits(&after));

    // If one part cannot be done, the other is not done either.
    let taken = TcpListener::bind(own_address()).unwrap();
    let web = format!("[[mapping]]\nhost = '{}'\nto = '192.0.2.1:80'\n", taken.local_addr().unwrap());
    served.reload_to(&format!("{}{web}", attach("max_connections = 9")), "port is taken; `ss");
    assert_eq!(served.limits(&before), json!({ "max_connections": 512 }));
    client::ping(&connection);
}

fn fixed_at_start() {
    let backend = TcpBackend::echo();
    let name = own_name();
    let web =
        format!("[[mapping]]\nname = 'web'\nhost = '{}'\nto = '{}'\n", own_address(), backend.address());
    let on = format!("attach = {{ name = '{name}' }}\n{web}");
    let served = Configured::start(&on, &[]);
    let port = Port::attach(&name, backend.address());
    let other = on.replace(&name, "another-name");
    let unchanged = |served: &Configured| {
        let list = served.proxy.json(&["list"]);
        list["mappings"].as_array().unwrap().iter().all(|entry| entry["limits"]["idle_timeout"].is_null())
    };
    for (text, key, way_out) in [
        (format!("{web}idle_timeout = '9m'\n"), "attach: ", "restart rproxy to stop"),
        (format!("attach = false\n{web}idle_timeout = '9m'\n"), "attach: ", "restart rproxy to stop"),
        (
            format!("{other}idle_timeout = '9m'\n"),
            "attach.name: ",
            "restart rproxy to change it to another-name",
        ),
    ] {
        let process = served.reload(&text);
        let line = process.wait_for_line(Stream::Stderr, |line| line.contains(way_out));
        assert!(line.contains("not reloaded; nothing has changed") && line.contains(key), "{line}");
        assert!(unchanged(&served), "{text}");
        client::assert_echoes(port.address);
    }
    served.reload_to(&on, "added=0 changed=0 removed=0 unchanged=1");
    drop((served, port));

    let without = Configured::start(&web.replace("name = 'web'", ""), &[]);
    let way_out = "restart rproxy to serve attached ports";
    let on = on.replace(&name, "another-name").replace("name = 'web'", "idle_timeout = '9m'");
    let line = without.reload(&on).wait_for_line(Stream::Stderr, |line| line.contains(way_out));
    assert!(line.contains("not reloaded; nothing has changed") && line.contains("attach: "), "{line}");
    assert!(unchanged(&without));
    Shim::connect("another-name").err().unwrap();
}

fn command_line() {
    let backend = TcpBackend::echo();
    let name = own_name();
    let attach = format!("--attach={name}");
    let of_file = format!("{name}-of-the-file");
    let limits = "idle_timeout = '1h'\nmax_connections = 7\n";
    let expected = json!({ "idle_timeout": "1h", "max_connections": 7 });
    let named = format!("[attach]\nname = '{of_file}'\n{limits}");
    let served = Configured::start(&named, &[&attach]);
    let port = Port::attach(&name, backend.address());
    assert_eq!(served.limits(&port), expected);
    Shim::connect(&of_file).err().unwrap();
    // The file may say something else about the name.
    served.reload_to(&named.replace(&of_file, "x"), "added=0 changed=0 removed=0 unchanged=0");
    drop((served, port));

    // Defaults hold for attached ports, whoever switches them on.
    let defaults = format!("mapping = []\n[defaults]\n{limits}");
    let served = Configured::start(&defaults, &[&attach]);
    let port = Port::attach(&name, backend.address());
    assert_eq!(served.limits(&port), expected);
    served.reload_to(&format!("attach = false\n{defaults}"), "added=0 changed=0 removed=0 unchanged=0");
    assert_eq!(served.limits(&port), expected);
}

/// Runs `rproxy` with the arguments, in which FILE is one with this text.
#[track_caller]
fn run_with(text: &str, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let words: Vec<&str> = arguments.iter().map(|word| if *word == "FILE" { file } else { word }).collect();
    process::run(rproxy::command(&words))
}

fn printed() {
    let by_flags =
        ["--attach=a \"name\"", "--idle-timeout", "1h", "--deny", "192.0.2.0/24", "--print-config"];
    let text = process::run(rproxy::command(&by_flags)).success();
    assert_eq!(
        text,
        "[attach]\nname = \"a \\\"name\\\"\"\nidle_timeout = \"1h\"\ndeny = [\"192.0.2.0/24\"]\n"
    );
    assert_eq!(run_with(&text, &["--config", "FILE", "--print-config"]).success(), text);
    assert_eq!(run_with(&text, &["check-config", "FILE"]).success(), "ok\n");
    // The defaults are part of it, and the name of the command line.
    let file = "attach = true\n[defaults]\nidle_timeout = '1h'\n[[mapping]]\nhost = '[::]:80'\nto = '192.0.2.1:80'\n";
    let mapping = "[[mapping]]\nhost = \"[::]:80\"\nto = \"192.0.2.1:80\"\nidle_timeout = \"1h\"\n";
    for (name, expected) in [
        ("--attach", "[attach]\nidle_timeout = \"1h\"\n\n"),
        ("--attach=x", "[attach]\nname = \"x\"\nidle_timeout = \"1h\"\n\n"),
    ] {
        let printed = run_with(file, &["--config", "FILE", name, "--print-config"]).success();
        assert_eq!(printed, format!("{expected}{mapping}"));
    }
    let wrong = run_with("[attach]\nname = ''\nidle = 1\n", &["check-config", "FILE"]);
    assert_eq!(wrong.status.code(), Some(1));
    let places: Vec<&str> =
        wrong.stderr.lines().filter_map(|line| line.split("rproxy.toml:").nth(1)).collect();
    assert!(
        places[0].starts_with("2:8: name: the name is empty; leave it out for the default"),
        "{places:?}"
    );
    assert!(places[1].starts_with("3:1: unknown key `idle`"), "{places:?}");
}

fn applied_by_ctl() {
    let backend = TcpBackend::echo();
    let (proxy, name) = attaching();
    let port = Port::attach(&name, backend.address());
    let before = entry(&proxy, "list", &port.name());
    let address = own_address();
    let web = format!("[[mapping]]\nhost = '{address}'\nto = '{}'\n", backend.address());
    for (text, notes) in [
        (format!("[attach]\nname = 'x'\nidle_timeout = '1m'\n{web}"), 1),
        (format!("attach = true\n{web}"), 1),
        (format!("attach = false\n{web}"), 0),
        (web.clone(), 0),
    ] {
        let file = proxy.file("attach.toml", &text);
        let output = proxy.ctl(&["apply", file.to_str().unwrap()]);
        assert_eq!(output.stderr.matches("attach is not applied").count(), notes, "{output:#?}");
        assert_eq!(output.stderr.lines().count(), notes, "{output:#?}");
        output.success();
        client::assert_echoes(address);
        assert_eq!(entry(&proxy, "list", &port.name()), before);
    }
    client::assert_echoes(port.address);
}
