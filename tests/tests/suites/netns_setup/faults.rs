//! A step that fails leaves everything as it was; after a sudden end, `repair` or `down` restores order.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use netns_setup::action::Action;
use netns_setup::cli::Cli;
use netns_setup::error::Error;
use netns_setup::executor::{ActionError, Executor};
use netns_setup::host_ip::HostIp;
use netns_setup::kernel::Kernel;
use netns_setup::name::Name;
use netns_setup::reserve::ReserveError;
use nix::sys::signal::{Signal, raise};
use rproxy_mapping::addr::Protocol;
use testkit::role;
use testkit::rproxy::rproxy;
use testkit::suite::Case;

use super::stage::{Backend, Stage, assert_same, for_each_firewall};

/// The role of a process that runs a command of `netns-setup` and dies before its N-th step.
pub(super) const DIE: &str = "die-before-step";

/// That of one whose N-th step fails; after the last one, that is to write down the state.
const FAIL: &str = "fail-step";

/// That of one whose N-th step acts, and fails nevertheless, as a tool that is killed when it is done.
const ACT: &str = "act-and-fail-step";

/// That of one that is interrupted in its N-th step.
const INTERRUPT: &str = "interrupt-step";

pub(crate) fn cases() -> Vec<Case> {
    let deadline = std::time::Duration::from_secs(900);
    let cases = [
        for_each_firewall("a step that fails leaves everything as it was", |stage, backend| {
            failing(stage, commands(backend));
        }),
        for_each_firewall("sudden death is repaired or taken down", |stage, backend| {
            dying(stage, commands(backend));
        }),
        for_each_firewall("a step for transparent sockets that fails", |stage, backend| {
            failing(stage, transparent(stage, backend));
        }),
        for_each_firewall("sudden death in a step for transparent sockets", |stage, backend| {
            dying(stage, transparent(stage, backend));
        }),
    ];
    cases.into_iter().flatten().map(|case| case.deadline(deadline)).collect()
}

/// A command that a case breaks, with what has to be done before.
type Broken = (Vec<String>, String);

/// The same, on the return path to transparent sockets.
fn transparent(stage: &Stage, backend: Backend) -> Vec<Broken> {
    stage.host("ip link add name br7 address 02:00:00:00:00:07 type bridge");
    let one = format!("transparent up --interface eth0 {}", backend.option());
    let two = "transparent up --interface br7".to_owned();
    let up = format!("up --transparent --subnet6 fd00:d0c::/64 {}", backend.option());
    vec![
        (vec![], one.clone()),
        (vec![one.clone()], two.clone()),
        (vec![one.clone(), two.clone()], "transparent down --interface eth0".to_owned()),
        (vec![one.clone(), two], "transparent down".to_owned()),
        (vec![], up.clone()),
        (vec![one], up.clone()),
        (vec![up], "down".to_owned()),
    ]
}

/// The commands that a case breaks.
fn commands(backend: Backend) -> Vec<Broken> {
    let up = format!("up --subnet6 fd00:d0c::/64 --persist {}", backend.option());
    let web = "attach web".to_owned();
    let publish = "publish web -p 80:80 -p 127.0.0.1:81:80 -p 82:80 --via both".to_owned();
    let direct = "publish web -p 90:80 -p 53:53/udp --via dnat".to_owned();
    let before = |commands: &[&String]| commands.iter().map(|command| (*command).clone()).collect();
    vec![
        (vec![], up.clone()),
        (before(&[&up]), web.clone()),
        (before(&[&up, &web]), publish.clone()),
        (before(&[&up, &web]), direct.clone()),
        (before(&[&up, &web, &publish, &direct]), "unpublish web".to_owned()),
        (before(&[&up, &web, &publish]), "detach web".to_owned()),
        (before(&[&up, &web, &publish]), "down".to_owned()),
    ]
}

/// The kernel, until its N-th action.
struct Failing {
    kernel: Kernel,
    left: Cell<usize>,
    then: fn() -> Result<(), ActionError>,
    /// Whether the action happens before.
    acts: bool,
    state_dir: PathBuf,
}

impl Failing {
    /// Whether what is asked for next is the one that something happens to.
    fn is_next(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left == 1
    }

    /// What is in the way when the state is to be written.
    fn block_state(&self) {
        std::fs::create_dir_all(blocker(&self.state_dir)).unwrap();
    }
}

fn blocker(state_dir: &Path) -> PathBuf {
    state_dir.join("state.json.new")
}

