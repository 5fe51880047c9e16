//! `netns-setup watch`: repairs what other programs flush, delete or end.

mod pace;

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rproxy_mapping::escape::escaped;
use sd_notify::NotifyState;

use crate::commands::{self, Mended, Options};
use crate::error::{Error, finding};
use crate::events::Events;
use crate::firewall::tool;
use crate::hints::Hints;
use crate::kernel::Kernel;
use crate::model::Firewall;
use crate::relay::client;
use crate::signals::Signals;
use pace::{Outcome, Pace};

/// Comparisons without a notification are so far apart: some kernel parameters change without one.
const INTERVAL: Duration = Duration::from_secs(30);

/// The rules of iptables-legacy change without a notification, too.
const LEGACY_INTERVAL: Duration = Duration::from_millis(500);

/// A line names so many differences.
const NAMED: usize = 3;

/// Repairs the network of a state directory whenever something differs, until a signal arrives.
///
/// # Errors
/// If changes cannot be noticed, or this process may not repair anything.
pub fn run(options: &Options, log: &mut dyn Write) -> Result<(), Error> {
    let signals = Signals::catch();
    let mut watch = Watch {
        events: Events::open(&options.state_dir, &signals)?,
        pace: Pace::new(Instant::now()),
        log: Log {
            out: log,
            hints: Hints::about(&options.state_dir),
            trouble: Vec::new(),
            repaired: Vec::new(),
        },
        is_legacy: is_legacy(),
        fight_until: Instant::now(),
    };
    watch.log.line(&format!("watching the network of {}", options.state_dir.display()));
    watch.compare(options, &signals)?;
    notify(NotifyState::Ready);
    while signals.caught().is_none() {
        if watch.pace.due() <= Instant::now() {
            watch.compare(options, &signals)?;
        } else if watch.events.wait(watch.pace.due())? {
            watch.pace.changed(Instant::now());
        }
    }
    notify(NotifyState::Stopping);
    Ok(())
}

struct Watch<'a> {
    events: Events,
    pace: Pace,
    log: Log<'a>,
    /// Whether `iptables` is that of the legacy tables.
    is_legacy: bool,
    /// Until then, what another program has undone again and again is left to it.
    fight_until: Instant,
}

impl Watch<'_> {
    /// Compares the system with the state, and repairs what differs.
    ///
    /// # Errors
    /// If no comparison can succeed.
    fn compare(&mut self, options: &Options, signals: &Signals) -> Result<(), Error> {
        let begun = Instant::now();
        if begun < self.fight_until && self.is_fought(options, signals) {
            self.pace.compared(Outcome::Same, begun, Instant::now(), self.fight_until - begun);
            return Ok(());
        }
        let (outcome, interval) = match commands::mend(options, &mut Kernel::ended_by(signals.clone())) {
            Ok(mended) => (self.log.mended(&mended, begun.elapsed()), self.follow(&mended, options)),
            Err(error @ (Error::NotRoot | Error::NotAllowed(_))) => return Err(error),
            Err(_) if signals.caught().is_some() => return Ok(()),
            Err(error) => {
                self.log.failure(&error);
                (Outcome::Failed, INTERVAL)
            }
        };
        reap();
        let delay = self.pace.compared(outcome, begun, Instant::now(), interval);
        if let (Outcome::Repaired { .. }, Some(delay)) = (outcome, delay) {
            self.fight_until = Instant::now() + delay;
            self.log.fight(delay);
        }
        Ok(())
    }

    /// Whether nothing differs but what another program has undone again and again.
    fn is_fought(&self, options: &Options, signals: &Signals) -> bool {
        let look = Options { dry_run: true, ..options.clone() };
        let found = commands::mend(&look, &mut Kernel::ended_by(signals.clone()));
        found.is_ok_and(|found| findings(&found).iter().all(|found| self.log.repaired.contains(found)))
    }

    /// Watches the supervisor of the relay. Returns after what time to compare again without an event.
    fn follow(&mut self, mended: &Mended, options: &Options) -> Duration {
        let current = &mended.state.current;
        let status = client::status(&options.state_dir).ok().flatten();
        let supervisor = status.and_then(|status| status.supervisor);
        let network = current.network.as_ref().map(|network| network.firewall);
        let marking = current.transparent.as_ref().map(|parts| parts.firewall);
        let is_iptables = [network, marking].contains(&Some(Firewall::Iptables));
        if !self.events.follow(supervisor) {
            Duration::ZERO
        } else if is_iptables && self.is_legacy {
            LEGACY_INTERVAL
        } else {
            INTERVAL
        }
    }
}

