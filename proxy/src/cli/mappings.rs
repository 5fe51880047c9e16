//! Mappings on the command line: `--host` with `--to`, and Docker's `-p` and `-P`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use rproxy_mapping::access::{AccessList, parse_network};
use rproxy_mapping::addr::{AddrError, HostSocketAddr, Protocol, Protocols, ScopedIp};
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::dscp::Dscp;
use rproxy_mapping::duration::parse_limit;
use rproxy_mapping::endpoint::{BackendSpec, HostSpec};
use rproxy_mapping::keepalive::Keepalive;
use rproxy_mapping::limits::{Limits, OnLimit};
use rproxy_mapping::name::Name;
use rproxy_mapping::overlap::refuse_overlap;
use rproxy_mapping::permissions::{FileMode, SocketPermissions, parse_owner};
use rproxy_mapping::proxy_protocol::{ProxyDatagrams, ProxyPeers, ProxyProtocol, ProxyVersion};
use rproxy_mapping::publish::{ExposedPorts, PublishSpec};
use rproxy_mapping::rate::Rate;
use rproxy_mapping::source::{Device, Source};
use rproxy_mapping::{Mapping, MappingError};

use super::UsageError;
use super::values::{
    Limit, To, UserTimeout, on_limit, parse_count, parse_host, parse_publish, proxy_datagrams, proxy_version,
};
use crate::bind::family::everywhere;
use crate::loops::{LoopReason, refuse_loops_among};

const HOST_HELP: &str = "Address and ports to listen on, such as [::]:80, 127.0.0.1:0, 0.0.0.0:8000-8010, or %eth0:80; needs a --to";
const PUBLISH_HELP: &str = "Ports to publish: [[ADDRESS:][HOST_PORT]:]PORT[/PROTOCOL]; ports may be ranges, and the address %INTERFACE";

