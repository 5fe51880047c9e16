//! The network configuration on standard input: the keys of the specification, of `portmap`, and this plugin's own.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use rproxy_mapping::addr::Protocol;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::attachment::check_name;
use super::error::CniError;
use crate::host_ip::HostIp;
use crate::model::Via;

/// The state directory by default.
const STATE_DIR: &str = "/run/rproxy-portmap";

/// How similar an unknown key has to be to one of this plugin to be taken for it (`strsim::jaro_winkler`).
const SIMILAR: f64 = 0.85;

/// What is done with packets for a published port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The relay serves everything.
    Relay,
    /// The kernel translates all that it can, also what containers and the host send; the relay serves the rest.
    Dnat,
    /// The kernel translates what comes from outside, the relay serves containers and loopback.
    #[default]
    Both,
}

impl Policy {
    /// What it means for the rules. The relay holds each port whatever the policy.
    #[must_use]
    pub fn via(self) -> Via {
        match self {
            Self::Relay => Via::Proxy,
            Self::Dnat => Via::Dnat,
            Self::Both => Via::Both,
        }
    }
}

/// The address by which the relay connects to a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceAddress {
    /// One of the host.
    #[default]
    Auto,
    /// The client's.
    Client,
}

/// One port that a container is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRequest {
    /// The protocol.
    pub proto: Protocol,
    /// The addresses of the host.
    pub host: HostIp,
    /// The port of the host.
    pub host_port: u16,
    /// The port in the container.
    pub container_port: u16,
}

/// An attachment that is in use, as `GC` names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct ValidAttachment {
    /// The identifier of the container.
    #[serde(rename = "containerID")]
    pub container: String,
    /// Its interface.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// The configuration.
#[derive(Debug)]
pub struct Conf {
    /// The name of the network.
    pub name: String,
    /// What is done with packets.
    pub policy: Policy,
    /// The address by which the relay connects.
    pub source: SourceAddress,
    /// The path of `rproxy`; `None` to search for it.
    pub rproxy: Option<PathBuf>,
    /// Where this plugin remembers what it has published.
    pub state_dir: PathBuf,
    /// The ports to publish, each once.
    pub ports: Vec<PortRequest>,
    /// The result of the plugin before, as it came.
    pub prev_result: Option<Box<RawValue>>,
    /// The attachments that are in use, if the runtime names them.
    pub valid: Option<BTreeSet<ValidAttachment>>,
}

/// The key of the attachments that are in use.
const VALID: &str = "cni.dev/valid-attachments";

/// The keys that are this plugin's own.
const OWN_KEYS: [&str; 4] = ["policy", "source", "rproxy", "stateDir"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Keys {
    #[serde(default)]
    name: String,
    #[serde(default)]
    policy: Policy,
    #[serde(default)]
    source: SourceAddress,
    rproxy: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    runtime_config: Option<RuntimeConfig>,
    prev_result: Option<Box<RawValue>>,
    #[serde(default, rename = "cni.dev/valid-attachments", deserialize_with = "or_null")]
    valid: Option<BTreeSet<ValidAttachment>>,
    // Those of `portmap` that change who may connect, or how.
    conditions_v4: Option<Value>,
    conditions_v6: Option<Value>,
    masq_all: Option<bool>,
    external_set_mark_chain: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    port_mappings: Option<Vec<WirePort>>,
}

/// A port or a range of ports: `portMappings` as runtimes write it. Those of Podman's plugins have a `range`, lists of
/// protocols, and keys in the other style.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WirePort {
    #[serde(alias = "host_port")]
    host_port: i64,
    #[serde(alias = "container_port")]
    container_port: i64,
    protocol: Option<String>,
    // Other cases are those of callers whose JSON does not tell them apart.
    #[serde(rename = "hostIP", alias = "hostIp", alias = "HostIP", alias = "hostip", alias = "host_ip")]
    host_ip: Option<String>,
    range: Option<i64>,
}

/// A list that is there; `null` is an empty one.
fn or_null<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BTreeSet<ValidAttachment>>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

