//! What holds for the parsers whatever they are given: they return, and what they write they read again as the same.

use std::ffi::OsString;
use std::fmt::{Debug, Display};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::str::FromStr;

use rproxy::config;
use rproxy::control::protocol;
use rproxy::docker::flags::{self, is_docker_proxy_command};
use rproxy::proxy_protocol::{Endpoints, Header, HeaderError, LONGEST, decode_datagram, decode_stream};
use rproxy_mapping::access::parse_network;
use rproxy_mapping::addr::{Protocol, ScopedIp};
use rproxy_mapping::dscp::Dscp;
use rproxy_mapping::duration::{format_limit, parse_optional_limit};
use rproxy_mapping::endpoint::{BackendSpec, HostSpec};
use rproxy_mapping::interfaces::{Interfaces, NoInterfaces};
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::proxy_protocol::ProxyVersion;
use rproxy_mapping::publish::{ExposedPorts, PublishSpec};
use rproxy_mapping::wire::WireMapping;
use rproxy_shim::message::{Answer, Request};

/// One interface, `eth0`.
struct Eth0;

impl Interfaces for Eth0 {
    fn index_of(&self, name: &str) -> Option<u32> {
        (name == "eth0").then_some(2)
    }

    fn example(&self) -> Option<String> {
        Some("eth0".to_owned())
    }
}

/// The words of the command line: `-p`, addresses, names, limits.
///
/// # Panics
/// If one is written in another way than it is read.
pub fn publish(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(spec) = PublishSpec::parse(text, &Eth0) {
        is_read_again(spec.clone());
        if let Ok(mapping) = spec.to(ScopedIp::ANY_V4.into(), ScopedIp::ANY) {
            is_read_again(mapping.name());
        }
    }
    HostSpec::parse(text, &Eth0).map(is_read_again).ok();
    BackendSpec::parse(text, &Eth0).map(is_read_again).ok();
    ScopedIp::parse(text, &Eth0).map(is_read_again).ok();
    text.parse::<ExposedPorts>().ok();
    text.parse::<PortRange>().map(is_read_again).ok();
    text.parse::<Name>().map(is_read_again).ok();
    text.parse::<Dscp>().map(is_read_again).ok();
    if let Ok(network) = parse_network(text) {
        assert_eq!(parse_network(&network.to_string()), Ok(network));
    }
    if let Ok(limit) = parse_optional_limit(text) {
        assert_eq!(parse_optional_limit(&format_limit(limit)), Ok(limit));
    }
}

fn is_read_again<T: Display + FromStr + PartialEq + Debug>(value: T)
where
    T::Err: Debug,
{
    let written = value.to_string();
    assert_eq!(written.parse().as_ref().ok(), Some(&value), "{written}");
}

/// A configuration file.
///
/// # Panics
/// If it is printed in another way than it is read, or a mistake is reported by more than one line each.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("rproxy.toml");
    match config::parse(path, text) {
        Ok(config) => {
            let (attach, metrics) = (config.attach_options(None), config.metrics);
            let printed = config::print(
                &config.mappings,
                attach.as_ref(),
                metrics.as_ref(),
                config::with_interface_name,
            );
            let again = config::parse(path, &printed).expect(&printed);
            assert_eq!(
                (again.attach_options(None), again.metrics, again.mappings),
                (attach, metrics, config.mappings),
                "{printed}"
            );
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!message.is_empty());
            assert!(!message.contains(|c: char| c.is_control() && c != '\n'), "{message:?}");
        }
    }
}

/// A line that a control client sends, and one that a server answers.
///
/// # Panics
/// If a mapping of a request is written in another way than it is read.
pub fn control(bytes: &[u8]) {
    let (_id, request) = protocol::decode(bytes);
    match request {
        Ok(protocol::Request::Add { mappings } | protocol::Request::Apply { mappings, .. }) => {
            for wire in mappings {
                let Ok(mapping) = wire.read(&NoInterfaces, ScopedIp::ANY) else { continue };
                let again = WireMapping::of(&mapping).read(&NoInterfaces, ScopedIp::ANY);
                assert_eq!(again, Ok(mapping));
            }
        }
        Ok(_) => {}
        Err(refusal) => assert!(!refusal.message.is_empty()),
    }
    if let Ok(line) = std::str::from_utf8(bytes) {
        protocol::read_answer(line);
    }
}

