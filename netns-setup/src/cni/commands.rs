//! The commands of the specification.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde_json::value::RawValue;

use super::attachment::AttachmentId;
use super::call::Call;
use super::command::Command;
use super::conf::{Conf, Policy, PortRequest, SourceAddress, ValidAttachment};
use super::error::CniError;
use super::result::Addresses;
use super::state::{Attachment, Node, Store};
use super::{change, localnet, rules};
use crate::firewall::tool::{self, ToolError};
use crate::model::MappingKey;
use crate::name::Name;
use crate::observe;
use crate::relay::{self, client};
use crate::relayed::{Launch, RelayedPort};

/// The longest name of a container in the relay, in bytes.
const LONGEST_OWNER: usize = 64;

/// What is answered.
#[derive(Debug, Default)]
pub struct Answer {
    /// The result, in JSON; nothing for commands without one.
    pub text: String,
    /// What people should know.
    pub warnings: Vec<String>,
}

impl Answer {
    /// An answer without warnings.
    #[must_use]
    pub fn of(text: String) -> Self {
        Self { text, warnings: Vec::new() }
    }
}

/// Carries out a call.
///
/// # Errors
/// If that fails; see [`CniError::code`].
pub fn run(call: &Call) -> Result<Answer, CniError> {
    let Call { command, attachment, conf } = call;
    match (command, attachment) {
        (Command::Add, Some(id)) => add(id, conf),
        (Command::Del, Some(id)) => delete(id, conf),
        (Command::Check, Some(id)) => check(id, conf),
        (Command::Gc, _) => collect(conf),
        (Command::Status, _) => status(conf),
        // `call::understand` names an attachment for each command that is about one, and answers to VERSION need no call.
        (Command::Add | Command::Del | Command::Check | Command::Version, _) => Ok(Answer::default()),
    }
}

/// Publishes the ports of an attachment. The result is the one of the plugin before.
fn add(id: &AttachmentId, conf: &Conf) -> Result<Answer, CniError> {
    let Some(prev) = &conf.prev_result else {
        return Err(CniError::Config(
            "prevResult is missing: chain this plugin after one that gives containers addresses".to_owned(),
        ));
    };
    let result = Answer::of(prev.get().to_owned());
    match (conf.ports.is_empty(), Store::open(&conf.state_dir)?) {
        (true, None) => Ok(result),
        (_, Some(store)) => add_to(&store, id, conf, prev, result),
        (false, None) => {
            let store = Store::create(&conf.state_dir)?;
            add_to(&store, id, conf, prev, result).inspect_err(|_error| store.discard())
        }
    }
}

/// Publishes them with what the state directory has.
fn add_to(
    store: &Store,
    id: &AttachmentId,
    conf: &Conf,
    prev: &RawValue,
    result: Answer,
) -> Result<Answer, CniError> {
    let before = store.load()?;
    if conf.ports.is_empty() && before.attachment(id).is_none() {
        return Ok(result);
    }
    let attachment = attachment(id, conf, &Addresses::of(prev, &id.interface)?)?;
    if !attachment.ports.is_empty() {
        check_programs(conf)?;
    }
    let launch = launch(conf, &before)?;
    let warnings = change::publish(store, &before, before.with(attachment), id, &launch)?;
    Ok(Answer { warnings, ..result })
}

/// What is published for a container with these addresses.
fn attachment(id: &AttachmentId, conf: &Conf, addresses: &Addresses) -> Result<Attachment, CniError> {
    if addresses.iter().next().is_none() && !conf.ports.is_empty() {
        return Err(CniError::Config(format!(
            "prevResult has no address of {}, to which ports could lead",
            id.interface
        )));
    }
    let owner = owner(id)?;
    let of_request = |request: &PortRequest| {
        let PortRequest { proto, host, host_port, container_port } = *request;
        let targets = addresses.targets(host).into_iter();
        let owner = owner.clone();
        targets.map(move |(host, ip)| RelayedPort {
            key: MappingKey { proto, host, port: host_port },
            owner: owner.clone(),
            to: (ip, container_port).into(),
            keeps_source: conf.source == SourceAddress::Client,
        })
    };
    let ports = conf.ports.iter().flat_map(of_request).collect();
    let subnets = addresses.iter().map(|address| address.trunc()).collect();
    let plain = Attachment {
        id: id.clone(),
        via: conf.policy.via(),
        ports,
        subnets,
        localnet: None,
        return_path: BTreeSet::new(),
    };
    with_interfaces(plain, conf, addresses)
}