impl Conf {
    /// Reads the configuration of a command that only removes: what it does not need may be wrong, as it was for an `ADD`
    /// that has failed.
    ///
    /// # Errors
    /// If what it needs is wrong.
    pub fn read_to_remove(text: &str) -> Result<Self, CniError> {
        let mut keys = object(text)?;
        keys.retain(|key, value| match key.as_str() {
            "rproxy" => value.as_str().is_some_and(|path| path.starts_with('/')),
            key => ["name", "stateDir", VALID].contains(&key),
        });
        Self::read(&Value::Object(keys).to_string())
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// If it is wrong: the message names the key.
    pub fn read(text: &str) -> Result<Self, CniError> {
        check_spelling(text)?;
        let deserializer = &mut serde_json::Deserializer::from_str(text);
        let keys: Keys = serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let path = error.path().to_string();
            let why = error.into_inner();
            CniError::Config(if path == "." { why.to_string() } else { format!("{path}: {why}") })
        })?;
        if keys.name.is_empty() {
            return Err(CniError::Config("name, that of the network, is missing".to_owned()));
        }
        check_name("name", &keys.name).map_err(CniError::Config)?;
        keys.check_portmap()?;
        let state_dir = keys.state_dir.unwrap_or_else(|| STATE_DIR.into());
        for (key, path) in [("stateDir", Some(&state_dir)), ("rproxy", keys.rproxy.as_ref())] {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let path = path.display();
                return Err(CniError::Config(format!("{key} \"{path}\" is not an absolute path")));
            }
        }
        Ok(Self {
            name: keys.name,
            policy: keys.policy,
            source: keys.source,
            rproxy: keys.rproxy,
            state_dir,
            ports: requests(&keys.runtime_config.unwrap_or_default().port_mappings.unwrap_or_default())?,
            prev_result: keys.prev_result,
            valid: keys.valid,
        })
    }
}

impl Keys {
    /// Refuses what `portmap` would do and this plugin does not: to ignore it could expose more than was asked for.
    fn check_portmap(&self) -> Result<(), CniError> {
        let is_set = |conditions: &Option<Value>| match conditions {
            None | Some(Value::Null) => false,
            Some(Value::Array(conditions)) => !conditions.is_empty(),
            Some(_) => true,
        };
        let conditions = "filter in a table of your own, or publish on one address with \"hostIP\"";
        let refused = [
            ("conditionsV4", is_set(&self.conditions_v4), conditions),
            ("conditionsV6", is_set(&self.conditions_v6), conditions),
            (
                "masqAll",
                self.masq_all == Some(true),
                "with \"policy\": \"relay\" containers see the host's address",
            ),
            (
                "externalSetMarkChain",
                self.external_set_mark_chain.as_deref().is_some_and(|chain| !chain.is_empty()),
                "leave it out: what this plugin masquerades needs no mark",
            ),
        ];
        let refused = refused.into_iter().find(|(_, is_set, _)| *is_set);
        refused.map_or(Ok(()), |(key, _, way_out)| Err(CniError::Unsupported { key, way_out }))
    }
}

fn object(text: &str) -> Result<serde_json::Map<String, Value>, CniError> {
    let not_an_object = |_| CniError::Config("the configuration is not an object".to_owned());
    serde_json::from_str(text).map_err(not_an_object)
}

/// Refuses a misspelt key of this plugin. Other unknown keys are those of other plugins and of runtimes.
fn check_spelling(text: &str) -> Result<(), CniError> {
    let conf = object(text)?;
    let unknown = conf.keys().filter(|key| !OWN_KEYS.contains(&key.as_str()));
    let mut alike = unknown.filter_map(|key| {
        let own = OWN_KEYS.into_iter().find(|own| strsim::jaro_winkler(own, key) > SIMILAR)?;
        Some(format!("{key:?} is not a key of this plugin: did you mean {own:?}?"))
    });
    alike.next().map_or(Ok(()), |message| Err(CniError::Config(message)))
}

/// The single ports, each once, in their order.
fn requests(ports: &[WirePort]) -> Result<Vec<PortRequest>, CniError> {
    let mut requests: Vec<PortRequest> = Vec::new();
    let mut seen = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let single = port
            .requests()
            .map_err(|why| CniError::Config(format!("runtimeConfig.portMappings[{index}].{why}")))?;
        requests.extend(single.into_iter().filter(|request| seen.insert(*request)));
    }
    check_distinct(&requests)?;
    Ok(requests)
}

/// Refuses two requests that one packet could match.
fn check_distinct(requests: &[PortRequest]) -> Result<(), CniError> {
    let mut sorted: Vec<_> = requests.iter().collect();
    sorted.sort_by_key(|request| (request.proto, request.host_port));
    let by_port = sorted.chunk_by(|one, other| (one.proto, one.host_port) == (other.proto, other.host_port));
    for same in by_port {
        for (at, one) in same.iter().enumerate() {
            if let Some(other) = same[at + 1..].iter().find(|other| one.host.overlaps(other.host)) {
                let (host, port, proto) = (one.host, one.host_port, one.proto);
                return Err(CniError::Config(format!(
                    "runtimeConfig.portMappings has host port {host}:{port}/{proto} twice: for container ports {} and \
                     {} on {}",
                    one.container_port, other.container_port, other.host
                )));
            }
        }
    }
    Ok(())
}

