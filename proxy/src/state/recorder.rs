//! The records of all live connections and flows of a process, and the access log that they end in.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rproxy_mapping::addr::HostSocketAddr;
use slab::Slab;

use crate::log::access::AccessLog;
use crate::state::access_line;
use crate::state::client::ClientAddr;
use crate::state::record::{Ending, Record, RecordedPort};

/// The records are in as many shards. Threads use them in turn, so that workers rarely wait for each other.
const SHARDS: usize = 16;

/// The number of records whose memory an empty shard keeps.
const KEPT: usize = 64;

thread_local! {
    /// The shard of the records that this thread opens.
    static SHARD: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS
    };
}

/// Records connections and flows. A process in which nobody can ask for them has none.
#[derive(Debug)]
pub(crate) struct Recorder {
    shards: [Shard; SHARDS],
    access_log: Option<Arc<AccessLog>>,
    /// Whether connections and flows are recorded that the access log leaves out.
    records_all: bool,
}

/// Aligned to a pair of cache lines, which are fetched together, so that the locks of two workers share none.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<Live>);

/// The live records of a shard.
#[derive(Debug, Default)]
struct Live {
    records: Slab<Arc<Record>>,
    /// How many were opened so far.
    opened: u64,
}

impl Recorder {
    /// A recorder without records. `records_all` says whether anybody but the access log asks
    /// for them: the control socket, the metrics, or a log at debug level.
    pub(crate) fn new(access_log: Option<Arc<AccessLog>>, records_all: bool) -> Self {
        Self { shards: Default::default(), access_log, records_all }
    }

    /// The log of what has ended, if there is one.
    pub(crate) fn access_log(&self) -> Option<&Arc<AccessLog>> {
        self.access_log.as_ref()
    }

    /// Records a connection or flow, if anybody wants to know of it.
    pub(super) fn open<H: Into<HostSocketAddr>>(
        &self,
        port: RecordedPort,
        peer: ClientAddr,
        host: impl FnOnce() -> H,
    ) -> Option<Arc<Record>> {
        if !self.records_all && self.log_of(&port).is_none() {
            return None;
        }
        let (peer, host) = (peer.canonical(), host().into());
        let index = SHARD.with(|shard| *shard);
        let mut live = self.shards[index].lock();
        live.opened += 1;
        let id = live.opened * SHARDS as u64 + index as u64;
        let entry = live.records.vacant_entry();
        let record = Arc::new(Record::new((id, entry.key()), peer, host, port));
        entry.insert(record.clone());
        Some(record)
    }

    /// Ends a record: it is not live any more, and the access log gets its line.
    pub(super) fn close(&self, record: &Record) {
        if self.take(record) {
            self.log(record);
        }
    }

    /// Removes a record, unless that has been done. After a burst, its memory is released.
    fn take(&self, record: &Record) -> bool {
        let records = &mut self.shard_of(record.id).records;
        let is_live = records.get(record.slot).is_some_and(|live| live.id == record.id);
        if is_live {
            records.remove(record.slot);
        }
        if records.is_empty() && records.capacity() > KEPT {
            *records = Slab::new();
        }
        is_live
    }

    /// Ends the records that are left when the process ends, and waits a moment for the access log to be written.
    pub(crate) fn finish(&self) {
        for shard in &self.shards {
            let left = std::mem::take(&mut shard.lock().records);
            for (_slot, record) in left {
                record.end(Ending::Drain);
                self.log(&record);
            }
        }
        self.access_log.iter().for_each(|log| log.finish());
    }

    /// Writes the line of a client that is not served.
    pub(super) fn log_refusal(&self, client: ClientAddr, port: &RecordedPort, ending: Ending) {
        if let Some(log) = self.log_of(port) {
            log.write(|line| access_line::write_refusal(line, log.format(), client, port, ending));
        }
    }

