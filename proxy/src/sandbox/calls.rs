//! The permitted system calls (seccomp(2)).
//!
//! Others fail with `ENOSYS`, as on a kernel without them, so that the C library falls back: from clone3(2),
//! whose arguments a filter cannot inspect, to clone(2), for example. Unconditional calls cost next to
//! nothing, because since Linux 5.11 the kernel caches them in a bitmap and does not run the filter.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use rproxy_sys::seccomp;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule,
};

use super::{Needs, Sources};

/// Calls for the data path, the event loop, memory management and threads.
const ALWAYS: &[libc::c_long] = &[
    // Connections and datagrams.
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_splice,
    libc::SYS_write,
    libc::SYS_writev,
    // Descriptors and waiting.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, signals, time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
];

/// Calls for UDP flows: each binds its own local port. The files that say which ports there are stay open and
/// are reread.
const FOR_DATAGRAMS: &[libc::c_long] = &[libc::SYS_bind, libc::SYS_pread64];

/// Calls for the addresses of clients: sockets are bound to them, and the open files with routes are reread.
const FOR_CLIENTS: &[libc::c_long] = &[libc::SYS_bind, libc::SYS_pread64];

/// Calls for changes: new listeners, and files that Landlock permits.
const FOR_CHANGES: &[libc::c_long] = &[
    libc::SYS_getcwd,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Calls that list open descriptors, in a directory that was opened before.
const FOR_METRICS: &[libc::c_long] = &[libc::SYS_getdents64, libc::SYS_lseek, libc::SYS_statx];

/// Calls for the file of the access log: whether it ends within a line, and another one in its place.
const FOR_LOG_FILE: &[libc::c_long] = &[libc::SYS_dup3, libc::SYS_pread64];

/// Calls that remove the file of a Unix socket, if it is still the same.
const FOR_UNIX_SOCKETS: &[libc::c_long] = &[
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// Calls that set the mode and the owner of the file of a Unix socket.
const FOR_UNIX_HOSTS: &[libc::c_long] = &[
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
];

/// Installs the filter, irrevocably.
pub(super) fn restrict(needs: &Needs<'_>) -> io::Result<String> {
    let program = filter(needs).map_err(io::Error::other)?;
    let instructions: Vec<_> = program
        .iter()
        .map(|step| libc::sock_filter { code: step.code, jt: step.jt, jf: step.jf, k: step.k })
        .collect();
    seccomp::install(&instructions)?;
    Ok(format!("{} instructions", instructions.len()))
}

fn filter(needs: &Needs<'_>) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = conditional(needs)?.into_iter().collect();
    let datagrams = if needs.udp || needs.changes.is_some() { FOR_DATAGRAMS } else { &[] };
    let sources: &[libc::c_long] = match needs.sources {
        Sources { clients: true, .. } => FOR_CLIENTS,
        sources if sources.are_bound() => &[libc::SYS_bind],
        _ => &[],
    };
    let changes = if needs.changes.is_some() { FOR_CHANGES } else { &[] };
    let has_files = !needs.unix_sockets.is_empty() || !needs.unix_host_files.is_empty();
    let unix = if needs.changes.is_some() || has_files { FOR_UNIX_SOCKETS } else { &[] };
    let unix_hosts = if needs.binds_unix_sockets() { FOR_UNIX_HOSTS } else { &[] };
    let metrics = if needs.metrics { FOR_METRICS } else { &[] };
    let log_file = if needs.log_file { FOR_LOG_FILE } else { &[] };
    let calls = [ALWAYS, datagrams, sources, changes, unix, unix_hosts, metrics, log_file].concat();
    rules.extend(calls.into_iter().map(|call| (call, Vec::new())));
    let arch = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
}

type Rules = Vec<(libc::c_long, Vec<SeccompRule>)>;
type Condition = Result<SeccompCondition, seccompiler::BackendError>;

/// Calls that are only harmless with some arguments.
fn conditional(needs: &Needs<'_>) -> Result<Rules, seccompiler::BackendError> {
    let this_process = std::process::id().cast_signed();
    Ok(vec![
        // Threads, but not processes.
        (libc::SYS_clone, vec![rule([bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)])?]),
        // Unacknowledged bytes; non-blocking mode; the index of an interface by name.
        (
            libc::SYS_ioctl,
            vec![rule([is(1, TIOCOUTQ)])?, rule([is(1, FIONBIO)])?, rule([is(1, SIOCGIFINDEX)])?],
        ),
        // No new executable memory.
        (libc::SYS_mmap, vec![rule([bits(2, libc::PROT_EXEC, 0)])?]),
        (libc::SYS_mprotect, vec![rule([bits(2, libc::PROT_EXEC, 0)])?]),
        // Thread names.
        (libc::SYS_prctl, vec![rule([is(0, libc::PR_SET_NAME)])?]),
        // Limits can be read, but not set: the pointer to a new limit must be null.
        (libc::SYS_prlimit64, vec![rule([SeccompCondition::new(2, Qword, SeccompCmpOp::Eq, 0)])?]),
        (libc::SYS_setsockopt, options(needs)?),
        (libc::SYS_socket, sockets(needs)?),
        // abort(3), for this process only.
        (libc::SYS_tgkill, vec![rule([is(0, this_process)])?]),
    ])
}

/// From netdevice(7).
const SIOCGIFINDEX: i32 = 0x8933;

/// For `FIONBIO` and `TIOCOUTQ` see ioctl_tty(2); the latter is `SIOCOUTQ` of tcp(7).
const FIONBIO: i32 = 0x5421;
const TIOCOUTQ: i32 = 0x5411;

/// The bits of a socket's type that are not flags (`SOCK_TYPE_MASK` in include/linux/net.h).
const SOCKET_TYPES: i32 = 0xf;

fn sockets(needs: &Needs<'_>) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let stream = || bits(1, SOCKET_TYPES, libc::SOCK_STREAM);
    let datagram = || bits(1, SOCKET_TYPES, libc::SOCK_DGRAM);
    let mut sockets = vec![
        rule([is(0, libc::AF_INET), stream()])?,
        rule([is(0, libc::AF_INET6), stream()])?,
        rule([is(0, libc::AF_INET), datagram()])?,
        rule([is(0, libc::AF_INET6), datagram()])?,
    ];
    if needs.changes.is_some() {
        // conntrack.
        sockets.push(rule([is(0, libc::AF_NETLINK), is(2, libc::NETLINK_NETFILTER)])?);
    }
    if needs.log_socket || needs.unix_backends || needs.binds_unix_sockets() {
        sockets.push(rule([is(0, libc::AF_UNIX), stream()])?);
    }
    if needs.log_socket {
        sockets.push(rule([is(0, libc::AF_UNIX), datagram()])?);
    }
    Ok(sockets)
}

/// A range of options of one level: level, first option, last option.
type Options = (i32, i32, i32);

/// Options of connections: buffers, keepalive and inline urgent data (numbers `SO_SNDBUF` to `SO_OOBINLINE`
/// are exactly these), how they close and when they become readable.
const OF_TCP: &[Options] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_LINGER, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, libc::SO_RCVLOWAT),
    (libc::SOL_TCP, libc::TCP_NODELAY, libc::TCP_NODELAY),
    (libc::SOL_TCP, libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL),
    (libc::SOL_TCP, libc::TCP_QUICKACK, libc::TCP_QUICKACK),
];

