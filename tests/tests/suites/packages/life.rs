//! The life of the packages on a machine with systemd: nothing runs unless asked to, no client is refused, and nothing
//! is left.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::load::meanwhile;
use testkit::machine::{self, Booted, Machine};
use testkit::process::run;
use testkit::require;
use testkit::suite::Case;

use super::{DEADLINE, DEBHELPER, build};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("installed, upgraded with traffic, removed, purged", life)
            .needs(machine::NEEDS)
            .needs(DEBHELPER)
            .deadline(DEADLINE),
    ]
}

/// The port of a mapping of the service, for which it needs a capability, and one of a shim.
pub(crate) const MAPPED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 80);
pub(crate) const ATTACHED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 81);

pub(crate) const UNITS: [&str; 2] = ["rproxy.service", "rproxy-attach.service"];

fn life() {
    let machine = Machine::boot(&[]);
    two_versions(machine.shared());
    let before = machine.written();

    installed(&machine);
    let backend = TcpBackend::echo_in(machine.network(), (Ipv4Addr::LOCALHOST, 0));
    started(&machine, backend.address());
    upgraded(&machine);
    machine.sh("systemctl stop shim").success();
    removed(&machine);

    machine.sh("dpkg --purge rproxy rproxy-netns").success();
    assert_eq!(left(&before, &machine.written()), BTreeSet::new());
    assert!(
        !machine.sh("getent passwd rproxy || getent group rproxy").status.success(),
        "the user is still there"
    );
}

/// Builds version 1.0-1 of the packages, and 2.0-1 with the same files.
pub(crate) fn two_versions(dir: &Path) {
    const SCRIPT: &str = r#"
set -e
cd "$0"
for package; do
    dpkg-deb --raw-extract "$package"_1.0-1_*.deb next
    sed -i 's/1\.0-1/2.0-1/' next/DEBIAN/control
    dpkg-deb -Znone --build --root-owner-group next "$package"_2.0-1.deb
    rm -r next
done
"#;
    build(dir, "1.0-1", |command| {
        // It takes less time (dpkg-deb(1)).
        command.env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    });
    let mut shell = require::command("sh");
    shell.args(["-c", SCRIPT]).arg(dir).args(["rproxy", "rproxy-netns"]);
    run(shell).success();
}

/// Nothing is enabled or runs, and the units have no mistake.
pub(crate) fn installed(machine: &impl Booted) {
    machine.sh("dpkg --install /run/host/rproxy_1.0-1_*.deb /run/host/rproxy-netns_1.0-1_*.deb").success();
    for unit in UNITS.into_iter().chain(["netns-setup-watch.service"]) {
        assert_eq!(machine.sh(&format!("systemctl is-enabled {unit}")).stdout, "disabled\n");
        assert_eq!(machine.sh(&format!("systemctl is-active {unit}")).stdout, "inactive\n");
        let found = machine.sh(&format!("systemd-analyze verify /lib/systemd/system/{unit}"));
        assert!(found.status.success() && found.stderr.is_empty(), "{found:#?}");
    }
    for program in ["rproxy --version", "rproxy-shim -v", "netns-setup --version"] {
        machine.sh(program).success();
    }
}

