//! The keys of `[[mapping]]`, `[defaults]` and `[attach]` tables.

use std::fmt::Display;
use std::ops::Range;

use rproxy_mapping::Mapping;
use rproxy_mapping::addr::{AddrError, ScopedIp};
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::endpoint::{BackendSpec, HostSpec};
use rproxy_mapping::interfaces::Interfaces;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::proxy_protocol::ProxyPeers;
use rproxy_mapping::source::Source;
use rproxy_mapping::wire::{FieldErrors, WireLimits, WireMapping};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::mistake::{Found, Mistakes};
use super::names::{KEYS, meant_key, unknown_key, with_keys};
use super::values::{self, NumberOrText};
use crate::bind::interfaces::HostInterfaces;
use crate::plane::AttachTable;
use crate::plane::socket::parse_name;

type Text = Option<Spanned<String>>;
type Count = Option<Spanned<usize>>;
type Switch = Option<Spanned<bool>>;
type Texts = Option<Spanned<Vec<String>>>;

/// The values of a table and their positions. `[defaults]` has the same keys as a mapping, `[attach]` some of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    name: Text,
    host: Text,
    to: Text,
    proto: Text,
    v6only: Switch,
    connect_timeout: Text,
    idle_timeout: Text,
    tcp_user_timeout: Text,
    keepalive: Text,
    max_connections: Count,
    on_limit: Text,
    max_connections_per_source: Count,
    rate: Text,
    udp_timeout: Text,
    udp_max_flows: Count,
    udp_max_flows_per_source: Count,
    udp_any_port: Switch,
    require_resolved: Switch,
    dscp: Option<Spanned<NumberOrText>>,
    source: Text,
    device: Text,
    send_proxy: Text,
    send_proxy_udp: Text,
    accept_proxy: Texts,
    proxy_timeout: Text,
    access_log: Switch,
    freebind: Switch,
    socket_mode: Text,
    socket_user: Text,
    socket_group: Text,
    allow: Texts,
    deny: Texts,
    /// Keys that are present but unreadable or misspelt.
    unread: Vec<String>,
}

/// The longest value for which a correction is suggested, in bytes.
pub(super) const LONGEST_VALUE: usize = 256;

impl Keys {
    /// Reads what is readable in `table`, which has these keys.
    pub(super) fn read(table: &DeTable<'_>, keys_of_table: &[&str], found: &mut Mistakes) -> Self {
        let mut keys = Self::default();
        for (key, value) in by_place(table) {
            let (place, key) = (key.span(), key.get_ref().as_ref());
            let before = found.seen();
            macro_rules! read {
                ($($known:ident),*) => {
                    match key {
                        $(stringify!($known) if keys_of_table.contains(&key) => {
                            keys.$known = values::read(key, value, is_accepted, found);
                        })*
                        unknown => found.push_with(place.start, || {
                            Found::at(place, unknown_key(unknown, keys_of_table))
                        }),
                    }
                };
            }
            with_keys!(read);
            if found.seen() > before {
                keys.unread.push(meant_key(key).unwrap_or(key).to_owned());
            }
        }
        keys
    }

    /// The values of this table, with those of `defaults` where it has none.
    fn or(&self, defaults: &Self) -> Self {
        let unread = self.unread.clone();
        macro_rules! or {
            ($($key:ident),*) => { Self { unread, $($key: self.$key.clone().or_else(|| defaults.$key.clone())),* } };
        }
        with_keys!(or)
    }

    /// Whether a mapping can have this value of `key`, independent of its other keys.
    pub(super) fn are_accepted(mut self, key: &str) -> bool {
        let text = |text: &str| Some(Spanned::new(0..0, text.to_owned()));
        match (key, &self.host, &self.to) {
            ("host", Some(host), _) => return HostSpec::parse(host.get_ref(), &HostInterfaces).is_ok(),
            (key, ..) if key.starts_with("socket_") => {
                (self.host, self.to) = (text("unix:/run/rproxy.sock"), text("172.17.0.2:80"));
            }
            ("to", _, Some(to)) => return BackendSpec::parse(to.get_ref(), &HostInterfaces).is_ok(),
            _ => (self.host, self.to) = (text("[::]:80"), text("172.17.0.2:80")),
        }
        let mut found = Mistakes::default();
        // What other keys are about.
        let proxies = Some(Spanned::new(0..0, vec!["192.0.2.1".to_owned()]));
        let others = Self { send_proxy: text("v2"), accept_proxy: proxies, ..Self::default() };
        self.mapping(&others, 0..0, &mut found).is_some() && found.is_empty()
    }

    /// The number of networks that this table lists.
    pub(super) fn networks(&self) -> usize {
        self.lists_of_networks().map(|(_key, count)| count).sum()
    }