impl WirePort {
    fn requests(&self) -> Result<Vec<PortRequest>, String> {
        let count = match self.range {
            None | Some(0) => 1,
            Some(count) => {
                u16::try_from(count).map_err(|_range| format!("range {count} is not a number of ports"))?
            }
        };
        let host_ports = ports("hostPort", self.host_port, count)?;
        let container_ports = ports("containerPort", self.container_port, count)?;
        let host = self.host()?;
        let mut requests = Vec::new();
        for proto in self.protocols()? {
            let pairs = host_ports.clone().zip(container_ports.clone());
            requests.extend(pairs.map(|(host_port, container_port)| PortRequest {
                proto,
                host,
                host_port,
                container_port,
            }));
        }
        Ok(requests)
    }

    fn protocols(&self) -> Result<Vec<Protocol>, String> {
        let Some(protocols) = self.protocol.as_deref().filter(|protocols| !protocols.is_empty()) else {
            return Ok(vec![Protocol::Tcp]);
        };
        let names = protocols.split(',').map(str::trim);
        let protocols = names.map(|name| match name.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "sctp" => Ok(Protocol::Sctp),
            _ => Err(format!("protocol {name:?} is not tcp, udp or sctp")),
        });
        protocols.collect()
    }

    fn host(&self) -> Result<HostIp, String> {
        let Some(host) = self.host_ip.as_deref().filter(|host| !host.is_empty()) else {
            return Ok(HostIp::Any);
        };
        match host.parse().map_err(|why| format!("hostIP {why}"))? {
            // Its interface can go at any time.
            HostIp::Scoped(ip, _) => {
                Err(format!("hostIP {ip} is the address of one link: publish on all, or on a global one"))
            }
            HostIp::Ip(IpAddr::V6(ip)) if ip.is_unicast_link_local() => {
                Err(format!("hostIP {ip} is the address of one link: publish on all, or on a global one"))
            }
            HostIp::Ip(ip) if ip.is_multicast() => Err(format!("hostIP {ip} is a multicast address")),
            // One that an IPv4 packet has (RFC 4291, section 2.5.5.2).
            HostIp::Ip(IpAddr::V6(ip)) => Ok(HostIp::Ip(ip.to_canonical())),
            host => Ok(host),
        }
    }
}

