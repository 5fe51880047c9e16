//! Cases of the other suites on the kernels of Debian's releases, and the packages on a whole Debian, in virtual machines.

mod debian;

use std::fmt::Display;
use std::sync::Arc;

use testkit::require::Need;
use testkit::suite::Case;
use testkit::vm::kernel::{KERNELS, Kernel};
use testkit::vm::{self, Bootable, Verdict};

/// What is checked on each kernel, in this order: names of cases.
const CHECKED: &[&str] = &[
    // TCP, IPv6, docker-proxy's flags.
    "relay::a half-closed connection continues",
    "standalone::[::] is dual stack",
    "standalone::host and container family differ",
    "docker::contract::rproxy: TestTCP4ProxyHalfClose",
    // With the demonstration.
    "faults::families::a machine without IPv6 addresses",
    // UDP and connection tracking.
    "udp::relay::dual-stack answers come from the address asked",
    "udp::relay::datagrams over the MTU pass in fragments",
    "udp::conntrack::flows to the host addresses are forgotten, and no others",
    // Changes and upgrades.
    "control::add, list and remove",
    "config::a configuration is served, and reloaded",
    "upgrade::flows keep their ports, and no datagram is lost",
    "upgrade::a transfer continues to its last byte",
    // The sandbox.
    "sandbox::inside: nothing but serving is possible",
    "sandbox::inside: what changes need is possible as well",
    "sandbox::a TCP relay has no capability, files or new calls",
    "sandbox::a UDP relay keeps its buffers' capability",
    "sandbox::with a control socket it keeps what changes need",
    "sandbox::docker-proxy's flags confine, too",
    "sandbox::another user",
    "sandbox::what an old kernel cannot restrict is said in one line",
    // SCTP, beside docker-proxy.
    "sctp::without the module, a line names it",
    "sctp::an echo without a proxy",
    "sctp::rproxy: TestSCTP4ProxyNoListener",
    "sctp::docker-proxy: TestSCTP4ProxyNoListener",
    "sctp::rproxy: TestSCTP6ProxyNoListener",
    "sctp::docker-proxy: TestSCTP6ProxyNoListener",
    "sctp::rproxy: TestSCTP4Proxy (alone: docker-proxy 20.10 takes no listener)",
    "sctp::rproxy: TestSCTP6Proxy (alone: docker-proxy 20.10 takes no listener)",
    "sctp::attached rproxy-shim: TestSCTP4Proxy (alone: docker-proxy 20.10 takes no listener)",
    "sctp::rproxy: IPv6 host, IPv4 container",
    "sctp::rproxy: streams, identifiers and boundaries are kept",
    "sctp::docker-proxy: streams, identifiers and boundaries are kept",
    "sctp::rproxy: a message of 64 kB is one message (alone: docker-proxy cuts it at 32 kB)",
    "sctp::rproxy: what is sent before a shutdown arrives",
    "sctp::docker-proxy: what is sent before a shutdown arrives",
    "sctp::rproxy: SIGINT ends it",
    "sctp::rproxy-shim: SIGINT ends it",
    "sctp::a backend's shutdown ends its client",
    "sctp::an abort is propagated as an abort",
    "sctp::clients that abort at once",
    "sctp::a backend that refuses",
    "sctp::a slow reader gets everything",
    "sctp::messages both ways at once",
    "sctp::flags, strictly confined",
    "sctp::an address of the host",
    "sctp::a configuration is served, reloaded and handed over",
    "sctp::add, list, count and remove",
    "sctp::a socket that comes with a request is served",
    "sctp::options that SCTP cannot have are refused",
    // As Podman starts it.
    "rootlessport::contract::TCP and UDP reach the container's namespace, and empty datagrams, too",
    "rootlessport::contract::another address moves clients, and a wrong one does not",
    "rootlessport::contract::SCTP reaches the container's namespace",
    // Networks.
    "source::TCP comes from its client",
    "netns_setup::traffic::a port published via dnat (Nft)",
    "netns_setup::traffic::a port published via dnat (IptablesNft)",
    "netns_setup::traffic::a port published via dnat (Legacy)",
    "netns_setup::story::the demonstration (Nft)",
    "netns_setup::story::the demonstration (IptablesNft)",
    "netns_setup::story::the demonstration (Legacy)",
];

/// What is not checked, because the kernel fails it by itself: version, and name of the case.
///
/// Linux 5.10 loses a handshake of SCTP in a thousand while peers abort: that of the client with the proxy's listener is then
/// repeated for 20 s and longer, before the proxy knows of it, and that with the backend as well.
const NOT_CHECKED: &[(&str, &str)] = &[("5.10", "sctp::clients that abort at once")];

pub(crate) fn cases() -> Vec<Case> {
    KERNELS.iter().flat_map(of_kernel).chain(testkit::modules![debian]).collect()
}

/// Whether `name` is checked on `kernel`.
fn is_checked(kernel: &Kernel, name: &str) -> bool {
    !NOT_CHECKED.contains(&(kernel.version, name))
}

fn of_kernel(kernel: &'static Kernel) -> Vec<Case> {
    let names = CHECKED.iter().filter(|name| is_checked(kernel, name));
    let names: Arc<[String]> = names.map(|name| (*name).to_owned()).collect();
    let needs = &[Need::Program("qemu-system-x86_64"), Need::Program("busybox"), Need::Kernel(kernel)];
    let case = |checked: &String| {
        let (names, name) = (Arc::clone(&names), checked.clone());
        Case::new(format!("{}::{name}", kernel.version), move || check(kernel, &names, &name))
            .needs(needs)
            .deadline(Kernel::PATIENCE * 2)
    };
    names.iter().map(case).collect()
}

/// Fails if `name` has failed on the machine.
fn check<M: Bootable + Display>(machine: &M, names: &[String], name: &str) {
    match vm::verdict(machine, names, name) {
        Verdict::Passed => (),
        Verdict::Failed(output) => panic!("it failed on {machine}:\n{output}"),
        Verdict::Missing(console) => {
            panic!("{machine} has not reported it; its console ends with:\n{console}")
        }
    }
}
