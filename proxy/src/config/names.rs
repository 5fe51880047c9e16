//! The names of the keys of a mapping, and corrections for unknown ones.

/// Calls a macro with the names of all keys, in the order in which a mapping is printed.
macro_rules! with_keys {
    ($macro:ident) => {
        $macro! {
            name,
            host,
            to,
            proto,
            v6only,
            connect_timeout,
            idle_timeout,
            max_connections,
            on_limit,
            allow,
            deny,
            udp_timeout,
            udp_max_flows,
            udp_max_flows_per_source,
            udp_any_port,
            dscp
        }
    };
}

macro_rules! names {
    ($($key:ident),*) => { [$(stringify!($key)),*] };
}

/// All keys.
pub(super) const KEYS: [&str; 16] = with_keys!(names);

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
        "tos" | "traffic_class" => return Some("dscp"),
        // Its letters resemble `dscp`, but it means something else.
        "desc" | "description" => return None,
        _ => {}
    }
    let score = |key: &str| strsim::jaro_winkler(&plain, key);
    let best = KEYS.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(best) >= SIMILAR).then_some(best)
}

/// The message for an unknown key of a mapping.
pub(super) fn unknown_key(written: &str) -> String {
    match meant_key(written) {
        Some(key) => format!("unknown key `{written}`; did you mean `{key}`?"),
        None if written.len() > LONGEST_KEY => format!("unknown key; the keys are {}", KEYS.join(", ")),
        None => format!("unknown key `{written}`; the keys are {}", KEYS.join(", ")),
    }
}

/// The message for a key outside a table, or for an unknown table.
pub(super) fn unknown_table(written: &str, is_table: bool) -> String {
    let resembles = |table: &str| {
        written.len() <= LONGEST_KEY && strsim::jaro_winkler(&written.to_lowercase(), table) >= SIMILAR
    };
    match (is_table, meant_key(written)) {
        (true, _) if resembles("mapping") => format!("unknown table `{written}`; did you mean [[mapping]]?"),
        (true, _) if resembles("defaults") => format!("unknown table `{written}`; did you mean [defaults]?"),
        (true, _) => format!("unknown table `{written}`; the tables are [[mapping]] and [defaults]"),
        (false, Some(key)) => {
            format!("`{written}` is outside a table; write [[mapping]] on a line before {key}")
        }
        (false, None) => format!("unknown key `{written}`; a file has the tables [[mapping]] and [defaults]"),
    }
}
