//! Mappings as the control protocol writes them.
//!
//! What `list` shows can be added again. Whatever is left out has its default.

use std::fmt::Display;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::access::{AccessList, parse_network};
use crate::duration::{format_limit, parse_optional_limit};
use crate::limits::{Limits, OnLimit};
use crate::mapping::{HostPorts, Mapping, MappingError};

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
    pub(crate) connect_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) idle_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_connections: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_limit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) udp_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) udp_max_flows: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) udp_max_flows_per_source: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) deny: Vec<String>,
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
    /// [`FieldError`]
    pub fn read(&self) -> Result<Mapping, FieldError> {
        let host = field("host", self.host.as_deref().unwrap_or("[::]").parse())?;
        let host_ports = self.host_ports.as_deref().map(str::parse).transpose();
        let host_ports = field("host_ports", host_ports)?;
        let to = field("to", self.to.parse())?;
        let to_ports = field("to_ports", self.to_ports.parse())?;
        let protocols = field("proto", self.proto.as_deref().unwrap_or("tcp").parse())?;
        let mut mapping = Mapping::new(protocols, (host, host_ports), (to, to_ports))?;
        if self.v6only {
            mapping = mapping.v6only()?;
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
            (limit != default).then(|| format_limit(limit))
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

    fn read(&self) -> Result<Limits, FieldError> {
        let default = Limits::default();
        let networks = |name, texts: &[String]| {
            field(name, texts.iter().map(|text| parse_network(text)).collect::<Result<Vec<_>, _>>())
        };
        let on_limit = match self.on_limit.as_deref() {
            None | Some("wait") => OnLimit::Wait,
            Some("reset") => OnLimit::Reset,
            Some(_) => return Err(FieldError::new("limits.on_limit", "write \"wait\" or \"reset\"")),
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
                Some(None) => {
                    return Err(FieldError::new("limits.udp_timeout", "flows need one, such as \"90s\""));
                }
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

/// Reads a limit on time, if one is written.
fn read_limit(name: &'static str, text: Option<&str>) -> Result<Option<Option<Duration>>, FieldError> {
    field(name, text.map(parse_optional_limit).transpose())
}

fn read_count(name: &'static str, count: Option<usize>) -> Result<Option<usize>, FieldError> {
    if count == Some(0) {
        return Err(FieldError::new(name, "write a number from 1 up, or leave it out"));
    }
    Ok(count)
}

fn field<T, E: Display>(name: &'static str, result: Result<T, E>) -> Result<T, FieldError> {
    result.map_err(|error| FieldError::new(name, error))
}

/// What is wrong with a mapping that was written; its text names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The field at fault; one of the limits as `limits.idle_timeout`.
    pub field: &'static str,
    /// What is wrong with it, and what would work.
    pub message: String,
}

impl FieldError {
    /// The mistake in `field` that `message` describes.
    pub fn new(field: &'static str, message: impl Display) -> Self {
        Self { field, message: message.to_string() }
    }
}

impl From<MappingError> for FieldError {
    fn from(error: MappingError) -> Self {
        let field = match error {
            MappingError::Lengths { .. } => "host_ports",
            MappingError::Backend(_) => "to",
            MappingError::V6Only(_) => "v6only",
        };
        Self::new(field, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Mapping, String> {
        let wire: WireMapping = serde_json::from_str(json).map_err(|error| error.to_string())?;
        wire.read().map_err(|error| error.to_string())
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
            (r#"{"to":"x","to_ports":"80","name":"web"}"#, "to: 'x'"),
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
