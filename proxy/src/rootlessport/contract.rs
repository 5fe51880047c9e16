//! What Podman passes on standard input: JSON with the published ports, and where their container is.
//!
//! The fields are those of `Config` in `pkg/rootlessport` of Podman 4.3 and of its later `common` library, and of `PortMapping` in its
//! `libnetwork/types`. Unknown ones are left to later versions.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rproxy_mapping::addr::{AddrError, Protocols, ScopedIp};
use rproxy_mapping::escape::escaped;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::{Mapping, MappingError};
use rproxy_sys::fd::claim_inherited;
use serde::Deserialize;

use crate::bind::family::everywhere;
use crate::bind::interfaces::HostInterfaces;

/// The most bytes that are read. Podman lists a range as one mapping, so this is room for many thousands.
const LONGEST: u64 = 16 * 1024 * 1024;

/// What was passed, as it is written.
#[derive(Debug, Deserialize)]
struct Passed {
    #[serde(rename = "Mappings", default)]
    mappings: Option<Vec<PassedMapping>>,
    #[serde(rename = "NetNSPath", default)]
    netns_path: PathBuf,
    #[serde(rename = "ExitFD", default)]
    exit_fd: i32,
    #[serde(rename = "ReadyFD", default)]
    ready_fd: i32,
    #[serde(rename = "TmpDir", default)]
    tmp_dir: PathBuf,
    #[serde(rename = "ChildIP", default)]
    child_ip: String,
    #[serde(rename = "ContainerID", default)]
    container_id: String,
    #[serde(rename = "RootlessCNI", default)]
    is_bridged: bool,
}

/// Some consecutive ports.
#[derive(Debug, Deserialize)]
struct PassedMapping {
    #[serde(default)]
    host_ip: String,
    #[serde(default)]
    container_port: u16,
    #[serde(default)]
    host_port: u16,
    /// How many, one if it is left out.
    #[serde(default)]
    range: u16,
    /// One, or several with commas.
    #[serde(default)]
    protocol: String,
}

/// What is asked for.
#[derive(Debug)]
pub(super) struct Contract {
    pub(super) mappings: Vec<Mapping>,
    /// The network namespace where the backends are.
    pub(super) netns: PathBuf,
    /// At its end of file, this process ends.
    pub(super) exit: OwnedFd,
    /// Gets `1` once clients are served.
    pub(super) ready: OwnedFd,
    /// Where Podman tells that the container has another address, if it does.
    pub(super) reload: Option<ReloadPlace>,
}

/// A directory and the name of a socket in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReloadPlace {
    pub(super) directory: PathBuf,
    pub(super) name: String,
}

/// Reads all of `input`, and claims the descriptors that it names. Call it before anything opens a file.
///
/// # Errors
/// [`ContractError`]
pub(super) fn read(input: impl Read) -> Result<Contract, ContractError> {
    let mut text = Vec::new();
    input.take(LONGEST).read_to_end(&mut text).map_err(ContractError::Read)?;
    let passed: Passed = serde_json::from_slice(&text).map_err(ContractError::Json)?;
    if passed.netns_path.as_os_str().is_empty() {
        return Err(ContractError::Missing("NetNSPath"));
    }
    let reload =
        passed.is_bridged.then(|| reload_place(&passed.tmp_dir, &passed.container_id)).transpose()?;
    Ok(Contract {
        mappings: mappings(&passed)?,
        netns: passed.netns_path,
        exit: claim("ExitFD", passed.exit_fd)?,
        ready: claim("ReadyFD", passed.ready_fd)?,
        reload,
    })
}

fn claim(field: &'static str, fd: i32) -> Result<OwnedFd, ContractError> {
    match fd {
        0 => Err(ContractError::Missing(field)),
        fd => claim_inherited(fd).map_err(|source| ContractError::Descriptor { field, fd, source }),
    }
}

/// `TmpDir/rp/ContainerID`.
fn reload_place(tmp_dir: &Path, id: &str) -> Result<ReloadPlace, ContractError> {
    match id {
        _ if tmp_dir.as_os_str().is_empty() => Err(ContractError::Missing("TmpDir")),
        "" => Err(ContractError::Missing("ContainerID")),
        id if id.contains(['/', '\0']) || matches!(id, "." | "..") => {
            Err(ContractError::Container(id.to_owned()))
        }
        id => Ok(ReloadPlace { directory: tmp_dir.join("rp"), name: id.to_owned() }),
    }
}

