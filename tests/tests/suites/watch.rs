//! `rproxy ctl stats --watch`, on a terminal and elsewhere.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::process::{self, Process, Stream};
use testkit::require::Need;
use testkit::rproxy;
use testkit::suite::Case;
use testkit::terminal::Terminal;
use testkit::udp;
use testkit::{PATIENCE, eventually};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    let terminal = &[Need::Program("setsid")];
    vec![
        case("a terminal is redrawn in place, with rates", redrawn).needs(terminal).deadline(PATIENCE * 2),
        case("a terminal is used as far as it goes", fits).needs(terminal),
        case("a terminal is restored, whatever ends it", restored).needs(terminal).deadline(PATIENCE * 2),
        case("a terminal is restored while it is stopped", stopped).needs(terminal),
        case("a terminal shows that the server is gone, and the next one", another_server).needs(terminal),
        case("a server that does not answer holds up nothing", silent_server).needs(terminal),
        case("a terminal without control sequences gets tables", dumb).needs(terminal),
        case("a pipe gets tables, and lines of JSON with rates", piped),
        case("a pipe that nobody reads ends it", unread),
        case("a pipe gets what the next server says", another_server_piped),
        case("counters are sorted and filtered", sorted),
    ]
}

/// `rproxy ctl stats` with more arguments.
fn stats(proxy: &Controlled, more: &[&str]) -> Command {
    let socket = proxy.socket();
    rproxy::command(&[&["ctl", "--control", socket.to_str().unwrap(), "stats"], more].concat())
}

/// Mappings `m00`, `m01` and so on of consecutive ports, to a backend that is not there.
fn mappings(count: u16) -> Vec<Value> {
    mappings_to(count, client::own_loopback(), "192.0.2.1:80".parse().unwrap())
}

fn mappings_to(count: u16, host: Ipv4Addr, to: SocketAddr) -> Vec<Value> {
    (0..count)
        .map(|index| mapping(&format!("m{index:02}"), "tcp", (host, 20_000 + index).into(), to))
        .collect()
}

fn has_row(lines: &[String], name: &str) -> bool {
    lines.iter().any(|line| line.split_whitespace().next() == Some(name))
}

fn wait_until_shown(terminal: &Terminal) -> Vec<String> {
    let lines = terminal.wait_for("a table", |lines| lines.iter().any(|line| line.starts_with("NAME")));
    eventually("the terminal is taken over", || terminal.is_taken_over());
    lines
}

fn redrawn() {
    let (backend, datagrams) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (proxy, web, dns) = (Controlled::start(&[]), own_address(), own_address());
    let all =
        [mapping("web", "tcp", web, backend.address()), mapping("dns", "udp", dns, datagrams.address())];
    proxy.apply(&all[..1]).success();
    let terminal = Terminal::start(&stats(&proxy, &["--watch", "--sort", "rate-in"]), (200, 24));
    wait_until_shown(&terminal);
    // The list changes while it is shown.
    proxy.apply(&all).success();
    terminal.wait_for("the new mapping", |lines| has_row(lines, "dns"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let client = udp::local();
            while !over.load(Ordering::Relaxed) {
                client::assert_echoes(web);
                udp::assert_echoes(&client, dns, b"hello");
            }
        });
        // CONNS CONNS/S FLOWS FLOWS/S BYTES/S IN, BYTES/S OUT, DATAGRAMS/S IN, DATAGRAMS/S OUT
        let grows = |line: &String, name: &str, columns: &[usize]| {
            let cells: Vec<&str> = line.split_whitespace().collect();
            cells.first() == Some(&name) && columns.iter().all(|column| !matches!(cells[*column], "0" | "-"))
        };
        terminal.wait_for("rates of both", |lines| {
            lines.iter().any(|line| grows(line, "web", &[2, 5, 6]))
                && lines.iter().any(|line| grows(line, "dns", &[5, 6, 7, 8]))
        });
        over.store(true, Ordering::Relaxed);
    });
    // In place: there is one table.
    let lines =
        terminal.wait_for("no rates", |lines| lines.iter().any(|line| line.contains(" 0B/s in, 0B/s out")));
    assert_eq!(lines.iter().filter(|line| line.starts_with("NAME")).count(), 1, "{lines:#?}");
    proxy.apply(&[]).success();
    terminal.wait_for("an empty table", |lines| !has_row(lines, "web"));
    terminal.type_keys("\x03");
    assert_eq!(terminal.process.wait().signal(), Some(Signal::SIGINT as i32));
    terminal.wait_until_restored();
    assert_eq!(terminal.process.captured(Stream::Stderr), "");
}