impl Executor for Failing {
    fn run(&mut self, action: &Action) -> Result<(), ActionError> {
        if self.is_next() {
            // Only this one fails: what undoes the others has to work.
            if self.acts {
                self.kernel.run(action)?;
            }
            (self.then)()?;
        }
        self.kernel.run(action)
    }

    fn reserve(&mut self, proto: Protocol, host: HostIp, port: u16) -> Result<u16, ReserveError> {
        self.kernel.reserve(proto, host, port)
    }

    /// Asked for when all steps are done, before that is written down.
    fn namespaces(&self) -> &BTreeMap<Name, u64> {
        if self.is_next() && (self.then)().is_err() {
            self.block_state();
        }
        self.kernel.namespaces()
    }

    fn interrupted(&mut self) -> Option<Signal> {
        self.kernel.interrupted()
    }
}

fn injected() -> Result<(), ActionError> {
    Err(ActionError::Sysctl { key: "injected".to_owned(), source: std::io::ErrorKind::Other.into() })
}

fn die() -> Result<(), ActionError> {
    raise(Signal::SIGKILL).unwrap();
    injected()
}

fn interrupt() -> Result<(), ActionError> {
    raise(Signal::SIGINT).unwrap();
    Ok(())
}

/// Runs a command that goes wrong, if the role is one of these.
pub(crate) fn play(role: &[&str]) -> Option<ExitCode> {
    let [what, step, command @ ..] = role else { return None };
    let then = match *what {
        DIE => die,
        FAIL | ACT => injected,
        INTERRUPT => interrupt,
        _ => return None,
    };
    Some(match broken(command, step.parse().unwrap(), *what == ACT, then) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            std::io::stderr().write_all(error.to_string().as_bytes()).unwrap();
            ExitCode::from(error.exit_code())
        }
    })
}

/// Runs a command whose N-th action does not happen.
fn broken(
    command: &[&str],
    step: usize,
    acts: bool,
    then: fn() -> Result<(), ActionError>,
) -> Result<(), Error> {
    let words = std::iter::once("netns-setup").chain(command.iter().copied());
    let cli = Cli::try_parse_from(words).unwrap();
    let state_dir = command.iter().skip_while(|word| **word != "--state-dir").nth(1).unwrap().into();
    let mut backend = Failing { kernel: Kernel::default(), left: Cell::new(step), then, acts, state_dir };
    cli.run(&mut backend, &mut std::io::sink(), &mut std::io::sink())
}

fn words(stage: &Stage, command: &str) -> Vec<String> {
    let mut words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    words.extend(["--state-dir".to_owned(), stage.state_dir().display().to_string()]);
    words.extend(["--rproxy".to_owned(), rproxy().display().to_string()]);
    words
}

/// How many steps a command has.
pub(super) fn steps(stage: &Stage, command: &str) -> usize {
    let report: serde_json::Value =
        serde_json::from_str(&stage.ok(&format!("{command} --dry-run --json"))).unwrap();
    report["steps"].as_array().unwrap().len()
}

/// Runs a command in a process of its own, in which nothing but the command can go wrong.
pub(super) fn run_broken(stage: &Stage, role: &str, command: &str, step: usize) -> testkit::process::Output {
    let mut process = role::command(&[role, &step.to_string()]);
    process.args(words(stage, command));
    stage.with_path(&mut process);
    stage.host.spawn(process).into_output()
}

