//! The names of backends: what they stand for, looked up again when that is no longer valid, or when connections fail.
//!
//! A process of its own does the looking up (`resolver`); the launcher starts it with the first question. So names are
//! looked up in the same way before and after confinement.

pub(crate) mod connection;
mod conversation;
mod known;
mod message;
pub(crate) mod resolver;
mod shares;
pub(crate) mod suspects;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use rproxy_mapping::Mapping;
use rproxy_mapping::backend::{BackendHost, HostName, NoAddress};
use rproxy_mapping::name::Name as MappingName;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use self::connection::{Connection, Ended, Event};
use self::known::Known;
use self::message::{Answer, Question};
use crate::bind::Bound;
use crate::log::limit::LogLimit;
use crate::loops::whereabouts::{Destination, Whereabouts};

/// How long the start, or a change, waits for names. Those that are not known by then are served, and resolve later.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the names of backends stand for.
#[derive(Debug, Default)]
pub(crate) struct Names {
    resolver: Option<Connection>,
    known: HashMap<HostName, Known>,
    /// All names by when they are due.
    schedule: BTreeSet<(Instant, HostName)>,
    /// Those that stand for other addresses now, as nobody was told yet.
    changed: HashSet<HostName>,
    /// Those that do not resolve any more, which is not logged yet.
    untold: HashSet<HostName>,
    /// How often a name has begun to resolve, or ceased to.
    turns: u64,
}

/// A mapping that must not be served yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{mapping}: {source}")]
pub struct NamesError {
    /// The mapping.
    pub mapping: MappingName,
    /// Which name, and why.
    pub source: UnresolvedError,
}

/// A name that does not resolve, though it has to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name {host} {problem}; without require_resolved, clients are refused until that changes")]
pub struct UnresolvedError {
    /// The name.
    pub host: HostName,
    /// Why it leads nowhere.
    pub problem: String,
}

impl Names {
    /// Looks names up by resolvers that the launcher at the other end of this socket starts.
    pub(crate) fn new(launcher: Option<StdUnixStream>) -> Self {
        Self { resolver: launcher.map(Connection::by), ..Self::default() }
    }

    /// Has `mapping` lead to what its name is known to stand for.
    pub(crate) fn resolved(&self, mapping: &Mapping) -> Mapping {
        let known = mapping.backend().name().and_then(|name| self.known.get(name));
        known.map_or_else(|| mapping.clone(), |known| mapping.resolved(&known.addresses))
    }

    /// Has `mappings` lead to what their names stand for, before they are served.
    ///
    /// # Errors
    /// [`NamesError`] for the first mapping whose name has to resolve, and does not.
    pub(crate) async fn resolve(&mut self, mappings: &mut [Mapping]) -> Result<(), NamesError> {
        self.look_up(names_of(mappings.iter())).await;
        mappings.iter_mut().for_each(|mapping| *mapping = self.resolved(mapping));
        self.refuse_unresolved_of(mappings.iter())
    }

