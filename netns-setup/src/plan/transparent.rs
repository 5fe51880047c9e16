//! What replies to transparent sockets need: marks, policy routing rules, and a route for each family.

use std::collections::BTreeSet;

use super::rules::{change_iptables, change_nft_table};
use super::{Inputs, Plan, PlanError, Step};
use crate::action::Action;
use crate::addr::Cidr;
use crate::family::Family;
use crate::firewall::transparent as firewall;
use crate::model::Transparent;
use crate::name::IfName;
use crate::observed::{PolicyRule, RuleTarget, Rules, Side, TableRoute, TransparentParts};
use crate::transparent::{self, MARK, PRIORITY, TABLE};

/// Checks that the routing table is free, or belongs to this program.
pub(super) fn check(inputs: Inputs<'_>) -> Result<(), PlanError> {
    let (Some(parts), Some(wanted), None) =
        (&inputs.observed.transparent, &inputs.desired.transparent, &inputs.owned.transparent)
    else {
        return Ok(());
    };
    match foreign_routes(parts, wanted, &inputs.observed.host).next() {
        Some((family, route)) => Err(PlanError::TableTaken { family, route }),
        None => Ok(()),
    }
}

/// The steps that set up what is wanted and take down the rest.
pub(super) fn change(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(parts) = &inputs.observed.transparent else {
        return;
    };
    let wanted: BTreeSet<_> = transparent::families(inputs.desired).collect();
    let owned: BTreeSet<_> = transparent::families(inputs.owned).chain(wanted.iter().copied()).collect();
    let there = |family: &Family| {
        parts.routes.iter().any(|route| route.family == *family && is_ours(route, &inputs.observed.host))
    };
    // Without IPv6, the kernel refuses the route.
    let can_have = |family: &&Family| **family == Family::V4 || parts.has_ipv6;
    for family in wanted.iter().filter(can_have).filter(|family| !there(family)) {
        plan.push(Step::new(Action::AddLocalRoute(*family), [Action::DeleteLocalRoute(*family)]));
    }
    add_rules(inputs, parts, plan);
    mark(inputs, &parts.rules, plan);
    delete_rules(inputs, parts, plan);
    for family in owned.difference(&wanted).filter(|family| there(family)) {
        plan.push(Step::new(Action::DeleteLocalRoute(*family), [Action::AddLocalRoute(*family)]));
    }
    if let Some(wanted) = &inputs.desired.transparent {
        let bridge = inputs.desired.network.as_ref().map(|network| network.bridge);
        let gone = gone(wanted, &inputs.observed.host).filter(|iif| Some(**iif) != bridge);
        plan.problems.extend(gone.map(|iif| format!(
            "the interface {iif} is gone: run `netns-setup transparent down --interface {iif}` if it does not come back"
        )));
        plan.problems.extend(problems(wanted, parts, &inputs.observed.host));
    }
}

fn is_ours(route: &TableRoute, host: &Side) -> bool {
    let lo = host.link(IfName::loopback().as_str()).map(|link| link.index);
    route.is_local && route.destination.is_none() && route.oif == lo
}

/// How often the rule of an interface is there.
fn count(parts: &TransparentParts, family: Family, iif: &IfName) -> usize {
    parts.policy.get(&family).into_iter().flatten().filter(|rule| rule.is_ours(iif)).count()
}

fn add_rules(inputs: Inputs<'_>, parts: &TransparentParts, plan: &mut Plan) {
    for (family, iif) in transparent::rules(inputs.desired) {
        if count(parts, family, &iif) == 0 {
            plan.push(Step::new(Action::AddRule { family, iif }, [Action::DeleteRule { family, iif }]));
        }
    }
}

fn delete_rules(inputs: Inputs<'_>, parts: &TransparentParts, plan: &mut Plan) {
    let wanted: BTreeSet<_> = transparent::rules(inputs.desired).collect();
    for (family, iif) in transparent::rules(inputs.owned).filter(|rule| !wanted.contains(rule)) {
        if count(parts, family, &iif) > 0 {
            plan.push(Step::new(Action::DeleteRule { family, iif }, [Action::AddRule { family, iif }]));
        }
    }
}

fn mark(inputs: Inputs<'_>, rules: &Rules, plan: &mut Plan) {
    let (owned, desired) = (inputs.owned, inputs.desired);
    match rules {
        Rules::None => {}
        Rules::Nft { listing, wanted } => {
            let body = firewall::nft(desired);
            let (listing, wanted) = (listing.as_deref(), wanted.as_deref());
            change_nft_table(firewall::TABLE_NAME, listing, body.as_deref(), wanted, plan);
        }
        Rules::Iptables(saved) => {
            for (family, saved) in saved {
                let rules = |topology| firewall::iptables(topology, *family);
                change_iptables(*family, saved, &rules(owned), &rules(desired), plan);
            }
        }
    }
}

