//! `netns-setup` wires the bridge, veths, addresses and firewall that `rproxy` serves.
fn main() {}
