//! Has the relay serve what it should, as far as it can.
//!
//! A mapping that was accepted once may be refused later: an address of the host has become that of its container, or
//! its interface is gone. All others are served without it, and it is tried again with each change, each start, and when
//! the interfaces or addresses of the host have changed. What a command adds is served, or the command fails.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use super::child::Child;
use super::control::{self, Failed, Refusal};
use super::held::{Difference, Held, Range};
use super::refused::Refused;
use super::scoped;
use crate::model::{MappingKey, RelayProcess};
use crate::relay::message::Unserved;

/// The most ranges that are removed one by one: each takes a request, but that does not grow with what stays.
const FEW: usize = 16;

/// The relay, and what it serves.
#[derive(Debug)]
pub(super) struct Serving {
    child: Child,
    /// What it has: it was passed the sockets of these.
    served: Held,
    /// What it cannot serve now.
    refused: Refused,
}

impl Serving {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { child: Child::new(program), served: Held::default(), refused: Refused::default() }
    }

    pub(super) fn process(&self) -> Option<RelayProcess> {
        self.child.process()
    }

    pub(super) fn ended(&self) -> Option<BorrowedFd<'_>> {
        self.child.ended()
    }

    pub(super) fn reap(&mut self) -> String {
        self.child.reap()
    }

    pub(super) fn stop(&mut self) {
        self.child.stop();
        // Its sockets are closed before a command hears of that: ports have to be free then.
        self.served = Held::default();
        self.refused = Refused::default();
    }

    /// Ends a relay that hangs; that is noticed as any end is.
    pub(super) fn kill(&mut self) {
        self.child.kill();
    }

    /// Whether it does not serve all that it should.
    pub(super) fn lacks_any(&self) -> bool {
        !self.refused.is_empty()
    }

    /// What it does not serve, and why.
    pub(super) fn unserved(&self) -> Vec<Unserved> {
        self.refused.listed()
    }

    /// Starts the relay with the ports of `held`.
    pub(super) fn start(&mut self, dir: &File, held: &mut Held) -> Result<(), String> {
        self.served = Held::default();
        self.child.start(dir)?;
        self.settle(dir, held).map_err(|failed| {
            self.child.stop();
            failed.why()
        })
    }

    /// Has the relay serve the ports of `wanted` instead of those of `held`. Those of `asked` it has to; if it refuses one, it
    /// serves what it did.
    pub(super) fn change(
        &mut self,
        dir: &File,
        held: &mut Held,
        mut wanted: Held,
        asked: &BTreeSet<MappingKey>,
    ) -> Result<(), String> {
        if self.child.has_ended() {
            self.start(dir, held)?;
        }
        let changed = match self.try_change(dir, &wanted, asked) {
            // It has ended just before, or it hangs.
            Err(failed) if matches!(failed, Failed::Silent(_)) || self.child.has_ended() => {
                self.start(dir, held)?;
                self.try_change(dir, &wanted, asked)
            }
            changed => changed,
        };
        if changed.is_ok() {
            self.refused.retain(|key| wanted.contains(key) && !asked.contains(key));
            std::mem::swap(held, &mut wanted);
        }
        // Also what could not be served before may be possible now.
        let settled = if changed.is_err() || self.lacks_any() { self.settle(dir, held) } else { Ok(()) };
        if settled.is_err() {
            // The end of one that hangs is noticed, and then it is started again.
            self.child.kill();
        }
        changed.map_err(Failed::why)
    }

    /// Makes a change without those that are refused anyway.
    fn try_change(&mut self, dir: &File, wanted: &Held, asked: &BTreeSet<MappingKey>) -> Result<(), Failed> {
        let target = wanted.without(|key| self.refused.contains(key) && !asked.contains(key));
        let Difference { gone, new } = target.beyond(&self.served);
        // Only what changes is passed: all of it takes long if that is much.
        if gone.is_empty() {
            self.add(dir, &new)
        } else if new.is_empty() && gone.len() <= FEW {
            gone.iter().try_for_each(|range| self.remove(dir, range))
        } else {
            self.apply(dir, target)
        }
    }

    /// Has the relay serve as much of `held` as it can, and nothing else.
    pub(super) fn settle(&mut self, dir: &File, held: &mut Held) -> Result<(), Failed> {
        let lost = scoped::bind_again(held);
        let is_lost = |key: &MappingKey| lost.iter().any(|(lost, _why)| lost == key);
        let Difference { gone, new } = held.without(is_lost).beyond(&self.served);
        gone.iter().try_for_each(|range| self.remove(dir, range))?;
        for (key, why) in &lost {
            self.refused.add([*key].into_iter(), why);
        }
        let mut parts = vec![new];
        while let Some(part) = parts.pop() {
            match self.add(dir, &part) {
                Ok(()) => {}
                Err(Failed::Refused(Refusal { message: why, .. })) => match part.halves() {
                    Some((first, second)) => parts.extend([second, first]),
                    None => self.refused.add(part.ports().map(|port| port.key), &why),
                },
                Err(silent) => return Err(silent),
            }
        }
        self.refused.forget(|key| self.served.contains(key));
        Ok(())
    }

    fn add(&mut self, dir: &File, more: &Held) -> Result<(), Failed> {
        if more.is_empty() {
            return Ok(());
        }
        control::add(&mut Child::talk(dir)?, more, &more.sockets_beyond(&Held::default()))?;
        self.served = std::mem::take(&mut self.served).and(more);
        Ok(())
    }

    fn remove(&mut self, dir: &File, range: &Range) -> Result<(), Failed> {
        match control::remove(&mut Child::talk(dir)?, range) {
            // It has none of that name.
            Ok(()) | Err(Failed::Refused(_)) => {}
            silent => silent?,
        }
        let keys: BTreeSet<_> = range.keys().collect();
        self.served = self.served.without(|key| keys.contains(key));
        Ok(())
    }

    /// Has the relay serve exactly the ports of `target`. What it has served until now and refuses is left out.
    fn apply(&mut self, dir: &File, mut target: Held) -> Result<(), Failed> {
        loop {
            let sockets = target.sockets_beyond(&self.served);
            let refusal = match control::apply(&mut Child::talk(dir)?, &target, &sockets) {
                Err(Failed::Refused(refusal)) => refusal,
                applied => {
                    applied?;
                    self.served = target;
                    return Ok(());
                }
            };
            let changed = target.beyond(&self.served).new;
            let ranges = self.served.ranges();
            let mut kept = ranges.iter().filter(|range| range.keys().all(|key| !changed.contains(&key)));
            let is_about = |range: &&Range| refusal.mapping.as_deref() == Some(range.name().as_str());
            let Some(range) = kept.find(is_about) else {
                return Err(Failed::Refused(refusal));
            };
            let keys: BTreeSet<_> = range.keys().collect();
            target = target.without(|key| keys.contains(key));
            self.remove(dir, range)?;
            self.refused.add(keys.into_iter(), &refusal.message);
        }
    }
}