/// The interfaces that do not exist.
fn gone<'a>(wanted: &'a Transparent, host: &'a Side) -> impl Iterator<Item = &'a IfName> {
    wanted.interfaces.iter().filter(|iif| host.link(iif.as_str()).is_none())
}

/// What keeps replies away although everything is there.
fn problems(wanted: &Transparent, parts: &TransparentParts, host: &Side) -> Vec<String> {
    let mut found = Vec::new();
    for family in wanted.families() {
        let rules = parts.policy.get(&family).map(Vec::as_slice).unwrap_or_default();
        let (name, ip) = (family.name(), family.ip());
        found.extend(prevailing(wanted, rules, host).map(|rule| {
            format!("the {name} rule `{rule}` takes replies first: give it a priority above {PRIORITY} (`{ip} rule`)")
        }));
        found.extend(sharing(wanted, rules).map(|rule| {
            format!("the {name} rule `{rule}` is for marks with the bit {MARK:#x}, which is netns-setup's: give it another (`{ip} rule`)")
        }));
    }
    for (family, route) in foreign_routes(parts, wanted, host) {
        found.push(format!(
            "the routing table {TABLE} has a route of others: remove it with `{} route delete {route} table {TABLE}`",
            family.ip()
        ));
    }
    match (parts.has_ipv6, wanted.ipv6) {
        (true, false) => {
            found.push("IPv6 has come up since: run `netns-setup transparent up` to include it".to_owned());
        }
        (false, true) => {
            found.push("IPv6 is off since: run `netns-setup transparent up` to leave it out".to_owned());
        }
        _ => {}
    }
    found
}

/// The routes of this program's table that are not its own, as `ip` writes them.
fn foreign_routes(
    parts: &TransparentParts,
    wanted: &Transparent,
    host: &Side,
) -> impl Iterator<Item = (Family, String)> {
    let families: Vec<_> = wanted.families().collect();
    let foreign = parts.routes.iter().filter(move |route| families.contains(&route.family));
    foreign.filter(|route| !is_ours(route, host)).map(|route| {
        let kind = if route.is_local { "local " } else { "" };
        let to = route.destination.map_or_else(|| "default".to_owned(), |to| to.to_string());
        let dev = host.links.iter().find(|link| Some(link.index) == route.oif);
        let dev = dev.map_or_else(String::new, |link| format!(" dev {}", link.name));
        (route.family, format!("{kind}{to}{dev}"))
    })
}

/// The rules of others that come first and may take replies.
fn prevailing<'a>(
    wanted: &'a Transparent,
    rules: &'a [PolicyRule],
    host: &'a Side,
) -> impl Iterator<Item = &'a PolicyRule> {
    let taken_by = move |rule: &PolicyRule, at: usize, iif: &IfName| {
        let is_first = rule.priority <= PRIORITY && !rules[..=at].iter().any(|earlier| earlier.is_ours(iif));
        is_first && may_take(rule, iif, host)
    };
    let found = rules.iter().enumerate();
    let found = found.filter(move |(at, rule)| wanted.interfaces.iter().any(|iif| taken_by(rule, *at, iif)));
    found.map(|(_, rule)| rule)
}

/// The rules of others for marks with the bit of this program.
fn sharing<'a>(wanted: &'a Transparent, rules: &'a [PolicyRule]) -> impl Iterator<Item = &'a PolicyRule> {
    let has_bit = |rule: &PolicyRule| rule.fwmark.is_some_and(|(mark, mask)| mark & mask & MARK != 0);
    let is_from = |rule: &PolicyRule, iif: &IfName| {
        rule.iif.as_ref().is_none_or(|name| name == iif.as_str()) && !rule.is_ours(iif)
    };
    let later =
        rules.iter().filter(move |rule| rule.priority > PRIORITY && has_bit(rule) && !rule.for_output);
    later.filter(move |rule| wanted.interfaces.iter().any(|iif| is_from(rule, iif)))
}

/// Whether a rule may apply to a marked packet from an interface, and leads it astray.
fn may_take(rule: &PolicyRule, iif: &IfName, host: &Side) -> bool {
    /// Holds the addresses of this host, of which a client's is none.
    const LOCAL: u32 = 255;
    let leads_on = match rule.target {
        RuleTarget::Nothing | RuleTarget::Table(LOCAL | TABLE) => true,
        RuleTarget::Goto(priority) => priority <= PRIORITY,
        RuleTarget::Table(_) | RuleTarget::Refusal(_) => false,
    };
    let from_here = rule.iif.as_ref().is_none_or(|name| name == iif.as_str());
    // Only this program's bit of the mark is known.
    let by_mark = rule.fwmark.is_none_or(|(mark, mask)| mask & MARK == 0 || mark & MARK != 0);
    let by_source = rule.source.is_none_or(|source| may_come_from(source, iif, host));
    !leads_on && (rule.is_negated || (!rule.for_output && from_here && by_mark && by_source))
}

