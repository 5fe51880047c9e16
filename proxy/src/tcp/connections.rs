//! The connections of each worker, so that those of clients that become denied can be reset.
//!
//! Threads share nothing here: a connection is listed and searched on the worker that serves it.

use std::cell::RefCell;
use std::sync::Arc;

use rproxy_mapping::addr::Protocol;
use slab::Slab;
use tokio::task::JoinHandle;
use tracing::info;

use crate::runtime::worker::Workers;
use crate::state::client::ClientAddr;
use crate::state::record::{Ending, Record};
use crate::state::sources::{Place, Source};
use crate::state::stats::FailureKind;
use crate::state::task::Cut;
use crate::state::{MappingPolicy, MappingState, Target};
use crate::tcp::pipe;

thread_local! {
    /// The connections of a worker. One that was cut is gone before its task is.
    static SERVED: RefCell<Slab<Option<Connection>>> = const { RefCell::new(Slab::new()) };
}

struct Connection {
    client: Client,
    /// Its mapping, identified by the address of the state, which the connection keeps alive.
    mapping: *const MappingState,
    record: Option<Arc<Record>>,
    /// Its place among those of its source, if these are counted.
    place: Option<Box<Place>>,
    task: JoinHandle<()>,
}

impl Connection {
    fn belongs_to(&self, mapping: &Arc<MappingState>) -> bool {
        self.mapping == Arc::as_ptr(mapping)
    }
}

/// Whom a connection is for.
pub(super) enum Client {
    Known(ClientAddr),
    /// The peer is a proxy, whose header will tell. By then, the target may be another one ([`follow`]).
    Awaited(Arc<Target>),
}

/// Runs the future that `task` returns for a connection of a mapping, on this worker: that of a client, its record and its
/// place if there are any. It owns the entry; wrapping it in another future would double its size.
///
/// # Panics
/// Outside a tokio runtime.
pub(super) fn spawn<F>(
    (client, record, place): (Client, Option<Arc<Record>>, Option<Box<Place>>),
    mapping: &Arc<MappingState>,
    task: impl FnOnce(Entry) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    SERVED.with_borrow_mut(|served| {
        let slot = served.vacant_entry();
        let key = u32::try_from(slot.key()).expect("a process has fewer descriptors");
        let task = tokio::spawn(task(Entry(key)));
        slot.insert(Some(Connection { client, mapping: Arc::as_ptr(mapping), record, place, task }));
    });
}

/// A port of a mapping gets another target: the old one, and the new one.
pub(super) type Retargeted = (Arc<Target>, Arc<Target>);

/// Tells the workers what other targets mean for their connections: those that still wait for the header of their proxy
/// follow, those of each source are counted, if there is a limit for them now, and those whose clients are denied now are
/// reset. Called by the task that accepts connections, it finds all that
/// were accepted before. The returned future ends when all have been told.
pub(super) fn retarget(workers: &Workers, retargeted: Vec<Retargeted>) -> impl Future<Output = ()> + use<> {
    let has_other_access = |(old, new): &&Retargeted| old.policy.limits.access != new.policy.limits.access;
    let stricter = retargeted.iter().filter(has_other_access).map(|(_, new)| new.policy.clone());
    let mut stricter: Vec<_> = stricter.collect();
    // The ports of a mapping are adjacent.
    stricter.dedup_by(|one, other| Arc::ptr_eq(one, other));
    let counts_newly = |(old, new): &&Retargeted| {
        let [old, new] = [old, new].map(|target| target.policy.limits.max_connections_per_source.is_some());
        new && !old
    };
    let mut counted: Vec<_> =
        retargeted.iter().filter(counts_newly).map(|(_, new)| new.policy.state.clone()).collect();
    counted.dedup_by(|one, other| Arc::ptr_eq(one, other));
    let changes = Arc::new((Followed::new(retargeted), stricter, counted));
    on_all(workers, move || {
        let changes = changes.clone();
        async move {
            let (followed, stricter, counted) = &*changes;
            follow(followed);
            counted.iter().for_each(count_sources);
            stricter.iter().for_each(cut_denied);
        }
    })
}

/// Targets that were replaced, in the order of their addresses.
struct Followed(Vec<Retargeted>);

impl Followed {
    fn new(mut retargeted: Vec<Retargeted>) -> Self {
        retargeted.sort_unstable_by_key(|(old, _)| Arc::as_ptr(old).addr());
        Self(retargeted)
    }

    /// What has replaced `target`.
    fn by(&self, target: &Arc<Target>) -> Option<&Arc<Target>> {
        let addr = Arc::as_ptr(target).addr();
        let index = self.0.binary_search_by_key(&addr, |(old, _)| Arc::as_ptr(old).addr()).ok()?;
        Some(&self.0[index].1)
    }
}

