//! Faults under load: of backends, of the network, of limits, of the process itself. Each is brought about in
//! namespaces while other clients are served, every connection and byte is accounted for, and afterwards
//! nothing is left: no descriptor, no pipe, no flow, no task, and no use of the processor.

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

mod backends;
mod congestion;
mod families;
mod flows;
mod limits;
mod listeners;
mod loops;
mod network;
mod process;
mod roles;
mod scene;
mod streams;
mod surroundings;

use std::process::ExitCode;

use rproxy_tests::require::Need;
use rproxy_tests::suite::{self, Case};

fn main() -> ExitCode {
    if let Some(code) = roles::played() {
        return code;
    }
    let networks = [of_backends_and_networks(), of_limits(), of_loops()];
    let others = [of_streams(), of_flows(), of_congestion(), of_processes(), of_surroundings()];
    suite::run(networks.into_iter().chain(others).flatten().collect())
}

fn case(name: &str, body: fn()) -> Case {
    Case::new(name, body).needs(&[Need::Root, Need::Program("ip")])
}

fn of_backends_and_networks() -> Vec<Case> {
    vec![
        case("a backend is killed, and started again", backends::killed),
        case("a backend that accepts and never reads", backends::hung),
        case("clients that never read", backends::slow_clients),
        case("clients that reset at random moments", backends::random_resets),
        case("a local port that nobody listens on does not answer itself", backends::self_connect)
            .needs(&[Need::Program("sysctl")]),
        case("a backend's address is gone, and back", network::address_gone),
        case("a link goes down, and up", network::link_down),
        case("the path gets a smaller MTU", network::smaller_mtu),
        case("SYN bursts beyond the backlog", network::syn_burst).needs(&[Need::Program("sysctl")]),
    ]
}

fn of_limits() -> Vec<Case> {
    vec![
        case("all local ports are taken", limits::ports_exhausted).needs(&[Need::Program("sysctl")]),
        case("the local port of a connection can be published", limits::own_port_published),
        case("no descriptor is left in the process", limits::no_descriptors)
            .needs(&[Need::Program("prlimit")]),
        case("no descriptor is left in the machine", limits::no_files).needs(&[Need::Program("strace")]),
        case("no buffer is left for datagrams", limits::no_buffers).needs(&[Need::Program("strace")]),
        case("no pipe is left to the user", limits::no_pipes).needs(&[Need::Program("setpriv")]),
        case("10,000 clients that say nothing", limits::silent_clients),
        case("a listener that is shut down ends a process without others", listeners::dead_ends_process),
        case("a listener that is shut down listens again", listeners::dead_listens_again),
        case("a listener that is destroyed listens again", listeners::destroyed_listens_again)
            .needs(&[Need::Program("ss")]),
        case("a listener for datagrams that is shut down", listeners::dead_udp),
        case("a listener that is shut down beside others", listeners::dead_beside_others),
        case("few descriptors make clients wait", listeners::few_descriptors)
            .needs(&[Need::Program("prlimit")]),
    ]
}

fn of_loops() -> Vec<Case> {
    vec![
        case("loops: a mapping that leads to itself does not start", loops::at_the_start)
            .needs(&[Need::Program("sysctl")]),
        case("loops: nor does one for dockerd", loops::in_docker_mode),
        case("loops: no change lets a mapping lead to itself", loops::by_changes),
        case("loops: nor does a socket that was passed", loops::by_a_passed_socket),
        case("loops: nor does an upgrade", loops::by_an_upgrade),
        case("loops: another program on this host is a backend", loops::to_another_program),
    ]
}

fn of_streams() -> Vec<Case> {
    vec![
        case("urgent bytes stay in their place", streams::urgent_bytes),
        case("urgent bytes stay in their place in bulk", streams::urgent_bytes_in_bulk),
        case("a reset behind what a slow reader still takes", streams::reset_behind_slow_reader),
        case("a reset between peers that do not read", streams::reset_between_stalled_peers),
        case("a slow reader is not idle", streams::slow_reader_is_not_idle),
        case("an answer before a reset", streams::answer_before_reset).needs(&[Need::Program("strace")]),
        case("splice(2) is refused", streams::splice_refused).needs(&[Need::Program("strace")]),
        case("a client that resets ends its dial", streams::reset_ends_dial),
    ]
}

