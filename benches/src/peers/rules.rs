//! Rules in the kernel that a peer needs: address translation, as Docker sets it up besides its proxy, or the return path to
//! sockets with the addresses of clients.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::rproxy::netns_setup;
use testkit::topology::BRIDGE;

use super::Mapping;
use crate::wiring::Wiring;

/// The table of the translation.
const TABLE: &str = "ip bench";

/// The rules of a peer.
pub(super) enum Rules {
    /// Translates these mappings to the backend.
    Dnat(Vec<Mapping>),
    /// Delivers what the backend answers to sockets of the host.
    ReturnPath,
}

/// Rules that are installed until this is dropped.
pub(crate) struct Active<'a> {
    host: &'a Namespace,
    /// The state of `netns-setup`, if the return path is set up.
    state: Option<TempDir>,
}

impl<'a> Active<'a> {
    /// Installs `rules` for the backend.
    ///
    /// # Panics
    /// If nft(8) or netns-setup fails.
    pub(super) fn new(wiring: &'a Wiring, rules: &Rules) -> Self {
        let host = wiring.host();
        let state = match rules {
            Rules::Dnat(mappings) => {
                translate(wiring, mappings);
                None
            }
            Rules::ReturnPath => {
                let state = TempDir::new().expect("a temporary directory");
                transparent(host, state.path(), &["up", "--interface", BRIDGE]).success();
                Some(state)
            }
        };
        Self { host, state }
    }
}

fn translate(wiring: &Wiring, mappings: &[Mapping]) {
    let mut rules = format!(
        "add table {TABLE} ; add chain {TABLE} prerouting {{ type nat hook prerouting priority -100 ; }}"
    );
    for Mapping { protocol, port } in mappings {
        let backend = wiring.backend_for(*protocol);
        write!(rules, " ; add rule {TABLE} prerouting {protocol} dport {port} dnat to {backend}").ok();
    }
    wiring.host().command(&format!("nft {rules}")).success();
}

fn transparent(host: &Namespace, state: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(netns_setup());
    command.arg("transparent").args(arguments).arg("--state-dir").arg(state);
    host.spawn(command).into_output()
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        // Anything that remains is deleted with the namespace.
        match &self.state {
            Some(state) => drop(transparent(self.host, state.path(), &["down"])),
            None => drop(self.host.command(&format!("nft delete table {TABLE}"))),
        }
    }
}