/// The same, with the interfaces of the host on which it depends.
fn with_interfaces(plain: Attachment, conf: &Conf, addresses: &Addresses) -> Result<Attachment, CniError> {
    let (is_dnat, keeps_source) = (conf.policy == Policy::Dnat, conf.source == SourceAddress::Client);
    if plain.ports.is_empty() || !is_dnat && !keeps_source {
        return Ok(plain);
    }
    let side = observe::side().map_err(|error| CniError::Host {
        step: "list the host's routes".to_owned(),
        source: std::io::Error::other(error),
    })?;
    let leads = |address: Option<IpNet>| localnet::interface_to(address?.addr(), &side);
    let localnet = is_dnat.then(|| leads(addresses.v4)).flatten();
    let to_all = [leads(addresses.v4), leads(addresses.v6)].into_iter().flatten();
    let return_path = to_all.filter(|_| keeps_source).filter_map(|name| name.parse().ok()).collect();
    Ok(Attachment { localnet, return_path, ..plain })
}

/// The name of a container in the relay.
fn owner(id: &AttachmentId) -> Result<Name, CniError> {
    let name: String = id.container.chars().take(LONGEST_OWNER).collect();
    name.parse().map_err(|error| CniError::Environment(format!("CNI_CONTAINERID: {error}")))
}

/// Publishes the ports of an attachment no more.
fn delete(id: &AttachmentId, conf: &Conf) -> Result<Answer, CniError> {
    remove(conf, |attachment| attachment.id == *id)
}

/// Removes what no valid attachment of the network has.
fn collect(conf: &Conf) -> Result<Answer, CniError> {
    let Some(valid) = &conf.valid else {
        return Err(CniError::Config(
            "cni.dev/valid-attachments is missing: without it, all ports of the network would be removed"
                .to_owned(),
        ));
    };
    let is_valid = |id: &AttachmentId| {
        valid.contains(&ValidAttachment { container: id.container.clone(), interface: id.interface.clone() })
    };
    remove(conf, |attachment| attachment.id.network == conf.name && !is_valid(&attachment.id))
}

/// Removes attachments; also what a change has left that was not completed.
fn remove(conf: &Conf, is_removed: impl Fn(&Attachment) -> bool) -> Result<Answer, CniError> {
    let Some(store) = Store::open(&conf.state_dir)? else { return Ok(Answer::default()) };
    let before = store.load()?;
    let after = before.without(is_removed);
    if before.attachments.is_empty() && !before.is_changing {
        return Ok(Answer::default());
    }
    // After an ADD that was refused for that: the rules are those of the other one.
    if change::other_directory(&before, &store).is_some() {
        return Ok(Answer::default());
    }
    // Nothing has to be started to withdraw ports, unless others are to be restored.
    let launch = launch(conf, &before).unwrap_or_else(|_missing| Launch {
        state_dir: store.path().to_owned(),
        network: before.id.clone(),
        program: PathBuf::from("rproxy"),
    });
    let warnings = change::withdraw(&store, &before, after, &launch)?;
    Ok(Answer { text: String::new(), warnings })
}

/// Compares what is there with what `ADD` has set up.
fn check(id: &AttachmentId, conf: &Conf) -> Result<Answer, CniError> {
    let Some(prev) = &conf.prev_result else {
        return Err(CniError::Config("prevResult is missing".to_owned()));
    };
    let wanted = attachment(id, conf, &Addresses::of(prev, &id.interface)?)?;
    let node = Store::open(&conf.state_dir)?.map(|store| store.load()).transpose()?;
    let known = node.as_ref().and_then(|node| node.attachment(id));
    let mut differs = Vec::new();
    for port in &wanted.ports {
        match known.and_then(|known| known.ports.iter().find(|other| other.key == port.key)) {
            None => differs.push(format!("host port {} was not published for {}", port.key, id.container)),
            Some(other) if other.to != port.to => {
                differs.push(format!("host port {} leads to {}, not to {}", port.key, other.to, port.to));
            }
            Some(_) => {}
        }
    }
    if let Some(known) = known.filter(|known| (known.via, &known.subnets) != (wanted.via, &wanted.subnets)) {
        differs.push(format!("{} was published with another policy or for other networks", known.id));
    }
    let extra = known.into_iter().flat_map(|known| &known.ports);
    let extra = extra.filter(|port| !wanted.ports.iter().any(|other| other.key == port.key));
    differs.extend(extra.map(|port| format!("host port {} is published, which is not asked for", port.key)));
    if let (Some(node), Some(known)) = (&node, known) {
        differs.extend(differing_relay(node, id, &conf.state_dir)?);
        differs.extend(rules::missing(node, known)?);
        differs.extend(localnet::missing(known.localnet.as_deref())?);
    }
    if differs.is_empty() { Ok(Answer::default()) } else { Err(CniError::Differs(differs)) }
}

