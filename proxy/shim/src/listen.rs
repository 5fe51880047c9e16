//! What listening sockets of `rproxy` and of the shim have in common, before the first client arrives.

use core::time::Duration;

/// The requested length of the accept queue; the kernel limits it to `net.core.somaxconn` (listen(2)).
pub const BACKLOG: i32 = i32::MAX;

/// Idle time before the first keepalive probe and between probes, as Go's net package sets them.
pub const KEEPALIVE: Duration = Duration::from_secs(15);

/// The receive buffer of a UDP listener, in bytes: room for a burst of all clients.
pub const UDP_RECEIVE_BUFFER: usize = 8 * 1024 * 1024;

/// The send buffer of a UDP listener, in bytes, as set. The kernel doubles it, and charges 2,304 bytes for a
/// full-sized packet. The packets that fit are half of a device queue's default length (`txqueuelen`, 1,000
/// packets). Packets that do not fit the device queue are lost without an error.
pub const UDP_SEND_BUFFER: usize = 512 * 1024;