    /// Refuses these mappings if the name of one of them has to resolve at once, and does not.
    ///
    /// # Errors
    /// [`NamesError`] for the first such mapping.
    pub(crate) fn refuse_unresolved_of<'a>(
        &self,
        mut mappings: impl Iterator<Item = &'a Mapping>,
    ) -> Result<(), NamesError> {
        mappings.try_for_each(|mapping| {
            let refused = self.refuse_unresolved(mapping);
            refused.map_err(|source| NamesError { mapping: mapping.name(), source })
        })
    }

    /// Has mappings that another process has served lead to what their names stand for. What it knew is valid until there is
    /// an answer, so that flows stay where they are.
    pub(crate) async fn resolve_bound(&mut self, bound: &mut [Bound]) {
        let now = Instant::now();
        for Bound { mapping, .. } in &*bound {
            if let BackendHost::Name(host) = mapping.backend() {
                self.add(host.name(), Known::of(host.addresses().clone(), now));
            }
        }
        self.look_up(names_of(bound.iter().map(|bound| &bound.mapping))).await;
        for bound in bound.iter_mut().filter(|bound| bound.mapping.backend().name().is_some()) {
            bound.lead_to(self.resolved(&bound.mapping));
        }
        Bound::leave_out_loops(bound);
    }

    /// Where the addresses of a name lead.
    pub(crate) fn whereabouts(&self, name: &HostName) -> Whereabouts {
        let Some(Known { addresses, own, .. }) = self.known.get(name) else { return Whereabouts::default() };
        let of = |ip: &IpAddr| if own.contains(ip) { Destination::Here } else { Destination::Elsewhere };
        Whereabouts::known(addresses.iter().map(|ip| ((*ip).into(), of(ip))))
    }

    /// Whether nothing is looked up.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Why the last look-up of the name of `mapping` has failed, if it has one and that has.
    pub(crate) fn failure_of(&self, mapping: &Mapping) -> Option<&str> {
        self.known.get(mapping.backend().name()?)?.failure.as_deref()
    }

    /// Whether the name of `mapping` resolves now, to an address that can be used; `None` if it has none.
    pub(crate) fn is_resolved(&self, mapping: &Mapping) -> Option<bool> {
        let BackendHost::Name(host) = mapping.backend() else { return None };
        Some(self.failure_of(mapping).is_none() && !host.addresses().is_empty())
    }

    /// A number that changes whenever a name begins to resolve, or ceases to.
    pub(crate) fn turns(&self) -> u64 {
        self.turns
    }

    /// Refuses `mapping` if its name has to resolve at once, and does not.
    ///
    /// # Errors
    /// [`UnresolvedError`]
    pub(crate) fn refuse_unresolved(&self, mapping: &Mapping) -> Result<(), UnresolvedError> {
        let BackendHost::Name(host) = mapping.backend() else { return Ok(()) };
        if !mapping.limits().require_resolved || !host.addresses().is_empty() {
            return Ok(());
        }
        let known = self.known.get(host.name());
        let problem = match (host.no_address(), known) {
            (Some(NoAddress::Unresolved) | None, Some(Known { failure: Some(failure), .. })) => {
                format!("does not resolve: {failure}")
            }
            (Some(NoAddress::Unresolved) | None, _) => "does not resolve: no answer has come yet".to_owned(),
            (Some(why), _) => why.to_string(),
        };
        Err(UnresolvedError { host: host.name().clone(), problem })
    }

    /// Looks up those of these names that stand for nothing yet, and waits for the answers, but not for long, as for those of
    /// names that are to be [renewed](Self::renew).
    pub(crate) async fn look_up(&mut self, names: HashSet<HostName>) {
        let start = Instant::now();
        for name in &names {
            self.add(name, Known::new(start));
            if self.known.get(name).is_some_and(|known| known.addresses.is_empty()) {
                self.update(name, |known| known.want(start));
            }
        }
        let mut open: Vec<HostName> = names.into_iter().collect();
        let answered = async {
            loop {
                let is_open = |name: &HostName| self.known.get(name).is_some_and(|known| known.is_wanted);
                while open.pop_if(|name| !is_open(name)).is_some() {}
                if open.is_empty() {
                    return;
                }
                self.step().await;
            }
        };
        // The others resolve later.
        timeout(PATIENCE, answered).await.ok();
    }

    /// Looks a name up soon, whatever its time to live.
    pub(crate) fn renew(&mut self, name: &HostName) {
        let now = Instant::now();
        self.update(name, |known| known.want(now));
    }

    /// Looks all names up soon.
    pub(crate) fn renew_all(&mut self) {
        let names: Vec<HostName> = self.known.keys().cloned().collect();
        names.iter().for_each(|name| self.renew(name));
    }

    /// Adds what is known of a name, unless something is.
    fn add(&mut self, name: &HostName, known: Known) {
        if !self.known.contains_key(name) {
            self.schedule.extend(known.due.map(|due| (due, name.clone())));
            self.known.insert(name.clone(), known);
        }
    }

    /// Changes what is known of a name, if it is in use, and with that, when it is due.
    fn update<T>(&mut self, name: &HostName, change: impl FnOnce(&mut Known) -> T) -> Option<T> {
        let known = self.known.get_mut(name)?;
        let before = known.due;
        let result = change(known);
        if known.due != before {
            if let Some(before) = before {
                self.schedule.remove(&(before, name.clone()));
            }
            self.schedule.extend(known.due.map(|due| (due, name.clone())));
        }
        Some(result)
    }

    /// Forgets all names but these.
    pub(crate) fn keep(&mut self, names: &HashSet<HostName>) {
        self.known.retain(|name, _known| names.contains(name));
        self.schedule.retain(|(_due, name)| names.contains(name));
        self.changed.retain(|name| names.contains(name));
        self.untold.retain(|name| names.contains(name));
    }

    /// Waits until names stand for other addresses than before, and returns them. Logs which do not resolve. Dropped at any
    /// point, nothing is lost.
    pub(crate) async fn changed(&mut self) -> HashSet<HostName> {
        loop {
            self.tell();
            if !self.changed.is_empty() {
                return std::mem::take(&mut self.changed);
            }
            self.step().await;
        }
    }

    /// Asks what is due, or takes an answer.
    async fn step(&mut self) {
        let is_full = self.ask_what_is_due();
        // What could not be asked is asked once the resolver takes more.
        let due = self.schedule.first().map(|(due, _name)| *due).filter(|_due| !is_full);
        tokio::select! {
            biased;
            event = next(&mut self.resolver, is_full) => match event {
                Ok(Event::Answer(answer)) => self.take(answer),
                Ok(Event::Ready) => {}
                Ok(Event::Ended(ended)) => self.replace_resolver(&ended),
                Err(error) => self.lose_resolver(&error),
            },
            () = suspects::added() => self.doubt(&suspects::take()),
            () = at(due) => {}
        }
    }

    /// Asks what is due. Returns whether there is more than the resolver takes now.
    fn ask_what_is_due(&mut self) -> bool {
        let now = Instant::now();
        while let Some((_due, name)) = self.schedule.first().filter(|(due, _name)| *due <= now).cloned() {
            let share = self.known.get(&name).map_or_else(Default::default, Known::share);
            let asked = match &mut self.resolver {
                Some(resolver) => resolver.ask(&Question { name: name.to_string(), share }, now),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            match asked {
                Ok(()) => {
                    self.update(&name, |known| known.await_answer(now));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if self.resolver.is_some() => self.lose_resolver(&error),
                Err(error) => self.fail(&name, &format!("the resolver cannot be asked: {error}"), now),
            }
        }
        false
    }

    /// Records an answer.
    fn take(&mut self, Answer { name, result, share }: Answer) {
        // It may not be in use any more.
        let Ok(name) = name.parse::<HostName>() else { return };
        let now = Instant::now();
        self.update(&name, |known| known.belong(share));
        let found = match result {
            Ok(found) => found,
            Err(why) => return self.fail(&name, &why, now),
        };
        let had_failed = self.known.get(&name).is_some_and(|known| known.failure.is_some());
        self.turns += u64::from(had_failed);
        if had_failed && !self.untold.remove(&name) {
            info!(%name, "the name resolves");
        }
        if self.update(&name, |known| known.succeed(found, now)) == Some(true) {
            self.changed.insert(name);
        }
    }

    /// Records that a name could not be looked up.
    fn fail(&mut self, name: &HostName, why: &str, now: Instant) {
        if self.update(name, |known| known.fail(why, now)) == Some(true) {
            self.untold.insert(name.clone());
            self.turns += 1;
        }
    }

    /// Logs which names do not resolve, the first time of several.
    fn tell(&mut self) {
        for name in std::mem::take(&mut self.untold) {
            let Some(Known { addresses, failure: Some(reason), .. }) = self.known.get(&name) else {
                continue;
            };
            match addresses.is_empty() {
                true => {
                    warn!(%name, %reason, "the name does not resolve; clients of its mappings are refused until it does")
                }
                false => {
                    warn!(%name, %reason, "the name does not resolve any more; its mappings keep its addresses")
                }
            }
        }
    }

    /// Has names looked up again that may stand for others by now.
    fn doubt(&mut self, names: &HashSet<HostName>) {
        for name in names {
            self.update(name, Known::doubt);
        }
    }

    /// Has what was asked in vain asked again, by another resolver. If not even the first question was answered, that waits.
    fn replace_resolver(&mut self, Ended { why, was_heard }: &Ended) {
        static REPLACED: LogLimit = LogLimit::new();

        if let Some(suppressed) = REPLACED.permit() {
            warn!(%why, suppressed, "another process looks names up from now on");
        }
        let now = Instant::now();
        for name in self.awaited() {
            if *was_heard {
                self.update(&name, |known| known.ask_again(now));
            } else {
                self.fail(&name, &why.to_string(), now);
            }
        }
    }

    fn lose_resolver(&mut self, error: &io::Error) {
        warn!(%error, "names are not looked up any more, as the launcher is gone; they keep their addresses");
        self.resolver = None;
        let now = Instant::now();
        self.awaited().iter().for_each(|name| self.fail(name, "the resolver is gone", now));
    }

    /// The names that were asked for, and not answered yet.
    fn awaited(&self) -> Vec<HostName> {
        let awaited = self.known.iter().filter(|(_name, known)| known.due.is_none());
        awaited.map(|(name, _known)| name.clone()).collect()
    }
}

/// The names of the backends of these mappings.
pub(crate) fn names_of<'a>(mappings: impl Iterator<Item = &'a Mapping>) -> HashSet<HostName> {
    mappings.filter_map(|mapping| mapping.backend().name()).cloned().collect()
}