fn mappings(passed: &Passed) -> Result<Vec<Mapping>, ContractError> {
    let child = child_ip(&passed.child_ip).map_err(ContractError::ChildIp)?;
    let all = passed.mappings.iter().flatten().map(|mapping| of_each_protocol(mapping, child));
    Ok(all.collect::<Result<Vec<_>, _>>()?.concat())
}

/// The container's address inside of its namespace. Without a network, it is the loopback interface that is left.
pub(super) fn child_ip(text: &str) -> Result<ScopedIp, AddrError> {
    match text {
        "" => Ok(IpAddr::from(Ipv4Addr::LOCALHOST).into()),
        text => text.parse(),
    }
}

fn of_each_protocol(passed: &PassedMapping, child: ScopedIp) -> Result<Vec<Mapping>, ContractError> {
    let host = match passed.host_ip.as_str() {
        "" => everywhere(),
        text => ScopedIp::parse(text, &HostInterfaces).map_err(ContractError::HostIp)?,
    };
    let host_ports = ports("host_port", passed.host_port, passed.range)?;
    let child_ports = ports("container_port", passed.container_port, passed.range)?;
    let of_protocol = |text: &str| {
        let unknown = |_of_parser| ContractError::Protocol(passed.protocol.clone());
        let protocols: Protocols = text.trim().parse().map_err(unknown)?;
        Mapping::new(protocols, (host.into(), Some(host_ports)), (child.into(), child_ports))
            .map_err(ContractError::Mapping)
    };
    passed.protocol.split(',').map(of_protocol).collect()
}

fn ports(field: &'static str, first: u16, range: u16) -> Result<PortRange, ContractError> {
    let last = first.checked_add(range.saturating_sub(1));
    let range_of = |last| PortRange::new(first, last).ok();
    last.and_then(range_of).ok_or(ContractError::Ports { field, first, range })
}