/// The service with a mapping, as its own user, and the one for Docker with a port.
pub(crate) fn started(machine: &impl Booted, backend: SocketAddr) {
    // As it is delivered, it serves nothing yet.
    machine.sh("systemctl start rproxy").success();
    machine.sh("rproxy ctl list").success();
    let configuration = format!("[[mapping]]\nhost = \"{MAPPED}\"\nto = \"{backend}\"\n");
    fs::write(machine.shared().join("rproxy.toml"), configuration).unwrap();
    machine.sh("cp /run/host/rproxy.toml /etc/rproxy/rproxy.toml && systemctl reload rproxy").success();
    eventually("the mapping is served", || {
        machine.sh("rproxy ctl list").success().contains(&MAPPED.to_string())
    });
    machine.sh("systemctl enable rproxy rproxy-attach && systemctl start rproxy-attach").success();
    let user = format!("ps -o user= -p {}", main_process(machine, UNITS[0]));
    assert_eq!(machine.sh(&user).success(), "rproxy\n");
    // CAP_NET_BIND_SERVICE and CAP_NET_ADMIN (capability.h).
    let permitted = format!("grep CapPrm /proc/{}/status", main_process(machine, UNITS[0]));
    assert_eq!(machine.sh(&permitted).success(), "CapPrm:\t0000000000001400\n");
    let shim = format!(
        "[Service]\nExecStart=/usr/bin/rproxy-shim -host-ip {} -host-port {} -container-ip {} -container-port {}\n",
        ATTACHED.ip(),
        ATTACHED.port(),
        backend.ip(),
        backend.port()
    );
    fs::write(machine.shared().join("shim.service"), shim).unwrap();
    machine.sh("cp /run/host/shim.service /run/systemd/system/ && systemctl daemon-reload && systemctl start shim").success();
    let attached = || machine.sh("rproxy ctl --control /run/rproxy-attach.sock list").success();
    eventually("the port is attached", || attached().contains(&ATTACHED.to_string()));
}

/// New processes run the new program, and no client notices.
pub(crate) fn upgraded(machine: &impl Booted) {
    let old = UNITS.map(|unit| main_process(machine, unit));
    let kept = [MAPPED, ATTACHED].map(|address| machine.within(|| client::connect(address)));
    let served = |number: usize| {
        let address = if number.is_multiple_of(2) { MAPPED } else { ATTACHED };
        machine.within(|| client::assert_echoes(address));
    };
    let clients = meanwhile(2, served, |load| {
        load.wait_for(10);
        let upgrade = machine.sh("dpkg --install /run/host/*_2.0-1.deb");
        assert_eq!(upgrade.stderr, "", "{upgrade:#?}");
        upgrade.success();
        load.wait_for(10);
    });
    assert!(clients > 20);
    kept.iter().for_each(client::ping);
    for (unit, old) in UNITS.into_iter().zip(old) {
        let new = main_process(machine, unit);
        assert_ne!(new, old, "{unit}");
        assert_eq!(machine.sh(&format!("readlink /proc/{new}/exe")).success(), "/usr/bin/rproxy\n", "{unit}");
        assert_eq!(machine.sh(&format!("systemctl is-active {unit}")).stdout, "active\n");
    }
}

/// Only the configuration is left, and nothing runs.
pub(crate) fn removed(machine: &impl Booted) {
    let removed = machine.sh("dpkg --remove rproxy-netns rproxy").success();
    assert!(!removed.contains("warning"), "{removed}");
    for unit in UNITS {
        assert_ne!(machine.sh(&format!("systemctl is-active {unit}")).stdout, "active\n");
    }
    assert_eq!(machine.sh("pgrep --list-full rproxy").stdout, "");
    let configuration = machine.sh("cat /etc/rproxy/rproxy.toml").success();
    assert!(configuration.contains("[[mapping]]"), "{configuration}");
    assert!(!machine.sh("command -v rproxy rproxy-shim netns-setup").status.success());
}

pub(crate) fn main_process(machine: &impl Booted, unit: &str) -> u32 {
    machine.sh(&format!("systemctl show --property MainPID --value {unit}")).success().trim().parse().unwrap()
}

/// What is left of the packages: not what man(1) has formatted, which is in a cache.
pub(crate) fn left(before: &BTreeSet<String>, after: &BTreeSet<String>) -> BTreeSet<String> {
    let is_of_packages = |path: &&String| {
        !path.starts_with("/var/cache/") && (path.contains("rproxy") || path.contains("netns"))
    };
    after.difference(before).filter(is_of_packages).cloned().collect()
}
