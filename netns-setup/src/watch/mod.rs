//! `netns-setup watch`: repairs what other programs flush, delete or end.

mod pace;

use std::io::Write;
use std::time::{Duration, Instant};

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
}

impl Watch<'_> {
    /// Compares the system with the state, and repairs what differs.
    ///
    /// # Errors
    /// If no comparison can succeed.
    fn compare(&mut self, options: &Options, signals: &Signals) -> Result<(), Error> {
        let begun = Instant::now();
        let (outcome, interval) = match commands::mend(options, &mut Kernel::ended_by(signals.clone())) {
            Ok(mended) => {
                let again = self.log.mended(&mended, begun.elapsed());
                let outcome = if mended.is_changed() { Outcome::Repaired { again } } else { Outcome::Same };
                (outcome, self.follow(&mended, options))
            }
            Err(error @ (Error::NotRoot | Error::NotAllowed(_))) => return Err(error),
            Err(_) if signals.caught().is_some() => return Ok(()),
            Err(error) => {
                self.log.failure(&error);
                (Outcome::Failed, INTERVAL)
            }
        };
        if let Some(delay) = self.pace.compared(outcome, begun, Instant::now(), interval) {
            self.log.delay(outcome, delay);
        }
        Ok(())
    }

    /// Watches the supervisor of the relay. Returns after what time to compare again without an event.
    fn follow(&mut self, mended: &Mended, options: &Options) -> Duration {
        let current = &mended.state.current;
        let status = client::status(&options.state_dir).ok().flatten();
        let supervisor = status.and_then(|status| status.supervisor);
        let is_iptables =
            current.network.as_ref().is_some_and(|network| network.firewall == Firewall::Iptables);
        if !self.events.follow(supervisor.into_iter()) {
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
    /// What the last repair was about.
    repaired: Vec<String>,
}

impl Log<'_> {
    /// Writes what was repaired. Returns whether that is the same as the last time.
    fn mended(&mut self, mended: &Mended, took: Duration) -> bool {
        let Mended { plan, given_up, .. } = mended;
        self.trouble(plan.problems.iter().chain(&plan.warnings).chain(given_up).cloned().collect());
        if let Some(restored) = &mended.restored {
            self.line(restored);
        }
        let found: Vec<_> = mended.plan.steps.iter().map(|step| finding(&step.action)).collect();
        if found.is_empty() {
            return false;
        }
        let (named, more) = found.split_at(found.len().min(NAMED));
        let more = if more.is_empty() { String::new() } else { format!("; and {} more", more.len()) };
        self.line(&format!("repaired within {} ms: {}{more}", took.as_millis(), named.join("; ")));
        std::mem::replace(&mut self.repaired, found) == self.repaired
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

    fn delay(&mut self, outcome: Outcome, delay: Duration) {
        if matches!(outcome, Outcome::Repaired { .. }) {
            let seconds = delay.as_secs();
            self.line(&format!(
                "another program undoes the repairs again and again; the next one is not before {seconds} s"
            ));
        }
    }

    fn line(&mut self, text: &str) {
        // There is nowhere to report that it cannot be written.
        drop(writeln!(self.out, "netns-setup: {}", escaped(&self.hints.complete(text))));
    }
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
