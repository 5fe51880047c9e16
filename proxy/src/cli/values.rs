//! Types of option values that are only used here.

use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use rproxy_mapping::addr::AddrError;
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::duration::parse_user_timeout;
use rproxy_mapping::duration::{UNLIMITED, parse, parse_optional_limit};
use rproxy_mapping::endpoint::{BackendSpec, HostSpec};
use rproxy_mapping::limits::OnLimit;
use rproxy_mapping::proxy_protocol::{ProxyDatagrams, ProxyVersion};
use rproxy_mapping::publish::{PublishSpec, SpecError};

use crate::bind::interfaces::HostInterfaces;

/// The value of `--to`.
#[derive(Clone, Debug)]
pub(super) enum To {
    /// Address and ports, for a `--host`.
    Backend(BackendSpec),
    /// An address or name for `-p` and `-P`, and why it is not enough for a `--host`.
    Host(BackendHost, AddrError),
}

impl FromStr for To {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        parse_backend(text).map(Self::Backend).or_else(|error| {
            match BackendHost::parse(text, &HostInterfaces) {
                Ok(host) => Ok(Self::Host(host, error)),
                Err(_) => Err(error),
            }
        })
    }
}

/// Parses where to listen, with interfaces of this machine.
pub(super) fn parse_host(text: &str) -> Result<HostSpec, AddrError> {
    HostSpec::parse(text, &HostInterfaces)
}

/// Parses where to forward to, with interfaces of this machine.
pub(super) fn parse_backend(text: &str) -> Result<BackendSpec, AddrError> {
    BackendSpec::parse(text, &HostInterfaces)
}

/// Parses what to publish, with interfaces of this machine.
pub(super) fn parse_publish(text: &str) -> Result<PublishSpec, SpecError> {
    PublishSpec::parse(text, &HostInterfaces)
}

/// Parses one of the values that the help lists.
pub(super) fn on_limit() -> impl TypedValueParser<Value = OnLimit> {
    PossibleValuesParser::new(["wait", "reset"]).try_map(|text| text.parse::<OnLimit>())
}

/// Parses one of the values that the help lists.
pub(super) fn proxy_version() -> impl TypedValueParser<Value = ProxyVersion> {
    PossibleValuesParser::new(["v1", "v2"])
        .map(|text| if text == "v1" { ProxyVersion::V1 } else { ProxyVersion::V2 })
}

/// Parses one of the values that the help lists.
pub(super) fn proxy_datagrams() -> impl TypedValueParser<Value = ProxyDatagrams> {
    PossibleValuesParser::new(["each", "first"]).try_map(|text| text.parse::<ProxyDatagrams>())
}

/// A time limit, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit(pub(super) Option<Duration>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_optional_limit(text).map(Self)
    }
}

/// The longest time until what was sent is acknowledged, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct UserTimeout(pub(super) Option<Duration>);

impl FromStr for UserTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_user_timeout(text).map(Self)
    }
}

/// A duration, which may be zero, or `unlimited`.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrainLimit(pub(super) Option<Duration>);

impl FromStr for DrainLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            UNLIMITED => Ok(Self(None)),
            _ => parse(text)
                .map(|limit| Self(Some(limit)))
                .map_err(|error| format!("{error}, or '{UNLIMITED}'")),
        }
    }
}

/// Parses a number of at least 1.
pub(super) fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "not a number of at least 1".to_owned())
}
