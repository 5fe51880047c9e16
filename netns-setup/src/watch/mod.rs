//! `netns-setup watch`: repairs what other programs flush, delete or end.

mod guard;
mod log;
mod notify;
mod pace;
mod place;

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::commands::{self, Mended, Options};
use crate::error::Error;
use crate::events::Events;
use crate::firewall::tool;
use crate::hints::Hints;
use crate::kernel::Kernel;
use crate::model::Firewall;
use crate::relay::client;
use crate::signals::Signals;
use crate::state::State;
use guard::{Acting, Guard, Noting};
use log::Log;
use notify::{Phase, notify};
use pace::{Outcome, Pace};
use place::Place;

/// Comparisons without a notification are so far apart: some kernel parameters change without one.
const INTERVAL: Duration = Duration::from_secs(30);

/// The rules of iptables-legacy change without a notification, too.
const LEGACY_INTERVAL: Duration = Duration::from_millis(500);

/// Repairs the network of a state directory whenever something differs, until a signal arrives.
///
/// # Errors
/// If changes cannot be noticed, or this process may not repair anything.
pub fn run(options: &Options, log: &mut dyn Write) -> Result<(), Error> {
    let signals = Signals::catch();
    let acting = Acting::default();
    let _guard = Guard::start(&signals, acting.clone()).map_err(Error::Signals)?;
    let mut watch = Watch {
        events: Events::open(&signals)?,
        pace: Pace::new(Instant::now()),
        log: Log::new(log, Hints::about(&options.state_dir)),
        is_legacy: is_legacy(),
        fight_until: Instant::now(),
        place: Place::new(&options.state_dir),
        known: None,
        acting,
    };
    watch.log.line(&format!("watching the network of {}", options.state_dir.display()));
    watch.compare(options, &signals)?;
    notify(Phase::Ready);
    while signals.caught().is_none() {
        if watch.pace.due() <= Instant::now() {
            watch.compare(options, &signals)?;
        } else if watch.events.wait(watch.pace.due())? {
            watch.pace.changed(Instant::now());
        }
    }
    notify(Phase::Stopping);
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
    place: Place,
    /// The state after the last repair.
    known: Option<State>,
    acting: Acting,
}

impl Watch<'_> {
    /// Compares the system with the state, and repairs what differs.
    ///
    /// # Errors
    /// If no comparison can succeed.
    fn compare(&mut self, options: &Options, signals: &Signals) -> Result<(), Error> {
        let begun = Instant::now();
        let moved = self.place.look();
        let (options, notes) = match moved {
            Some(moved) => (&Options { state_dir: moved.to, ..options.clone() }, vec![moved.note]),
            None => (options, Vec::new()),
        };
        if begun < self.fight_until && self.is_fought(options, signals) {
            self.pace.compared(Outcome::Same, begun, Instant::now(), self.fight_until - begun);
            return Ok(());
        }
        let (outcome, interval) = match self.mend(options, signals) {
            Ok(mended) => {
                let follows = self.pace.follows(begun);
                let outcome = self.log.mended(&mended, begun.elapsed(), follows, notes);
                let interval = self.follow(&mended, options);
                self.known = Some(mended.state);
                (outcome, interval)
            }
            Err(error @ (Error::NotRoot | Error::NotAllowed(_))) => return Err(error),
            Err(_) if signals.caught().is_some() => return Ok(()),
            Err(error) => {
                self.log.failure(&error, notes);
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

    fn mend(&self, options: &Options, signals: &Signals) -> Result<Mended, Error> {
        let executor = Kernel::ended_by(signals.clone());
        let mut executor = Noting { executor, acting: self.acting.clone() };
        let mended = commands::mend(options, self.known.as_ref(), &mut executor);
        self.acting.end();
        mended
    }

    /// Whether nothing differs but what another program has undone again and again.
    fn is_fought(&self, options: &Options, signals: &Signals) -> bool {
        let look = Options { dry_run: true, ..options.clone() };
        let found = commands::mend(&look, self.known.as_ref(), &mut Kernel::ended_by(signals.clone()));
        found.is_ok_and(|found| self.log.knows(&found))
    }

    /// Watches the supervisor of the relay. Returns after what time to compare again without an event.
    fn follow(&mut self, mended: &Mended, options: &Options) -> Duration {
        let current = &mended.state.current;
        let status = client::status(&options.state_dir).ok().flatten();
        let supervisor = status.and_then(|status| status.supervisor);
        let network = current.network.as_ref().map(|network| network.firewall);
        let marking = current.transparent.as_ref().map(|parts| parts.firewall);
        let is_iptables = [network, marking].contains(&Some(Firewall::Iptables));
        if !self.events.follow(supervisor, &options.state_dir) {
            Duration::ZERO
        } else if is_iptables && self.is_legacy {
            LEGACY_INTERVAL
        } else {
            INTERVAL
        }
    }
}

/// Reaps children that have ended: supervisors that this process has started.
fn reap() {
    while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status != WaitStatus::StillAlive) {}
}

/// Whether `iptables` changes the legacy tables, which the kernel does not notify of.
fn is_legacy() -> bool {
    tool::run("iptables", &["--version"], "").is_ok_and(|version| version.contains("legacy"))
}
