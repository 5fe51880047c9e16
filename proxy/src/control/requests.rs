//! Executes the requests of clients.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rproxy_mapping::Mapping;
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::endpoint::BackendSpec;
use rproxy_mapping::name::{Name, NameError};
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::wire::WireMapping;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::info;

use super::answers::{Added, ChangeCounts, ConnectionList, CutCounts, List, Response, StatsList};
use super::chosen::{ClientFilter, NamePattern};
use super::clients::{Call, Reply};
use super::protocol::{Chosen, Refusal, Request};
use super::sockets;
use crate::bind::family::{NO_IPV6, everywhere, has_ipv6};
use crate::bind::interfaces::HostInterfaces;
use crate::engine::Server;
use crate::engine::change::{Changed, Removal};
use crate::engine::change_error::ChangeError;
use crate::state::record::Record;

/// How long the client that ends the process may take to read its response.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// The longest list of connections and flows: as many as a table can show, and a response can hold.
const MOST_CONNECTIONS: usize = 10_000;

const NOTHING_CHOSEN: &str = "cut: it does not say which connections; give mapping, client, id, or all: true";

/// Executes a request and replies. Returns whether it ends the process, once the client has received the
/// response.
pub(crate) async fn answer(Call { request, sockets, answer }: Call, server: &mut Server) -> bool {
    let is_last = request == Request::Drain;
    let (until_told, told) = oneshot::channel();
    let result = handle(request, sockets, server).await;
    // The client may be gone.
    answer.send(Reply { result, until_told }).ok();
    if is_last {
        // A client that does not read its response is not waited for any longer.
        timeout(LAST_ANSWER, told).await.ok();
        info!("ending, as requested by a control client");
    }
    is_last
}

async fn handle(request: Request, sockets: Vec<OwnedFd>, server: &mut Server) -> Result<Response, Refusal> {
    let passed = sockets::adopt(sockets, &request)?;
    let (changed, names) = match request {
        Request::List => return Ok(Response::List(List::of(server.registry(), &server.names))),
        Request::Stats => return Ok(Response::Stats(StatsList::of(server.registry()))),
        Request::Connections(chosen) => {
            let limit = chosen.limit.unwrap_or(MOST_CONNECTIONS);
            return Ok(Response::Connections(ConnectionList::of(&live(&chosen, server)?, limit)));
        }
        Request::Cut(chosen) if chosen.is_empty() => return Err(Refusal::bad_request(NOTHING_CHOSEN)),
        Request::Cut(chosen) => {
            let mut records = live(&chosen, server)?;
            records.truncate(chosen.limit.unwrap_or(usize::MAX));
            server.cut_recorded(&records).await;
            return Ok(Response::Cut(CutCounts { cut: records.len() }));
        }
        Request::Drain => return Ok(Response::Drain {}),
        Request::Add { mappings } => {
            let mappings = read(&mappings, server)?;
            let names: Vec<Name> = mappings.iter().map(Mapping::name).collect();
            let changed = server.add(mappings, passed).await?;
            return Ok(Response::Added(Added::of(changed, server, &names)));
        }
        Request::Apply { mut mappings, cut } => {
            // Attached ports are in a list that is applied, but not served at the request of a client.
            mappings.retain(|mapping| mapping.origin.is_none());
            let mappings = read(&mappings, server)?;
            let names = mappings.iter().map(Mapping::name).collect();
            (server.apply(mappings, passed, removal(cut)).await?, names)
        }
        Request::Remove { name, cut } => {
            let name = parse_name(&name)?;
            (remove(server, name, cut).await?, Vec::new())
        }
        Request::Retarget { name, to, cut } => {
            let name = parse_name(&name)?;
            let changed = retarget(server, &name, &to).await?;
            if cut {
                server.cut_left(&HashSet::from([name.clone()])).await;
            }
            (changed, vec![name])
        }
    };
    Ok(Response::Changed(ChangeCounts::of(changed, server, &names)))
}

async fn remove(server: &mut Server, name: Name, cut: bool) -> Result<Changed, ChangeError> {
    match server.remove(&name, removal(cut)).await {
        // It was removed before, and this ends what it has left.
        Err(ChangeError::Unknown(_)) if cut && server.registry().knows(&name) => {
            server.cut_left(&HashSet::from([name])).await;
            Ok(Changed { unchanged: server.registry().requested().count(), ..Changed::default() })
        }
        removed => removed,
    }
}

/// The live connections and flows that `chosen` describes.
fn live(chosen: &Chosen, server: &Server) -> Result<Vec<Arc<Record>>, Refusal> {
    let mapping = chosen.mapping.as_deref().map(str::parse::<NamePattern>).transpose();
    let mapping = mapping.map_err(|error| Refusal::bad_request(error.to_string()))?;
    let client = chosen.client.as_deref().map(str::parse::<ClientFilter>).transpose();
    let client = client.map_err(|error| Refusal::bad_request(format!("client: {error}")))?;
    let mut live = server.live();
    live.retain(|record| {
        chosen.id.is_none_or(|id| id == record.id)
            && mapping.as_ref().is_none_or(|pattern| pattern.matches(record.port.mapping.as_str()))
            && client.as_ref().is_none_or(|filter| filter.matches(record.client()))
    });
    if let (true, Some(name)) = (live.is_empty(), mapping.as_ref().and_then(NamePattern::exact)) {
        // A name without connections may be a misspelt one.
        let name = parse_name(name)?;
        let is_known = server.registry().knows(&name);
        is_known.then_some(()).ok_or(ChangeError::Unknown(name))?;
    }
    Ok(live)
}

fn read(mappings: &[WireMapping], server: &Server) -> Result<Vec<Mapping>, Refusal> {
    if !has_ipv6() && mappings.iter().any(|mapping| mapping.host.is_none() && !mapping.v6only) {
        info!("{NO_IPV6}");
    }
    let read = |mapping: &WireMapping| {
        if let Some(Ok(name)) = mapping.name.as_deref().map(str::parse) {
            server.refuse_attached(&name)?;
        }
        mapping.read(&HostInterfaces, everywhere()).map_err(|error| match &mapping.name {
            Some(name) => {
                Refusal::bad_request(format!("mapping {}: {error}", name.escape_debug())).about(name)
            }
            None => Refusal::bad_request(error.to_string()),
        })
    };
    mappings.iter().map(read).collect()
}

fn removal(cut: bool) -> Removal {
    if cut { Removal::Cut } else { Removal::Drain }
}

fn parse_name(name: &str) -> Result<Name, Refusal> {
    name.parse().map_err(|error: NameError| Refusal::bad_request(error.to_string()))
}

async fn retarget(server: &mut Server, name: &Name, to: &str) -> Result<Changed, Refusal> {
    let wrong = |error: &dyn std::fmt::Display| Refusal::bad_request(format!("to {to}: {error}"));
    let BackendSpec { host, ports } =
        BackendSpec::parse(to, &HostInterfaces).map_err(|error| wrong(&error))?;
    // The server refuses an unknown name.
    let count = server.registry().get(name).map_or(1, |served| served.mapping().backend_ports().count());
    let is_unix = matches!(host, BackendHost::Unix(_));
    let first = ports.one().ok().filter(|_port| !is_unix);
    let Some(first) = first else { return Ok(server.retarget(name, host, ports).await?) };
    let last = u16::try_from(count - 1).ok().and_then(|more| first.checked_add(more));
    let last =
        last.ok_or_else(|| wrong(&format_args!("there are fewer than {count} ports from there on")))?;
    let ports = PortRange::new(first, last).map_err(|error| wrong(&error))?;
    Ok(server.retarget(name, host, ports).await?)
}