/// Options of SCTP sockets beside those (linux/sctp.h): `SCTP_INITMSG` and `SCTP_NODELAY`, and `SCTP_RECVRCVINFO`.
const OF_SCTP: &[Options] = &[(SOL_SCTP, 2, 3), (SOL_SCTP, 32, 32)];

/// The option level of SCTP (linux/sctp.h).
const SOL_SCTP: i32 = 132;

/// Options of flows: buffers, GSO and GRO, ancillary data, and sharing the listener's port.
const OF_UDP: &[Options] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, libc::SO_RXQ_OVFL),
    (libc::SOL_IP, libc::IP_RECVTOS, libc::IP_RECVTOS),
    (libc::SOL_IPV6, libc::IPV6_RECVTCLASS, libc::IPV6_RECVTCLASS),
    (libc::SOL_IPV6, libc::IPV6_V6ONLY, libc::IPV6_V6ONLY),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, libc::SO_RCVBUF),
    (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE),
    (libc::SOL_UDP, libc::UDP_GRO, libc::UDP_GRO),
];

/// The code point of connections.
const OF_MARKS: &[Options] =
    &[(libc::SOL_IP, libc::IP_TOS, libc::IP_TOS), (libc::SOL_IPV6, libc::IPV6_TCLASS, libc::IPV6_TCLASS)];

