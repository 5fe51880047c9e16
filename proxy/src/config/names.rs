//! The names of keys and tables, and corrections for unknown ones.

use super::values::example;

/// Calls a macro with the names of all keys, in the order in which a mapping is printed.
macro_rules! with_keys {
    ($macro:ident) => {
        $macro! {
            name,
            host,
            to,
            proto,
            v6only,
            freebind,
            socket_mode,
            socket_user,
            socket_group,
            connect_timeout,
            idle_timeout,
            tcp_user_timeout,
            keepalive,
            max_connections,
            on_limit,
            max_connections_per_source,
            rate,
            allow,
            deny,
            udp_timeout,
            udp_max_flows,
            udp_max_flows_per_source,
            udp_any_port,
            dscp,
            source,
            device,
            send_proxy,
            send_proxy_udp,
            accept_proxy,
            proxy_timeout,
            require_resolved,
            access_log
        }
    };
}

macro_rules! names {
    ($($key:ident),*) => { [$(stringify!($key)),*] };
}

/// All keys.
pub(super) const KEYS: [&str; 32] = with_keys!(names);

/// The keys of `[attach]`.
pub(super) const ATTACH_KEYS: [&str; 23] = [
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
    "dscp",
    "source",
    "device",
    "send_proxy",
    "send_proxy_udp",
    "accept_proxy",
    "proxy_timeout",
    "access_log",
];

pub(super) use with_keys;

/// The longest word that is considered a misspelt key, in bytes.
const LONGEST_KEY: usize = 64;

/// The minimum Jaro-Winkler similarity for a word to be considered a misspelling of another.
const SIMILAR: f64 = 0.8;

/// The key that `written` probably means, if it resembles one.
pub(super) fn meant_key(written: &str) -> Option<&'static str> {
    if written.len() > LONGEST_KEY {
        return None;
    }
    let plain = written.to_lowercase().replace('-', "_");
    match &*plain {
        "listen" | "bind" | "address" => return Some("host"),
        "backend" | "target" | "upstream" | "forward" => return Some("to"),
        "proxy_protocol" | "send_proxy_protocol" => return Some("send_proxy"),
        "accept_proxy_protocol" => return Some("accept_proxy"),
        "tos" | "traffic_class" => return Some("dscp"),
        "mode" => return Some("socket_mode"),
        "user" | "owner" => return Some("socket_user"),
        "group" => return Some("socket_group"),
        // Its letters resemble `dscp`, but it means something else.
        "desc" | "description" => return None,
        _ => {}
    }
    let score = |key: &str| strsim::jaro_winkler(&plain, key);
    let best = KEYS.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(best) >= SIMILAR).then_some(best)
}

/// The keys outside tables.
const TOP_KEYS: [&str; 2] = ["attach", "metrics"];

/// What is said on the command line alone.
const FLAGS: [&str; 8] = [
    "control",
    "user",
    "sandbox",
    "log_level",
    "log_format",
    "access_log_format",
    "drain_timeout",
    "upgrade_drain_timeout",
];

/// The message for a key or table that is a flag, and nothing that a file says.
fn flag(written: &str) -> Option<String> {
    let flag = FLAGS.into_iter().find(|flag| written.replace('-', "_").eq_ignore_ascii_case(flag))?;
    Some(format!("`{written}` is a flag, --{}, and not a key of a file", flag.replace('_', "-")))
}

/// The key outside tables that `written` probably means, or else the key of a table.
pub(super) fn meant_anywhere(written: &str) -> Option<&'static str> {
    meant_at_top(written).or_else(|| meant_key(written))
}

/// The key outside tables that `written` probably means.
fn meant_at_top(written: &str) -> Option<&'static str> {
    TOP_KEYS.into_iter().find(|key| resembles(written, key))
}

fn resembles(written: &str, name: &str) -> bool {
    written.len() <= LONGEST_KEY && strsim::jaro_winkler(&written.to_lowercase(), name) >= SIMILAR
}

/// The message for an unknown key of a table that has these `keys`.
pub(super) fn unknown_key(written: &str, keys: &[&str]) -> String {
    if let Some(flag) = flag(written) {
        return flag;
    }
    let keys_are = if keys == KEYS { "the keys are" } else { "the keys of [attach] are" };
    match meant_key(written).filter(|key| keys.contains(key)) {
        _ if TOP_KEYS.contains(&written) => {
            format!(
                "`{written}` is not a key of a table; write {written} = {} above the first table",
                example(written)
            )
        }
        Some(key) => format!("unknown key `{written}`; did you mean `{key}`?"),
        None if written.len() > LONGEST_KEY => format!("unknown key; {keys_are} {}", keys.join(", ")),
        None => format!("unknown key `{written}`; {keys_are} {}", keys.join(", ")),
    }
}

/// The message for a key outside a table, or for an unknown table.
pub(super) fn unknown_table(written: &str, is_table: bool) -> String {
    if let Some(flag) = flag(written) {
        return flag;
    }
    let resembles = |name: &str| resembles(written, name);
    match (is_table, meant_key(written)) {
        (true, _) if resembles("mapping") => format!("unknown table `{written}`; did you mean [[mapping]]?"),
        (true, _) if resembles("defaults") => format!("unknown table `{written}`; did you mean [defaults]?"),
        (true, _) if resembles("attach") => format!("unknown table `{written}`; did you mean [attach]?"),
        (true, _) if resembles("metrics") => {
            format!("`{written}` is not a table; write metrics = {}", example("metrics"))
        }
        (true, _) => {
            format!("unknown table `{written}`; the tables are [[mapping]], [defaults] and [attach]")
        }
        (false, Some("access_log")) => format!(
            "`{written}` is outside a table; the destination of the access log is a flag, --access-log FILE, -, or \
             unix:PATH, and access_log = false in a [[mapping]] or [defaults] leaves mappings out"
        ),
        (false, key) => match (meant_at_top(written), key) {
            (Some(top), _) => format!("unknown key `{written}`; did you mean `{top}`?"),
            (None, Some(key)) => {
                format!("`{written}` is outside a table; write [[mapping]] on a line before {key}")
            }
            (None, None) => {
                format!(
                    "unknown key `{written}`; a file has the keys attach and metrics, and below them the tables \
                     [[mapping]], [defaults] and [attach]"
                )
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attached_ports_have_all_keys_but_those_of_one_mapping() {
        let of_one_mapping = ["host", "to", "proto", "v6only", "require_resolved", "freebind"];
        let of_one_mapping = [&of_one_mapping[..], &["socket_mode", "socket_user", "socket_group"]].concat();
        let others: Vec<&str> = KEYS.into_iter().filter(|key| !of_one_mapping.contains(key)).collect();
        assert_eq!(others, ATTACH_KEYS);
    }
}
