//! The names of backends: what they stand for, looked up again when that is no longer valid, or when connections fail.
//!
//! A process of its own does the looking up (`resolver`); the launcher starts it with the first question. So names are
//! looked up in the same way before and after confinement.

mod conversation;
mod message;
pub(crate) mod resolver;
pub(crate) mod suspects;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use rproxy_mapping::Mapping;
use rproxy_mapping::backend::{BackendHost, HostName};
use rproxy_mapping::name::Name as MappingName;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use self::conversation::{Conversation, heard};
use self::message::{Answer, Found};
use crate::bind::{Bound, BoundPort};
use crate::loops::whereabouts::{Destination, Whereabouts};

/// How long the start, or a change, waits for names. Those that are not known by then are served, and resolve later.
const PATIENCE: Duration = Duration::from_secs(5);

/// The shortest time between two questions for a name, whatever its time to live is and however many connections fail.
const SHORTEST: Duration = Duration::from_secs(1);

/// The longest time after a failure until a name is looked up again.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// After this time, a question counts as lost: the resolver gives up earlier (`options timeout` and `attempts`,
/// resolv.conf(5)).
const LOST: Duration = Duration::from_secs(60);

/// What the names of backends stand for.
#[derive(Debug, Default)]
pub(crate) struct Names {
    resolver: Option<Conversation>,
    known: HashMap<HostName, Known>,
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
#[error(
    "the name {host} does not resolve: {reason}; without require_resolved, clients are refused until it does"
)]
pub struct UnresolvedError {
    /// The name.
    pub host: HostName,
    /// Why.
    pub reason: String,
}

/// What is known of a name.
#[derive(Debug)]
struct Known {
    /// Its addresses as of the last answer that had some; none before.
    addresses: Arc<[IpAddr]>,
    /// Those of them that are of this machine, which a confined process cannot find out.
    own: Vec<IpAddr>,
    /// Why the last question has failed, if it has.
    failure: Option<String>,
    /// Failures since the last success.
    failures: u32,
    /// When it was asked for last.
    asked: Instant,
    /// When it is asked for again; while an answer is awaited, when that counts as lost.
    due: Instant,
    is_awaited: bool,
}

impl Names {
    /// Looks names up over this socket, at whose other end a resolver is started when it is needed.
    pub(crate) fn new(resolver: Option<StdUnixStream>) -> Self {
        Self { resolver: resolver.map(Conversation::Idle), known: HashMap::new() }
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
        for mapping in mappings {
            *mapping = self.resolved(mapping);
            self.refuse_unresolved(mapping)
                .map_err(|source| NamesError { mapping: mapping.name(), source })?;
        }
        Ok(())
    }

    /// Has mappings that another process has served lead to what their names stand for. What it knew is valid until there is
    /// an answer, so that flows stay where they are.
    pub(crate) async fn resolve_bound(&mut self, bound: &mut [Bound]) {
        let now = Instant::now();
        for Bound { mapping, .. } in &*bound {
            if let BackendHost::Name(host) = mapping.backend() {
                let known = Known { addresses: host.addresses().clone(), ..Known::new(now) };
                self.known.entry(host.name().clone()).or_insert(known);
            }
        }
        self.look_up(names_of(bound.iter().map(|bound| &bound.mapping))).await;
        for Bound { mapping, ports, .. } in
            bound.iter_mut().filter(|bound| bound.mapping.backend().name().is_some())
        {
            *mapping = self.resolved(mapping);
            let first = mapping.backend().first_ip();
            for BoundPort { port_mapping, .. } in ports {
                *port_mapping = port_mapping.at(first.ip());
            }
        }
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
        let reason = match known {
            Some(Known { addresses, .. }) if !addresses.is_empty() => {
                "none of its addresses can be used from source"
            }
            Some(Known { failure: Some(failure), .. }) => failure,
            _ => "no answer has come yet",
        };
        Err(UnresolvedError { host: host.name().clone(), reason: reason.to_owned() })
    }

    /// Looks up those of these names that stand for nothing yet, and waits for the answers, but not for long.
    pub(crate) async fn look_up(&mut self, names: HashSet<HostName>) {
        let start = Instant::now();
        if names.is_empty() {
            return;
        }
        for name in &names {
            let known = self.known.entry(name.clone()).or_insert_with(|| Known::new(start));
            if known.addresses.is_empty() && !known.is_awaited {
                known.due = start;
            }
        }
        let answered = async {
            while self.known.iter().any(|(name, known)| names.contains(name) && known.is_open(start)) {
                self.step().await;
            }
        };
        // The others resolve later.
        timeout(PATIENCE, answered).await.ok();
    }

    /// Forgets all names but these.
    pub(crate) fn keep(&mut self, names: &HashSet<HostName>) {
        self.known.retain(|name, _known| names.contains(name));
    }

    /// Waits until a name stands for other addresses than before, and returns it. Dropped at any point, nothing is lost.
    pub(crate) async fn changed(&mut self) -> HostName {
        loop {
            if let Some(name) = self.step().await {
                return name;
            }
        }
    }

