//! Mappings as the control protocol represents them.
//!
//! The output of `list` can be added again. Omitted members have their defaults.

use std::error::Error;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::access::{AccessList, parse_network};
use crate::addr::{Protocols, ScopedIp};
use crate::backend::BackendHost;
use crate::duration::{UNLIMITED, format_limit, parse_limit, parse_optional_limit, parse_user_timeout};
use crate::host::HostAddr;
use crate::interfaces::Interfaces;
use crate::limits::{Limits, OnLimit};
use crate::name::Name;
use crate::permissions::{SocketPermissions, parse_owner};
use crate::ports::PortRange;
use crate::proxy_protocol::{ProxyDatagrams, ProxyProtocol, ProxyVersion};
use crate::source::Source;
use crate::{HostPorts, Mapping, MappingError};

/// A mapping in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object that describes a mapping")]
pub struct WireMapping {
    /// Its name; by default derived from its ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address that clients connect to, `%eth0` for those of an interface, or a Unix socket; by default `[::]`, or
    /// `0.0.0.0` on a machine without IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The ports that clients connect to; random ones by default, none of a Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ports: Option<String>,
    /// The address or name of the backend, or a Unix socket.
    pub to: String,
    /// The ports of the backend; none of a Unix socket.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub to_ports: String,
    /// `tcp` (the default), `udp`, `tcp+udp` or `sctp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proto: Option<String>,
    /// Whether `[::]` excludes IPv4 clients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub v6only: bool,
    /// Its limits and other options.
    #[serde(default, skip_serializing_if = "WireLimits::is_default")]
    pub limits: WireLimits,
    /// What the name of the backend stands for, in the output of `list`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub resolved: Option<Vec<String>>,
    /// Why that is nothing, in the output of `list`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub unresolved: Option<String>,
    /// Why the last look-up of that name has failed, in the output of `list`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub lookup_error: Option<String>,
    /// The bound ports, in the output of `list`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub bound: Option<String>,
    /// The bound addresses, in the output of `list`, if they differ from `host`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub bound_host: Option<String>,
    /// The origin of an attached port, in the output of `list`. Requests to serve exactly some mappings ignore such
    /// ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The process that has attached it, in the output of `list`. Ignored in requests.
    #[serde(default, skip_serializing)]
    pub process: Option<u32>,
}

/// The [`Limits`] that differ from the default, in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "an object with limits")]
pub struct WireLimits {
    /// A duration, or `unlimited`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<String>,
    /// A duration, or `unlimited`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<String>,
    /// A duration, or `unlimited`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_user_timeout: Option<String>,
    /// A duration, with `interval` and `count` if these are not the default, or `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<String>,
    /// At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<usize>,
    /// `wait` or `reset`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_limit: Option<String>,
    /// At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<usize>,
    /// A rate, such as `10/s burst 50`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
    /// A duration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_timeout: Option<String>,
    /// At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_max_flows: Option<usize>,
    /// At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_max_flows_per_source: Option<usize>,
    /// Whether to accept replies from any port of the backend.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub udp_any_port: bool,
    /// The number or name of a code point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dscp: Option<String>,
    /// `auto`, `client`, `client-only` or an address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The name of an interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// `v1`, `v2` or `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_proxy: Option<String>,
    /// `each` or `first`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_proxy_udp: Option<String>,
    /// Networks, and `unix` for the clients of a Unix socket.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub accept_proxy: Vec<String>,
    /// A duration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_timeout: Option<String>,
    /// Whether the name of the backend has to resolve at once.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub require_resolved: bool,
    /// `false` for no lines in the access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_log: Option<bool>,
    /// Whether the host address is bound before the machine has it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub freebind: bool,
    /// The mode of the file of the Unix socket that is listened on, in octal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<String>,
    /// The name or number of the user who owns it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_user: Option<String>,
    /// The name or number of its group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// Networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
}

