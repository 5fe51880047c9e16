//! Who has a host port.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry};
use procfs::process::{FDTarget, Process};
use rproxy_mapping::addr::Protocol;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::Socket;

use crate::host_ip::HostIp;
use crate::model::MappingKey;

/// Where nerdctl keeps the process that holds the ports of a container until it has its network.
const NERDCTL: &str = "/run/nerdctl";

/// The process that has the port, for people; `None` if none can be found.
#[must_use]
pub fn describe(key: MappingKey) -> Option<String> {
    let inodes = sockets(key);
    let processes = procfs::process::all_processes().ok()?.filter_map(Result::ok);
    let mut holders = processes.filter_map(|process| {
        let descriptors = process.fd().ok()?.filter_map(Result::ok);
        let mut targets = descriptors.map(|descriptor| descriptor.target);
        let has_it =
            targets.any(|target| matches!(target, FDTarget::Socket(inode) if inodes.contains(&inode)));
        let name = process.stat().map(|stat| stat.comm).ok()?;
        has_it.then(|| format!("{name} (process {})", process.pid))
    });
    holders.next()
}

/// The inodes of the sockets that have the port, on addresses that overlap those of `key`.
fn sockets(key: MappingKey) -> Vec<u64> {
    let is_it = |address: SocketAddr| {
        address.port() == key.port && (is_wildcard(address) || HostIp::Ip(address.ip()).overlaps(key.host))
    };
    match key.proto {
        Protocol::Tcp => {
            let entries: Vec<TcpNetEntry> =
                [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten().collect();
            let listening = entries.into_iter().filter(|entry| entry.state == TcpState::Listen);
            listening.filter(|entry| is_it(entry.local_address)).map(|entry| entry.inode).collect()
        }
        Protocol::Udp => {
            let entries: Vec<UdpNetEntry> =
                [procfs::net::udp(), procfs::net::udp6()].into_iter().flatten().flatten().collect();
            entries.into_iter().filter(|entry| is_it(entry.local_address)).map(|entry| entry.inode).collect()
        }
        Protocol::Sctp => Vec::new(),
    }
}

/// `[::]` may have the port for both families.
fn is_wildcard(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// A copy of the socket that nerdctl holds for the container, if it is that of `key`. nerdctl calls a container by its
/// namespace and identifier: `default-4f2d…`.
#[must_use]
pub fn reserved_by_nerdctl(container: &str, key: MappingKey) -> Option<Socket> {
    let inodes = sockets(key);
    let mut files = nerdctl_files(container);
    files.find_map(|file| {
        let pid: i32 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let descriptors = Process::new(pid).ok()?.fd().ok()?.filter_map(Result::ok);
        let mut sockets = descriptors.filter(
            |descriptor| matches!(descriptor.target, FDTarget::Socket(inode) if inodes.contains(&inode)),
        );
        let copy: OwnedFd = pidfd_getfd(&pidfd, sockets.next()?.fd, PidfdGetfdFlags::empty()).ok()?;
        Some(Socket::from(copy)).filter(|socket| is_bound(socket, key))
    })
}

/// Whether the socket has the port on just the addresses of `key`: it was taken while its process might have changed.
fn is_bound(socket: &Socket, key: MappingKey) -> bool {
    let address = socket.local_addr().ok().and_then(|address| address.as_socket());
    address.is_some_and(|address| address.port() == key.port && HostIp::Ip(address.ip()) == key.host)
}

/// The files of nerdctl that may name the process: both parts of the container's name can have a `-`.
fn nerdctl_files(container: &str) -> impl Iterator<Item = PathBuf> {
    let parts = container.match_indices('-').map(|(at, _)| (&container[..at], &container[at + 1..]));
    parts.map(|(namespace, id)| Path::new(NERDCTL).join(namespace).join(id).join("port-reserver.pid"))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn the_process_that_listens_is_named() {
        let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("[::1]:0").unwrap());
        let own = format!("(process {})", std::process::id());
        for (proto, address) in [(Protocol::Tcp, tcp.local_addr()), (Protocol::Udp, udp.local_addr())] {
            let key = MappingKey { proto, host: HostIp::Any, port: address.unwrap().port() };
            let holder = describe(key).unwrap();
            assert!(holder.ends_with(&own), "{holder}");
            let elsewhere = MappingKey { host: "10.9.9.9".parse().unwrap(), ..key };
            assert_eq!(describe(elsewhere), None);
        }
    }

    #[test]
    fn a_container_of_nerdctl_is_found_by_its_namespace() {
        let files: Vec<_> = nerdctl_files("k8s.io-4f2d").collect();
        assert_eq!(files, [PathBuf::from("/run/nerdctl/k8s.io/4f2d/port-reserver.pid")]);
        assert_eq!(nerdctl_files("a-b-c").count(), 2);
        assert_eq!(nerdctl_files("4f2d").count(), 0);
    }
}
