//! Which flows have sockets towards their clients, and which of these is closed for another one.

use std::collections::VecDeque;

use super::client_socket::ClientSocket;
use super::flow::Flow;
use super::key::FlowKey;
use super::table::{FlowId, FlowTable};

/// Sockets towards clients at the most: about as many as there can be neighbours whose addresses are asked for
/// (`gc_thresh3`, arp(7)).
const MOST: usize = 1024;

/// One in so many descriptors may be one of them.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// How many of them are looked at to find one that can be closed.
const LOOKED_AT: usize = 32;

/// Which flows have sockets towards their clients.
#[derive(Debug)]
pub(super) struct ClientSockets {
    most: usize,
    pub(super) open: usize,
    /// In the order in which they are looked at when one has to go (the clock algorithm); some may be over.
    pub(super) clock: VecDeque<FlowId>,
    /// Those that are yet to be drained and closed.
    pub(super) retired: Vec<ClientSocket>,
}

impl ClientSockets {
    /// None, where a process may have as many descriptors.
    pub(super) fn new(descriptors: usize) -> Self {
        let most = MOST.min(descriptors / SHARE_OF_DESCRIPTORS);
        Self { most, open: 0, clock: VecDeque::new(), retired: Vec::new() }
    }

    pub(super) fn opened(&mut self, id: FlowId) {
        self.open += 1;
        self.clock.push_back(id);
    }

    /// Finds room for one more: one that has not been used lately, and for which nothing waits, has to go if there are
    /// as many as may be.
    pub(super) fn make_room(
        &mut self,
        table: &mut FlowTable<FlowKey, Flow>,
    ) -> Result<Option<Box<ClientSocket>>, Full> {
        if self.open < self.most {
            return Ok(None);
        }
        for _ in 0..self.clock.len().min(LOOKED_AT) {
            let Some(id) = self.clock.pop_front() else { break };
            let Some((_key, flow)) = table.get_mut(id) else { continue };
            let Some(socket) = &mut flow.client_socket else { continue };
            let is_used = std::mem::take(&mut socket.was_used) || !socket.queue.is_empty();
            if !is_used {
                return Ok(flow.client_socket.take());
            }
            self.clock.push_back(id);
        }
        Err(Full)
    }
}

/// There are as many sockets as there may be, and all are in use.
pub(super) struct Full;