fn of_flows() -> Vec<Case> {
    vec![
        case("a flow's port has been nobody else's for a while", flows::ports_in_turn),
        case("so it has when another process takes over", flows::ports_in_turn_over_an_upgrade),
        case("a flow's port is published", flows::flows_give_way),
        case("a burst of clients beyond the cap", flows::burst_at_the_cap),
        case("datagrams that are refused", flows::refused_datagrams).needs(&[Need::Program("nft")]),
        case("a datagram from the backend", flows::from_the_backend),
        case("a flow's socket is destroyed", flows::destroyed).needs(&[Need::Program("ss")]),
        case("flows follow a change", flows::changes_are_followed),
        case("answers from any port of a backend", flows::any_port),
        case("a flow with any port goes over in an upgrade", flows::any_port_upgraded),
        case("the host's address towards a backend changes", flows::source_changes)
            .needs(&[Need::Program("sysctl")]),
        case("a flow's socket is shut down", flows::shut_down),
        case("what there is no room for is counted", flows::overflows_are_counted),
        case("so it is across an upgrade", flows::overflows_across_an_upgrade),
        case("ports are reserved while flows come and go", flows::reserved_later),
        case("each mapping has its own limits of flows", flows::limits_of_each_mapping),
        case("thousands of flows end at once", flows::many_end_at_once),
        case("a burst of large datagrams is over", flows::burst_of_large_ones),
        case("the kernel's memory for many flows", flows::shares_of_the_kernel).needs(&[Need::Program("ss")]),
        case("many flows to a slow backend", flows::slow_backend).needs(&[Need::Program("tc")]),
    ]
}

fn of_congestion() -> Vec<Case> {
    let case = |name: &str, body: fn()| case(name, body).needs(&[Need::Program("ss"), Need::Program("tc")]);
    vec![
        case("clients that are not there wait alone", congestion::absent_neighbours),
        case("so they do where IPv6 serves IPv4", congestion::absent_neighbours_dual_stack),
        case("so they do over IPv6", congestion::absent_neighbours_v6),
        case("so they do as another user", congestion::absent_neighbours_of_a_user),
        case("so they do when flows come and go", congestion::absent_neighbours_that_change),
        case("a client behind a slow link waits alone", congestion::slow_link),
        case("clients behind one slow link share it", congestion::shared_link),
        case("answers that wait survive their mapping", congestion::removal),
        case("answers that wait survive the order to end", congestion::end_of_the_process),
        case("answers that wait survive the end of their socket", congestion::destroyed),
        case("answers that wait survive an upgrade", congestion::upgrade),
        case("nothing is left of a way out that was full", congestion::over),
        case("answers that wait are accounted for when flows end", congestion::retarget),
    ]
}

fn of_processes() -> Vec<Case> {
    vec![
        case("a machine without IPv6", families::no_sockets),
        case("changes and an upgrade without IPv6", families::changes_without_sockets),
        case("a machine without IPv6 addresses", families::no_addresses).needs(&[Need::Program("sysctl")]),
        case("SIGSTOP and SIGCONT", process::stopped),
        case("SIGKILL resets both sides and frees the port", process::killed),
        case("what a drain cuts is reset", process::cut),
        case("another time since boot", process::other_clock).needs(&[Need::Program("unshare")]),
        case("nobody reads the log", process::log_unread),
        case("a terminal that is held gets the log", process::terminal_held),
        case("the log's disk is full", process::log_full),
        case("there is no standard error", process::log_closed),
    ]
}

fn of_surroundings() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Root]);
    let threads = &[Need::Program("prlimit"), Need::Program("setpriv")];
    vec![
        case("no thread is to be had", surroundings::no_threads).needs(threads),
        case("no thread is to be had, and mappings change", surroundings::no_threads_to_manage)
            .needs(threads),
        case("no thread is to be had by a proxy of dockerd", surroundings::no_threads_for_docker)
            .needs(threads),
        case("nobody reads standard output for now", surroundings::output_unread),
        case("a terminal that is held gets standard output", surroundings::output_held),
        case("nobody ever reads standard output", surroundings::output_never_read),
        case("the log is as long as a file may be", surroundings::log_too_long)
            .needs(&[Need::Program("prlimit")]),
        case("signals that mean nothing", surroundings::signals),
        case("descriptors that were not passed on purpose", surroundings::descriptors),
        case("descriptors that dockerd did not pass", surroundings::descriptors_of_docker),
        case("a root directory with nothing in it", surroundings::empty_root)
            .needs(&[Need::Program("chroot")]),
        case("the launcher in lists of processes", surroundings::launcher_in_lists),
    ]
}
