//! rproxy