impl WireMapping {
    /// The representation of `mapping`.
    pub fn of(mapping: &Mapping) -> Self {
        let ports = match mapping.host_ports() {
            _ if mapping.host().unix_addr().is_some() => None,
            HostPorts::Exactly(range) | HostPorts::FirstFree(range) => Some(range.to_string()),
            HostPorts::Random => None,
        };
        Self {
            name: mapping.given_name().map(ToString::to_string),
            host: Some(mapping.host().to_string()),
            host_ports: ports,
            to: mapping.backend().to_string(),
            to_ports: match mapping.backend() {
                BackendHost::Unix(_) => String::new(),
                _ => mapping.backend_ports().to_string(),
            },
            proto: Some(mapping.protocols().to_string()),
            v6only: mapping.is_v6only(),
            limits: WireLimits::of(mapping.limits()),
            resolved: None,
            unresolved: None,
            lookup_error: None,
            bound: None,
            bound_host: None,
            origin: None,
            process: None,
        }
    }

    /// The represented mapping, on a machine with these `interfaces`. Without a host address it listens `everywhere`.
    ///
    /// # Errors
    /// [`FieldErrors`] with all errors.
    pub fn read(&self, interfaces: &dyn Interfaces, everywhere: ScopedIp) -> Result<Mapping, FieldErrors> {
        let mut wrong = FieldErrors::default();
        let address = |text: &String| HostAddr::parse(text, interfaces);
        let host = match &self.host {
            Some(host) => wrong.note("host", address(host)),
            // Only `[::]` can exclude IPv4 clients. If it is not available, binding it reports that.
            None if self.v6only => Some(ScopedIp::ANY.into()),
            None => Some(everywhere.into()),
        };
        let host_ports = wrong.note("host_ports", self.read_host_ports(host.as_ref()));
        let to = wrong.note("to", BackendHost::parse(&self.to, interfaces));
        let to_ports = wrong.note("to_ports", self.read_to_ports(to.as_ref()));
        self.limits.refuse_lone(&self.limits, &mut wrong);
        let mapping = self.read_between(host.zip(host_ports), to.zip(to_ports), &mut wrong);
        mapping.filter(|_mapping| wrong.0.is_empty()).ok_or(wrong)
    }

    fn read_host_ports(&self, host: Option<&HostAddr>) -> Result<Option<PortRange>, Box<dyn Error>> {
        match (host, &self.host_ports) {
            (Some(HostAddr::Unix(_)), None) => Ok(Some(PortRange::OF_UNIX)),
            (Some(HostAddr::Unix(_)), Some(_)) => Err("a Unix socket has no ports; leave them out".into()),
            (_, ports) => Ok(ports.as_deref().map(str::parse).transpose()?),
        }
    }

    fn read_to_ports(&self, to: Option<&BackendHost>) -> Result<PortRange, Box<dyn Error>> {
        match (to, self.to_ports.is_empty()) {
            (Some(BackendHost::Unix(_)), true) => Ok(PortRange::OF_UNIX),
            (Some(BackendHost::Unix(_)), false) => Err("a Unix socket has no ports; leave them out".into()),
            (_, true) => Err("it is missing; write the backend's address and ports".into()),
            (_, false) => Ok(self.to_ports.parse()?),
        }
    }

    /// The represented mapping, with `host` and `to` in place of its own, as far as they are known. Adds all errors to
    /// `wrong`.
    pub fn read_between(
        &self,
        host: Option<(HostAddr, Option<PortRange>)>,
        to: Option<(BackendHost, PortRange)>,
        wrong: &mut FieldErrors,
    ) -> Option<Mapping> {
        let name = wrong.note("name", self.name.as_deref().map(Name::given).transpose());
        let (protocols, limits) = self.read_values(wrong);
        let mut mapping = Mapping::new(protocols?, host?, to?);
        if self.v6only {
            mapping = mapping.and_then(Mapping::v6only);
        }
        let limits = limits?;
        let mapping = mapping.and_then(|mapping| mapping.limited(limits));
        let mapping = mapping.map_err(|error| wrong.0.push(error.into())).ok()?;
        Some(match name? {
            Some(name) => mapping.named(name),
            None => mapping,
        })
    }

    /// The options that several mappings may share.
    pub fn read_values(&self, wrong: &mut FieldErrors) -> (Option<Protocols>, Option<Limits>) {
        let protocols = wrong.note("proto", self.proto.as_deref().unwrap_or("tcp").parse());
        (protocols, self.limits.read(wrong))
    }
}