/// The lines of the service. Those that say the same as before are left out.
struct Log<'a> {
    out: &'a mut dyn Write,
    hints: Hints,
    /// The failure or the problems of the last comparison.
    trouble: Vec<String>,
    /// What the last repairs were about, as long as they have something in common.
    repaired: Vec<String>,
}

impl Log<'_> {
    /// Writes what was repaired, and what could not be.
    fn mended(&mut self, mended: &Mended, took: Duration) -> Outcome {
        if let Some(restored) = &mended.restored {
            self.line(restored);
        }
        let found = findings(mended);
        if !found.is_empty() {
            let (named, more) = found.split_at(found.len().min(NAMED));
            let more = if more.is_empty() { String::new() } else { format!("; and {} more", more.len()) };
            self.line(&format!("repaired within {} ms: {}{more}", took.as_millis(), named.join("; ")));
        }
        let plan = &mended.plan;
        self.trouble(
            [&mended.given_up, &plan.problems, &plan.warnings].into_iter().flatten().cloned().collect(),
        );
        match (found.is_empty(), plan.problems.is_empty()) {
            (false, _) => Outcome::Repaired { again: self.is_again(found) },
            (true, false) => Outcome::Failed,
            (true, true) => Outcome::Same,
        }
    }

    /// Whether the repair before was about one of these, too. They are remembered.
    fn is_again(&mut self, found: Vec<String>) -> bool {
        let again = found.iter().any(|found| self.repaired.contains(found));
        if again {
            self.repaired.extend(found);
            self.repaired.sort_unstable();
            self.repaired.dedup();
        } else {
            self.repaired = found;
        }
        again
    }

    fn failure(&mut self, error: &Error) {
        self.trouble(vec![format!("not repaired: {error}")]);
    }

    /// Writes what is not as it should be, unless that has been said.
    fn trouble(&mut self, trouble: Vec<String>) {
        let known = std::mem::replace(&mut self.trouble, trouble.clone());
        for line in trouble.iter().filter(|line| !known.contains(line)) {
            self.line(line);
        }
        if trouble.is_empty() && !known.is_empty() {
            self.line("everything is as it should be again");
        }
    }

    fn fight(&mut self, delay: Duration) {
        let seconds = delay.as_secs();
        self.line(&format!(
            "another program undoes the repairs again and again; the next one is not before {seconds} s"
        ));
    }

    fn line(&mut self, text: &str) {
        // There is nowhere to report that it cannot be written.
        drop(writeln!(self.out, "netns-setup: {}", escaped(&self.hints.complete(text))));
    }
}

/// What a repair was about.
fn findings(mended: &Mended) -> Vec<String> {
    mended.plan.steps.iter().map(|step| finding(&step.action)).collect()
}

/// Reaps children that have ended: supervisors that this process has started.
fn reap() {
    while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status != WaitStatus::StillAlive) {}
}

/// Notifies the service manager, if there is one (sd_notify(3)).
fn notify(state: NotifyState<'_>) {
    // Without it, the service manager ends this process when its time to start is over, and says why.
    drop(sd_notify::notify(&[state]));
}

/// Whether `iptables` changes the legacy tables, which the kernel does not notify of.
fn is_legacy() -> bool {
    tool::run("iptables", &["--version"], "").is_ok_and(|version| version.contains("legacy"))
}