/// The mappings and their limits.
#[derive(Args, Debug)]
pub struct MappingArgs {
    // Not doc comments, because rustdoc would take the brackets for links.
    #[arg(long, value_name = "ADDRESS:PORTS", help = HOST_HELP, value_parser = parse_host)]
    host: Vec<HostSpec>,
    /// Address or name, and ports, to forward to, for the --host in the same position; or only the address or name, for -p
    /// and -P; or for a --host, unix:/run/app.sock
    #[arg(long, value_name = "ADDRESS[:PORTS]")]
    to: Vec<To>,
    #[arg(short = 'p', visible_alias = "publish", value_name = "SPEC", help = PUBLISH_HELP, value_parser = parse_publish)]
    publish: Vec<PublishSpec>,
    /// Publish each --expose that no -p publishes, on random ports
    #[arg(short = 'P', visible_alias = "publish-all")]
    publish_all: bool,
    /// A port or range of the backend, for -P
    #[arg(long, value_name = "PORT[/PROTOCOL]", requires = "publish_all")]
    expose: Vec<ExposedPorts>,
    /// tcp, udp, sctp or tcp+udp: once for all --host, or once for each [default: tcp]
    #[arg(long, value_name = "PROTOCOL")]
    proto: Vec<Protocols>,
    #[arg(long, help = "Do not accept IPv4 clients on [::]")]
    v6only: bool,
    /// The name of the mapping, if there is only one [default: derived from its ports]
    #[arg(long, value_parser = Name::given)]
    name: Option<Name>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// The limits of each mapping, and how it is served.
#[derive(Args, Debug)]
#[command(next_help_heading = "How each mapping is served")]
struct LimitArgs {
    /// How long a backend may take to accept a connection before the client is reset, or 'unlimited'
    #[arg(long, value_name = "DURATION", default_value = "10s", allow_hyphen_values = true)]
    connect_timeout: Limit,
    /// Reset a TCP connection after this long without data in either direction, or 'unlimited'
    #[arg(long, value_name = "DURATION", default_value = "unlimited", allow_hyphen_values = true)]
    idle_timeout: Limit,
    /// Reset a TCP connection when data sent is not acknowledged for this long, or 'unlimited': when the kernel does
    #[arg(long, value_name = "DURATION", default_value = "unlimited", allow_hyphen_values = true)]
    tcp_user_timeout: UserTimeout,
    /// Probe TCP connections that are idle for this long: 1m, '1m interval 10s count 5', or off
    #[arg(long, value_name = "PROBES", default_value_t, allow_hyphen_values = true)]
    keepalive: Keepalive,
    /// Concurrent TCP connections of a mapping [default: as descriptors allow]
    #[arg(long, value_name = "COUNT", value_parser = parse_count, allow_hyphen_values = true)]
    max_connections: Option<usize>,
    /// Whether clients beyond --max-connections wait in the backlog or are reset
    #[arg(long, value_parser = on_limit(), default_value_t)]
    on_limit: OnLimit,
    /// Concurrent connections from one IPv4 address or IPv6 /64; those beyond are reset
    #[arg(long, value_name = "COUNT", value_parser = parse_count, allow_hyphen_values = true)]
    max_connections_per_source: Option<usize>,
    /// New connections and UDP flows from one IPv4 address or IPv6 /64, such as 10/s, 100/m or '10/s burst 50'; those
    /// beyond are reset, or their datagrams dropped
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    rate: Option<Rate>,
    /// Serve only clients in these networks, such as 10.0.0.0/8,fd00::/8
    #[arg(long, value_name = "NETWORK", value_delimiter = ',', value_parser = parse_network)]
    allow: Vec<IpNet>,
    /// Refuse clients in these networks, even if --allow includes them
    #[arg(long, value_name = "NETWORK", value_delimiter = ',', value_parser = parse_network)]
    deny: Vec<IpNet>,
    /// A UDP flow expires when neither side has sent a datagram for this long
    #[arg(long, value_name = "DURATION", default_value = "90s", value_parser = parse_limit, allow_hyphen_values = true)]
    udp_timeout: Duration,
    /// Concurrent UDP flows; at the limit, the longest idle new flow is evicted [default: as descriptors and
    /// ports allow]
    #[arg(long, value_name = "COUNT", value_parser = parse_count, allow_hyphen_values = true)]
    udp_max_flows: Option<usize>,
    /// Concurrent UDP flows from one IPv4 address or IPv6 /64 [default: 3/4 of --udp-max-flows]
    #[arg(long, value_name = "COUNT", value_parser = parse_count, allow_hyphen_values = true)]
    udp_max_flows_per_source: Option<usize>,
    /// Accept UDP replies from any port of the backend's address, as TFTP servers need, and send the client's
    /// next datagrams to the port that replied last
    #[arg(long)]
    udp_any_port: bool,
    /// Do not start while the name of a backend does not resolve, instead of refusing its clients until it does
    #[arg(long)]
    require_resolved: bool,
    /// The code point (DSCP) to send with in both directions, instead of the received one [default: UDP as
    /// received; TCP 0]
    #[arg(long, value_name = "CODE_POINT", allow_hyphen_values = true)]
    dscp: Option<Dscp>,
    /// Where connections and datagrams to the backend come from: auto, an address of this host, or client, the
    /// client's own address and port (client-only: or not at all). See netns-setup transparent
    #[arg(long, value_name = "SOURCE", default_value_t)]
    source: Source,
    /// The interface by which they have to leave
    #[arg(long, value_name = "INTERFACE")]
    device: Option<Device>,
    /// Tell the backend who the client is, in a header of the PROXY protocol before the first byte; datagrams have
    /// v2 in either case
    #[arg(long, value_name = "VERSION", value_parser = proxy_version())]
    send_proxy: Option<ProxyVersion>,
    /// Which datagrams of a flow begin with that header
    #[arg(long, value_name = "DATAGRAMS", value_parser = proxy_datagrams(), default_value_t)]
    send_proxy_udp: ProxyDatagrams,
    /// Peers in these networks are proxies, or all peers of a Unix socket (`unix`): each of their connections and datagrams
    /// has to begin with a header of the PROXY protocol, which tells who the client is
    #[arg(long, value_name = "NETWORK", value_delimiter = ',', value_parser = str::parse::<ProxyPeers>)]
    accept_proxy: Vec<ProxyPeers>,
    /// How long the header of a connection may take to arrive
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_limit, allow_hyphen_values = true)]
    proxy_timeout: Duration,
    /// Write no lines to the access log about these mappings
    #[arg(long)]
    no_access_log: bool,
    /// Bind host addresses that this machine does not have yet
    #[arg(long)]
    freebind: bool,
    /// The mode of the file of each Unix socket to listen on, in octal digits; 0600 by default
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<FileMode>,
    /// The user who owns it, by name or number
    #[arg(long, value_name = "USER", value_parser = parse_owner)]
    socket_user: Option<Arc<str>>,
    /// Its group, by name or number
    #[arg(long, value_name = "GROUP", value_parser = parse_owner)]
    socket_group: Option<Arc<str>>,
}

