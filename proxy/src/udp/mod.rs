//! The UDP relay: flows, batches, and GSO batches.
//!
//! A flow consists of the datagrams that a client sends to one local address, and the replies. It has its own socket
//! towards the backend. The [`relay`] serves all flows of a process in one task, in turns, with one [`batch`] of
//! buffers: [`requests`] forwards to backends, [`answers`] to clients, and [`commands`] handles commands of the engine.
//!
//! The [`table`] finds flows and limits their number, and [`local_ports`] assigns to each a port that was not used
//! recently. [`gso`] groups datagrams so that one call sends many. [`send`] handles errors of sending, and
//! [`congestion`] a listener whose send buffer is full.

mod answers;
mod batch;
mod capacity;
mod client_socket;
mod client_sockets;
mod commands;
mod congestion;
mod flow;
mod flows;
mod gso;
mod handover;
mod key;
mod listeners;
mod local_ports;
mod origin;
mod payload;
mod port_settings;
mod proxy_header;
pub(crate) mod relay;
mod requests;
mod routed;
mod scopes;
mod send;
pub(crate) mod shared;
mod shares;
mod slots;
mod source;
pub(crate) mod stale;
mod table;
mod tally;
mod token;
mod turn;