/// Whether there can be backends with an address of `source` behind an interface.
fn may_come_from(source: Cidr, iif: &IfName, host: &Side) -> bool {
    let Some(link) = host.link(iif.as_str()) else {
        return true;
    };
    let routes = host.routes.iter().filter(|route| route.oif == Some(link.index));
    let routes = routes.filter_map(|route| route.destination);
    let addresses = host.addresses.iter().filter(|(index, _)| *index == link.index);
    let mut networks = routes.chain(addresses.map(|(_, address)| *address));
    networks.any(|network| network.overlaps(&source))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::{Firewall, Topology};
    use crate::observed::{Link, Observed};
    use crate::plan::{Scope, plan};
    use crate::testdata;

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), up: true, ..Link::default() }
    }

    fn nothing() -> TransparentParts {
        let policy = BTreeMap::from([(Family::V4, vec![]), (Family::V6, vec![])]);
        let rules = Rules::Nft { listing: None, wanted: None };
        TransparentParts { policy, routes: vec![], rules, has_ipv6: true }
    }

    /// What is there after everything was set up.
    fn everything(topology: &Topology) -> TransparentParts {
        let mut parts = nothing();
        for (family, iif) in transparent::rules(topology) {
            parts.policy.entry(family).or_default().push(PolicyRule::ours(&iif));
        }
        for family in transparent::families(topology) {
            parts.routes.push(TableRoute { family, is_local: true, destination: None, oif: Some(1) });
        }
        parts.rules = Rules::Nft { listing: Some("it".to_owned()), wanted: Some("it".to_owned()) };
        parts
    }

    fn plan_for(owned: &Topology, desired: &Topology, parts: TransparentParts) -> Result<Plan, PlanError> {
        let links = [(1, "lo"), (2, "docker0"), (3, "br-0123456789ab"), (4, "eth0")];
        let links = links.map(|(index, name)| link(index, name)).to_vec();
        let host = Side { links, ..Side::default() };
        let observed = Observed { host, transparent: Some(parts), ..Observed::default() };
        let rproxy = std::path::Path::new("rproxy");
        let (scope, state_dir) = (&Scope::Transparent, std::path::Path::new("/run/netns-setup"));
        plan(Inputs { owned, desired, observed: &observed, scope, rproxy, state_dir, is_repair: false })
    }

    fn commands<'a>(actions: impl Iterator<Item = &'a Action>) -> Vec<String> {
        let first_line = |action: &Action| action.to_string().lines().next().unwrap_or_default().to_owned();
        actions.map(first_line).collect()
    }

    #[test]
    fn the_plans_are_the_golden_ones() {
        let (none, all) = (Topology::default(), testdata::transparent(Firewall::Nft));
        let up = plan_for(&none, &all, nothing()).unwrap();
        let up = commands(up.steps.iter().map(|step| &step.action));
        testdata::golden("transparent.plan", &(up.join("\n") + "\n"));
        let down = plan_for(&all, &none, everything(&all)).unwrap();
        let down = commands(down.steps.iter().map(|step| &step.action));
        testdata::golden("transparent.down.plan", &(down.join("\n") + "\n"));
    }

    #[test]
    fn every_step_can_be_undone_by_what_it_replaces() {
        let (none, all) = (Topology::default(), testdata::transparent(Firewall::Nft));
        let up = plan_for(&none, &all, nothing()).unwrap();
        let back = commands(up.steps.iter().rev().flat_map(|step| &step.undo));
        let down = plan_for(&all, &none, everything(&all)).unwrap();
        let mut down = commands(down.steps.iter().map(|step| &step.action));
        assert_eq!(back.len(), up.steps.len());
        let mut back = back;
        back.sort();
        down.sort();
        assert_eq!(back, down);
    }

    #[test]
    fn what_is_there_is_left_alone_and_what_is_not_there_is_not_removed() {
        let (none, all) = (Topology::default(), testdata::transparent(Firewall::Nft));
        let plan = plan_for(&all, &all, everything(&all)).unwrap();
        assert_eq!((plan.steps, plan.problems), (vec![], Vec::<String>::new()));
        assert!(plan_for(&all, &none, nothing()).unwrap().is_empty());
    }

    #[test]
    fn a_table_of_somebody_else_is_in_the_way() {
        let (none, all) = (Topology::default(), testdata::transparent(Firewall::Nft));
        let mut parts = nothing();
        parts.routes.push(TableRoute {
            family: Family::V6,
            is_local: false,
            destination: None,
            oif: Some(4),
        });
        let error = plan_for(&none, &all, parts.clone()).unwrap_err();
        let route = "default dev eth0".to_owned();
        assert_eq!(error, PlanError::TableTaken { family: Family::V6, route });
        // What came later is reported.
        assert_eq!(plan_for(&all, &all, parts).unwrap().problems.len(), 1);
    }
}