/// `count` ports from `first`.
fn ports(key: &str, first: i64, count: u16) -> Result<std::ops::RangeInclusive<u16>, String> {
    let last = first.saturating_add(i64::from(count) - 1);
    match (u16::try_from(first), u16::try_from(last)) {
        (Ok(first @ 1..), Ok(last)) => Ok(first..=last),
        _ if count == 1 => Err(format!("{key} {first} is not a port: use 1 to 65535")),
        _ => Err(format!("{key} {first} with range {count} ends at {last}: ports are 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<Conf, CniError> {
        let mut conf = json!({ "cniVersion": "1.1.0", "name": "pods", "type": "rproxy-portmap" });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Conf::read(&conf.to_string())
    }

    fn with_ports(ports: Value) -> Result<Vec<String>, String> {
        let conf = read(json!({ "runtimeConfig": { "portMappings": ports } })).map_err(|error| {
            assert_eq!(error.code(), 7);
            error.to_string()
        })?;
        let text = |port: &PortRequest| {
            format!("{}:{}->{}/{}", port.host, port.host_port, port.container_port, port.proto)
        };
        Ok(conf.ports.iter().map(text).collect())
    }

    #[test]
    fn ports_are_read_as_runtimes_write_them() {
        let kubelet = json!([{ "hostPort": 80, "containerPort": 8080, "protocol": "TCP", "hostIP": "" }]);
        assert_eq!(with_ports(kubelet).unwrap(), ["*:80->8080/tcp"]);
        let podman = json!([{ "host_port": 53, "container_port": 5353, "protocol": "tcp,udp", "host_ip": "127.0.0.1", "range": 2 }]);
        assert_eq!(
            with_ports(podman).unwrap(),
            [
                "127.0.0.1:53->5353/tcp",
                "127.0.0.1:54->5354/tcp",
                "127.0.0.1:53->5353/udp",
                "127.0.0.1:54->5354/udp"
            ]
        );
        let twice = json!([{ "hostPort": 80, "containerPort": 80 }, { "hostPort": 80, "containerPort": 80 }]);
        assert_eq!(with_ports(twice).unwrap(), ["*:80->80/tcp"]);
        let mapped = json!([{ "hostPort": 80, "containerPort": 80, "hostIP": "::ffff:10.0.0.1" }]);
        assert_eq!(with_ports(mapped).unwrap(), ["10.0.0.1:80->80/tcp"]);
        assert!(with_ports(Value::Null).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_published_is_named_by_its_place() {
        for (port, message) in [
            (json!({ "hostPort": 0, "containerPort": 80 }), "hostPort 0 is not a port"),
            (json!({ "hostPort": 80, "containerPort": 65536 }), "containerPort 65536 is not a port"),
            (json!({ "hostPort": 65535, "containerPort": 80, "range": 2 }), "ends at 65536"),
            (json!({ "hostPort": 80, "containerPort": 80, "range": -1 }), "range -1 is not"),
            (
                json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }),
                "\"icmp\" is not tcp, udp or sctp",
            ),
            (
                json!({ "hostPort": 80, "containerPort": 80, "hostIP": "web" }),
                "hostIP \"web\" is not an address",
            ),
            (
                json!({ "hostPort": 80, "containerPort": 80, "hostIP": "fe80::1%lo" }),
                "hostIP fe80::1 is the address of one link",
            ),
            (json!({ "hostPort": "80", "containerPort": 80 }), "hostPort: invalid type: string \"80\""),
        ] {
            let fine = json!({ "hostPort": 1, "containerPort": 1 });
            let error = with_ports(json!([fine, port])).unwrap_err();
            assert!(error.starts_with("runtimeConfig.portMappings[1]."), "{error}");
            assert!(error.contains(message), "{error}");
        }
        let both = json!([{ "hostPort": 80, "containerPort": 80 }, { "hostPort": 80, "containerPort": 81, "hostIP": "10.0.0.1" }]);
        assert!(with_ports(both).unwrap_err().contains("twice: for container ports 80 and 81 on 10.0.0.1"));
    }

    #[test]
    fn keys_that_would_be_misunderstood_are_refused() {
        let refused = |more: Value| read(more).unwrap_err();
        assert_eq!(refused(json!({ "conditionsV4": ["-s", "10.0.0.0/8"] })).code(), 2);
        assert_eq!(refused(json!({ "masqAll": true })).code(), 2);
        assert!(refused(json!({ "polcy": "relay" })).to_string().contains("did you mean \"policy\"?"));
        assert!(refused(json!({ "policy": "nat" })).to_string().starts_with("policy: unknown variant `nat`"));
        assert!(refused(json!({ "stateDir": "here" })).to_string().contains("not an absolute path"));
        assert!(refused(json!({ "name": "../x" })).to_string().starts_with("name \"../x\" is not a name"));
        read(json!({ "snat": true, "markMasqBit": 13, "conditionsV4": null, "nerdctlID": "x", "backend": "nftables" })).unwrap();
        assert_eq!(Conf::read("[]").unwrap_err().code(), 7);
    }

    #[test]
    fn what_a_removal_does_not_need_may_be_wrong() {
        let text = r#"{"name":"pods","policy":"nat","polcy":1,"rproxy":"x","conditionsV4":["a"],
                      "runtimeConfig":{"portMappings":[{"hostPort":0}]},"prevResult":7}"#;
        assert_eq!(Conf::read_to_remove(text).unwrap().name, "pods");
        assert!(Conf::read_to_remove(r#"{"name":""}"#).is_err());
        let kept =
            Conf::read_to_remove(r#"{"name":"pods","rproxy":"/opt/rproxy","stateDir":"/run/x"}"#).unwrap();
        assert_eq!((kept.rproxy, kept.state_dir), (Some("/opt/rproxy".into()), "/run/x".into()));
    }

    #[test]
    fn attachments_that_are_not_named_are_not_none() {
        assert_eq!(read(json!({})).unwrap().valid, None);
        let valid = read(json!({ "cni.dev/valid-attachments": null })).unwrap().valid;
        assert_eq!(valid, Some(BTreeSet::new()));
        let named = json!({ "cni.dev/valid-attachments": [{ "containerID": "c1", "ifname": "eth0" }] });
        assert_eq!(read(named).unwrap().valid.unwrap().len(), 1);
    }

    #[test]
    fn the_result_before_stays_as_it_was() {
        let text = r#"{"name":"pods","prevResult":{"z":1,  "a":[ ]}}"#;
        let prev = Conf::read(text).unwrap().prev_result.unwrap();
        assert_eq!(prev.get(), r#"{"z":1,  "a":[ ]}"#);
    }
}
