//! Address translation in the kernel, as Docker sets it up besides its proxy.

use std::fmt::Write as _;
use std::net::SocketAddrV4;

use testkit::netns::Namespace;

use super::Mapping;

/// The table of the rules.
const TABLE: &str = "ip bench";

/// Rules that are installed until this is dropped.
pub(crate) struct Active<'a>(&'a Namespace);

impl<'a> Active<'a> {
    /// Translates `mappings` to `backend`.
    ///
    /// # Panics
    /// If nft(8) fails.
    pub(super) fn new(host: &'a Namespace, mappings: &[Mapping], backend: SocketAddrV4) -> Self {
        let mut rules = format!(
            "add table {TABLE} ; add chain {TABLE} prerouting {{ type nat hook prerouting priority -100 ; }}"
        );
        for Mapping { protocol, port } in mappings {
            write!(rules, " ; add rule {TABLE} prerouting {protocol} dport {port} dnat to {backend}").ok();
        }
        host.command(&format!("nft {rules}")).success();
        Self(host)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        // Anything that remains is deleted with the namespace.
        self.0.command(&format!("nft delete table {TABLE}"));
    }
}