/// The command line of docker-proxy, its words apart by NUL.
pub fn docker(bytes: &[u8]) {
    let words: Vec<OsString> =
        bytes.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    if is_docker_proxy_command(&words) {
        flags::parse(&words).ok();
    }
}

/// A packet of a shim, and one of the process that it attaches to.
///
/// # Panics
/// If a message is written in another way than it is read.
pub fn attach(bytes: &[u8]) {
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(Request::decode(request.encode().as_bytes()), Ok(request));
    }
    match Answer::decode(bytes) {
        Ok(answer) => assert_eq!(answer.encode().as_bytes(), bytes),
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

/// The start of a connection from a proxy, and a datagram of one.
///
/// # Panics
/// If a header is longer than its bytes or than [`LONGEST`], depends on what follows it, is taken for whole before it is,
/// or is written in another way than it is read.
pub fn proxy_protocol(bytes: &[u8]) {
    if let Ok(Some(header)) = decode_stream(bytes) {
        let whole = of_length(bytes, header);
        assert_eq!(decode_stream(whole), Ok(Some(header)));
        (0..header.len).for_each(|end| assert_eq!(decode_stream(&whole[..end]), Ok(None)));
        header.endpoints.iter().for_each(is_received_again);
    }
    if let Ok(header) = decode_datagram(bytes) {
        let whole = of_length(bytes, header);
        assert_eq!(decode_datagram(whole), Ok(header));
        for end in 0..header.len {
            let error = decode_datagram(&whole[..end]).unwrap_err();
            assert!(matches!(error, HeaderError::Missing | HeaderError::Incomplete), "{error}");
        }
        header.endpoints.iter().for_each(is_received_again);
    }
}

fn of_length(bytes: &[u8], header: Header) -> &[u8] {
    assert!(header.len <= LONGEST);
    &bytes[..header.len]
}

fn is_received_again(endpoints: &Endpoints) {
    for version in [ProxyVersion::V1, ProxyVersion::V2] {
        let written = endpoints.header(version, Protocol::Tcp);
        let header = Header { len: written.len(), endpoints: Some(*endpoints) };
        assert_eq!(decode_stream(&written), Ok(Some(header)));
        let written = endpoints.header(version, Protocol::Udp);
        let header = Header { len: written.len(), endpoints: Some(*endpoints) };
        assert_eq!(decode_datagram(&written), Ok(header));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// The corpus of a target.
    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        let files = fs::read_dir(&dir).expect("each target has a corpus");
        let corpus: Vec<_> = files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
        assert!(!corpus.is_empty());
        corpus
    }

    /// What one input becomes when a part of it is cut out and a part of another is put there.
    fn crossed(corpus: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        let part = || (any::<Index>(), any::<Index>(), any::<Index>());
        (part(), part(), any::<bool>(), ".{0,3}").prop_map(move |(one, other, whole, junk)| {
            let cut = |(which, from, to): (Index, Index, Index)| {
                let input = which.get(&corpus);
                let (from, to) = (from.index(input.len() + 1), to.index(input.len() + 1));
                (input, from.min(to)..from.max(to))
            };
            let ((one, hole), (other, piece)) = (cut(one), cut(other));
            let piece = if whole { &[][..] } else { &other[piece] };
            [&one[..hole.start], piece, junk.as_bytes(), &one[hole.end..]].concat()
        })
    }

    fn try_target(target: &str, run: fn(&[u8])) {
        let corpus = corpus(target);
        corpus.iter().for_each(|input| run(input));
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) };
        proptest!(config, |(input in crossed(corpus))| run(&input));
    }

    #[test]
    fn publish() {
        try_target("publish", super::publish);
    }

    #[test]
    fn config() {
        try_target("config", super::config);
    }

    #[test]
    fn control() {
        try_target("control", super::control);
    }

    #[test]
    fn docker() {
        try_target("docker", super::docker);
    }

    #[test]
    fn attach() {
        try_target("attach", super::attach);
    }

    #[test]
    fn proxy_protocol() {
        try_target("proxy_protocol", super::proxy_protocol);
    }
}
