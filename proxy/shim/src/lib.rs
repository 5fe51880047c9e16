//! What a shim and the process that it attaches to agree on.
//!
//! A shim (`rproxy-shim`) is the process that a container runtime starts for each published port. It passes
//! its listening socket to one `rproxy --attach`, and waits for signals. This library has no dependencies and
//! allocates nothing, as the shim has neither a heap nor the standard library.

#![no_std]

pub mod message;
