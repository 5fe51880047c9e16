//! The UDP relay: flows, batches, and GSO batches.
//!
//! A flow is what one client sends to one local address of ours, and the answers. It has a socket of its own towards
//! the backend. The [`relay`] serves all flows of a process from one task, in turns, with one [`batch`] of buffers:
//! [`requests`] go to backends, [`answers`] to clients, and [`commands`] come from the engine.
//!
//! The [`table`] finds flows and bounds their number, and [`local_ports`] gives each one a port that no other had a
//! moment ago. [`gso`] groups datagrams so that one call sends many. [`send`] deals with what the kernel refuses, and
//! [`congestion`] with a listener whose send buffer is full.

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
pub(crate) mod relay;
mod requests;
mod scopes;
mod send;
mod shares;
mod slots;
pub(crate) mod stale;
mod table;
mod tally;
mod token;
mod turn;
