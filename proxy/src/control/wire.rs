//! Mappings as the control protocol writes them.
//!
//! What `list` shows can be added again. Whatever is left out has its default.

use std::fmt::Display;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::access::{AccessList, parse_network};
use crate::limits::{Limits, OnLimit};
use crate::mapping::{HostPorts, Mapping};

/// How a limit is written that there is not.
const UNLIMITED: &str = "unlimited";

/// A mapping, in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WireMapping {
    /// Its name; by default one that follows from its ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address that clients connect to, by default `[::]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The ports that clients connect to; random ones by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ports: Option<String>,
    /// The address of the backend.
    pub to: String,
    /// The ports of the backend.
    pub to_ports: String,
    /// `tcp`, which is the default, `udp` or `tcp+udp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proto: Option<String>,
    /// Whether `[::]` leaves IPv4 clients out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub v6only: bool,
    /// What bounds it.
    #[serde(default, skip_serializing_if = "WireLimits::is_default")]
    pub limits: WireLimits,
    /// What `list` says about the ports that are bound. It asks for nothing.
    #[serde(default, skip_serializing)]
    pub bound: Option<String>,
}

/// Limits, in JSON: those that are not the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WireLimits {
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_connections: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_limit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    udp_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    udp_max_flows: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    udp_max_flows_per_source: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allow: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    deny: Vec<String>,
}

impl WireMapping {
    /// How `mapping` is written.
    pub fn of(mapping: &Mapping) -> Self {
        let ports = match mapping.host_ports() {
            HostPorts::Exactly(range) | HostPorts::FirstFree(range) => Some(range.to_string()),
            HostPorts::Random => None,
        };
        Self {
            name: mapping.given_name().map(ToString::to_string),
            host: Some(mapping.host().to_string()),
            host_ports: ports,
            to: mapping.backend().to_string(),
            to_ports: mapping.backend_ports().to_string(),
            proto: Some(mapping.protocols().to_string()),
            v6only: mapping.is_v6only(),
            limits: WireLimits::of(mapping.limits()),
            bound: None,
        }
    }

    /// The mapping that is written here.
    ///
    /// # Errors
    /// A message that names the field at fault, what is wrong with it, and what would work.
    pub fn read(&self) -> Result<Mapping, String> {
        self.read_fields().map_err(|message| match &self.name {
            Some(name) => format!("mapping {}: {message}", name.escape_debug()),
            None => message,
        })
    }

    fn read_fields(&self) -> Result<Mapping, String> {
        let host = field("host", self.host.as_deref().unwrap_or("[::]").parse())?;
        let host_ports = self.host_ports.as_deref().map(str::parse).transpose();
        let host_ports = field("host_ports", host_ports)?;
        let to = field("to", self.to.parse())?;
        let to_ports = field("to_ports", self.to_ports.parse())?;
        let protocols = field("proto", self.proto.as_deref().unwrap_or("tcp").parse())?;
        let mut mapping =
            Mapping::new(protocols, (host, host_ports), (to, to_ports)).map_err(|error| error.to_string())?;
        if self.v6only {
            mapping = field("v6only", mapping.v6only())?;
        }
        if let Some(name) = &self.name {
            mapping = mapping.named(field("name", name.parse())?);
        }
        Ok(mapping.limited(self.limits.read()?))
    }
}

impl WireLimits {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn of(limits: &Limits) -> Self {
        let default = Limits::default();
        let duration = |limit: Option<Duration>, default: Option<Duration>| {
            let text = |limit: Option<Duration>| match limit {
                Some(limit) => humantime::format_duration(limit).to_string(),
                None => UNLIMITED.to_owned(),
            };
            (limit != default).then(|| text(limit))
        };
        let networks = |networks: &[ipnet::IpNet]| networks.iter().map(ToString::to_string).collect();
        Self {
            connect_timeout: duration(limits.connect_timeout, default.connect_timeout),
            idle_timeout: duration(limits.idle_timeout, default.idle_timeout),
            max_connections: limits.max_connections,
            on_limit: (limits.on_limit == OnLimit::Reset).then(|| "reset".to_owned()),
            udp_timeout: duration(Some(limits.udp_timeout), Some(default.udp_timeout)),
            udp_max_flows: limits.udp_max_flows,
            udp_max_flows_per_source: limits.udp_max_flows_per_source,
            allow: networks(&limits.access.allow),
            deny: networks(&limits.access.deny),
        }
    }