impl WireLimits {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The representation of `limits`.
    pub fn of(limits: &Limits) -> Self {
        let default = Limits::default();
        let duration = |limit: Option<Duration>, default: Option<Duration>| {
            (limit != default).then(|| format_limit(limit))
        };
        let proxy = &limits.proxy_protocol;
        let of_proxy = &default.proxy_protocol;
        let networks = |networks: &[IpNet]| networks.iter().map(ToString::to_string).collect();
        let socket = limits.socket.as_deref().cloned().unwrap_or_default();
        let owner = |owner: Option<Arc<str>>| owner.map(|owner| owner.to_string());
        Self {
            connect_timeout: duration(limits.connect_timeout, default.connect_timeout),
            idle_timeout: duration(limits.idle_timeout, default.idle_timeout),
            tcp_user_timeout: duration(limits.tcp_user_timeout, default.tcp_user_timeout),
            keepalive: (limits.keepalive != default.keepalive).then(|| limits.keepalive.to_string()),
            max_connections: limits.max_connections,
            on_limit: (limits.on_limit != OnLimit::default()).then(|| limits.on_limit.to_string()),
            max_connections_per_source: limits.max_connections_per_source,
            rate: limits.rate.map(|rate| rate.to_string()),
            udp_timeout: duration(Some(limits.udp_timeout), Some(default.udp_timeout)),
            udp_max_flows: limits.udp_max_flows,
            udp_max_flows_per_source: limits.udp_max_flows_per_source,
            udp_any_port: limits.udp_any_port,
            dscp: limits.dscp.map(|dscp| dscp.to_string()),
            source: (limits.source != Source::Auto).then(|| limits.source.to_string()),
            device: limits.device.as_ref().map(ToString::to_string),
            send_proxy: proxy.send.map(|version| version.to_string()),
            send_proxy_udp: (proxy.send_udp != ProxyDatagrams::default()).then(|| proxy.send_udp.to_string()),
            accept_proxy: proxy.accept.iter().map(ToString::to_string).collect(),
            proxy_timeout: duration(Some(proxy.timeout), Some(of_proxy.timeout)),
            require_resolved: limits.require_resolved,
            access_log: (!limits.access_log).then_some(false),
            freebind: limits.freebind,
            socket_mode: socket.mode.map(|mode| mode.to_string()),
            socket_user: owner(socket.user),
            socket_group: owner(socket.group),
            allow: networks(&limits.access.allow),
            deny: networks(&limits.access.deny),
        }
    }