    /// The key that most of those networks are under.
    pub(super) fn key_of_networks(&self) -> &'static str {
        let lists = self.lists_of_networks();
        lists.max_by_key(|(_key, count)| *count).map_or("allow", |(key, _count)| key)
    }

    /// The keys of networks, and how many each has.
    fn lists_of_networks(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let lists = [("allow", &self.allow), ("deny", &self.deny), ("accept_proxy", &self.accept_proxy)];
        lists.into_iter().map(|(key, list)| (key, list.as_ref().map_or(0, |list| list.get_ref().len())))
    }

    /// The errors in this table if it is `[defaults]`.
    pub(super) fn mistakes_of_defaults(&self) -> Vec<Found> {
        let keys = [("name", &self.name), ("host", &self.host), ("to", &self.to)];
        let of_one = |(key, value): (&str, &Text)| {
            let place = value.as_ref()?.span();
            Some(Found::at(place, format!("{key}: it is for one mapping, and these hold for all")))
        };
        let mut found: Vec<Found> = keys.into_iter().filter_map(of_one).collect();
        let mut wrong = FieldErrors::default();
        self.wire().read_values(&mut wrong);
        found.extend(self.located(wrong, 0..0));
        found
    }

    /// The mapping of this table, at `place`, combined with `defaults`.
    pub(super) fn mapping(
        &self,
        defaults: &Self,
        place: Range<usize>,
        found: &mut Mistakes,
    ) -> Option<Mapping> {
        let mut wrong = FieldErrors::default();
        let purpose = "listen on, as in \"[::]:80\"";
        let host = self.endpoint("host", &self.host, HostSpec::parse, purpose, &mut wrong);
        let purpose = "forward to, as in \"172.17.0.2:80\"";
        let to = self.endpoint("to", &self.to, BackendSpec::parse, purpose, &mut wrong);
        let mut all = self.or(defaults);
        if self.v6only.is_none() && host.as_ref().is_some_and(|host| host.host != ScopedIp::ANY) {
            // `v6only` in `[defaults]` only applies to mappings for which it makes sense.
            all.v6only = None;
        }
        if all.proto.as_ref().is_some_and(|proto| proto.get_ref() == "sctp") {
            all.leave_out_others_than_of_sctp(self);
        }
        if to.as_ref().is_some_and(|to| matches!(to.host, BackendHost::Unix(_))) {
            (all.source, all.device) = (self.source.clone(), self.device.clone());
        }
        if host.as_ref().is_some_and(|host| host.host.unix_addr().is_some()) {
            all.leave_out_addresses(self);
        }
        let (host, to) = (host.map(|host| (host.host, host.ports)), to.map(|to| (to.host, to.ports)));
        let mapping = all.wire().read_between(host, to, &mut wrong);
        self.limits().refuse_lone(&all.limits(), &mut wrong);
        let is_wrong = !wrong.0.is_empty() || !self.unread.is_empty();
        found.extend(all.located(wrong, place));
        mapping.filter(|_mapping| !is_wrong)
    }

    /// Leaves out what only TCP and UDP have and `own`, the table of a mapping of SCTP, does not say: `[defaults]` says that to
    /// others.
    fn leave_out_others_than_of_sctp(&mut self, own: &Self) {
        self.tcp_user_timeout.clone_from(&own.tcp_user_timeout);
        self.keepalive.clone_from(&own.keepalive);
        self.send_proxy.clone_from(&own.send_proxy);
        self.send_proxy_udp.clone_from(&own.send_proxy_udp);
        self.accept_proxy.clone_from(&own.accept_proxy);
        self.proxy_timeout.clone_from(&own.proxy_timeout);
        if text(&self.source).is_some_and(|source| source.parse().is_ok_and(Source::is_client)) {
            self.source.clone_from(&own.source);
        }
    }

    /// Leaves out what clients of a Unix socket cannot have and `own`, the table of a mapping that listens there, does not say:
    /// without a proxy in front, they have no addresses.
    fn leave_out_addresses(&mut self, own: &Self) {
        let is_of_unix = |peers: &String| *peers == ProxyPeers::Unix.to_string();
        if own.accept_proxy.is_none()
            && let Some(peers) = &mut self.accept_proxy
        {
            peers.get_mut().retain(is_of_unix);
        }
        self.accept_proxy.take_if(|peers| peers.get_ref().is_empty());
        if self.accept_proxy.is_none() {
            self.proxy_timeout.clone_from(&own.proxy_timeout);
            (self.allow, self.deny) = (own.allow.clone(), own.deny.clone());
            if text(&self.source).is_some_and(|source| source.parse().is_ok_and(Source::is_client)) {
                self.source.clone_from(&own.source);
            }
        }
    }

    /// How ports are attached if this is `[attach]`, combined with `defaults`.
    pub(super) fn attach(&self, defaults: &Self, found: &mut Mistakes) -> Option<AttachTable> {
        let mut wrong = FieldErrors::default();
        let name = self.name.as_ref().map(|name| parse_name(name.get_ref()));
        let name = wrong.note("name", name.transpose());
        let all = self.or(defaults);
        let limits = all.limits().read(&mut wrong);
        self.limits().refuse_lone(&all.limits(), &mut wrong);
        let is_right = wrong.0.is_empty() && self.unread.is_empty();
        found.extend(all.located(wrong, 0..0));
        is_right.then_some(AttachTable { name: name?, limits: limits? })
    }

    /// The limits of this table, if it is `[defaults]` without errors.
    pub(super) fn limits_of_defaults(&self) -> Limits {
        self.limits().read(&mut FieldErrors::default()).unwrap_or_default()
    }

    /// Parses the value of `key` as `ADDRESS:PORTS`.
    fn endpoint<T>(
        &self,
        key: &'static str,
        value: &Text,
        parse: fn(&str, &dyn Interfaces) -> Result<T, AddrError>,
        purpose: &str,
        wrong: &mut FieldErrors,
    ) -> Option<T> {
        match value {
            Some(value) => wrong.note(key, parse(value.get_ref(), &HostInterfaces)),
            None if self.unread.iter().any(|unread| unread == key) => None,
            None => {
                let missing = format!("it is missing; write the address and port to {purpose}");
                wrong.note(key, Err::<T, &dyn Display>(&missing))
            }
        }
    }

    /// Everything except host and backend.
    fn wire(&self) -> WireMapping {
        WireMapping {
            name: text(&self.name),
            proto: text(&self.proto),
            v6only: is_on(&self.v6only),
            limits: self.limits(),
            ..WireMapping::default()
        }
    }

    fn limits(&self) -> WireLimits {
        let count = |value: &Count| value.as_ref().map(|value| *value.get_ref());
        let texts = |value: &Texts| value.as_ref().map(|value| value.get_ref().clone()).unwrap_or_default();
        WireLimits {
            connect_timeout: text(&self.connect_timeout),
            idle_timeout: text(&self.idle_timeout),
            tcp_user_timeout: text(&self.tcp_user_timeout),
            keepalive: text(&self.keepalive),
            max_connections: count(&self.max_connections),
            on_limit: text(&self.on_limit),
            max_connections_per_source: count(&self.max_connections_per_source),
            rate: text(&self.rate),
            udp_timeout: text(&self.udp_timeout),
            udp_max_flows: count(&self.udp_max_flows),
            udp_max_flows_per_source: count(&self.udp_max_flows_per_source),
            udp_any_port: is_on(&self.udp_any_port),
            require_resolved: is_on(&self.require_resolved),
            dscp: self.dscp.as_ref().map(|value| value.get_ref().0.clone()),
            source: text(&self.source),
            device: text(&self.device),
            send_proxy: text(&self.send_proxy),
            send_proxy_udp: text(&self.send_proxy_udp),
            accept_proxy: texts(&self.accept_proxy),
            proxy_timeout: text(&self.proxy_timeout),
            access_log: self.access_log.as_ref().map(|value| *value.get_ref()),
            freebind: is_on(&self.freebind),
            socket_mode: text(&self.socket_mode),
            socket_user: text(&self.socket_user),
            socket_group: text(&self.socket_group),
            allow: texts(&self.allow),
            deny: texts(&self.deny),
        }
    }

    /// Converts errors in fields to errors at the positions of their keys, or at `place` of the table.
    fn located(&self, wrong: FieldErrors, place: Range<usize>) -> impl Iterator<Item = Found> {
        wrong.0.into_iter().map(move |error| {
            let key = match error.field {
                "host_ports" => "host",
                key => key.trim_start_matches("limits."),
            };
            Found::at(self.place_of(key, place.clone()), format!("{key}: {}", error.message))
        })
    }

    /// The position of the value of `key`, or else of the table.
    pub(super) fn place_of(&self, key: &str, table: Range<usize>) -> Range<usize> {
        macro_rules! places {
            ($($key:ident),*) => { match key { $(stringify!($key) => self.$key.as_ref().map(Spanned::span),)* _ => None } };
        }
        with_keys!(places).unwrap_or(table)
    }
}

/// Whether `key` accepts `value`, written as in a file.
pub(super) fn is_accepted(key: &str, value: &str) -> bool {
    if key == "attach" {
        return matches!(value, "true" | "false");
    }
    let line = format!("{key} = {value}");
    if value.len() > LONGEST_VALUE || value.contains('\n') {
        return false;
    }
    let Ok(table) = DeTable::parse(&line) else { return false };
    let mut found = Mistakes::default();
    let keys = Keys::read(table.get_ref(), &KEYS, &mut found);
    found.is_empty() && table.get_ref().len() == 1 && keys.are_accepted(key)
}

/// The keys and values of a table in file order.
pub(super) fn by_place<'a, 'i>(
    table: &'a DeTable<'i>,
) -> Vec<(&'a Spanned<DeString<'i>>, &'a Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_unstable_by_key(|(key, _value)| key.span().start);
    entries
}

fn text(value: &Text) -> Option<String> {
    value.as_ref().map(|value| value.get_ref().clone())
}

fn is_on(value: &Switch) -> bool {
    value.as_ref().is_some_and(|value| *value.get_ref())
}