impl LimitArgs {
    fn limits(&self) -> Limits {
        Limits {
            connect_timeout: self.connect_timeout.0,
            idle_timeout: self.idle_timeout.0,
            tcp_user_timeout: self.tcp_user_timeout.0,
            keepalive: self.keepalive,
            max_connections: self.max_connections,
            on_limit: self.on_limit,
            max_connections_per_source: self.max_connections_per_source,
            rate: self.rate,
            udp_timeout: self.udp_timeout,
            udp_max_flows: self.udp_max_flows,
            udp_max_flows_per_source: self.udp_max_flows_per_source,
            udp_any_port: self.udp_any_port,
            require_resolved: self.require_resolved,
            dscp: self.dscp,
            source: self.source,
            device: self.device.clone(),
            proxy_protocol: ProxyProtocol {
                send: self.send_proxy,
                send_udp: self.send_proxy_udp,
                accept: self.accept_proxy.clone(),
                timeout: self.proxy_timeout,
            },
            access_log: !self.no_access_log,
            freebind: self.freebind,
            socket: self.socket(),
            access: AccessList { allow: self.allow.clone(), deny: self.deny.clone() },
        }
    }
}

impl LimitArgs {
    /// The permissions of Unix sockets, if some are asked for.
    fn socket(&self) -> Option<Arc<SocketPermissions>> {
        let Self { socket_mode: mode, socket_user: user, socket_group: group, .. } = self;
        let socket = SocketPermissions { mode: *mode, user: user.clone(), group: group.clone() };
        socket.is_some().then(|| socket.into())
    }

    /// The first option about permissions that is given.
    fn socket_option(&self) -> Option<&'static str> {
        let given = [
            ("--socket-mode", self.socket_mode.is_some()),
            ("--socket-user", self.socket_user.is_some()),
            ("--socket-group", self.socket_group.is_some()),
        ];
        given.into_iter().find_map(|(option, is_given)| is_given.then_some(option))
    }
}

/// A mapping, and the arguments that request it.
struct Asked {
    words: String,
    mapping: Mapping,
}

impl MappingArgs {
    /// The ids of these options in clap. All of them can be expressed in a file.
    pub(super) const IDS: [&str; 35] = [
        "host",
        "to",
        "publish",
        "publish_all",
        "expose",
        "proto",
        "v6only",
        "name",
        "connect_timeout",
        "idle_timeout",
        "tcp_user_timeout",
        "keepalive",
        "max_connections",
        "on_limit",
        "max_connections_per_source",
        "rate",
        "allow",
        "deny",
        "udp_timeout",
        "udp_max_flows",
        "udp_max_flows_per_source",
        "udp_any_port",
        "require_resolved",
        "dscp",
        "source",
        "device",
        "send_proxy",
        "send_proxy_udp",
        "accept_proxy",
        "proxy_timeout",
        "no_access_log",
        "freebind",
        "socket_mode",
        "socket_user",
        "socket_group",
    ];