    fn read(&self) -> Result<Limits, String> {
        let default = Limits::default();
        let networks = |name, texts: &[String]| {
            field(name, texts.iter().map(|text| parse_network(text)).collect::<Result<Vec<_>, _>>())
        };
        let on_limit = match self.on_limit.as_deref() {
            None | Some("wait") => OnLimit::Wait,
            Some("reset") => OnLimit::Reset,
            Some(_) => return Err("limits.on_limit: write \"wait\" or \"reset\"".to_owned()),
        };
        let udp_timeout = read_limit("limits.udp_timeout", self.udp_timeout.as_deref())?;
        Ok(Limits {
            connect_timeout: read_limit("limits.connect_timeout", self.connect_timeout.as_deref())?
                .unwrap_or(default.connect_timeout),
            idle_timeout: read_limit("limits.idle_timeout", self.idle_timeout.as_deref())?
                .unwrap_or(default.idle_timeout),
            max_connections: read_count("limits.max_connections", self.max_connections)?,
            on_limit,
            udp_timeout: match udp_timeout {
                None => default.udp_timeout,
                Some(Some(timeout)) => timeout,
                Some(None) => return Err("limits.udp_timeout: flows need one, such as \"90s\"".to_owned()),
            },
            udp_max_flows: read_count("limits.udp_max_flows", self.udp_max_flows)?,
            udp_max_flows_per_source: read_count(
                "limits.udp_max_flows_per_source",
                self.udp_max_flows_per_source,
            )?,
            access: AccessList {
                allow: networks("limits.allow", &self.allow)?,
                deny: networks("limits.deny", &self.deny)?,
            },
        })
    }
}

/// Deadlines further away than this are a slip of the finger, and in the end overflow the clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// A duration from a moment up to a year, or `unlimited`; `None` if nothing is written.
fn read_limit(name: &str, text: Option<&str>) -> Result<Option<Option<Duration>>, String> {
    let Some(text) = text else {
        return Ok(None);
    };
    if text == UNLIMITED {
        return Ok(Some(None));
    }
    let duration = humantime::parse_duration(text)
        .ok()
        .filter(|duration| (Duration::from_nanos(1)..=LONGEST).contains(duration));
    let message = || format!("{name}: not a duration; write one such as \"10s\", or \"{UNLIMITED}\"");
    duration.map(|duration| Some(Some(duration))).ok_or_else(message)
}

fn read_count(name: &str, count: Option<usize>) -> Result<Option<usize>, String> {
    if count == Some(0) {
        return Err(format!("{name}: write a number from 1 up, or leave it out"));
    }
    Ok(count)
}

fn field<T, E: Display>(name: &str, result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Mapping, String> {
        serde_json::from_str::<WireMapping>(json).map_err(|error| error.to_string())?.read()
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        for json in [
            r#"{"to":"172.17.0.2","to_ports":"80"}"#,
            r#"{"name":"web","host":"10.0.0.11","host_ports":"8000-8010","to":"[fd00::2]","to_ports":"80"}"#,
            r#"{"host_ports":"1000-1009","to":"172.17.0.2","to_ports":"2000-2009","proto":"tcp+udp","v6only":true}"#,
            r#"{"to":"172.17.0.2","to_ports":"80","limits":{"connect_timeout":"unlimited","idle_timeout":"1m",
                "max_connections":9,"on_limit":"reset","udp_timeout":"5s","udp_max_flows":7,
                "udp_max_flows_per_source":3,"allow":["10.0.0.0/8"],"deny":["fd00::/8"]}}"#,
        ] {
            let mapping = read(json).expect(json);
            assert_eq!(WireMapping::of(&mapping).read(), Ok(mapping), "{json}");
        }
    }

    #[test]
    fn mistakes_name_their_field() {
        for (json, part) in [
            (r#"{"to_ports":"80"}"#, "missing field `to`"),
            (r#"{"to":"x","to_ports":"80","name":"web"}"#, "mapping web: to: 'x'"),
            (r#"{"to":"172.17.0.2","to_ports":"80","port":1}"#, "unknown field `port`"),
            (r#"{"to":"172.17.0.2","to_ports":"0"}"#, "to_ports: '0' is not a port"),
            (r#"{"to":"172.17.0.2","to_ports":"80","proto":"sctp"}"#, "proto: 'sctp'"),
            (r#"{"to":"172.17.0.2","to_ports":"80","name":"a b"}"#, "name: \"a b\" is not a name"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"idle_timeout":"soon"}}"#,
                "limits.idle_timeout",
            ),
            (r#"{"to":"172.17.0.2","to_ports":"80","limits":{"udp_timeout":"unlimited"}}"#, "flows need one"),
            (r#"{"to":"172.17.0.2","to_ports":"80","limits":{"max_connections":0}}"#, "from 1 up"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"deny":["lan"]}}"#,
                "limits.deny: not a network",
            ),
        ] {
            let message = read(json).expect_err(json);
            assert!(message.contains(part), "{json}: {message}");
        }
    }
}