    /// The represented limits. Adds all errors to `wrong`.
    pub fn read(&self, wrong: &mut FieldErrors) -> Option<Limits> {
        let default = Limits::default();
        let connect_timeout = read_limit("limits.connect_timeout", self.connect_timeout.as_deref(), wrong);
        let idle_timeout = read_limit("limits.idle_timeout", self.idle_timeout.as_deref(), wrong);
        let tcp_user_timeout = self.tcp_user_timeout.as_deref().map(parse_user_timeout).transpose();
        let tcp_user_timeout = wrong.note("limits.tcp_user_timeout", tcp_user_timeout);
        let keepalive = self.keepalive.as_deref().map(str::parse).transpose();
        let keepalive = wrong.note("limits.keepalive", keepalive);
        let max_connections = read_count("limits.max_connections", self.max_connections, wrong);
        let on_limit = self.on_limit.as_deref().map(str::parse).transpose();
        let on_limit = wrong.note("limits.on_limit", on_limit);
        let per_source = self.max_connections_per_source;
        let max_connections_per_source = read_count("limits.max_connections_per_source", per_source, wrong);
        let rate = wrong.note("limits.rate", self.rate.as_deref().map(str::parse).transpose());
        let udp_timeout = self.udp_timeout.as_deref().map(|text| match text {
            UNLIMITED => Err("flows need one, such as \"90s\"".to_owned()),
            text => parse_limit(text),
        });
        let udp_timeout = wrong.note("limits.udp_timeout", udp_timeout.transpose());
        let udp_max_flows = read_count("limits.udp_max_flows", self.udp_max_flows, wrong);
        let per_source = self.udp_max_flows_per_source;
        let per_source = read_count("limits.udp_max_flows_per_source", per_source, wrong);
        let dscp = wrong.note("limits.dscp", self.dscp.as_deref().map(str::parse).transpose());
        let source = wrong.note("limits.source", self.source.as_deref().map(str::parse).transpose());
        let device = wrong.note("limits.device", self.device.as_deref().map(str::parse).transpose());
        let proxy_protocol = self.read_proxy_protocol(wrong);
        let socket = self.read_socket(wrong);
        let access = self.read_access(wrong);
        Some(Limits {
            connect_timeout: connect_timeout?.unwrap_or(default.connect_timeout),
            idle_timeout: idle_timeout?.unwrap_or(default.idle_timeout),
            tcp_user_timeout: tcp_user_timeout?.unwrap_or(default.tcp_user_timeout),
            keepalive: keepalive?.unwrap_or_default(),
            max_connections: max_connections?,
            on_limit: on_limit?.unwrap_or_default(),
            max_connections_per_source: max_connections_per_source?,
            rate: rate?,
            udp_timeout: udp_timeout?.unwrap_or(default.udp_timeout),
            udp_max_flows: udp_max_flows?,
            udp_max_flows_per_source: per_source?,
            udp_any_port: self.udp_any_port,
            dscp: dscp?,
            source: source?.unwrap_or_default(),
            device: device?,
            proxy_protocol: proxy_protocol?,
            require_resolved: self.require_resolved,
            access_log: self.access_log.unwrap_or(default.access_log),
            freebind: self.freebind,
            socket: socket?,
            access: access?,
        })
    }

    /// Adds the values to `wrong` that mean nothing, because `all` lacks what they are about. `all` has those of this, and
    /// perhaps defaults.
    pub fn refuse_lone(&self, all: &Self, wrong: &mut FieldErrors) {
        let lone = [
            (
                "limits.send_proxy_udp",
                self.send_proxy_udp.is_some() && all.send_proxy.is_none(),
                "no datagram has a header without send_proxy; set that too, to \"v2\"",
            ),
            (
                "limits.proxy_timeout",
                self.proxy_timeout.is_some() && all.accept_proxy.is_empty(),
                "no header is awaited without accept_proxy; set that too, to the addresses of proxies",
            ),
        ];
        for (field, is_lone, message) in lone {
            if is_lone && wrong.0.iter().all(|error| error.field != field) {
                wrong.0.push(FieldError::new(field, message));
            }
        }
    }

    fn read_access(&self, wrong: &mut FieldErrors) -> Option<AccessList> {
        let allow = wrong.note("limits.allow", read_all(&self.allow, parse_network));
        let deny = wrong.note("limits.deny", read_all(&self.deny, parse_network));
        Some(AccessList { allow: allow?, deny: deny? })
    }

    /// The permissions of a Unix socket, if some are asked for.
    fn read_socket(&self, wrong: &mut FieldErrors) -> Option<Option<Arc<SocketPermissions>>> {
        let mode = self.socket_mode.as_deref().map(str::parse).transpose();
        let mode = wrong.note("limits.socket_mode", mode);
        let user = self.socket_user.as_deref().map(parse_owner).transpose();
        let user = wrong.note("limits.socket_user", user);
        let group = self.socket_group.as_deref().map(parse_owner).transpose();
        let group = wrong.note("limits.socket_group", group);
        let socket = SocketPermissions { mode: mode?, user: user?, group: group? };
        Some(socket.is_some().then(|| socket.into()))
    }