    /// Whether no mapping is requested.
    pub(super) fn is_empty(&self) -> bool {
        self.host.is_empty() && self.to.is_empty() && !self.publishes()
    }

    fn publishes(&self) -> bool {
        !self.publish.is_empty() || self.publish_all
    }

    /// The limits of each mapping.
    pub(super) fn limits(&self) -> Limits {
        self.limits.limits()
    }

    /// Refuses options of headers that are neither sent nor awaited.
    ///
    /// # Errors
    /// [`UsageError`]
    pub(super) fn refuse_lone(&self) -> Result<(), UsageError> {
        let given = self.limits.limits().proxy_protocol;
        let effective = given.clone().normalized();
        if given.send_udp != effective.send_udp {
            let words = format!("--send-proxy-udp {}", given.send_udp);
            return Err(wrong(&words, &"no datagram has a header without --send-proxy v2; add that"));
        }
        if given.timeout != effective.timeout {
            let problem =
                "no header is awaited without --accept-proxy; add that, with the addresses of proxies";
            return Err(wrong("--proxy-timeout", &problem));
        }
        Ok(())
    }

    /// Refuses options of mappings that mean nothing without one, not even for attached ports, which shims bind for their
    /// backends.
    ///
    /// # Errors
    /// [`UsageError`]
    pub(super) fn refuse_without_mapping(&self) -> Result<(), UsageError> {
        let given = [
            ("--proto", !self.proto.is_empty()),
            ("--v6only", self.v6only),
            ("--name", self.name.is_some()),
            ("--require-resolved", self.limits.require_resolved),
            ("--freebind", self.limits.freebind),
            (self.limits.socket_option().unwrap_or_default(), self.limits.socket().is_some()),
        ];
        match given.into_iter().find(|(_words, is_given)| *is_given) {
            Some((words, _)) => Err(wrong(
                words,
                &"it is for mappings, and none is asked for; add --host and --to, or leave it out",
            )),
            None => Ok(()),
        }
    }

    /// The requested mappings: those of `--host` in order, then those of `-p`, then those of `-P`.
    ///
    /// # Errors
    /// [`UsageError`]: an unpaired option, no mapping, a loop, or two mappings for one port.
    pub fn mappings(&self) -> Result<Vec<Mapping>, UsageError> {
        if self.is_empty() {
            return Err(UsageError::new(
                "nothing to forward; give --host ADDRESS:PORT and --to ADDRESS:PORT, or --to ADDRESS and -p PORT",
            ));
        }
        let (backends, addresses) = self.split_to();
        let mut asked = self.paired(&backends, &addresses)?;
        asked.extend(self.published(&backends, &addresses)?);
        if self.v6only && !asked.iter().any(|asked| *asked.mapping.host() == ScopedIp::ANY) {
            return Err(wrong("--v6only", &"v6only is for [::], and no mapping listens there"));
        }
        if let Some(words) = self.limits.socket_option()
            && !asked.iter().any(|asked| has_file(&asked.mapping))
        {
            return Err(wrong(
                words,
                &"no --host is a Unix socket with a file; write one, as in --host unix:/run/front.sock",
            ));
        }
        let asked = asked.into_iter().map(|asked| self.finish(asked)).collect::<Result<Vec<_>, _>>()?;
        let mut mappings: Vec<Mapping> = asked.iter().map(|asked| asked.mapping.clone()).collect();
        refuse_overlap(&mappings).map_err(|error| {
            let words = asked.iter().rfind(|asked| asked.mapping == *error.mapping);
            wrong(words.map_or("", |asked| &asked.words), &error)
        })?;
        refuse_loops_among(&mappings).map_err(|error| match &error.reason {
            LoopReason::Many(to) => wrong(&format!("--to {to}"), &error),
            LoopReason::Ring(_) | LoopReason::Itself { .. } => wrong(&asked[error.mapping].words, &error),
        })?;
        tell_apart(&mut mappings);
        match (&self.name, &mut mappings[..]) {
            (None, _) => {}
            (Some(name), [mapping]) => *mapping = mapping.clone().named(name.clone()),
            (Some(name), _) => {
                return Err(wrong(
                    &format!("--name {name}"),
                    &"it is for one mapping, and these are several",
                ));
            }
        }
        Ok(mappings)
    }