    fn log(&self, record: &Record) {
        if let Some(log) = self.log_of(&record.port) {
            log.write(|line| access_line::write(line, log.format(), record));
        }
    }

    fn log_of(&self, port: &RecordedPort) -> Option<&AccessLog> {
        self.access_log.as_deref().filter(|_log| port.is_logged)
    }

    /// What is live now, in the order of opening.
    pub(crate) fn live(&self) -> Vec<Arc<Record>> {
        let mut live = Vec::new();
        for shard in &self.shards {
            live.extend(shard.lock().records.iter().map(|(_slot, record)| record.clone()));
        }
        live.sort_unstable_by_key(|record| (record.opened, record.id));
        live
    }

    fn shard_of(&self, id: u64) -> MutexGuard<'_, Live> {
        let index = id % SHARDS as u64;
        self.shards[usize::try_from(index).unwrap_or_default()].lock()
    }
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Live> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::PortMapping;
    use rproxy_mapping::addr::Protocol;
    use rproxy_mapping::name::Name;

    use std::net::SocketAddr;

    use super::*;
    use crate::log::Format;

    fn port(is_logged: bool) -> RecordedPort {
        let (host, backend) = ("127.0.0.1:80".parse().unwrap(), "172.17.0.2:80".parse().unwrap());
        let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
        RecordedPort { mapping: Name::default(), port_mapping, unresolved: None, is_logged }
    }

    fn open(recorder: &Recorder, is_logged: bool) -> Option<Arc<Record>> {
        let [peer, host]: [SocketAddr; 2] =
            ["[::ffff:192.0.2.7]:5000", "127.0.0.1:80"].map(|text| text.parse().unwrap());
        recorder.open(port(is_logged), peer.into(), || host)
    }

    #[test]
    fn what_is_live_records_all_in_its_order_until_it_ends() {
        let recorder = Recorder::new(None, true);
        let records: Vec<_> = (0..100).map(|_| open(&recorder, true).unwrap()).collect();
        assert_eq!(records[0].client().to_string(), "192.0.2.7:5000", "as people know it");
        let ids = |records: &[Arc<Record>]| records.iter().map(|record| record.id).collect::<Vec<_>>();
        assert_eq!(ids(&recorder.live()), ids(&records));
        records[1..].iter().for_each(|record| recorder.close(record));
        assert_eq!(ids(&recorder.live()), ids(&records[..1]));
    }

    #[test]
    fn nothing_is_recorded_that_nobody_can_ask_for() {
        let recorder = Recorder::new(Some(Arc::new(AccessLog::new(Format::Text))), false);
        assert!(open(&recorder, false).is_none());
        assert!(open(&recorder, true).is_some());
    }

    #[test]
    fn the_memory_of_a_burst_is_released() {
        let recorder = Recorder::new(None, true);
        let records: Vec<_> = (0..KEPT * 8).map(|_| open(&recorder, true).unwrap()).collect();
        records.iter().for_each(|record| recorder.close(record));
        let kept = recorder.shards.iter().map(|shard| shard.lock().records.capacity());
        assert!(kept.max().unwrap() <= KEPT);
    }

    #[test]
    fn an_id_is_used_once_by_all_threads() {
        let recorder = Recorder::new(None, true);
        let open_some = || (0..10).map(|_| open(&recorder, true).unwrap()).collect::<Vec<_>>();
        let mut records = open_some();
        std::thread::scope(|scope| records.extend(scope.spawn(open_some).join().unwrap()));
        // The second time closes nothing, even if its slot is used again.
        (0..2).for_each(|_| records.iter().for_each(|record| recorder.close(record)));
        assert_eq!(recorder.live().len(), 0);
        records.extend(open_some());
        records.iter().take(20).for_each(|record| recorder.close(record));
        assert_eq!(recorder.live().len(), 10);
        records.sort_unstable_by_key(|record| record.id);
        records.dedup_by_key(|record| record.id);
        assert_eq!(records.len(), 30);
    }
}