    fn read_proxy_protocol(&self, wrong: &mut FieldErrors) -> Option<ProxyProtocol> {
        let default = ProxyProtocol::default();
        let send = self.send_proxy.as_deref().map(ProxyVersion::parse).transpose();
        let send = wrong.note("limits.send_proxy", send.map(Option::flatten));
        let send_udp = self.send_proxy_udp.as_deref().map(str::parse).transpose();
        let send_udp = wrong.note("limits.send_proxy_udp", send_udp);
        let accept = wrong.note("limits.accept_proxy", read_all(&self.accept_proxy, str::parse));
        let timeout = self.proxy_timeout.as_deref().map(|text| match text {
            UNLIMITED => Err("a header needs one, such as \"5s\"".to_owned()),
            text => parse_limit(text),
        });
        let timeout = wrong.note("limits.proxy_timeout", timeout.transpose());
        let (send_udp, timeout) = (send_udp?.unwrap_or_default(), timeout?.unwrap_or(default.timeout));
        // Options of what is off may be defaults for other mappings.
        Some(ProxyProtocol { send: send?, send_udp, accept: accept?, timeout }.normalized())
    }
}

/// Parses a time limit, if present.
fn read_limit(
    name: &'static str,
    text: Option<&str>,
    wrong: &mut FieldErrors,
) -> Option<Option<Option<Duration>>> {
    wrong.note(name, text.map(parse_optional_limit).transpose())
}

fn read_count(name: &'static str, count: Option<usize>, wrong: &mut FieldErrors) -> Option<Option<usize>> {
    let is_zero = count == Some(0);
    wrong.note(name, if is_zero { Err("write a number of at least 1, or leave it out") } else { Ok(count) })
}

fn read_all<T>(texts: &[String], parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let read = |text: &String| parse(text).map_err(|error| format!("'{}': {error}", text.escape_debug()));
    texts.iter().map(read).collect()
}

/// The errors in a represented mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldErrors(pub Vec<FieldError>);

impl FieldErrors {
    /// The value of `field`, or `None` if it is invalid; the error is recorded.
    pub fn note<T, E: Display>(&mut self, field: &'static str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(FieldError::new(field, error))).ok()
    }
}

impl Error for FieldErrors {}

impl Display for FieldErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errors: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&errors.join("; "))
    }
}

/// An error in a represented mapping. Its text names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The field at fault; limits have names such as `limits.idle_timeout`.
    pub field: &'static str,
    /// What is wrong, and what would be valid.
    pub message: String,
}

impl FieldError {
    /// The error in `field` that `message` describes.
    pub fn new(field: &'static str, message: impl Display) -> Self {
        Self { field, message: message.to_string() }
    }
}