/// The connections of this worker that still wait for the header of their proxy go to the new targets. Those that have
/// dialled stay with the old ones.
fn follow(followed: &Followed) {
    SERVED.with_borrow_mut(|served| {
        let connections = served.iter_mut().filter_map(|(_key, connection)| connection.as_mut());
        for connection in connections {
            if let Client::Awaited(target) = &mut connection.client
                && let Some(new) = followed.by(target)
            {
                *target = new.clone();
            }
        }
    });
}

/// Counts the connections of a mapping on this worker for their sources. Those that a proxy has yet to tell are counted
/// then.
fn count_sources(mapping: &Arc<MappingState>) {
    SERVED.with_borrow_mut(|served| {
        for connection in served.iter_mut().filter_map(|(_key, connection)| connection.as_mut()) {
            if connection.belongs_to(mapping)
                && let (Client::Known(client), None) = (&connection.client, &connection.place)
            {
                connection.place = Place::take(mapping, Source::of(*client), usize::MAX);
            }
        }
    });
}

/// Resets the connections of this worker whose clients `policy` denies. Those that a proxy has yet to tell are checked
/// then.
fn cut_denied(policy: &Arc<MappingPolicy>) {
    let is_denied = |client: &Client| match client {
        Client::Known(client) => policy.limits.access.refusal(client.ip()).is_some(),
        Client::Awaited(_) => false,
    };
    let denied = cut(Ending::Denied, |connection| {
        connection.belongs_to(&policy.state) && is_denied(&connection.client)
    });
    let denied = denied.len();
    if denied > 0 {
        info!(mapping = %policy.state.name, connections = denied, "resetting connections of clients that are denied now");
        (0..denied).for_each(|_| policy.state.stats.count_of(Protocol::Tcp, FailureKind::Denied));
    }
}

/// Resets all connections of a mapping, once none is accepted any more: until then, only the task that accepts them finds all
/// ([`cut_chosen`]). Their sockets are closed when the returned future ends.
pub(crate) fn reset_all(workers: &Workers, mapping: &Arc<MappingState>) -> impl Future<Output = ()> + use<> {
    let mapping = mapping.clone();
    cut_on_all(workers, Ending::Removed, move |connection| connection.belongs_to(&mapping))
}

/// Resets connections. Called by the task that accepts them, it finds all that it has accepted before, because each worker
/// gets both in their order. Their sockets are closed when the returned future ends.
pub(super) fn cut_chosen(workers: &Workers, chosen: Cut) -> impl Future<Output = ()> + use<> {
    let ending = match chosen {
        Cut::Recorded(_) => Ending::Cut,
        Cut::ConnectionsOf(_) => Ending::Removed,
    };
    cut_on_all(workers, ending, move |connection| match &chosen {
        Cut::Recorded(records) => {
            connection.record.as_ref().is_some_and(|record| records.contains(&record.id))
        }
        Cut::ConnectionsOf(mapping) => connection.belongs_to(mapping),
    })
}

/// Resets the `chosen` connections of all workers because of `ending`. Their sockets are closed when the returned future
/// ends; they are reset even if it is not awaited.
fn cut_on_all<F>(workers: &Workers, ending: Ending, chosen: F) -> impl Future<Output = ()> + use<F>
where
    F: Fn(&Connection) -> bool + Clone + Send + 'static,
{
    on_all(workers, move || {
        let chosen = chosen.clone();
        async move {
            for task in cut(ending, |connection| chosen(connection)) {
                // It has been cancelled, or had finished before.
                drop(task.await);
            }
        }
    })
}

/// Runs the future that `work` returns on each worker, after what it was told before. The returned future ends when all
/// have; they run even if it is not awaited.
fn on_all<F, W: Fn() -> F>(workers: &Workers, work: W) -> impl Future<Output = ()> + use<F, W>
where
    F: Future<Output = ()> + Send + 'static,
{
    let tasks: Vec<_> = workers.runtimes().into_iter().map(|runtime| runtime.spawn(work())).collect();
    async move {
        for task in tasks {
            // A panic has been reported where it happened.
            drop(task.await);
        }
    }
}

/// Resets the `chosen` connections of this worker because of `ending`, and returns their tasks.
fn cut(ending: Ending, chosen: impl Fn(&mut Connection) -> bool) -> Vec<JoinHandle<()>> {
    let cut: Vec<Connection> = SERVED.with_borrow_mut(|served| {
        served.iter_mut().filter_map(|(_key, connection)| connection.take_if(&chosen)).collect()
    });
    cut.iter().filter_map(|connection| connection.record.as_ref()).for_each(|record| record.end(ending));
    let tasks: Vec<_> = cut.into_iter().map(|connection| connection.task).collect();
    // This closes their sockets, which resets unfinished connections.
    tasks.iter().for_each(JoinHandle::abort);
    tasks
}

/// The key of a connection in its worker's list, removed when dropped.
#[derive(Debug)]
pub(super) struct Entry(u32);