/// Waits for what happens to the resolver; forever if there is none.
async fn next(resolver: &mut Option<Connection>, is_full: bool) -> io::Result<Event> {
    match resolver {
        Some(resolver) => resolver.next(is_full).await,
        None => std::future::pending().await,
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::Ipv4Addr;
    use std::os::fd::AsFd;
    use std::thread;

    use rproxy_sys::pass::send_descriptors;

    use super::message::Found;
    use super::*;
    use crate::runtime::new_runtime;

    /// Names whose resolver has an answer of an hour for each question: the number of questions so far.
    fn counting() -> Names {
        let (ours, launcher) = StdUnixStream::pair().unwrap();
        thread::spawn(move || {
            (&launcher).read_exact(&mut [0]).unwrap();
            let (resolver, theirs) = StdUnixStream::pair().unwrap();
            send_descriptors(launcher.as_fd(), &[theirs.as_fd()]).unwrap();
            drop(theirs);
            let questions = BufReader::new(resolver.try_clone().unwrap()).lines();
            for (number, line) in (1..).zip(questions.map_while(Result::ok)) {
                let Question { name, share } = serde_json::from_str(&line).unwrap();
                let addresses = vec![Ipv4Addr::from_bits(number).into()];
                let result = Ok(Found { addresses, own: Vec::new(), seconds: 3600 });
                let line = serde_json::to_string(&Answer { name, result, share }).unwrap() + "\n";
                if (&resolver).write_all(line.as_bytes()).is_err() {
                    return;
                }
            }
        });
        Names::new(Some(ours))
    }

    fn set(names: &[&str]) -> HashSet<HostName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_learnt_while_a_change_waits_is_told_later() {
        new_runtime().unwrap().block_on(async {
            let mut names = counting();
            names.look_up(set(&["a"])).await;
            assert_eq!(names.changed().await, set(&["a"]));
            names.renew(&"a".parse().unwrap());
            names.look_up(set(&["b"])).await;
            names.look_up(set(&["a"])).await;
            assert_eq!(names.changed().await, set(&["a", "b"]));
            assert_eq!(names.known.values().filter(|known| known.is_wanted).count(), 0);
            names.keep(&set(&["b"]));
            assert_eq!((names.known.len(), names.schedule.len()), (1, 1));
        });
    }

    #[test]
    fn more_names_are_asked_for_than_both_sockets_hold() {
        new_runtime().unwrap().block_on(async {
            let mut names = counting();
            let many = (0..20_000).map(|number| format!("host-{number}.internal").parse().unwrap());
            let mut missing: HashSet<HostName> = many.collect();
            missing.iter().for_each(|name| names.add(name, Known::new(Instant::now())));
            while !missing.is_empty() {
                for name in names.changed().await {
                    assert!(missing.remove(&name), "{name} is told once");
                }
            }
        });
    }
}
