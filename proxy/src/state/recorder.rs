//! The records of all live connections and flows of a process, and the access log that they end in.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rproxy_mapping::addr::canonical;

use crate::log::access::AccessLog;
use crate::state::access_line;
use crate::state::record::{Ending, Record, RecordOf};

/// The records are in as many maps, so that workers do not wait for each other.
const SHARDS: usize = 16;

/// Records connections and flows. A process in which nobody can ask for them has none.
#[derive(Debug)]
pub(crate) struct Recorder {
    next: AtomicU64,
    live: [Mutex<HashMap<u64, Arc<Record>>>; SHARDS],
    access_log: Option<Arc<AccessLog>>,
    /// Whether clients of the control socket or of the metrics may ask for what is live.
    is_listed: bool,
}

impl Recorder {
    /// A recorder without records. `is_listed` says whether anybody asks for what is live.
    pub(crate) fn new(access_log: Option<Arc<AccessLog>>, is_listed: bool) -> Self {
        Self { next: AtomicU64::new(1), live: Default::default(), access_log, is_listed }
    }

    /// The log of what has ended, if there is one.
    pub(crate) fn access_log(&self) -> Option<&Arc<AccessLog>> {
        self.access_log.as_ref()
    }

    /// Records a connection or flow, if anybody wants to know of it.
    pub(super) fn open(
        &self,
        of: RecordOf,
        peer: SocketAddr,
        host: impl FnOnce() -> SocketAddr,
    ) -> Option<Arc<Record>> {
        if !self.is_listed && self.log_of(&of).is_none() {
            return None;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let record = Arc::new(Record::new(id, canonical(peer), canonical(host()), of));
        self.shard(id).insert(id, record.clone());
        Some(record)
    }

    /// Ends a record: it is not live any more, and the access log gets its line.
    pub(super) fn close(&self, record: &Record) {
        if self.shard(record.id).remove(&record.id).is_some() {
            self.log(record);
        }
    }

    /// Ends the records that are left when the process ends, and waits a moment for the access log to be written.
    pub(crate) fn finish(&self) {
        for shard in &self.live {
            let left = std::mem::take(&mut *shard.lock().unwrap_or_else(PoisonError::into_inner));
            for record in left.into_values() {
                record.end(Ending::Drain);
                self.log(&record);
            }
        }
        self.access_log.iter().for_each(|log| log.finish());
    }

    /// Writes the line of a client that is not served.
    pub(super) fn log_refusal(&self, client: SocketAddr, of: &RecordOf, ending: Ending) {
        if let Some(log) = self.log_of(of) {
            log.write(|line| access_line::write_refusal(line, log.format(), client, of, ending));
        }
    }

    fn log(&self, record: &Record) {
        if let Some(log) = self.log_of(&record.of) {
            log.write(|line| access_line::write(line, log.format(), record));
        }
    }

    fn log_of(&self, of: &RecordOf) -> Option<&AccessLog> {
        self.access_log.as_deref().filter(|_log| of.is_logged)
    }

    /// What is live now, in the order of opening.
    pub(crate) fn live(&self) -> Vec<Arc<Record>> {
        let mut live = Vec::new();
        for shard in &self.live {
            live.extend(shard.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        }
        live.sort_unstable_by_key(|record| record.id);
        live
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Record>>> {
        let index = usize::try_from(id).unwrap_or_default() % SHARDS;
        self.live[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