impl From<MappingError> for FieldError {
    fn from(error: MappingError) -> Self {
        let field = match &error {
            MappingError::Lengths { .. } | MappingError::InterfacePorts(_) => "host_ports",
            MappingError::Backend(_) => "to",
            MappingError::V6Only(_) => "v6only",
            MappingError::Source(_) => "limits.source",
            MappingError::NotOfSctp("source = client") => "limits.source",
            MappingError::NotOfSctp("send_proxy") => "limits.send_proxy",
            MappingError::NotOfSctp("accept_proxy") => "limits.accept_proxy",
            MappingError::NotOfSctp("tcp_user_timeout") => "limits.tcp_user_timeout",
            MappingError::NotOfSctp("keepalive") => "limits.keepalive",
            MappingError::NotOfSctp(_) => "limits",
            MappingError::NotByUnix(_) => "proto",
            MappingError::PortsAtUnix => "host_ports",
            MappingError::SeveralAtUnix(_) => "to_ports",
            MappingError::NotAtUnix("freebind") => "limits.freebind",
            MappingError::NotAtUnix(option) if option.starts_with("source") => "limits.source",
            MappingError::NotAtUnix(option) if option.starts_with("allow") => "limits.allow",
            MappingError::NotAtUnix(_) => "limits.accept_proxy",
            MappingError::NoFile(_) => "limits.socket_mode",
            MappingError::NotOfUnix(option) if option == "ports" => "to_ports",
            MappingError::NotOfUnix(option) if option.starts_with("device") => "limits.device",
            MappingError::NotOfUnix(_) => "limits.source",
        };
        Self::new(field, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::NoInterfaces;

    fn read(json: &str) -> Result<Mapping, String> {
        let wire: WireMapping = serde_json::from_str(json).map_err(|error| error.to_string())?;
        wire.read(&NoInterfaces, ScopedIp::ANY).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_unix_socket_cannot_have_is_named() {
        let read = |host: &str, limits: &str| {
            read(&format!(r#"{{"host":"{host}","to":"172.17.0.2","to_ports":"80","limits":{{{limits}}}}}"#))
        };
        for (host, limits, part) in [
            (
                "unix:/run/a",
                r#""allow":["10.0.0.0/8"]"#,
                "limits.allow: a mapping that listens on a Unix socket",
            ),
            ("unix:/run/a", r#""source":"client""#, "limits.source: "),
            ("unix:/run/a", r#""freebind":true"#, "limits.freebind: "),
            ("unix:/run/a", r#""accept_proxy":["10.0.0.1"]"#, "\"unix\" stands for all"),
            ("unix:/run/a", r#""socket_mode":"660x""#, "limits.socket_mode: '660x' is not the mode"),
            ("unix:/run/a", r#""socket_user":"a b""#, "limits.socket_user: 'a b'"),
            ("unix:@a", r#""socket_mode":"0660""#, "and the host unix:@a has none"),
            ("127.0.0.1", r#""socket_group":"0""#, "and the host 127.0.0.1 has none"),
        ] {
            let message = read(host, limits).unwrap_err();
            assert!(message.contains(part), "{host} {limits}: {message}");
        }
        read("unix:/run/a", r#""accept_proxy":["unix"],"allow":["10.0.0.0/8"],"source":"client""#).unwrap();
        let with_ports = r#"{"host":"unix:/run/a","host_ports":"80","to":"172.17.0.2","to_ports":"80"}"#;
        assert!(self::read(with_ports).unwrap_err().contains("host_ports: a Unix socket has no ports"));
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        for json in [
            r#"{"to":"172.17.0.2","to_ports":"80"}"#,
            r#"{"host":"%eth0","host_ports":"80","to":"172.17.0.2","to_ports":"80"}"#,
            r#"{"host":"unix:/run/front.sock","to":"172.17.0.2","to_ports":"80"}"#,
            r#"{"host":"unix:/run/front.sock","to":"unix:@app","limits":{"socket_mode":"0660","socket_user":"root",
                "socket_group":"33","accept_proxy":["unix"],"allow":["10.0.0.0/8"],"source":"auto"}}"#,
            r#"{"name":"web","host":"10.0.0.11","host_ports":"8000-8010","to":"[fd00::2]","to_ports":"80"}"#,
            r#"{"host_ports":"1000-1009","to":"172.17.0.2","to_ports":"2000-2009","proto":"tcp+udp","v6only":true}"#,
            r#"{"to":"172.17.0.2","to_ports":"80","limits":{"connect_timeout":"unlimited","idle_timeout":"1m",
                "tcp_user_timeout":"30s","keepalive":"1m interval 10s count 5","freebind":true,
                "max_connections":9,"on_limit":"reset","max_connections_per_source":2,"rate":"10/s burst 50","udp_timeout":"5s","udp_max_flows":7,
                "udp_max_flows_per_source":3,"udp_any_port":true,"dscp":"ef","send_proxy":"v2","send_proxy_udp":"first",
                "accept_proxy":["10.0.0.0/8"],"proxy_timeout":"1s","source":"client","device":"eth0","allow":["10.0.0.0/8"],"deny":["fd00::/8"]}}"#,
        ] {
            let mapping = read(json).expect(json);
            assert_eq!(WireMapping::of(&mapping).read(&NoInterfaces, ScopedIp::ANY), Ok(mapping), "{json}");
        }
    }

    #[test]
    fn mistakes_name_their_field() {
        for (json, part) in [
            (r#"{"to_ports":"80"}"#, "missing field `to`"),
            (r#"{"to":"x!","to_ports":"80","name":"web"}"#, "to: 'x!' is neither"),
            (r#"{"to":"172.17.0.2","to_ports":"80","port":1}"#, "unknown field `port`"),
            (r#"{"to":"172.17.0.2","to_ports":"0"}"#, "to_ports: '0' is not a port"),
            (r#"{"to":"172.17.0.2","to_ports":"80","proto":"dccp"}"#, "proto: 'dccp'"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","proto":"sctp","limits":{"send_proxy":"v2"}}"#,
                "sctp has no send_proxy",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","proto":"sctp","limits":{"source":"client"}}"#,
                "sctp has no source = client",
            ),
            (
                r#"{"host":"%eth0","to":"172.17.0.2","to_ports":"80"}"#,
                "host_ports: the addresses of the interface eth0",
            ),
            (
                r#"{"host":"%e h","host_ports":"80","to":"172.17.0.2","to_ports":"80"}"#,
                "host: 'e h' is not the name",
            ),
            (r#"{"to":"172.17.0.2","to_ports":"80","name":"a b"}"#, "name: \"a b\" is not a name"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"idle_timeout":"soon"}}"#,
                "limits.idle_timeout",
            ),
            (r#"{"to":"172.17.0.2","to_ports":"80","limits":{"udp_timeout":"unlimited"}}"#, "flows need one"),
            (r#"{"to":"172.17.0.2","to_ports":"80","limits":{"max_connections":0}}"#, "of at least 1"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"dscp":"AF5"}}"#,
                "limits.dscp: not a code point",
            ),
            (r#"{"to":"172.17.0.2","to_ports":"80","limits":{"dscp":"184"}}"#, "whose code point is 46"),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"deny":["lan"]}}"#,
                "limits.deny: 'lan': not a network",
            ),
        ] {
            let message = read(json).expect_err(json);
            assert!(message.contains(part), "{json}: {message}");
        }
    }

    #[test]
    fn mistakes_in_limits_of_connections_name_their_field() {
        for (json, part) in [
            (
                r#"{"to":"172.17.0.2","to_ports":"80","proto":"sctp","limits":{"keepalive":"off"}}"#,
                "sctp has no keepalive",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","proto":"sctp","limits":{"tcp_user_timeout":"1m"}}"#,
                "sctp has no tcp_user_timeout",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"tcp_user_timeout":"30days"}}"#,
                "limits.tcp_user_timeout: longer than the 24 days that the kernel counts",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"keepalive":"never"}}"#,
                "limits.keepalive: not a time of idleness",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"max_connections_per_source":0}}"#,
                "limits.max_connections_per_source: write a number of at least 1",
            ),
            (
                r#"{"to":"172.17.0.2","to_ports":"80","limits":{"rate":"10"}}"#,
                "limits.rate: in which time? write 10/s",
            ),
        ] {
            let message = read(json).expect_err(json);
            assert!(message.contains(part), "{json}: {message}");
        }
    }

    #[test]
    fn mistakes_about_the_clients_address_name_their_field() {
        for (limits, part) in [
            (
                r#"{"source":"fd00::1"}"#,
                "limits.source: fd00::1 cannot reach the backend 172.17.0.2, which is of the other family; write an IPv4",
            ),
            (r#"{"source":"me"}"#, "limits.source: write \"auto\","),
            (r#"{"device":"eth 0"}"#, "limits.device: not the name"),
            (r#"{"send_proxy":"v3"}"#, "limits.send_proxy: write \"v1\", \"v2\" or"),
            (r#"{"send_proxy_udp":"all"}"#, "limits.send_proxy_udp: write \"each\" or"),
            (
                r#"{"accept_proxy":["10.0.0.1"],"proxy_timeout":"unlimited"}"#,
                "limits.proxy_timeout: a header needs one",
            ),
            (r#"{"proxy_timeout":"1s"}"#, "limits.proxy_timeout: no header is awaited without accept_proxy"),
            (
                r#"{"send_proxy_udp":"first"}"#,
                "limits.send_proxy_udp: no datagram has a header without send_proxy",
            ),
            (r#"{"source":"fe80::1"}"#, "limits.source: fe80::1 is link-local"),
            (r#"{"source":"fe80::1%eth0"}"#, "limits.source: fe80::1 is link-local"),
            (
                r#"{"accept_proxy":["10.0.0.1/8"]}"#,
                "limits.accept_proxy: '10.0.0.1/8': it has host bits set; write 10.0.0.0/8",
            ),
        ] {
            let json = format!(r#"{{"to":"172.17.0.2","to_ports":"80","limits":{limits}}}"#);
            let message = read(&json).expect_err(limits);
            assert!(message.contains(part), "{limits}: {message}");
        }
    }
}