fn fits() {
    let proxy = Controlled::start(&[]);
    proxy.apply(&mappings(40)).success();
    let terminal = Terminal::start(&stats(&proxy, &["--watch", "3600"]), (80, 24));
    let lines = wait_until_shown(&terminal);
    assert_eq!(
        (lines.len(), has_row(&lines, "m00"), has_row(&lines, "m39")),
        (24, true, false),
        "{lines:#?}"
    );
    assert!(lines[23].starts_with("and 20 more"), "{lines:#?}");
    // At once, although the next look is far.
    terminal.resize((120, 50));
    let lines = terminal.wait_for("all of them", |lines| has_row(lines, "m39"));
    assert!(lines.iter().any(|line| line.len() > 80), "{lines:#?}");
    terminal.resize((30, 10));
    terminal.wait_for("what fits", |lines| lines.len() == 10 && lines.iter().all(|line| line.len() <= 30));
    terminal.resize((1, 1));
    terminal.wait_for("what fits", |lines| lines.len() == 1 && lines[0].len() <= 1);
    terminal.type_keys("q");
    assert_eq!(terminal.process.wait().code(), Some(0));
    terminal.wait_until_restored();
}

fn restored() {
    let proxy = Controlled::start(&[]);
    let command = stats(&proxy, &["--watch"]);
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        let terminal = Terminal::start(&command, (80, 24));
        wait_until_shown(&terminal);
        terminal.process.signal(signal);
        assert_eq!(terminal.process.wait().signal(), Some(signal as i32));
        terminal.wait_until_restored();
    }
    for (keys, status) in [("q", Some(0)), ("x\x04", Some(0))] {
        let terminal = Terminal::start(&command, (80, 24));
        wait_until_shown(&terminal);
        terminal.type_keys(keys);
        assert_eq!(terminal.process.wait().code(), status);
        terminal.wait_until_restored();
    }
    // A server that does not serve us any more.
    let terminal = Terminal::start(&command, (80, 24));
    wait_until_shown(&terminal);
    let socket = proxy.socket();
    std::fs::remove_file(&socket).unwrap();
    std::fs::create_dir(&socket).unwrap();
    terminal.wait_for("why", |lines| lines.concat().contains("it is a directory, not a socket"));
    terminal.type_keys("q");
    terminal.process.wait();
    terminal.wait_until_restored();
}

fn stopped() {
    let proxy = Controlled::start(&[]);
    proxy.apply(&mappings(1)).success();
    let terminal = Terminal::start(&stats(&proxy, &["--watch"]), (80, 24));
    wait_until_shown(&terminal);
    // Ctrl-Z.
    terminal.type_keys("\x1a");
    terminal.wait_until_restored();
    terminal.process.resume();
    wait_until_shown(&terminal);
    // Ctrl-S: the terminal takes nothing more.
    terminal.type_keys("\x13");
    proxy.apply(&mappings(2)).success();
    terminal.process.signal(Signal::SIGTERM);
    assert_eq!(terminal.process.wait().signal(), Some(Signal::SIGTERM as i32));
    terminal.wait_until_restored();
}

/// Starts another server in the place of one that has ended.
fn next_server(proxy: &Controlled) -> Process {
    Process::spawn(rproxy::command(&["--control", proxy.socket().to_str().unwrap()]))
}

fn another_server() {
    let proxy = Controlled::start(&[]);
    proxy.apply(&mappings(1)).success();
    let terminal = Terminal::start(&stats(&proxy, &["--watch"]), (200, 24));
    wait_until_shown(&terminal);
    proxy.process.signal(Signal::SIGTERM);
    let lines =
        terminal.wait_for("that nobody answers", |lines| lines[1].contains("no rproxy listens there"));
    assert!(has_row(&lines, "m00"), "what was seen last stays: {lines:#?}");
    let _next = next_server(&proxy);
    terminal.wait_for("the next one", |lines| lines[1].is_empty() && !has_row(lines, "m00"));
    proxy.apply(&mappings(2)).success();
    terminal.wait_for("its mappings", |lines| has_row(lines, "m01"));
    terminal.type_keys("q");
    assert_eq!(terminal.process.wait().code(), Some(0));
}

fn silent_server() {
    let proxy = Controlled::start(&[]);
    let terminal = Terminal::start(&stats(&proxy, &["--watch"]), (200, 24));
    wait_until_shown(&terminal);
    proxy.process.pause();
    terminal.wait_for("that it waits", |lines| lines[1].contains("has not answered for 2 s"));
    proxy.process.resume();
    terminal.wait_for("that it goes on", |lines| lines[1].is_empty());
    proxy.process.pause();
    terminal.wait_for("that it waits", |lines| lines[1].contains("has not answered"));
    terminal.type_keys("\x03");
    assert_eq!(terminal.process.wait().signal(), Some(Signal::SIGINT as i32));
    terminal.wait_until_restored();
    proxy.process.resume();
}

fn dumb() {
    let proxy = Controlled::start(&[]);
    let mut command = stats(&proxy, &["--watch"]);
    command.env("TERM", "dumb");
    let terminal = Terminal::start(&command, (80, 24));
    let tables = |lines: &[String]| lines.iter().filter(|line| line.starts_with("NAME")).count();
    terminal.wait_for("two tables", |lines| tables(lines) == 2);
    assert!(!terminal.is_taken_over());
    terminal.type_keys("\x03");
    assert_eq!(terminal.process.wait().signal(), Some(Signal::SIGINT as i32));
}