    /// Asks what is due, or takes an answer. Returns the name that stands for others now.
    async fn step(&mut self) -> Option<HostName> {
        self.ask_what_is_due().await;
        let due = self.known.values().map(|known| known.due).min();
        tokio::select! {
            biased;
            answer = heard(&mut self.resolver) => match answer {
                Ok(answer) => self.take(answer),
                Err(error) => {
                    self.lose_resolver(&error);
                    None
                }
            },
            () = suspects::added() => {
                self.doubt(&suspects::take());
                None
            }
            () = at(due) => None,
        }
    }

    async fn ask_what_is_due(&mut self) {
        let now = Instant::now();
        for (name, known) in &mut self.known {
            if known.due > now {
                continue;
            }
            if known.is_awaited {
                known.fail("the resolver has not answered", now);
                continue;
            }
            let asked = match &mut self.resolver {
                Some(resolver) => resolver.ask(name).await,
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            match asked {
                Ok(()) => known.await_answer(now),
                Err(error) => known.fail(&format!("the resolver cannot be asked: {error}"), now),
            }
            known.tell(name);
        }
    }

    /// Records an answer. Returns its name if it stands for others now.
    fn take(&mut self, Answer { name, result }: Answer) -> Option<HostName> {
        let name: HostName = name.parse().ok()?;
        // It may not be in use any more.
        let known = self.known.get_mut(&name)?;
        let now = Instant::now();
        match result {
            Ok(found) => known.succeed(&name, found, now).then_some(name),
            Err(why) => {
                known.fail(&why, now);
                known.tell(&name);
                None
            }
        }
    }

    /// Has names looked up again that may stand for others by now.
    fn doubt(&mut self, names: &HashSet<HostName>) {
        for name in names {
            if let Some(known) = self.known.get_mut(name).filter(|known| !known.is_awaited) {
                known.due = known.due.min(known.asked + SHORTEST);
            }
        }
    }

    fn lose_resolver(&mut self, error: &io::Error) {
        warn!(%error, "names are not looked up any more, as the launcher is gone; they keep their addresses");
        self.resolver = None;
        let now = Instant::now();
        self.known
            .values_mut()
            .filter(|known| known.is_awaited)
            .for_each(|known| known.fail("the resolver is gone", now));
    }
}

impl Known {
    fn new(now: Instant) -> Self {
        let addresses = Arc::new([]);
        Self {
            addresses,
            own: Vec::new(),
            failure: None,
            failures: 0,
            asked: now,
            due: now,
            is_awaited: false,
        }
    }

    /// Whether it stands for nothing, and an answer is awaited, or will be as it was due at `start`.
    fn is_open(&self, start: Instant) -> bool {
        self.addresses.is_empty() && (self.is_awaited || self.due <= start)
    }

    fn await_answer(&mut self, now: Instant) {
        self.is_awaited = true;
        self.asked = now;
        self.due = now + LOST;
    }

    /// Records addresses. Returns whether they are others than before.
    fn succeed(&mut self, name: &HostName, Found { addresses, own, seconds }: Found, now: Instant) -> bool {
        if self.failure.take().is_some() {
            info!(%name, "the name resolves");
        }
        (self.is_awaited, self.failures) = (false, 0);
        self.due = now + Duration::from_secs(seconds).max(SHORTEST);
        self.own = own;
        let (before, after): (HashSet<_>, HashSet<_>) =
            (self.addresses.iter().collect(), addresses.iter().collect());
        if before == after {
            return false;
        }
        self.addresses = with_first(addresses, self.addresses.first().copied()).into();
        true
    }

    fn fail(&mut self, why: &str, now: Instant) {
        self.is_awaited = false;
        let delay = SHORTEST.saturating_mul(1 << self.failures.min(5)).min(LONGEST_RETRY);
        self.failures = self.failures.saturating_add(1);
        self.due = now + delay;
        self.failure = Some(why.to_owned());
    }

    /// Logs the first failure of several.
    fn tell(&self, name: &HostName) {
        let Some(reason) = self.failure.as_ref().filter(|_why| self.failures == 1) else { return };
        match self.addresses.is_empty() {
            true => {
                warn!(%name, %reason, "the name does not resolve; clients of its mappings are refused until it does")
            }
            false => {
                warn!(%name, %reason, "the name does not resolve any more; its mappings keep its addresses")
            }
        }
    }
}

/// The names of the backends of these mappings.
pub(crate) fn names_of<'a>(mappings: impl Iterator<Item = &'a Mapping>) -> HashSet<HostName> {
    mappings.filter_map(|mapping| mapping.backend().name()).cloned().collect()
}

/// These addresses with `first` in front, if it is one of them: flows stay where they are as long as they can.
fn with_first(mut addresses: Vec<IpAddr>, first: Option<IpAddr>) -> Vec<IpAddr> {
    let place = first.and_then(|first| addresses.iter().position(|ip| *ip == first));
    if let Some(place) = place {
        addresses[..=place].rotate_right(1);
    }
    addresses
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