/// The timers of connections: the number of keepalive probes, and how long data may wait for its acknowledgement.
const OF_TIMERS: &[Options] = &[
    (libc::SOL_TCP, libc::TCP_KEEPCNT, libc::TCP_KEEPCNT),
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT, libc::TCP_USER_TIMEOUT),
];

/// Sockets that come from the address of a client.
const OF_CLIENTS: &[Options] = &[
    (libc::SOL_IP, libc::IP_TRANSPARENT, libc::IP_TRANSPARENT),
    (libc::SOL_IPV6, libc::IPV6_TRANSPARENT, libc::IPV6_TRANSPARENT),
];

/// Sockets that come from a given address, or a client's with any port.
const OF_ADDRESSES: &[Options] =
    &[(libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, libc::IP_BIND_ADDRESS_NO_PORT)];

/// Sockets that leave by a given interface.
const OF_DEVICES: &[Options] = &[(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, libc::SO_BINDTODEVICE)];

/// Options of new listeners, and of the conntrack socket.
const OF_CHANGES: &[Options] = &[
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, libc::SO_RCVTIMEO),
    (libc::SOL_IP, libc::IP_FREEBIND, libc::IP_FREEBIND),
    (libc::SOL_IPV6, libc::IPV6_FREEBIND, libc::IPV6_FREEBIND),
    (libc::SOL_IP, libc::IP_PKTINFO, libc::IP_PKTINFO),
    (libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, libc::IPV6_RECVPKTINFO),
    (libc::SOL_IPV6, libc::IPV6_V6ONLY, libc::IPV6_V6ONLY),
];

/// The socket options in use. All others are refused, because some of them mark packets, redirect or filter
/// them, or put a connection into repair mode.
fn options(needs: &Needs<'_>) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let changes = needs.changes.is_some();
    let served = [
        (OF_TCP, changes || needs.tcp() || needs.sctp()),
        (OF_SCTP, changes || needs.sctp()),
        (OF_UDP, changes || needs.udp),
        (OF_MARKS, changes || needs.dscp),
        (OF_TIMERS, changes || needs.timers),
        (OF_CLIENTS, changes || needs.sources.clients),
        (OF_ADDRESSES, changes || needs.sources.are_bound()),
        (OF_DEVICES, changes || needs.sources.devices),
        (OF_CHANGES, changes),
    ];
    let allowed =
        served.into_iter().filter(|(_options, is_served)| *is_served).flat_map(|(options, _)| options);
    allowed
        .map(|(level, first, last)| {
            let name = |operator, value: i32| {
                SeccompCondition::new(2, Dword, operator, u64::from(value.cast_unsigned()))
            };
            if first == last {
                return rule([is(1, *level), is(2, *first)]);
            }
            rule([is(1, *level), name(SeccompCmpOp::Ge, *first), name(SeccompCmpOp::Le, *last)])
        })
        .collect()
}

/// Requires all `conditions`.
fn rule<const N: usize>(conditions: [Condition; N]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)
}

/// Requires an int argument to be `value`. Like the kernel, it compares 32 bits.
fn is(argument: u8, value: i32) -> Condition {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, u64::from(value.cast_unsigned()))
}

/// Requires the bits of an argument selected by `mask` to equal `value`.
fn bits(argument: u8, mask: i32, value: i32) -> Condition {
    let [mask, value] = [mask, value].map(|bits| u64::from(bits.cast_unsigned()));
    SeccompCondition::new(argument, Qword, SeccompCmpOp::MaskedEq(mask), value)
}
