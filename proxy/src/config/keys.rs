//! The keys of a `[[mapping]]` table.

use std::ops::Range;
use std::str::FromStr;

use serde::Deserialize;
use toml::Spanned;

use super::mistake::Found;
use crate::addr::AddrError;
use crate::control::wire::{FieldError, WireLimits, WireMapping};
use crate::endpoint::{BackendSpec, HostSpec};
use crate::mapping::Mapping;

type Text = Option<Spanned<String>>;
type Count = Option<Spanned<usize>>;
type Texts = Option<Spanned<Vec<String>>>;

/// What a table says, and where. That of `[defaults]` has the same keys.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Keys {
    name: Text,
    host: Text,
    to: Text,
    proto: Text,
    v6only: Option<Spanned<bool>>,
    connect_timeout: Text,
    idle_timeout: Text,
    max_connections: Count,
    on_limit: Text,
    udp_timeout: Text,
    udp_max_flows: Count,
    udp_max_flows_per_source: Count,
    allow: Texts,
    deny: Texts,
}

/// Calls a macro with the names of all keys.
macro_rules! with_keys {
    ($macro:ident) => {
        $macro!(
            name,
            host,
            to,
            proto,
            v6only,
            connect_timeout,
            idle_timeout,
            max_connections,
            on_limit,
            udp_timeout,
            udp_max_flows,
            udp_max_flows_per_source,
            allow,
            deny
        )
    };
}

impl Keys {
    /// What this table says, and what `defaults` says where it says nothing.
    pub(super) fn or(&self, defaults: &Self) -> Self {
        macro_rules! or {
            ($($key:ident),*) => { Self { $($key: self.$key.clone().or_else(|| defaults.$key.clone())),* } };
        }
        with_keys!(or)
    }

    /// Refuses, in `[defaults]`, what no two mappings can have in common.
    pub(super) fn refuse_those_of_one(&self) -> Vec<Found> {
        let keys = [("name", &self.name), ("host", &self.host), ("to", &self.to)];
        let found = |(key, value): (&str, &Text)| {
            let place = value.as_ref()?.span();
            Some(Found::at(place, format!("{key}: it is for one mapping, and these hold for all")))
        };
        keys.into_iter().filter_map(found).collect()
    }

    /// The mapping that the table at `table` says.
    pub(super) fn mapping(&self, table: Range<usize>) -> Result<Mapping, Found> {
        self.read().map_err(|error| {
            let key = match error.field {
                "host_ports" => "host",
                "to_ports" => "to",
                key => key.trim_start_matches("limits."),
            };
            Found::at(self.place_of(key, table), format!("{key}: {}", error.message))
        })
    }

    fn read(&self) -> Result<Mapping, FieldError> {
        let host: HostSpec = endpoint("host", self.host.as_ref(), "listen on, as in \"[::]:80\"")?;
        let to: BackendSpec = endpoint("to", self.to.as_ref(), "forward to, as in \"172.17.0.2:80\"")?;
        let wire = WireMapping {
            name: text(&self.name),
            host: Some(host.ip.to_string()),
            host_ports: host.ports.map(|ports| ports.to_string()),
            to: to.ip.to_string(),
            to_ports: to.ports.to_string(),
            proto: text(&self.proto),
            v6only: self.v6only.as_ref().is_some_and(|value| *value.get_ref()),
            limits: self.limits(),
            bound: None,
        };
        wire.read()
    }

    fn limits(&self) -> WireLimits {
        let count = |value: &Count| value.as_ref().map(|value| *value.get_ref());
        let texts = |value: &Texts| value.as_ref().map(|value| value.get_ref().clone()).unwrap_or_default();
        WireLimits {
            connect_timeout: text(&self.connect_timeout),
            idle_timeout: text(&self.idle_timeout),
            max_connections: count(&self.max_connections),
            on_limit: text(&self.on_limit),
            udp_timeout: text(&self.udp_timeout),
            udp_max_flows: count(&self.udp_max_flows),
            udp_max_flows_per_source: count(&self.udp_max_flows_per_source),
            allow: texts(&self.allow),
            deny: texts(&self.deny),
        }
    }

    /// Where the value of `key` is, or else the table.
    pub(super) fn place_of(&self, key: &str, table: Range<usize>) -> Range<usize> {
        macro_rules! places {
            ($($key:ident),*) => { match key { $(stringify!($key) => self.$key.as_ref().map(Spanned::span),)* _ => None } };
        }
        with_keys!(places).unwrap_or(table)
    }
}

fn text(value: &Text) -> Option<String> {
    value.as_ref().map(|value| value.get_ref().clone())
}

/// Parses `ADDRESS:PORTS`.
fn endpoint<T: FromStr<Err = AddrError>>(
    field: &'static str,
    value: Option<&Spanned<String>>,
    purpose: &str,
) -> Result<T, FieldError> {
    let missing = || format!("it is missing; write the address and port to {purpose}");
    let value = value.ok_or_else(|| FieldError::new(field, missing()))?;
    value.get_ref().parse().map_err(|error| FieldError::new(field, error))
}
