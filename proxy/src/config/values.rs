//! The types of values, and suggestions for values of the wrong type.

use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::mistake::{Found, Mistakes};

/// A type of values.
pub(super) trait Value: Sized {
    /// Its name in messages.
    const NAME: &'static str;

    /// Returns the value, or the position of a wrong element if that is more precise than the whole value.
    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>>;

    /// What `value`, which has another type, probably means for `key`, written as in a file.
    fn meant(key: &str, value: &DeValue<'_>) -> String;
}

/// Reads the value of `key`. If the type is wrong, the error suggests a value for which `is_accepted` holds.
pub(super) fn read<T: Value>(
    key: &str,
    value: &Spanned<DeValue<'_>>,
    is_accepted: fn(&str, &str) -> bool,
    found: &mut Mistakes,
) -> Option<Spanned<T>> {
    let (place, value) = (value.span(), value.get_ref());
    match T::read(value) {
        Ok(read) => Some(Spanned::new(place, read)),
        Err(better) => {
            let place = better.unwrap_or(place);
            found.push_with(place.start, || {
                let meant = T::meant(key, value);
                let meant = if is_accepted(key, &meant) { &meant } else { example(key) };
                let hint = match (key, value) {
                    ("access_log", DeValue::String(_)) => " (its destination is a flag, --access-log)",
                    _ => "",
                };
                Found::at(place, format!("{key}: expected {}{hint}; write {key} = {meant}", T::NAME))
            });
            None
        }
    }
}

impl Value for String {
    const NAME: &'static str = "a quoted string";

    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>> {
        value.as_str().map(ToOwned::to_owned).ok_or(None)
    }

    fn meant(key: &str, value: &DeValue<'_>) -> String {
        let number = value.as_integer().filter(|number| number.radix() == 10).map(|number| number.as_str());
        let number = number.filter(|digits| digits.parse::<u16>().is_ok_and(|number| number > 0));
        let is_optional = matches!(key, "connect_timeout" | "idle_timeout" | "tcp_user_timeout");
        match (key, number) {
            ("host", Some(port)) => format!("\"[::]:{port}\""),
            ("to", Some(port)) => format!("\"172.17.0.2:{port}\""),
            ("name", Some(name)) => format!("\"{name}\""),
            ("rate", Some(count)) => format!("\"{count}/s\""),
            (_, Some(seconds)) if key.ends_with("timeout") || key == "keepalive" => format!("\"{seconds}s\""),
            _ if is_optional && value.as_bool() == Some(false) => "\"unlimited\"".to_owned(),
            ("keepalive", None) if value.as_bool() == Some(false) => "\"off\"".to_owned(),
            _ => example(key).to_owned(),
        }
    }
}

impl Value for usize {
    const NAME: &'static str = "a number of at least 1";

    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>> {
        let number = value.as_integer().ok_or(None)?;
        Self::from_str_radix(number.as_str(), number.radix()).map_err(|_negative_or_huge| None)
    }

    fn meant(key: &str, value: &DeValue<'_>) -> String {
        let number = value.as_str().filter(|text| text.parse::<Self>().is_ok_and(|number| number > 0));
        number.unwrap_or(example(key)).to_owned()
    }
}

/// A quoted string, or a number in its place.
#[derive(Clone, Debug)]
pub(super) struct NumberOrText(pub(super) String);

impl Value for NumberOrText {
    const NAME: &'static str = "a number or a quoted string";

    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>> {
        String::read(value).or_else(|_no_text| usize::read(value).map(|number| number.to_string())).map(Self)
    }

    fn meant(key: &str, _value: &DeValue<'_>) -> String {
        example(key).to_owned()
    }
}

impl Value for bool {
    const NAME: &'static str = "true or false";

    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>> {
        value.as_bool().ok_or(None)
    }

    fn meant(_key: &str, value: &DeValue<'_>) -> String {
        let text = value.as_str().map(str::to_ascii_lowercase);
        let is_off = matches!(text.as_deref(), Some("false" | "no" | "off"))
            || value.as_integer().is_some_and(|number| number.as_str() == "0");
        if is_off { "false" } else { "true" }.to_owned()
    }
}

impl Value for Vec<String> {
    const NAME: &'static str = "a list of quoted strings";

    fn read(value: &DeValue<'_>) -> Result<Self, Option<Range<usize>>> {
        let array = value.as_array().ok_or(None)?;
        array.iter().map(|item| String::read(item.get_ref()).map_err(|_better| Some(item.span()))).collect()
    }

    fn meant(key: &str, value: &DeValue<'_>) -> String {
        value.as_str().map_or_else(|| example(key).to_owned(), |network| format!("[\"{network}\"]"))
    }
}

/// An example value of `key`.
pub(super) fn example(key: &str) -> &'static str {
    match key {
        "host" => "\"[::]:80\"",
        "to" => "\"172.17.0.2:80\"",
        "name" => "\"web\"",
        "proto" => "\"tcp\"",
        "on_limit" => "\"wait\"",
        "access_log" => "false",
        "v6only" | "freebind" | "udp_any_port" | "require_resolved" | "attach" => "true",
        "dscp" => "\"AF41\"",
        "source" => "\"client\"",
        "rate" => "\"10/s\"",
        "keepalive" => "\"1m\"",
        "device" => "\"eth0\"",
        "socket_mode" => "\"0660\"",
        "socket_user" | "socket_group" => "\"www-data\"",
        "metrics" => "\"127.0.0.1:9464\"",
        "send_proxy" => "\"v2\"",
        "send_proxy_udp" => "\"first\"",
        "allow" | "deny" | "accept_proxy" => "[\"10.0.0.0/8\"]",
        key if key.ends_with("timeout") => "\"90s\"",
        _ => "1000",
    }
}
