//! Finds processes of this program by what they were asked to do: the state directory that records them may be lost,
//! or an interrupted run may have started one without recording it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::process;
use crate::model::{MappingKey, RelayProcess};
use crate::name::Id;
use crate::relayed::RelayedPort;

/// The subcommand of the supervisor.
pub const SUPERVISE: &str = "supervise-relay";

/// The option of the supervisor that names its network.
pub const NETWORK: &str = "--network";

/// The network namespace of the caller.
const OWN: &str = "/proc/thread-self/ns/net";

/// The option of the supervisor that names its state directory.
pub const STATE_DIR: &str = "--state-dir";

/// The processes in the caller's network namespace that may be those of a network.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The supervisors of the network.
    pub supervisors: Vec<RelayProcess>,
    /// The relays that an earlier version has started, each for one port.
    pub singles: BTreeMap<MappingKey, RelayProcess>,
}

/// Looks through all processes.
#[must_use]
pub fn find(network: &Id, ports: &[RelayedPort]) -> Found {
    let mut found = Found::default();
    let Some(own) = namespace(Path::new(OWN)) else { return found };
    let singles: BTreeMap<Vec<String>, MappingKey> =
        ports.iter().map(|port| (single_arguments(port), port.key)).collect();
    for (pid, words) in commands() {
        let key = single(&words).and_then(|arguments| singles.get(arguments)).copied();
        let is_supervisor = is_supervisor(&words, NETWORK, network.as_str());
        if !(is_supervisor || key.is_some()) || namespace_of(pid) != Some(own) {
            continue;
        }
        let Some(process) = process::running(pid) else { continue };
        match key {
            Some(key) => drop(found.singles.insert(key, process)),
            None => found.supervisors.push(process),
        }
    }
    found
}

/// The supervisors in the caller's network namespace that were started for a state directory.
#[must_use]
pub fn supervisors_of(state_dir: &Path) -> Vec<RelayProcess> {
    let Some(own) = namespace(Path::new(OWN)) else { return Vec::new() };
    // As the one who has started it has named it.
    let state_dir = state_dir.canonicalize().unwrap_or_else(|_| state_dir.to_owned());
    let state_dir = state_dir.to_string_lossy();
    let found = commands().filter(|(pid, words)| {
        is_supervisor(words, STATE_DIR, &state_dir) && namespace_of(*pid) == Some(own)
    });
    found.filter_map(|(pid, _words)| process::running(pid)).collect()
}

/// The state directories that supervisors in the caller's network namespace were started for.
#[must_use]
pub fn state_dirs() -> Vec<PathBuf> {
    let Some(own) = namespace(Path::new(OWN)) else { return Vec::new() };
    let found = commands().filter_map(|(pid, words)| {
        let directory = state_dir(&words)?.into();
        (namespace_of(pid) == Some(own)).then_some(directory)
    });
    found.collect()
}

/// The command lines of the processes of the caller's user.
fn commands() -> impl Iterator<Item = (u32, Vec<String>)> {
    let user = geteuid().as_raw();
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(move |entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let is_ours = entry.metadata().is_ok_and(|metadata| metadata.uid() == user);
        let line = is_ours.then(|| fs::read(entry.path().join("cmdline")).ok()).flatten()?;
        let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        Some((pid, words.collect()))
    })
}

/// Whether it is the command line of a supervisor with this value of an option.
fn is_supervisor(words: &[String], option: &str, value: &str) -> bool {
    let mut pairs = words.windows(2);
    words.get(1).is_some_and(|word| word == SUPERVISE)
        && pairs.any(|pair| pair[0] == option && pair[1] == value)
}

/// The state directory in the command line of a supervisor.
fn state_dir(words: &[String]) -> Option<&str> {
    let mut pairs = words.windows(2);
    let is_supervisor = words.get(1).is_some_and(|word| word == SUPERVISE);
    pairs.find(|pair| is_supervisor && pair[0] == STATE_DIR).map(|pair| pair[1].as_str())
}

/// The arguments of a relay for one port.
fn single(words: &[String]) -> Option<&[String]> {
    let (program, arguments) = words.split_first()?;
    let is_rproxy = program.rsplit('/').next().is_some_and(|name| name.starts_with("rproxy"));
    is_rproxy.then(|| arguments.get(..SINGLE_ARGUMENTS)).flatten()
}

/// The number of [`single_arguments`].
const SINGLE_ARGUMENTS: usize = 11;

/// How an earlier version has started the relay of one port: as dockerd starts docker-proxy.
fn single_arguments(port: &RelayedPort) -> Vec<String> {
    let pairs = [
        ("-proto", port.key.proto.to_string()),
        ("-host-ip", port.host()),
        ("-host-port", port.key.port.to_string()),
        ("-container-ip", port.to.ip().to_string()),
        ("-container-port", port.to.port().to_string()),
    ];
    let pairs = pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    pairs.chain(["-use-listen-fd".to_owned()]).collect()
}

/// The network namespace of a process.
fn namespace_of(pid: u32) -> Option<(u64, u64)> {
    namespace(&PathBuf::from(format!("/proc/{pid}/ns/net")))
}

fn namespace(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::Protocol;

    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_supervisor_is_known_by_its_network() {
        let (id, other) = (Id::from_bytes([7; 32]), Id::from_bytes([8; 32]));
        let line = words(&format!("netns-setup {SUPERVISE} --rproxy /usr/bin/rproxy {NETWORK} {id}"));
        assert!(is_supervisor(&line, NETWORK, id.as_str()));
        assert!(!is_supervisor(&line, NETWORK, other.as_str()));
        assert!(!is_supervisor(&words(&format!("vi {id}")), NETWORK, id.as_str()));
        let line = words(&format!("netns-setup {SUPERVISE} {STATE_DIR} /run/x {NETWORK} {id}"));
        assert_eq!((state_dir(&line), state_dir(&line[1..])), (Some("/run/x"), None));
    }

    #[test]
    fn a_relay_of_one_port_is_known_by_its_arguments() {
        let key = MappingKey { proto: Protocol::Tcp, host: "*".parse().unwrap(), port: 80 };
        let port = RelayedPort {
            key,
            owner: "web".parse().unwrap(),
            to: "172.17.0.2:8080".parse().unwrap(),
            keeps_source: false,
        };
        let arguments = single_arguments(&port);
        assert_eq!(
            arguments.join(" "),
            "-proto tcp -host-ip :: -host-port 80 -container-ip 172.17.0.2 -container-port 8080 -use-listen-fd"
        );
        assert_eq!(arguments.len(), SINGLE_ARGUMENTS);
        let line = words(&format!("/usr/bin/rproxy {} ", arguments.join(" ")));
        assert_eq!(single(&line), Some(&arguments[..]));
        assert_eq!(single(&words(&format!("/bin/sh {}", arguments.join(" ")))), None);
    }
}
