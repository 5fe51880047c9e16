//! `list` and `inspect`: show the state in Docker's formats.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::locked::LockedState;
use super::{Options, Report};
use crate::error::Error;
use crate::model::{Endpoint, Mapping, Network, RelayProcess};
use crate::name::{Id, Name};
use crate::relay::client;

/// Lists the containers.
pub(super) fn list(options: &Options) -> Result<Report, Error> {
    let locked = LockedState::open_to_read(options)?;
    let topology = &locked.state.current;
    let mut table = vec![["NAME", "ADDRESS", "VETH", "PORTS"].map(str::to_owned)];
    let mut result = Vec::new();
    let status = client::status(&options.state_dir).ok().flatten().unwrap_or_default();
    let relay = status.relay;
    for (name, endpoint) in &topology.endpoints {
        let ports: Vec<_> = endpoint.mappings.iter().map(port).collect();
        let (ip, veth) = (endpoint.ip.to_string(), endpoint.id.veth());
        let ip6 = topology.network.as_ref().and_then(|network| endpoint.ip6(network));
        let addresses = ip6.map_or_else(|| ip.clone(), |ip6| format!("{ip},{ip6}"));
        table.push([name.to_string(), addresses, veth.to_string(), ports.join(", ")]);
        result.push(json!({
            "name": name, "ip": ip, "ip6": ip6, "mac": endpoint.mac().to_string(), "veth": veth,
            "netns": endpoint.netns.path,
            "mappings": endpoint.mappings.iter().map(|one| mapping(one, relay)).collect::<Vec<_>>(),
        }));
    }
    let unserved = status.unserved.iter();
    let unserved = unserved.map(|port| format!("{} is not served now: {}", port.key, port.why));
    let warnings = interrupted(&locked).into_iter().chain(unserved).collect();
    let shown = Some(format!("{:#}", json!(result)));
    Ok(Report { lines: aligned(&table), warnings, shown, ..Report::default() })
}

/// Lines with columns that are as wide as they have to be, and not narrower than usual.
fn aligned(table: &[[String; 4]]) -> Vec<String> {
    let width = |column: usize, usual| table.iter().map(|row| row[column].len()).fold(usual, usize::max);
    let [names, addresses, veths] = [width(0, 16), width(1, 16), width(2, 12)];
    let line = |[name, address, veth, ports]: &[String; 4]| {
        format!("{name:<names$} {address:<addresses$} {veth:<veths$} {ports}").trim_end().to_owned()
    };
    table.iter().map(line).collect()
}

fn interrupted(locked: &LockedState) -> Vec<String> {
    let pending = locked.state.pending.iter();
    pending.map(|_| Error::Unfinished.to_string()).collect()
}

/// A mapping as in `docker ps`, with what relays it.
fn port(mapping: &Mapping) -> String {
    let via = serde_json::to_value(mapping.via).ok();
    let via = via.as_ref().and_then(Value::as_str).unwrap_or_default();
    let suspended = if mapping.suspended { ", suspended" } else { "" };
    format!(
        "{}:{}->{}/{} ({via}{suspended})",
        mapping.host, mapping.host_port, mapping.container_port, mapping.proto
    )
}

/// The relay of the network, if it runs and may be asked.
pub(super) fn relay(options: &Options) -> Option<RelayProcess> {
    client::status(&options.state_dir).ok().flatten()?.relay
}

/// A mapping as JSON, with the process that relays it.
pub(super) fn mapping(mapping: &Mapping, relay: Option<RelayProcess>) -> Value {
    let relay = mapping.relay.or(relay.filter(|_| mapping.via.has_relay() && !mapping.suspended));
    let mut shown = json!(mapping);
    shown["relay"] = json!(relay);
    shown
}

/// Shows one container, or all.
pub(super) fn inspect(name: Option<&Name>, options: &Options) -> Result<Report, Error> {
    let locked = LockedState::open_to_read(options)?;
    let by_id = name.map(|name| locked.by_id(name)).transpose()?.flatten();
    let shown = match (by_id.as_ref().or(name), &locked.state.current.network) {
        (Some(name), _) => vec![Inspected::new(locked.network()?, name, locked.endpoint(name)?)],
        (None, Some(network)) => {
            let all = locked.state.current.endpoints.iter();
            all.map(|(name, endpoint)| Inspected::new(network, name, endpoint)).collect()
        }
        (None, None) => Vec::new(),
    };
    // Serialised from types, because a `Value` would sort the keys.
    let text = serde_json::to_string_pretty(&shown).map_err(|error| Error::Output(error.into()))?;
    let warnings = interrupted(&locked);
    Ok(Report { lines: vec![text.clone()], warnings, shown: Some(text), ..Report::default() })
}

