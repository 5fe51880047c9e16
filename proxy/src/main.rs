//! rproxy
fn main() {}