/// What the relay does not serve.
fn differing_relay(node: &Node, id: &AttachmentId, state_dir: &Path) -> Result<Vec<String>, CniError> {
    let node = node.effective();
    let Some(attachment) = node.attachment(id).filter(|attachment| !attachment.ports.is_empty()) else {
        return Ok(Vec::new());
    };
    let status = client::status(state_dir)?;
    let Some(status) = status else { return Ok(vec!["the relay does not run".to_owned()]) };
    let served: BTreeSet<_> = status.ports.iter().map(|port| (port.key, port.to)).collect();
    let missing = attachment.ports.iter().filter(|port| !served.contains(&(port.key, port.to)));
    let missing = missing.map(|port| format!("the relay does not serve host port {}", port.key));
    let own: BTreeSet<_> = attachment.ports.iter().map(|port| port.key).collect();
    let unserved = status.unserved.iter().filter(|unserved| own.contains(&unserved.key));
    let unserved = unserved
        .map(|unserved| format!("the relay does not serve host port {}: {}", unserved.key, unserved.why));
    let trouble = status.trouble.map(|why| format!("the relay does not run: {why}"));
    Ok(missing.chain(unserved).chain(trouble).collect())
}

/// Says whether ports can be published.
fn status(conf: &Conf) -> Result<Answer, CniError> {
    check_programs(conf)?;
    check_that_programs_work(conf)?;
    let store = Store::create(&conf.state_dir)?;
    let is_usable = store.check_writable().and_then(|()| store.load());
    store.discard();
    is_usable?;
    match client::status(&conf.state_dir)?.and_then(|status| status.trouble) {
        Some(why) => Err(CniError::NotReady(format!("the relay does not run: {why}"))),
        None => Ok(Answer::default()),
    }
}

/// Refuses programs that are there but cannot be used.
fn check_that_programs_work(conf: &Conf) -> Result<(), CniError> {
    let program = program(conf).unwrap_or_default();
    let why = match tool::run_at("rproxy", &program, &["--version"], "") {
        Ok(_version) => None,
        Err(ToolError::Failed { status, .. }) => Some(status.to_string()),
        Err(ToolError::Run { source, .. }) => Some(source.to_string()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(why) = why {
        return Err(CniError::NotReady(format!("{} does not run: {why}", program.display())));
    }
    if conf.policy != Policy::Relay {
        tool::run("nft", &["list", "tables"], "").map_err(|error| CniError::NotReady(error.to_string()))?;
    }
    Ok(())
}

/// Refuses what needs a right or a program that is not there.
fn check_programs(conf: &Conf) -> Result<(), CniError> {
    let not_ready = |why: &str| Err(CniError::NotReady(why.to_owned()));
    if !nix::unistd::geteuid().is_root() {
        return not_ready("only root can publish ports: have the runtime call this plugin as root");
    }
    let program = program(conf);
    if !program.as_ref().is_some_and(|program| is_executable(program)) {
        let found = program.map_or_else(String::new, |program| format!(" at {}", program.display()));
        return not_ready(&format!(
            "there is no rproxy{found}: install it beside this plugin or in PATH, or name it with \"rproxy\""
        ));
    }
    if conf.policy != Policy::Relay && tool::find("nft").is_none() {
        return not_ready("nft is not installed: install nftables, or choose \"policy\": \"relay\"");
    }
    Ok(())
}

fn program(conf: &Conf) -> Option<PathBuf> {
    relay::program(conf.rproxy.as_deref())
}

fn is_executable(file: &Path) -> bool {
    nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file()
}

fn launch(conf: &Conf, node: &Node) -> Result<Launch, CniError> {
    let program = program(conf).ok_or_else(|| CniError::NotReady("there is no rproxy".to_owned()))?;
    Ok(Launch { state_dir: conf.state_dir.clone(), network: node.id.clone(), program })
}