fn piped() {
    let (backend, proxy) = (TcpBackend::echo(), Controlled::start(&[]));
    let web = own_address();
    proxy.apply(&[mapping("web", "tcp", web, backend.address())]).success();
    let tables = Process::spawn(stats(&proxy, &["--watch"]));
    let lines = Process::spawn(stats(&proxy, &["--watch", "--json", "--mapping", "w*"]));
    let is_row = |line: &str| line.starts_with("web ");
    let unknown = tables.wait_for_line(Stream::Stdout, is_row);
    assert_eq!(unknown.split_whitespace().nth(2), Some("-"), "{unknown}");
    let first: Value = serde_json::from_str(&lines.wait_for_line(Stream::Stdout, |_line| true)).unwrap();
    assert_eq!((&first["elapsed_ms"], &first["mappings"][0]["rates"]), (&Value::Null, &Value::Null));
    client::assert_echoes(web);
    tables.wait_for_line(Stream::Stdout, |line| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        is_row(line) && !matches!(cells[2], "0" | "-") && !matches!(cells[5], "0" | "-")
    });
    lines.wait_for_line(Stream::Stdout, |line| {
        let look: Value = serde_json::from_str(line).unwrap();
        let rates = &look["mappings"][0]["rates"];
        look["elapsed_ms"].as_u64().is_some_and(|elapsed| elapsed > 0)
            && rates["bytes_in"].as_f64().is_some_and(|rate| rate > 0.0)
            && rates["connections"].as_f64().is_some_and(|rate| rate > 0.0)
    });
    assert!(tables.captured(Stream::Stdout).contains("\n\nNAME"), "tables are apart");
}

fn unread() {
    let proxy = Controlled::start(&[]);
    for (lines, more) in
        [("1", &["--watch"][..]), ("2", &["--watch", "--json"]), ("1", &["--watch", "3600", "--json"])]
    {
        let script = format!("\"$0\" \"$@\" | head -n {lines} >/dev/null");
        assert_eq!(process::run(process::in_shell(&script, &stats(&proxy, more))).success(), "");
    }
    let full = process::in_shell("\"$0\" \"$@\" >/dev/full", &stats(&proxy, &["--watch"]));
    let output = process::run(full);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.starts_with("rproxy: standard output: No space left"), "{output:#?}");
}

fn another_server_piped() {
    let proxy = Controlled::start(&[]);
    proxy.apply(&mappings(1)).success();
    let watch = Process::spawn(stats(&proxy, &["--watch"]));
    watch.wait_for_line(Stream::Stdout, |line| line.starts_with("m00"));
    proxy.process.signal(Signal::SIGTERM);
    watch.wait_for_line(Stream::Stderr, |line| {
        line.contains("no rproxy listens there") && line.ends_with("looking again every 1s")
    });
    let _next = next_server(&proxy);
    watch.wait_for_line(Stream::Stderr, |line| line == "rproxy: a running rproxy answers again");
    assert_eq!(watch.captured(Stream::Stderr).lines().count(), 2, "each once");
    assert!(watch.is_running());
}

fn sorted() {
    let (backend, proxy) = (TcpBackend::echo(), Controlled::start(&[]));
    let host = client::own_loopback();
    let all = mappings_to(3, host, backend.address());
    proxy.apply(&all).success();
    for (index, count) in [(1_u16, 3), (2, 1)] {
        (0..count).for_each(|_| client::assert_echoes((host, 20_000 + index).into()));
    }
    eventually("all bytes are counted", || {
        proxy.stats("m01")["bytes_out"] == 15 && proxy.stats("m02")["bytes_out"] == 5
    });
    let names = |more: &[&str]| {
        let answer = proxy.json(&[&["stats"], more].concat());
        let names: Vec<Value> =
            answer["mappings"].as_array().unwrap().iter().map(|it| it["name"].clone()).collect();
        Value::from(names)
    };
    assert_eq!(names(&[]), json!(["m00", "m01", "m02"]));
    assert_eq!(names(&["--sort", "bytes-in"]), json!(["m01", "m02", "m00"]));
    assert_eq!(
        names(&["--sort", "connections-total", "--mapping", "m02", "--mapping", "*1"]),
        json!(["m01", "m02"])
    );
    for wrong in ["x*", "nobody"] {
        let output = proxy.ctl(&["stats", "--mapping", "m*", "--mapping", wrong]);
        assert_eq!((output.status.code(), output.stdout.as_str()), (Some(1), ""), "{output:#?}");
        let said = format!("rproxy: --mapping {wrong}: there is no such mapping; ");
        assert!(output.stderr.starts_with(&said) && output.stderr.lines().count() == 1, "{output:#?}");
    }
    let table = proxy.ctl(&["stats", "--sort", "bytes-out", "--mapping", "*0*"]).success();
    let first: Vec<&str> = table.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(first, ["NAME", "m01", "m02", "m00"]);
}
