//! What the processes of the relay have of the command that has started them, and how long their log gets.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use testkit::eventually;
use testkit::require::Need;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::relay::{parent, relay};
use super::stage::{Stage, case, serve};

pub(crate) fn cases() -> Vec<Case> {
    let tools = &[Need::Program("nice"), Need::Program("taskset"), Need::Program("chrt")];
    vec![
        case("the relay has no limits, priority or signals of the command that starts it", settings)
            .needs(tools),
        case("the log of the relay is bounded while it runs, and has the newest lines", log),
    ]
}

/// Settings that a service manager or a shell may have given to a command.
const SETTINGS: &str = "ulimit -Sn 300; ulimit -St 4000; umask 0; trap '' HUP INT QUIT USR1 CHLD; \
    echo 300 >/proc/self/oom_score_adj; exec nice -n 7 taskset -c 0 chrt --batch 0";

/// A line of a file of `/proc/PID`, without its name.
fn value(pid: u32, file: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("{file} lacks {name}: {text}")).trim().to_owned()
}

/// The processors that this process may run on if it is told no other ones.
fn processors() -> String {
    let mut all = CpuSet::new();
    (0..CpuSet::count()).for_each(|processor| all.set(processor).unwrap());
    sched_setaffinity(Pid::from_raw(0), &all).unwrap();
    let text = fs::read_to_string("/proc/thread-self/status").unwrap();
    text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

fn settings(stage: &Stage) {
    stage.ok("up");
    let _web = stage.attach("web");
    let mut command = Command::new("sh");
    let publish = format!("\"$0\" --state-dir {} publish web -p 80:80", stage.state_dir().display());
    command.args(["-c", &format!("{SETTINGS} {publish}")]).arg(netns_setup());
    stage.host.spawn(command).into_output().success();
    let relay = relay(stage);
    for pid in [relay, parent(relay)] {
        let files = value(pid, "limits", "Max open files");
        let words: Vec<_> = files.split_whitespace().collect();
        assert_eq!(words[0], words[1], "{files}");
        assert!(value(pid, "limits", "Max cpu time").starts_with("unlimited"));
        assert_eq!(value(pid, "status", "Umask:"), "0022");
        assert_eq!(value(pid, "oom_score_adj", ""), "0");
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        // The fields 19 and 41 of proc_pid_stat(5): nice, and the policy SCHED_OTHER.
        assert_eq!((fields[16], fields[38]), ("0", "0"), "{stat}");
        assert_eq!(value(pid, "status", "Cpus_allowed_list:"), processors());
    }
    // `rproxy` ignores and blocks some itself.
    let supervisor = parent(relay);
    assert_eq!(value(supervisor, "status", "SigBlk:"), "0000000000000000");
    let ignored = u64::from_str_radix(&value(supervisor, "status", "SigIgn:"), 16).unwrap();
    // HUP, INT, QUIT, USR1, TERM, CHLD (signal(7)).
    let of_command = [1, 2, 3, 10, 15, 17].iter().fold(0, |bits, signal| bits | 1 << (signal - 1));
    assert_eq!(ignored & of_command, 0, "{ignored:x}");
}

fn log(stage: &Stage) {
    const LONGEST: u64 = 1024 * 1024;
    stage.ok("up");
    let web = stage.attach("web");
    stage.ok("publish web -p 80:80 --via proxy");
    let path = stage.state_dir().join("relay.log");
    let fill = || {
        let mut log = fs::OpenOptions::new().append(true).open(&path).unwrap();
        let lines: String = (0..100_000).map(|number| format!("line {number}\n")).collect();
        log.write_all(lines.as_bytes()).unwrap();
        assert!(log.metadata().unwrap().len() > LONGEST);
    };
    let text = || fs::read_to_string(&path).unwrap();
    // A line of the relay: nobody answers in the container.
    fill();
    drop(stage.client.run(|| TcpStream::connect((HOST_V4, 80)).unwrap()));
    eventually("the relay says that", || text().contains("connection reset: no backend"));
    assert!(text().contains("line 99999\n") && !text().contains("line 100\n"), "{}", text().len());
    assert!(fs::metadata(&path).unwrap().len() <= LONGEST);
    // One of the supervisor, and the relay goes on writing.
    fill();
    let first = relay(stage);
    stage.host(&format!("kill -KILL {first}"));
    eventually("the supervisor says that", || text().contains("the relay is started again"));
    assert!(text().contains("the relay was ended by signal 9") && text().contains("line 99999\n"));
    assert!(fs::metadata(&path).unwrap().len() <= LONGEST);
    let _server = serve(&web, 80);
    stage.ok("check");
}