/// The lines of a dump in an order that does not depend on theirs.
fn unordered(dump: &str) -> String {
    let mut lines: Vec<_> = dump.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// Interrupts a command in the middle of its steps. One that has only one step is finished, and set up again.
fn interrupted(stage: &Stage, before: &[String], command: &str, count: usize) {
    let output = run_broken(stage, INTERRUPT, command, count.div_ceil(2));
    let is_whole = count == 1;
    assert_eq!(output.status.code(), Some(if is_whole { 0 } else { 130 }), "{command}: {output:#?}");
    if is_whole {
        stage.ok("down");
        before.iter().for_each(|earlier| drop(stage.ok(earlier)));
    } else {
        assert!(output.stderr.starts_with("ended by SIGINT"), "{command}: {output:#?}");
        assert!(output.stderr.ends_with("nothing was changed"), "{command}: {output:#?}");
    }
}

fn failing(stage: &Stage, commands: Vec<Broken>) {
    for (before, command) in commands {
        for earlier in &before {
            stage.ok(earlier);
        }
        let (intact, listed) = (stage.dump(), relays(stage));
        let count = steps(stage, &command);
        assert!(count > 0, "{command}");
        let fail = |role, step| {
            let output = run_broken(stage, role, &command, step);
            assert_eq!(output.status.code(), Some(1), "{command}, step {step}: {output:#?}");
            let error = output.stderr;
            assert!(
                error.contains("injected") && error.ends_with("nothing was changed"),
                "{command}: {error}"
            );
            assert_eq!(relays(stage), listed, "{command}, step {step} of {count}, {role}");
            if !before.is_empty() {
                assert_eq!(stage.ok("check"), "everything is as it should be\n", "{command}, step {step}");
            }
        };
        for step in 1..=count {
            fail(FAIL, step);
            assert_same(&stage.dump(), &intact, &format!("{command}, step {step} of {count}"));
        }
        interrupted(stage, &before, &command, count);
        assert_same(&stage.dump(), &intact, &format!("{command}, interrupted"));
        assert_eq!(relays(stage), listed, "{command}, interrupted");

        // What a step has done in spite of its failure is taken back by further ones: rules of iptables that nothing
        // depends on the order of are in another one then.
        let intact = unordered(&intact);
        for step in 1..=count {
            fail(ACT, step);
            assert_same(
                &unordered(&stage.dump()),
                &intact,
                &format!("{command}, step {step} of {count}, acting"),
            );
        }

        // After `down` there is nothing to write down.
        if !matches!(command.as_str(), "down" | "transparent down") {
            unsaved(stage, &command, count, before.is_empty());
            assert_same(&unordered(&stage.dump()), &intact, &format!("{command}, unsaved"));
            assert_eq!(relays(stage), listed, "{command}, unsaved");
        }
        stage.ok("down");
    }
}

/// A command that does all of its `count` steps, and cannot write down that it did.
fn unsaved(stage: &Stage, command: &str, count: usize, is_first: bool) {
    let output = run_broken(stage, FAIL, command, count + 1);
    assert_eq!(output.status.code(), Some(1), "{command}, unsaved: {output:#?}");
    assert!(output.stderr.contains("(step: record the state)"), "{command}: {output:#?}");
    // To write down that there is nothing takes no new file.
    let end = if is_first { "nothing was changed" } else { "or `netns-setup down`" };
    assert!(output.stderr.ends_with(end), "{command}: {output:#?}");
    std::fs::remove_dir(blocker(&stage.state_dir())).unwrap();
}

/// The sockets of relays.
fn relays(stage: &Stage) -> String {
    let shown = stage.host("ss -Hlnt");
    let mut addresses: Vec<&str> = shown.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    addresses.sort_unstable();
    addresses.join(" ")
}

/// What puts things in order after a command has died. One for transparent sockets can also be run again.
fn mends(command: &str) -> Vec<&str> {
    let again = command.starts_with("transparent up").then_some(command);
    let down = command.starts_with("transparent").then_some("transparent down");
    ["repair", "down"].into_iter().chain(down).chain(again).collect()
}

/// Asserts that nothing differs from the state, which may be that there is nothing.
#[track_caller]
fn assert_in_order(stage: &Stage, what: &str) {
    let output = stage.run("check");
    let is_nothing = output.stderr.contains("there is no network") && output.stdout.is_empty();
    assert!(is_nothing || output.stdout == "everything is as it should be\n", "{what}: {output:#?}");
}

fn dying(stage: &Stage, commands: Vec<Broken>) {
    // The tools leave empty tables behind the first time.
    let bare = stage.dump();
    for (before, command) in commands {
        let count = {
            before.iter().for_each(|earlier| drop(stage.ok(earlier)));
            let count = steps(stage, &command);
            stage.ok("down");
            count
        };
        for step in 1..=count + 1 {
            for mend in mends(&command) {
                before.iter().for_each(|earlier| drop(stage.ok(earlier)));
                let output = run_broken(stage, DIE, &command, step);
                assert_eq!(output.status.code(), None, "{command} should have died: {output:#?}");
                let what = format!("{command}, dead before step {step} of {count}, then {mend}");
                stage.ok(mend);
                if !mend.ends_with("down") {
                    assert_in_order(stage, &what);
                    stage.ok("down");
                }
                assert_same(&stage.dump(), &bare, &what);
                assert_eq!(relays(stage), "", "{what}");
            }
        }
    }
}