    /// Whether a mapping listens on all addresses because none was given.
    pub fn is_everywhere(&self) -> bool {
        self.publish_all || self.publish.iter().any(|spec| spec.host.is_none())
    }

    /// The option that requests to listen on `host`, for messages.
    pub fn words_for(&self, host: &HostSocketAddr) -> &'static str {
        let is_asked = self.host.iter().any(|asked| asked.contains(host));
        if !self.publishes() || is_asked { "--host" } else { "-p" }
    }

    fn split_to(&self) -> (Vec<BackendSpec>, Vec<(BackendHost, AddrError)>) {
        let mut split = (Vec::new(), Vec::new());
        for to in &self.to {
            match to {
                To::Backend(backend) => split.0.push(backend.clone()),
                To::Host(host, error) => split.1.push((host.clone(), error.clone())),
            }
        }
        split
    }

    /// The mappings of `--host`, each with the `--to` in the same position.
    fn paired(
        &self,
        backends: &[BackendSpec],
        addresses: &[(BackendHost, AddrError)],
    ) -> Result<Vec<Asked>, UsageError> {
        if let (Some((address, error)), false) = (addresses.first(), self.publishes()) {
            return Err(wrong(&format!("--to {address}"), error));
        }
        if let Some(host) = self.host.get(backends.len()) {
            return Err(wrong(&format!("--host {host}"), &"its --to is missing; each --host goes with one"));
        }
        if let Some(to) = backends.get(self.host.len()) {
            let problem = match (&to.host, self.publishes()) {
                (BackendHost::Unix(_), true) => {
                    "-p has a port of the backend, and a Unix socket none; write --host ADDRESS:PORT in its place".to_owned()
                }
                (address, true) => {
                    format!("its --host is missing; for -p the address is enough: --to {address}")
                }
                (_, false) => "its --host is missing; each --to goes with one".to_owned(),
            };
            return Err(wrong(&format!("--to {to}"), &problem));
        }
        let pairs = self.host.iter().zip(backends).zip(self.protocols()?);
        pairs.map(|((host, to), protocols)| pair(host, to, protocols)).collect()
    }

    /// The protocols of each `--host`.
    fn protocols(&self) -> Result<Vec<Protocols>, UsageError> {
        let count = self.host.len();
        match self.proto[..] {
            [] => Ok(vec![Protocols::One(Protocol::Tcp); count]),
            [_, ..] if count == 0 && self.publishes() => {
                Err(wrong("--proto", &"it is for --host; write -p PORT/PROTOCOL, as in 53:53/udp"))
            }
            [all] => Ok(vec![all; count]),
            ref each if each.len() == count => Ok(each.to_vec()),
            ref each => Err(wrong(
                "--proto",
                &format_args!(
                    "given {} times for {count} mappings; give it once for all, or once for each",
                    each.len()
                ),
            )),
        }
    }

    /// The mappings of `-p` and `-P`, which have one backend address.
    fn published(
        &self,
        backends: &[BackendSpec],
        addresses: &[(BackendHost, AddrError)],
    ) -> Result<Vec<Asked>, UsageError> {
        if !self.publishes() {
            return Ok(Vec::new());
        }
        let to = match addresses {
            [(to, _)] => to,
            [_, (second, _), ..] => {
                return Err(wrong(
                    &format!("--to {second}"),
                    &"all -p have one backend; --config can have several",
                ));
            }
            [] if backends.is_empty() => {
                return Err(UsageError::new("-p: no backend; give --to ADDRESS, such as --to 172.17.0.2"));
            }
            [] => {
                return Err(UsageError::new(
                    "-p: its --to ADDRESS is missing; one with a port is for a --host",
                ));
            }
        };
        if self.publish_all && self.expose.is_empty() {
            return Err(wrong("-P", &"no ports to publish; give --expose PORT for each"));
        }
        let exposed = self.expose.iter().filter(|_| self.publish_all).map(|exposed| exposed.at_random());
        let exposed = exposed.filter(|exposed| !self.publish.iter().any(|spec| covers(spec, exposed)));
        let exposed = exposed.map(|spec| (format!("--expose {}/{}", spec.ports, spec.protocols), spec));
        let specs = self.publish.iter().map(|spec| (format!("-p {spec}"), spec.clone())).chain(exposed);
        specs.map(|(words, spec)| publish(words, spec, to)).collect()
    }

    /// Applies the options that hold for all mappings.
    fn finish(&self, Asked { words, mapping }: Asked) -> Result<Asked, UsageError> {
        let mapping = if self.v6only && *mapping.host() == ScopedIp::ANY {
            mapping.v6only().map_err(|error| wrong(&words, &error))?
        } else {
            mapping
        };
        let limits = self.limits.limits();
        let socket = limits.socket.clone().filter(|_| has_file(&mapping));
        let mapping = mapping.limited(Limits { socket, ..limits });
        let mapping = mapping.map_err(|error| match error {
            MappingError::NotOfSctp(_) | MappingError::NotOfUnix(_) | MappingError::NotAtUnix(_) => {
                wrong(&words, &error)
            }
            _ => wrong(&format!("--source {}", self.limits.source), &error),
        })?;
        Ok(Asked { words, mapping })
    }
}

