//! The shim, and what it and the process that it attaches to agree on.
//!
//! `rproxy-shim` is the process that dockerd starts for each published port in place of docker-proxy, with the same
//! flags, descriptors, signals and exit statuses (moby's `cmd/docker-proxy/main_linux.go` and
//! `daemon/libnetwork/portmapper/proxy_linux.go`). It binds the port, unless it was passed the socket, and hands it to
//! one `rproxy --attach`, the *plane*, which serves the ports of all shims. Then it sleeps with a few kilobytes of
//! memory of its own: it has neither a heap nor the standard library.
//!
//! ```text
//! dockerd              shim                                       plane
//!   │ flags, 3, 4 ──────▶│ bind, listen                             │
//!   │                    │ connect; its user: root, or the own one? │
//!   │                    │ attach, the socket (SCM_RIGHTS) ────────▶│
//!   │                    │◀──────────────────────────────── serving │ serves clients
//!   │◀───────────── 0\n │ waits, and holds the socket              │
//!   │ SIGINT ───────────▶│ detach: unpublished ────────────────────▶│
//!   │                    │◀─────────────────────────────── detached │ has closed the socket
//!   │◀──────────── exits │                                          │
//! ```
//!
//! **It can always be used.** Whatever it does not handle, it leaves to `rproxy`, which it executes in its own place with
//! the same arguments, and which serves the port by itself or reports what is wrong in its own words. That is the
//! `rproxy` beside it, or else the one in `PATH`. It does so if
//! - the flags are wrong, or ask for a version, a protocol or an address that only `rproxy` handles;
//! - the port cannot be bound, or descriptor 4 is no suitable socket;
//! - there is no plane ([`message::NAME_VARIABLE`] names it), or one of another user or version;
//! - the plane does not answer within 2 s, or says that it cannot serve the port.
//!
//! A bound socket goes along at descriptor 4, with `-use-listen-fd`. A plane that refuses a request as wrong is the
//! exception: its text is reported, as a failed start.
//!
//! **The plane may end at any time.** The shim holds the socket, so clients of TCP wait in the backlog and datagrams in
//! the buffer. It looks for another plane after 10 ms, and then in intervals that double up to 1 s. After 10 s, it
//! executes `rproxy`.
//!
//! **Its end.** `SIGINT` (dockerd unpublishes the port), or `SIGTERM` or `SIGQUIT` (dockerd ends) are passed on. The shim
//! exits with status 0 once the plane has closed the port, so that the port is free. A plane that does not within 1 s
//! loses a TCP port nevertheless (shutdown(2)); a UDP port that it holds is free only when it closes it. Other signals
//! mean nothing. All of them stay blocked while `rproxy` replaces the shim, which reads the same ones from a
//! descriptor, so that none is lost or kills it in between.
//!
//! This library has no dependencies and allocates nothing. `rproxy` uses it, too.

#![no_std]

pub mod flags;
pub mod listen;
pub mod message;