/// The network section of a container in `docker inspect`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Inspected<'a> {
    id: &'a Id,
    name: String,
    network_settings: NetworkSettings<'a>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkSettings<'a> {
    sandbox_key: &'a Path,
    ports: BTreeMap<String, Option<Vec<Binding>>>,
    networks: Networks<'a>,
}

#[derive(Debug, Serialize)]
struct Networks<'a> {
    bridge: Attachment<'a>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Binding {
    host_ip: IpAddr,
    host_port: String,
}

/// Docker's `NetworkSettings.Networks` entry, with its names and in its order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Attachment<'a> {
    #[serde(rename = "IPAMConfig")]
    ipam_config: Option<Value>,
    links: Option<()>,
    aliases: Option<()>,
    #[serde(rename = "NetworkID")]
    network_id: &'a Id,
    #[serde(rename = "EndpointID")]
    endpoint_id: &'a Id,
    gateway: Ipv4Addr,
    #[serde(rename = "IPAddress")]
    ip_address: Ipv4Addr,
    #[serde(rename = "IPPrefixLen")]
    ip_prefix_len: u8,
    #[serde(rename = "IPv6Gateway")]
    ipv6_gateway: String,
    #[serde(rename = "GlobalIPv6Address")]
    global_ipv6_address: String,
    #[serde(rename = "GlobalIPv6PrefixLen")]
    global_ipv6_prefix_len: u8,
    mac_address: String,
    driver_opts: Option<()>,
}

impl<'a> Inspected<'a> {
    pub(super) fn new(network: &'a Network, name: &Name, endpoint: &'a Endpoint) -> Self {
        let networks = Networks { bridge: Attachment::new(network, endpoint) };
        let settings =
            NetworkSettings { sandbox_key: &endpoint.netns.path, ports: ports(endpoint), networks };
        Self { id: &endpoint.id, name: format!("/{name}"), network_settings: settings }
    }
}

impl<'a> Attachment<'a> {
    fn new(network: &'a Network, endpoint: &'a Endpoint) -> Self {
        let v6 = endpoint.ip6(network).zip(network.subnet6);
        Self {
            ipam_config: endpoint.ip_requested.then(|| json!({ "IPv4Address": endpoint.ip })),
            links: None,
            aliases: None,
            network_id: &network.id,
            endpoint_id: &endpoint.id,
            gateway: network.subnet.gateway(),
            ip_address: endpoint.ip,
            ip_prefix_len: network.subnet.prefix(),
            ipv6_gateway: v6.map_or_else(String::new, |(_, subnet)| subnet.gateway().to_string()),
            global_ipv6_address: v6.map_or_else(String::new, |(ip, _)| ip.to_string()),
            global_ipv6_prefix_len: v6.map_or(0, |(_, subnet)| subnet.prefix()),
            mac_address: endpoint.mac().to_string(),
            driver_opts: None,
        }
    }
}

/// Ports by container port; those that are only exposed have `null`, as in Docker.
fn ports(endpoint: &Endpoint) -> BTreeMap<String, Option<Vec<Binding>>> {
    let mut ports: BTreeMap<String, Option<Vec<Binding>>> = BTreeMap::new();
    for (port, proto) in &endpoint.exposed {
        ports.insert(format!("{port}/{proto}"), None);
    }
    for mapping in &endpoint.mappings {
        let bindings = ports.entry(format!("{}/{}", mapping.container_port, mapping.proto)).or_default();
        let every = || vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let addresses = mapping.host.ip().map_or_else(every, |ip| vec![ip]);
        let binding = |host_ip| Binding { host_ip, host_port: mapping.host_port.to_string() };
        bindings.get_or_insert_default().extend(addresses.into_iter().map(binding));
    }
    ports
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    #[test]
    fn the_story_s_container_is_shown_as_in_the_golden_file() {
        let topology = testdata::story();
        let (name, endpoint) = topology.endpoints.first_key_value().unwrap();
        let shown = Inspected::new(topology.network.as_ref().unwrap(), name, endpoint);
        testdata::golden("story.inspect.json", &(serde_json::to_string_pretty(&[shown]).unwrap() + "\n"));
    }
}
