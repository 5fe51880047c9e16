//! Executes the requests of clients.

use std::time::Duration;

use rproxy_mapping::Mapping;
use rproxy_mapping::endpoint::BackendSpec;
use rproxy_mapping::name::{Name, NameError};
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::wire::WireMapping;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::info;

use super::answers::{Added, List, Response, StatsList};
use super::clients::{Call, Reply};
use super::protocol::{Refusal, Request};
use crate::bind::family::{NO_IPV6, everywhere, has_ipv6};
use crate::bind::interfaces::HostInterfaces;
use crate::engine::Server;
use crate::engine::change::Changed;

/// How long the client that ends the process may take to read its response.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Executes a request and replies. Returns whether it ends the process, once the client has received the
/// response.
pub(crate) async fn answer(Call { request, answer }: Call, server: &mut Server) -> bool {
    let is_last = request == Request::Drain;
    let (until_told, told) = oneshot::channel();
    let result = handle(request, server).await;
    // The client may be gone.
    answer.send(Reply { result, until_told }).ok();
    if is_last {
        // A client that does not read its response is not waited for any longer.
        timeout(LAST_ANSWER, told).await.ok();
        info!("ending, as requested by a control client");
    }
    is_last
}

async fn handle(request: Request, server: &mut Server) -> Result<Response, Refusal> {
    let changed = match request {
        Request::List => return Ok(Response::List(List::of(server.registry()))),
        Request::Stats => return Ok(Response::Stats(StatsList::of(server.registry()))),
        Request::Drain => return Ok(Response::Drain {}),
        Request::Add { mappings } => {
            let mappings = read(&mappings, server)?;
            let names: Vec<Name> = mappings.iter().map(Mapping::name).collect();
            let changed = server.add(mappings).await?;
            return Ok(Response::Added(Added::of(changed, server.registry(), &names)));
        }
        Request::Apply { mut mappings } => {
            // Attached ports are in a list that is applied, but not served at the request of a client.
            mappings.retain(|mapping| mapping.origin.is_none());
            server.apply(read(&mappings, server)?).await?
        }
        Request::Remove { name } => server.remove(&parse_name(&name)?).await?,
        Request::Retarget { name, to } => retarget(server, &parse_name(&name)?, &to).await?,
    };
    Ok(changed.into())
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
            Some(name) => Refusal::bad_request(format!("mapping {}: {error}", name.escape_debug())),
            None => Refusal::bad_request(error.to_string()),
        })
    };
    mappings.iter().map(read).collect()
}

fn parse_name(name: &str) -> Result<Name, Refusal> {
    name.parse().map_err(|error: NameError| Refusal::bad_request(error.to_string()))
}

async fn retarget(server: &mut Server, name: &Name, to: &str) -> Result<Changed, Refusal> {
    let wrong = |error: &dyn std::fmt::Display| Refusal::bad_request(format!("to {to}: {error}"));
    let BackendSpec { ip, ports } = BackendSpec::parse(to, &HostInterfaces).map_err(|error| wrong(&error))?;
    // The server refuses an unknown name.
    let count = server.registry().get(name).map_or(1, |served| served.mapping().backend_ports().count());
    let Ok(first) = ports.one() else { return Ok(server.retarget(name, ip, ports).await?) };
    let last = u16::try_from(count - 1).ok().and_then(|more| first.checked_add(more));
    let last =
        last.ok_or_else(|| wrong(&format_args!("there are fewer than {count} ports from there on")))?;
    let ports = PortRange::new(first, last).map_err(|error| wrong(&error))?;
    Ok(server.retarget(name, ip, ports).await?)
}