impl Entry {
    /// Lists the connection as that of `client`, whom its proxy has told. Returns its target, which may be another one than
    /// when it was accepted.
    pub(super) fn set_client(&self, client: ClientAddr) -> Option<Arc<Target>> {
        let client = Client::Known(client);
        let before = SERVED.with_borrow_mut(|served| {
            let connection = served.get_mut(self.0 as usize)?.as_mut()?;
            Some(std::mem::replace(&mut connection.client, client))
        });
        match before {
            Some(Client::Awaited(target)) => Some(target),
            Some(Client::Known(_)) | None => None,
        }
    }
}

impl Entry {
    /// Keeps the place of the connection among those of its source.
    pub(super) fn set_place(&self, place: Box<Place>) {
        SERVED.with_borrow_mut(|served| {
            if let Some(Some(connection)) = served.get_mut(self.0 as usize) {
                connection.place = Some(place);
            }
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // When a thread ends, the list may already be gone.
        let removed = SERVED.try_with(|served| {
            let mut served = served.borrow_mut();
            (served.try_remove(self.0 as usize), served.is_empty())
        });
        if let Ok((_connection, true)) = removed {
            // Pipes of idle processes would count against the budget of their user.
            pipe::close_kept();
        }
    }
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::PortMapping;
    use rproxy_mapping::access::{AccessList, parse_network};
    use rproxy_mapping::limits::Limits;

    use super::*;
    use crate::runtime::new_runtime;

    #[test]
    fn connections_of_denied_clients_are_cut_and_no_others() {
        let [one, other] = [Arc::<MappingState>::default(), Arc::default()];
        let [denied, admitted]: [ClientAddr; 2] =
            ["192.0.2.7:1", "192.0.2.8:1"].map(|addr| ClientAddr::Inet(addr.parse().unwrap()));
        let access = AccessList { deny: vec![parse_network("192.0.2.7").unwrap()], ..AccessList::default() };
        let limits = Limits { access, ..Limits::default() };
        let policy = Arc::new(MappingPolicy { limits: limits.into(), state: one.clone() });
        new_runtime().unwrap().block_on(async {
            let (ended, mut ends) = tokio::sync::mpsc::unbounded_channel();
            for (name, client, mapping) in
                [("cut", denied, &one), ("admitted", admitted, &one), ("elsewhere", denied, &other)]
            {
                let guard = OnDrop(name, ended.clone());
                spawn((Client::Known(client), None, None), mapping, |entry| async move {
                    std::future::pending::<()>().await;
                    drop((guard, entry));
                });
            }
            tokio::task::yield_now().await;
            cut_denied(&policy);
            assert_eq!(ends.recv().await, Some("cut"));
            ends.try_recv().unwrap_err();
            assert_eq!(one.stats.failure_kind(FailureKind::Denied), 1);
            let left = SERVED.with_borrow(|served| {
                (served.len(), served.iter().filter(|(_key, connection)| connection.is_some()).count())
            });
            assert_eq!(left, (2, 2));
        });
    }

    #[test]
    fn a_client_that_a_proxy_has_yet_to_tell_is_subject_to_what_changes_meanwhile() {
        let state = Arc::<MappingState>::default();
        let client = ClientAddr::Inet("192.0.2.7:1".parse().unwrap());
        let target = |deny: &str, backend: &str| {
            let access = AccessList { deny: vec![parse_network(deny).unwrap()], ..AccessList::default() };
            let limits = Limits { access, ..Limits::default() };
            let policy = Arc::new(MappingPolicy { limits: limits.into(), state: state.clone() });
            let (host, backend) = ("127.0.0.1:80".parse().unwrap(), backend.parse().unwrap());
            let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
            Arc::new(Target::new(port_mapping, policy))
        };
        let replace = |old: &Arc<Target>, new: &Arc<Target>| {
            follow(&Followed::new(vec![(new.clone(), old.clone()), (old.clone(), new.clone())]));
        };
        new_runtime().unwrap().block_on(async {
            let (tell, told) = tokio::sync::oneshot::channel();
            let (report, mut reported) = tokio::sync::mpsc::unbounded_channel();
            let first = target("198.51.100.0/24", "192.0.2.1:80");
            spawn((Client::Awaited(first.clone()), None, None), &state, |entry| async move {
                told.await.unwrap();
                report.send(entry.set_client(client).unwrap()).unwrap();
                std::future::pending::<()>().await;
                drop((report, entry));
            });
            tokio::task::yield_now().await;
            let second = target("::/0", "192.0.2.2:80");
            replace(&first, &second);
            cut_denied(&second.policy);
            let third = target("192.0.2.7", "192.0.2.3:80");
            replace(&second, &third);
            cut_denied(&third.policy);
            tell.send(()).unwrap();
            let served = reported.recv().await.unwrap();
            assert!(Arc::ptr_eq(&served, &third), "the last one holds");
            assert_eq!(state.stats.failure_kind(FailureKind::Denied), 0, "it is counted by who asks");
            cut_denied(&second.policy);
            cut_denied(&third.policy);
            assert!(reported.recv().await.is_none(), "from now on it is cut");
        });
    }

    struct OnDrop(&'static str, tokio::sync::mpsc::UnboundedSender<&'static str>);

    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.1.send(self.0).ok();
        }
    }
}