/// Why nothing can be done with what was passed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContractError {
    #[error("standard input: {0}")]
    Read(#[source] io::Error),
    #[error("standard input is not the JSON that Podman passes ({}); rootlessport is for Podman to start", escaped(&.0.to_string()))]
    Json(#[source] serde_json::Error),
    #[error("{0} is missing in the JSON on standard input; rootlessport is for Podman to start")]
    Missing(&'static str),
    #[error("{field} {fd}: no descriptor to be used was passed with this number: {source}")]
    Descriptor { field: &'static str, fd: i32, source: io::Error },
    #[error("ContainerID '{}': it is not the name of a file", escaped(.0))]
    Container(String),
    #[error("ChildIP: {}", escaped(&.0.to_string()))]
    ChildIp(#[source] AddrError),
    #[error("host_ip: {}", escaped(&.0.to_string()))]
    HostIp(#[source] AddrError),
    #[error("protocol '{}': tcp, udp and sctp are relayed", escaped(.0))]
    Protocol(String),
    #[error("{field} {first} with range {range}: ports are numbers from 1 to 65535")]
    Ports { field: &'static str, first: u16, range: u16 },
    #[error(transparent)]
    Mapping(MappingError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the numbers are, there are as many ports as asked for, or none.
        #[test]
        fn a_range_is_as_long_on_both_sides(host_port: u16, container_port: u16, range: u16) {
            let protocol = "udp".to_owned();
            let passed = PassedMapping { host_ip: "0.0.0.0".to_owned(), container_port, host_port, range, protocol };
            let child = child_ip("").unwrap();
            if let Ok(mappings) = of_each_protocol(&passed, child) {
                let ports: Vec<_> = mappings[0].port_mappings().collect();
                prop_assert_eq!((mappings.len(), ports.len()), (1, usize::from(range.max(1))));
                let last = &ports[ports.len() - 1];
                prop_assert_eq!(usize::from(last.host.port().unwrap()), usize::from(host_port) + ports.len() - 1);
                prop_assert_eq!(
                    usize::from(last.backend.socket_addr().port()),
                    usize::from(container_port) + ports.len() - 1
                );
            } else {
                let last = |first: u16| u32::from(first) + u32::from(range.max(1)) - 1;
                let fits = |first: u16| first > 0 && last(first) <= u32::from(u16::MAX);
                prop_assert!(!fits(host_port) || !fits(container_port));
            }
        }
    }

    fn parsed(json: &str) -> Result<Vec<String>, ContractError> {
        let passed: Passed = serde_json::from_str(json).map_err(ContractError::Json)?;
        let shown = |mapping: &Mapping| format!("{mapping} -> {}", mapping.backend());
        Ok(mappings(&passed)?.iter().map(shown).collect())
    }

    fn refused(json: &str) -> String {
        let error = read(json.as_bytes()).expect_err(json).to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn ranges_and_protocols_are_mappings_to_the_child() {
        let json = r#"{"Mappings":[
            {"host_ip":"127.0.0.1","container_port":80,"host_port":8000,"range":3,"protocol":"tcp,udp"},
            {"host_ip":"::1","container_port":53,"host_port":53,"range":1,"protocol":"udp"},
            {"host_ip":"192.0.2.1","container_port":7,"host_port":7,"range":0,"protocol":"sctp"}],
            "ChildIP":"10.0.2.100","Later":{"unknown":[1]}}"#;
        let expected = [
            "127.0.0.1:8000-8002:80-82/tcp -> 10.0.2.100",
            "127.0.0.1:8000-8002:80-82/udp -> 10.0.2.100",
            "[::1]:53:53/udp -> 10.0.2.100",
            "192.0.2.1:7:7/sctp -> 10.0.2.100",
        ];
        assert_eq!(parsed(json).unwrap(), expected);
    }

    #[test]
    fn go_writes_null_for_nothing() {
        assert_eq!(parsed(r#"{"Mappings":null,"ChildIP":""}"#).unwrap(), [""; 0]);
        let mapping = r#"{"Mappings":[{"host_port":1,"container_port":2,"range":1,"protocol":"tcp"}]}"#;
        let shown = parsed(mapping).unwrap().concat();
        assert!(shown.ends_with(":1:2/tcp -> 127.0.0.1"), "{shown}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with =
            |mapping: &str| format!(r#"{{"NetNSPath":"/n","Mappings":[{mapping}],"ChildIP":"10.0.0.1"}}"#);
        for (json, part) in [
            ("", "not the JSON"),
            ("7", "not the JSON"),
            ("{}", "NetNSPath is missing"),
            (r#"{"NetNSPath":"/n"}"#, "ExitFD is missing"),
            (r#"{"NetNSPath":"/n","ExitFD":999}"#, "ExitFD 999"),
            (r#"{"NetNSPath":"/n","ExitFD":1}"#, "ExitFD 1"),
            (r#"{"NetNSPath":"/n","RootlessCNI":true}"#, "TmpDir is missing"),
            (r#"{"NetNSPath":"/n","RootlessCNI":true,"TmpDir":"/t"}"#, "ContainerID is missing"),
            (r#"{"NetNSPath":"/n","RootlessCNI":true,"TmpDir":"/t","ContainerID":"../a"}"#, "'../a'"),
            (r#"{"NetNSPath":"/n","ChildIP":"nowhere"}"#, "ChildIP: "),
            (&with(r#"{"host_port":1,"container_port":1,"protocol":"dccp"}"#), "protocol 'dccp'"),
            (&with(r#"{"host_port":1,"container_port":1}"#), "protocol ''"),
            (&with(r#"{"host_port":0,"container_port":1,"protocol":"tcp"}"#), "host_port 0"),
            (
                &with(r#"{"host_port":65535,"container_port":1,"range":2,"protocol":"tcp"}"#),
                "host_port 65535 with",
            ),
            (&with(r#"{"host_port":65536,"container_port":1,"protocol":"tcp"}"#), "not the JSON"),
            (&with(r#"{"host_ip":"a.b","host_port":1,"container_port":1,"protocol":"tcp"}"#), "host_ip: "),
        ] {
            let error = refused(json);
            assert!(error.contains(part), "{json}: {error}");
        }
    }
}