/// Whether a mapping listens on a Unix socket with a file.
fn has_file(mapping: &Mapping) -> bool {
    mapping.host().unix_addr().is_some_and(|addr| addr.path().is_some())
}

/// The mapping of one `--host` and its `--to`.
fn pair(host: &HostSpec, to: &BackendSpec, protocols: Protocols) -> Result<Asked, UsageError> {
    let mapping = Mapping::new(protocols, (host.host.clone(), host.ports), (to.host.clone(), to.ports));
    let words = format!("--host {host}");
    let mapping = mapping.map_err(|error| match error {
        MappingError::Lengths { .. }
        | MappingError::InterfacePorts(_)
        | MappingError::PortsAtUnix
        | MappingError::SeveralAtUnix(_) => wrong(&words, &error),
        MappingError::NotByUnix(_) => wrong("--proto", &error),
        _ => wrong(&format!("--to {to}"), &error),
    })?;
    Ok(Asked { words, mapping })
}

/// The mapping of one `-p` or `--expose`.
fn publish(words: String, spec: PublishSpec, to: &BackendHost) -> Result<Asked, UsageError> {
    match spec.to(to.clone(), everywhere()) {
        Ok(mapping) => Ok(Asked { words, mapping }),
        Err(MappingError::Backend(error)) => Err(wrong(&format!("--to {to}"), &error)),
        Err(error) => Err(wrong(&words, &error)),
    }
}

/// Names each mapping whose default name is taken by an earlier one, which is possible with random ports: the
/// second `random:80/tcp` becomes `random:80/tcp#2`.
fn tell_apart(mappings: &mut [Mapping]) {
    let mut seen: HashMap<Name, usize> = HashMap::new();
    for mapping in mappings {
        let name = mapping.name();
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            let name = format!("{name}#{count}").parse().expect("it is a default name and a number");
            *mapping = mapping.clone().named(name);
        }
    }
}

/// Whether `spec` publishes all of `exposed`.
fn covers(spec: &PublishSpec, exposed: &PublishSpec) -> bool {
    let ports = spec.ports.first() <= exposed.ports.first() && exposed.ports.last() <= spec.ports.last();
    ports && exposed.protocols.iter().all(|protocol| spec.protocols.contains(protocol))
}

fn wrong(words: &str, problem: &dyn fmt::Display) -> UsageError {
    UsageError::new(format!("{words}: {problem}"))
}
