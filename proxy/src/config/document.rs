//! The content of a file: its `[defaults]`, its `[attach]`, its `[[mapping]]` tables, and the conflicts between
//! mappings.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use rproxy_mapping::Mapping;
use rproxy_mapping::overlap::{Overlap, OverlapError, overlaps};
use toml::de::{DeArray, DeTable, DeValue};

use super::keys::{Keys, by_place};
use super::mistake::{Found, Mistakes};
use super::names::{ATTACH_KEYS, KEYS};
use super::values::{Value as _, example};
use super::{Config, names, syntax};
use crate::loops::refuse_loops_among;
use crate::metrics::addr::{MetricsAddr, MetricsAddrError};

/// Parses the text of a file.
///
/// # Errors
/// The errors in it.
pub(super) fn find_config(text: &str) -> Result<Config, Mistakes> {
    let (text, is_cut) = syntax::before_too_many_errors(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut found = Mistakes::with_more(is_cut);
    let mut file = File::read(document.get_ref(), &mut found);
    let of_defaults = file.defaults.mistakes_of_defaults();
    let of_defaults: Vec<Found> = of_defaults.into_iter().chain(file.too_many_networks()).collect();
    let are_defaults_right = of_defaults.is_empty();
    if !are_defaults_right {
        // Otherwise each mapping would report the same errors again.
        found.extend(of_defaults);
        file.defaults = Keys::default();
    }
    let attach = file.attach.as_ref().and_then(|keys| keys.attach(&file.defaults, &mut found));
    let defaults = file.defaults.limits_of_defaults();
    let mut read = Vec::new();
    for (place, table) in file.tables {
        let keys = Keys::read(table, &KEYS, &mut found);
        if let Some(mapping) = keys.mapping(&file.defaults, place.clone(), &mut found) {
            read.push((Table { place, keys }, mapping));
        }
    }
    if !errors.is_empty() || is_cut {
        return Err(syntax::beside_errors(text, &errors, found));
    }
    if found.is_empty() && read.is_empty() && attach.is_none() && !file.says_none {
        // Without this, a file that is being written could remove all mappings.
        found.push(Found::at(0..0, NO_MAPPING));
    }
    let (tables, mappings): (Vec<Table>, Vec<Mapping>) = read.into_iter().unzip();
    if are_defaults_right {
        found.extend(same_names(&tables, &mappings));
        found.extend(same_ports(&tables, &mappings));
    }
    if found.is_empty() {
        found.extend(loops(&tables, &mappings));
    }
    let metrics = file.metrics;
    if found.is_empty() { Ok(Config { mappings, attach, defaults, metrics }) } else { Err(found) }
}

const NO_MAPPING: &str = "there is no [[mapping]] in it; write one, attach = true to serve attached ports, or mapping = [] for none";

/// The maximum number of networks that all mappings together may get from `[defaults]`.
const MOST_NETWORKS: usize = 1_000_000;

/// The number of mappings that attached ports count as for [`MOST_NETWORKS`].
const ATTACHED: usize = 100;

/// A parsed file.
#[derive(Default)]
struct File<'a, 'i> {
    /// The values for mappings that do not override them.
    defaults: Keys,
    /// The mappings and their positions.
    tables: Vec<(Range<usize>, &'a DeTable<'i>)>,
    /// Whether it says that there is no mapping.
    says_none: bool,
    /// How ports are attached, if they can be.
    attach: Option<Keys>,
    /// Where metrics are served, if they are.
    metrics: Option<MetricsAddr>,
}

impl<'a, 'i> File<'a, 'i> {
    fn read(document: &'a DeTable<'i>, found: &mut Mistakes) -> Self {
        let mut file = Self::default();
        for (key, value) in by_place(document) {
            let (name, place) = (key.get_ref().as_ref(), key.span());
            match (name, value.get_ref()) {
                ("defaults", DeValue::Table(table)) => file.defaults = Keys::read(table, &KEYS, found),
                ("defaults", _) => {
                    found.push(Found::at(place, "there is one table of defaults; write [defaults]"));
                }
                ("mapping", DeValue::Array(tables)) => file.read_mappings(tables, found),
                ("mapping", DeValue::Table(keys)) => {
                    found.push(Found::at(
                        value.span(),
                        "[mapping] is one table, not one of several; write [[mapping]]",
                    ));
                    file.tables.push((value.span(), keys));
                }
                ("mapping", _) => {
                    found.push(Found::at(place, "a mapping is a table; write [[mapping]]"));
                }
                ("attach", value) => file.read_attach(value, place, found),
                ("metrics", of_key) => match read_metrics(of_key) {
                    Ok(addr) => file.metrics = Some(addr),
                    Err(problem) => found.push(Found::at(value.span(), format!("metrics: {problem}"))),
                },
                (_, value) => {
                    let is_table = matches!(value, DeValue::Table(_) | DeValue::Array(_));
                    found.push_with(place.start, || Found::at(place, names::unknown_table(name, is_table)));
                }
            }
        }
        file
    }

    fn read_mappings(&mut self, tables: &'a DeArray<'i>, found: &mut Mistakes) {
        self.says_none = tables.is_empty();
        for table in tables.iter() {
            match table.get_ref() {
                DeValue::Table(keys) => self.tables.push((table.span(), keys)),
                _ => found.push(Found::at(table.span(), "a mapping is a table; write [[mapping]]")),
            }
        }
    }

    /// Reads the value of `attach`, whose key is at `place`.
    fn read_attach(&mut self, value: &DeValue<'_>, place: Range<usize>, found: &mut Mistakes) {
        let problem = match value {
            DeValue::Table(table) => {
                self.attach = Some(Keys::read(table, &ATTACH_KEYS, found));
                return;
            }
            DeValue::Boolean(is_on) => {
                self.attach = is_on.then(Keys::default);
                return;
            }
            DeValue::Array(_) => "attach: there is one table; write [attach]".to_owned(),
            other => {
                let meant = bool::meant("attach", other);
                format!("attach: expected true, false or a table; write attach = {meant}")
            }
        };
        found.push(Found::at(place, problem));
    }

    /// An error if the networks of `[defaults]`, repeated for each mapping, would take too much memory.
    fn too_many_networks(&self) -> Option<Found> {
        let (mappings, networks) = (self.tables.len(), self.defaults.networks());
        let of_attach = self.attach.as_ref().map(|attach| (attach, attach.networks().max(networks)));
        if let Some((attach, networks)) = of_attach
            && networks.saturating_mul(ATTACHED) > MOST_NETWORKS
        {
            let most = MOST_NETWORKS / ATTACHED;
            let keys = if attach.networks() > 0 { attach } else { &self.defaults };
            let key = keys.key_of_networks();
            let problem = format!(
                "{key}: {networks} networks for each attached port are more than {most}; write wider networks"
            );
            return Some(Found::at(keys.place_of(key, 0..0), problem));
        }
        (mappings.saturating_mul(networks) > MOST_NETWORKS).then(|| {
            let key = self.defaults.key_of_networks();
            let problem = format!(
                "{key}: {networks} networks for each of {mappings} mappings are more than {MOST_NETWORKS}; write wider networks"
            );
            Found::at(self.defaults.place_of(key, 0..0), problem)
        })
    }
}

/// Reads the value of `metrics`.
///
/// # Errors
/// What is wrong with it.
fn read_metrics(value: &DeValue<'_>) -> Result<MetricsAddr, String> {
    match value {
        DeValue::String(text) => text.parse().map_err(|error: MetricsAddrError| error.to_string()),
        _ => Err(format!("expected a quoted string; write metrics = {}", example("metrics"))),
    }
}

/// A `[[mapping]]` and its position.
struct Table {
    place: Range<usize>,
    keys: Keys,
}

impl Table {
    /// An error in the value of `key`.
    fn mistake(&self, key: &str, problem: &dyn fmt::Display) -> Found {
        Found::at(self.keys.place_of(key, self.place.clone()), format!("{key}: {problem}"))
    }
}

/// Errors for mappings that have the name of an earlier one.
fn same_names(tables: &[Table], mappings: &[Mapping]) -> Vec<Found> {
    let mut seen = HashSet::with_capacity(mappings.len());
    let mut found = Vec::new();
    for (table, mapping) in tables.iter().zip(mappings) {
        let name = mapping.name();
        if !seen.insert(name.clone()) {
            let problem =
                format_args!("{name} is the name of another mapping; give it one of its own").to_string();
            found.push(table.mistake("name", &problem));
        }
    }
    found
}

/// Errors for mappings that want the same port as an earlier one.
fn same_ports(tables: &[Table], mappings: &[Mapping]) -> Vec<Found> {
    let error = |Overlap { first, second, port }: Overlap| {
        tables[second].mistake("host", &OverlapError::new(&mappings[second], &mappings[first], port))
    };
    overlaps(mappings).into_iter().map(error).collect()
}

/// An error for a mapping that leads back to itself.
fn loops(tables: &[Table], mappings: &[Mapping]) -> Option<Found> {
    let error = refuse_loops_among(mappings).err()?;
    Some(tables[error.mapping].mistake("to", &error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rproxy_mapping::dscp::Dscp;
    use rproxy_mapping::limits::Limits;
    use rproxy_mapping::testdata::any_mapping;

    use super::super::mistake::Lines;
    use super::super::print::{print, with_interface_name};
    use super::*;
    use crate::plane::AttachOptions;
    use crate::plane::socket::parse_name;

    fn find_mappings(text: &str) -> Result<Vec<Mapping>, Mistakes> {
        find_config(text).map(|config| config.mappings)
    }

    fn mistakes(text: &str) -> Vec<String> {
        let found = find_config(text).expect_err(text);
        Lines::of(text).locate(found).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_second_table_of_a_mapping_is_told_once() {
        let table = "[mapping]\nhost = \"[::]:80\"\nto = \"172.17.0.2:80\"\n";
        let found = mistakes(&format!("{table}{table}[defaults]\nrate = \"1/s\"\nrate = \"2/s\"\n"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("4:1: [mapping] is one table, and there is one already"), "{found:?}");
        assert!(found[1].starts_with("9:1: duplicate key"), "{found:?}");
    }

    #[test]
    fn a_file_is_read() {
        let text = r#"
            # What holds for all.
            [defaults]
            idle_timeout = "1h"
            deny = ["192.0.2.0/24"]

            [[mapping]]
            host = "[::]:8080"
            to = "172.17.0.2:80"

            [[mapping]]
            name = "many"
            host = "10.0.0.11:8000-8010"
            to = "[fd00::2]:80-90"
            proto = "tcp+udp"
            idle_timeout = "unlimited"
            max_connections = 100

            [[mapping]]
            host = "127.0.0.1:0"
            to = "172.17.0.2:81"
        "#;
        let mappings = find_mappings(text).unwrap();
        let shown: Vec<_> = mappings.iter().map(|mapping| format!("{} {mapping}", mapping.name())).collect();
        assert_eq!(
            shown,
            [
                "8080/tcp [::]:8080:80/tcp",
                "many 10.0.0.11:8000-8010:80-90/tcp+udp",
                "127.0.0.1:random:81/tcp 127.0.0.1::81/tcp"
            ]
        );
        let idle: Vec<_> = mappings.iter().map(|mapping| mapping.limits().idle_timeout).collect();
        let hour = Some(std::time::Duration::from_secs(3600));
        assert_eq!(idle, [hour, None, hour]);
        assert!(mappings.iter().all(|mapping| mapping.limits().access.deny.len() == 1));
        assert_eq!(mappings[1].limits().max_connections, Some(100));
    }

    #[test]
    fn metrics_are_served_where_a_file_says() {
        let addr = |text: &str| find_config(text).unwrap().metrics.map(|addr| addr.to_string());
        let file = |metrics: &str| format!("{metrics}\nmapping = []");
        assert_eq!(addr(&file("metrics = 'unix:/run/m'")).as_deref(), Some("unix:/run/m"));
        assert_eq!(addr(&file("metrics = \"[::1]:9464\"")).as_deref(), Some("[::1]:9464"));
        assert_eq!(addr(&file("")), None);
    }

    #[track_caller]
    fn assert_found(text: &str, expected: &str) {
        let found = mistakes(text);
        assert!(found[0].starts_with(expected), "{text}: {found:?}");
        assert!(!found[0].contains('\n'), "{text}: {found:?}");
    }

    #[test]
    fn mistakes_in_limits_have_a_place_and_a_way_out() {
        for (text, expected) in [
            ("[[mapping]]\nhost = \"[::]:80\"\nrate = 10", "1:1: to: it is missing"),
            ("[defaults]\nrate = 10", "2:8: rate: expected a quoted string; write rate = \"10/s\""),
            (
                "[defaults]\nkeepalive = 60",
                "2:13: keepalive: expected a quoted string; write keepalive = \"60s\"",
            ),
            (
                "[defaults]\nkeepalive = false",
                "2:13: keepalive: expected a quoted string; write keepalive = \"off\"",
            ),
            (
                "[defaults]\nkeepalive = off",
                "2:13: keepalive: this is not a TOML value; write keepalive = \"off\"",
            ),
            ("[defaults]\ntcp_user_timeout = \"25d\"", "2:20: tcp_user_timeout: longer than the 24 days"),
            (
                "[defaults]\nmax_connections_per_source = 0",
                "2:30: max_connections_per_source: write a number of at least 1",
            ),
            ("[defaults]\nfree_bind = true", "2:1: unknown key `free_bind`; did you mean `freebind`?"),
        ] {
            assert_found(text, expected);
        }
    }

    #[test]
    fn what_sctp_does_not_have_in_defaults_is_for_other_mappings() {
        let defaults = "[defaults]\nkeepalive = '1m'\ntcp_user_timeout = '1m'\nsource = 'client'\nsend_proxy = 'v2'\n\
            send_proxy_udp = 'first'\naccept_proxy = ['10.0.0.1']\nproxy_timeout = '1s'\nidle_timeout = '1h'\n\
            [[mapping]]\nhost = '[::]:80'\nto = '172.17.0.2:80'\n\
            [[mapping]]\nhost = '[::]:81'\nto = '172.17.0.2:81'\nproto = 'sctp'\n";
        let mappings = find_mappings(defaults).unwrap();
        assert_eq!(mappings[0].limits().not_of_sctp(), Some("source = client"));
        assert_eq!(mappings[1].limits().not_of_sctp(), None);
        assert_eq!(mappings[1].limits().idle_timeout, mappings[0].limits().idle_timeout);
        let line = defaults.lines().count() + 1;
        for (key, value, column) in [
            ("keepalive", "'1m'", 13),
            ("tcp_user_timeout", "'1m'", 20),
            ("send_proxy", "'v1'", 14),
            ("accept_proxy", "['10.0.0.1']", 16),
            ("source", "'client'", 10),
        ] {
            let option = if key == "source" { "source = client" } else { key };
            let expected = format!("{line}:{column}: {key}: sctp has no {option}");
            assert_found(&format!("{defaults}{key} = {value}\n"), &expected);
        }
        let of_another = format!("{defaults}source = '127.0.0.1'\n");
        assert_eq!(find_mappings(&of_another).unwrap()[1].limits().source.to_string(), "127.0.0.1");
    }

    #[test]
    fn mistakes_in_tables_have_a_place() {
        let missing = "host: it is missing; write the address and port to listen on, as in \"[::]:80\"";
        for (text, expected) in [
            ("", "1:1: there is no [[mapping]] in it"),
            ("[[mapping]\n", "1:11: "),
            ("[[mapping]]\nhots = 1", "1:1: to: it is missing"),
            ("[mapping]\nhost = \"1\"", "1:1: [mapping] is one table, not one of several; write [[mapping]]"),
            (
                "[[mapping]]\nhost = 80\nto = 1",
                "2:8: host: expected a quoted string; write host = \"[::]:80\"",
            ),
            ("[[mapping]]\nhost = \"[::]:80\"\nhost = \"[::]:81\"", "3:1: duplicate key; remove one"),
            ("[[mapping]]", &format!("1:1: {missing}")),
            ("[[mapping]]\nhost = \"[::]:80\"", "1:1: to: it is missing"),
            ("[[mappings]]\nhost = \"[::]:80\"", "1:3: unknown table `mappings`; did you mean [[mapping]]?"),
            ("[default]\nproto = \"udp\"", "1:2: unknown table `default`; did you mean [defaults]?"),
            (
                "[servers]",
                "1:2: unknown table `servers`; the tables are [[mapping]], [defaults] and [attach]",
            ),
            ("control = '/run/x'", "1:1: `control` is a flag, --control, and not a key of a file"),
            ("log-level = 'debug'", "1:1: `log-level` is a flag, --log-level, and not a key of a file"),
            ("[defaults]\nuser = 'nobody'", "2:1: `user` is a flag, --user, and not a key of a file"),
            ("drain_timeout = '5s'", "1:1: `drain_timeout` is a flag, --drain-timeout, and not a key"),
            ("[control]", "1:2: `control` is a flag, --control, and not a key of a file"),
            (
                "servers = 1",
                "1:1: unknown key `servers`; a file has the keys attach and metrics, and below them the tables \
                 [[mapping]], [defaults] and [attach]",
            ),
            ("[[defaults]]", "1:3: there is one table of defaults; write [defaults]"),
            ("metrics = 9464", "1:11: metrics: expected a quoted string; write metrics = \"127.0.0.1:9464\""),
            ("metrics = true", "1:11: metrics: expected a quoted string"),
            ("metrics = ':9464'", "1:11: metrics: the address is missing; write 127.0.0.1:9464"),
            ("metric = 'x'", "1:1: unknown key `metric`; did you mean `metrics`?"),
            ("[metrics]", "1:1: metrics: expected a quoted string; write metrics = \"127.0.0.1:9464\""),
            ("[[metric]]", "1:3: `metric` is not a table; write metrics = \"127.0.0.1:9464\""),
            (
                "[defaults]\nmetrics = ''",
                "2:1: `metrics` is not a key of a table; write metrics = \"127.0.0.1:9464\" above the first table",
            ),
            ("host = \"[::]:80\"", "1:1: `host` is outside a table; write [[mapping]] on a line before host"),
            (
                "[mapping]\n[mapping]",
                "2:1: [mapping] is one table, and there is one already; write [[mapping]] for each",
            ),
            ("mapping = 1", "1:1: a mapping is a table; write [[mapping]]"),
            ("[defaults]\nname = \"x\"", "2:8: name: it is for one mapping"),
        ] {
            assert_found(text, expected);
        }
    }

    #[test]
    fn the_destination_of_the_access_log_is_known_to_be_a_flag() {
        for (text, expected) in [
            (
                "access_log = '/var/log/x'",
                "1:1: `access_log` is outside a table; the destination of the access log is a flag, --access-log FILE",
            ),
            (
                "access-log = true",
                "1:1: `access-log` is outside a table; the destination of the access log is a flag, --access-log FILE",
            ),
            (
                "[defaults]\naccess_log = '/var/log/x'",
                "2:14: access_log: expected true or false (its destination is a flag, --access-log); write access_log = true",
            ),
        ] {
            assert_found(text, expected);
        }
    }

    #[test]
    fn mistakes_in_values_have_a_place_and_a_way_out() {
        for (host, to, more, expected) in [
            ("0.0.0.0", "10.0.0.1:80", "", "2:8: host: the port is missing; write it as 0.0.0.0:80"),
            ("10.0.0.256:80", "10.0.0.1:80", "", "2:8: host: '10.0.0.256' is not an IP address"),
            ("[::]:80-x", "10.0.0.1:80", "", "2:8: host: 'x' is not a port"),
            ("[::]:80-82", "10.0.0.1:80-81", "", "2:8: host: 3 host ports"),
            ("[::]:80", "10.0.0.1", "", "3:6: to: the port is missing"),
            (
                "[::]:80",
                "127.0.0.1:80",
                "",
                "3:6: to: 80/tcp would forward to itself, since 127.0.0.1 is an address of this machine",
            ),
            ("[::]:80", "10.0.0.1:80", "proto = 'dccp'", "4:9: proto: 'dccp' is not a protocol"),
            (
                "1.2.3.4:80",
                "10.0.0.1:80",
                "v6only = true",
                "4:10: v6only: v6only is for [::], and the host address is 1.2.3.4",
            ),
            ("[::]:80", "10.0.0.1:80", "idle_timeout = 'soon'", "4:16: idle_timeout: not a duration"),
            ("[::]:80", "10.0.0.1:80", "dscp = 'AF5'", "4:8: dscp: not a code point; write a number from"),
            ("[::]:80", "10.0.0.1:80", "dscp = 0xb8", "4:8: dscp: more than 63; it looks like a whole"),
            ("[::]:80", "10.0.0.1:80", "allow = ['lan']", "4:9: allow: 'lan': not a network"),
            ("[::]:80", "10.0.0.1:80", "name = 'a b'", "4:8: name: \"a b\" is not a name"),
        ] {
            assert_found(&format!("[[mapping]]\nhost = \"{host}\"\nto = \"{to}\"\n{more}\n"), expected);
        }
    }

    #[test]
    fn all_mistakes_are_found_at_once() {
        let text =
            "[[mapping]]\nhost = \"x\"\nto = \"10.0.0.1:80\"\n[[mapping]]\nhost = \"[::]:80\"\nto = \"y\"\n";
        assert_eq!(mistakes(text).len(), 2);
        let text = "[[mapping]]\nhost = \"[::]:80\"\nto = \"10.0.0.1:80\"\n";
        let found = mistakes(&text.repeat(3));
        assert!(found[0].starts_with("4:1: name: 80/tcp is the name of another mapping"), "{found:?}");
        assert!(found.iter().any(|mistake| mistake.starts_with("5:8: host: port 80 is taken")), "{found:?}");
    }

    #[test]
    fn defaults_do_not_multiply() {
        let networks = vec!["\"10.0.0.0/8\""; 10_001].join(",");
        for (key, column) in [("allow", 9), ("deny", 8), ("accept_proxy", 16)] {
            let text = format!("[defaults]\n{key} = [{networks}]\n{}", GOOD.repeat(100));
            let expected =
                format!("2:{column}: {key}: 10001 networks for each of 100 mappings are more than 1000000");
            assert_found(&text, &expected);
        }
    }

    const GOOD: &str = "[[mapping]]\nhost = \"[::]:80\"\nto = \"10.0.0.1:80\"\n";

    /// Lines with an obvious mistake, and the suggested correction.
    const MEANT: &[(&str, &str)] = &[
        ("host = [::]:80", "host = \"[::]:80\""),
        ("host = 0.0.0.0:80 # all", "host = \"0.0.0.0:80\""),
        ("host = 0.0.0.0:80-90", "host = \"0.0.0.0:80-90\""),
        ("host = “[::]:80”", "host = \"[::]:80\""),
        ("host = \"[::]:80", "host = \"[::]:80\""),
        ("host: [::]:80", "host = \"[::]:80\""),
        ("host =", "host = \"[::]:80\""),
        ("host = 8080", "host = \"[::]:8080\""),
        ("host = [\"[::]:80\"]", "host = \"[::]:80\""),
        ("to = 172.17.0.2:80", "to = \"172.17.0.2:80\""),
        ("to = 8080", "to = \"172.17.0.2:8080\""),
        ("name = web", "name = \"web\""),
        ("name = 7", "name = \"7\""),
        ("proto = udp", "proto = \"udp\""),
        ("proto = 17", "proto = \"tcp\""),
        ("idle_timeout = 60", "idle_timeout = \"60s\""),
        ("idle_timeout = 60s", "idle_timeout = \"60s\""),
        ("idle_timeout = 1.5", "idle_timeout = \"90s\""),
        ("idle_timeout = false", "idle_timeout = \"unlimited\""),
        ("connect_timeout = 0", "connect_timeout = \"90s\""),
        ("udp_timeout = 07:30:00", "udp_timeout = \"90s\""),
        ("on_limit = reset", "on_limit = \"reset\""),
        ("max_connections = \"100\"", "max_connections = 100"),
        ("max_connections = -1", "max_connections = 1000"),
        ("max_connections = 1k", "max_connections = 1000"),
        ("v6only = \"yes\"", "v6only = true"),
        ("v6only = no", "v6only = false"),
        ("udp_any_port = 1", "udp_any_port = true"),
        ("udp_any_port = off", "udp_any_port = false"),
        ("dscp = EF", "dscp = \"EF\""),
        ("dscp = -1", "dscp = \"AF41\""),
        ("dscp = [46]", "dscp = \"AF41\""),
        ("allow = \"10.0.0.0/8\"", "allow = [\"10.0.0.0/8\"]"),
        ("allow = [10.0.0.0/8, fd00::/8]", "allow = [\"10.0.0.0/8\", \"fd00::/8\"]"),
        ("deny = [7]", "deny = [\"10.0.0.0/8\"]"),
    ];

    #[test]
    fn what_is_meant_by_a_line_is_suggested_and_accepted() {
        for (line, meant) in MEANT {
            let key = line.split([' ', ':']).next().unwrap();
            let others = GOOD.lines().filter(|other| !other.starts_with(key));
            let others: Vec<&str> = others.collect();
            let file = |line: &str| [&others[..], &[line]].concat().join("\n");
            let found = mistakes(&file(line));
            let [mistake] = &found[..] else { panic!("{line}: {found:?}") };
            assert!(mistake.contains(&format!("; write {meant}")), "{line}: {mistake}");
            assert!(mistake.starts_with(&format!("{}:", others.len() + 1)), "{line}: {mistake}");
            assert!(find_config(&file(meant)).is_ok(), "{line}: {mistake}");
        }
    }

    #[test]
    fn keys_that_there_are_not_get_a_hint() {
        for (key, meant) in [
            ("too", "to"),
            ("hots", "host"),
            ("Host", "host"),
            ("idle-timeout", "idle_timeout"),
            ("idletimeout", "idle_timeout"),
            ("max_conections", "max_connections"),
            ("protocol", "proto"),
            ("v6-only", "v6only"),
            ("listen", "host"),
            ("backend", "to"),
            ("denied", "deny"),
            ("tos", "dscp"),
            ("udp-any-port", "udp_any_port"),
        ] {
            let found = mistakes(&format!("{GOOD}{key} = \"x\"\n"));
            assert_eq!(found, [format!("4:1: unknown key `{key}`; did you mean `{meant}`?")]);
        }
        for key in ["colour", "description"] {
            let found = mistakes(&format!("{GOOD}{key} = \"x\"\n"));
            let expected = format!("4:1: unknown key `{key}`; the keys are name, host, to, ");
            assert!(found[0].starts_with(&expected), "{found:?}");
        }
        // The suggested key is not also reported as missing.
        let found = mistakes("[[mapping]]\nhost = \"[::]:80\"\ntoo = \"10.0.0.1:80\"\n");
        assert_eq!(found, ["3:1: unknown key `too`; did you mean `to`?"]);
    }

    #[test]
    fn all_mistakes_of_a_mapping_are_found_at_once() {
        let text = "[defaults]\nidle_timeout = \"soon\"\nproto = 6\n[[mapping]]\nhost = \"x!:80\"\nto = \"10.0.0.1\"\n\
                    allow = [\"lan\"]\nname = \"a b\"\nhots = 1\nmax_connections = 0\n[[mapping]]\nto = \"10.0.0.2:80\"\n";
        let found = mistakes(text);
        let places: Vec<_> =
            found.iter().map(|mistake| mistake.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
        let expected = [
            "2:16 idle_timeout",
            "3:9 proto",
            "5:8 host",
            "6:6 to",
            "7:9 allow",
            "8:8 name",
            "9:1 unknown key `hots`; did you mean `host`?",
            "10:19 max_connections",
            "11:1 host",
        ];
        assert_eq!(places, expected, "{found:#?}");
        // Also together with lines that are not TOML, unless those hide them.
        let found = mistakes(
            "[[mapping]]\nhost = [::]:80\ntoo = 1\nallow = \"10.0.0.0/8\"\nidle_timeout = \"soon\"\n",
        );
        let lines: Vec<_> = found.iter().map(|mistake| mistake.split(':').next().unwrap()).collect();
        assert_eq!(lines, ["2", "3", "4", "5"], "{found:#?}");
    }

    #[test]
    fn defaults_hold_for_those_mappings_for_which_they_mean_something() {
        let text = format!(
            "[defaults]\nv6only = true\n{GOOD}[[mapping]]\nhost = \"0.0.0.0:80\"\nto = \"10.0.0.1:80\"\n"
        );
        let v6only: Vec<_> = find_mappings(&text).unwrap().iter().map(Mapping::is_v6only).collect();
        assert_eq!(v6only, [true, false]);
    }

    #[test]
    fn code_points_are_numbers_or_names() {
        let read = |value: &str| {
            let mappings = find_mappings(&format!("{GOOD}dscp = {value}\n")).expect(value);
            mappings[0].limits().dscp.map(Dscp::bits)
        };
        for value in ["46", "0x2e", "0o56", "\"46\"", "\"0x2E\"", "\"EF\"", "'ef'"] {
            assert_eq!(read(value), Some(46), "{value}");
        }
        assert_eq!(read("0"), Some(0));
        let of_all = format!("[defaults]\ndscp = 8\nudp_any_port = true\n{GOOD}udp_any_port = false\n");
        let limits = find_mappings(&of_all).unwrap()[0].limits().clone();
        assert_eq!((limits.dscp.map(Dscp::bits), limits.udp_any_port), (Some(8), false));
    }

    #[test]
    fn attached_ports_have_the_limits_of_their_table_and_else_of_the_defaults() {
        let defaults = "[defaults]\nidle_timeout = '1h'\nmax_connections = 7\nproto = 'udp'\nv6only = true\n";
        let options = |text: &str, name| find_config(text).expect(text).attach_options(name);
        let limits = |text: &str, name| {
            let limits = options(text, name).unwrap().limits;
            (limits.idle_timeout.map(|limit| limit.as_secs()), limits.max_connections)
        };
        for (attach, expected) in [
            ("[attach]\nidle_timeout = 'unlimited'", (None, Some(7))),
            ("[attach]\nmax_connections = 9", (Some(3600), Some(9))),
            ("[attach]", (Some(3600), Some(7))),
        ] {
            assert_eq!(limits(&format!("{attach}\n{defaults}"), None), expected, "{attach}");
        }
        let on = format!("attach = true\n{defaults}");
        let off = format!("attach = false\n{defaults}{GOOD}");
        assert_eq!(limits(&on, None), (Some(3600), Some(7)));
        assert_eq!(options(&off, None), None);
        // The command line takes precedence.
        assert_eq!(limits(&off, Some(Some("x"))), (Some(3600), Some(7)));
        let named = "attach = { name = 'of the file' }";
        for (flag, expected) in [(None, "of the file"), (Some(None), "of the file"), (Some(Some("x")), "x")] {
            assert_eq!(options(named, flag).unwrap().name, expected);
        }
        assert_eq!(options(&on, None).unwrap().name, "rproxy");
        assert_eq!(find_mappings("mapping = []").unwrap(), []);
    }

    #[test]
    fn mistakes_about_attached_ports_have_a_place() {
        let keys = "the keys of [attach] are name, connect_timeout, ";
        for (text, expected) in [
            ("[attach]\nhost = '[::]:80'", &*format!("2:1: unknown key `host`; {keys}")),
            ("[attach]\nto = 'x'", &format!("2:1: unknown key `to`; {keys}")),
            ("[attach]\nproto = 'udp'", &format!("2:1: unknown key `proto`; {keys}")),
            ("[attach]\nv6only = true", &format!("2:1: unknown key `v6only`; {keys}")),
            (
                "[attach]\nidle-timeout = '1m'",
                "2:1: unknown key `idle-timeout`; did you mean `idle_timeout`?",
            ),
            ("[attach]\nname = ''", "2:8: name: the name is empty; leave it out for the default"),
            ("[attach]\nname = \"a\\u0000b\"", "2:8: name: the name has a NUL byte"),
            ("[attach]\nname = 7", "2:8: name: expected a quoted string; write name = \"7\""),
            ("[attach]\nidle_timeout = 'soon'", "2:16: idle_timeout: not a duration"),
            ("[attach]\nmax_connections = 0", "2:19: max_connections: write a number of at least 1"),
            ("[attach]\nname = rproxy", "2:8: name: this is not a TOML value; write name = \"rproxy\""),
            ("attach = yes", "1:10: attach: this is not a TOML value; write attach = true"),
            ("attach = 'no'", "1:1: attach: expected true, false or a table; write attach = false"),
            ("attach = 1", "1:1: attach: expected true, false or a table; write attach = true"),
            ("attach = true\n[attach]", "2:2: duplicate key; remove one of the two"),
            ("[[attach]]", "1:3: attach: there is one table; write [attach]"),
            ("atach = true", "1:1: unknown key `atach`; did you mean `attach`?"),
            ("[Attached]", "1:2: unknown table `Attached`; did you mean [attach]?"),
            (
                "[defaults]\nattach = true",
                "2:1: `attach` is not a key of a table; write attach = true above the first table",
            ),
            ("attach = false", "1:1: there is no [[mapping]] in it; write one, attach = true to serve"),
            ("[defaults]\nidle_timeout = 'soon'\n[attach]", "2:16: idle_timeout: not a duration"),
            ("[defaults]\nname = 'x'\n[attach]", "2:8: name: it is for one mapping"),
        ] {
            assert_found(text, expected);
            assert_eq!(mistakes(text).len(), 1, "{text}");
        }
        let networks = vec!["\"10.0.0.0/8\""; 10_001].join(",");
        for (key, column) in [("deny", 8), ("accept_proxy", 16)] {
            let expected =
                format!("2:{column}: {key}: 10001 networks for each attached port are more than 10000");
            assert_found(&format!("[defaults]\n{key} = [{networks}]\n[attach]"), &expected);
            assert_found(&format!("[attach]\n{key} = [{networks}]"), &expected);
        }
    }

    #[test]
    fn options_of_headers_need_headers() {
        let alone = [
            ("send_proxy_udp = 'first'", "4:18: send_proxy_udp: no datagram has a header without send_proxy"),
            ("proxy_timeout = '1s'", "4:17: proxy_timeout: no header is awaited without accept_proxy"),
        ];
        let together = "[defaults]\nsend_proxy_udp = 'first'\nproxy_timeout = '1s'\n";
        for (line, expected) in alone {
            let found = mistakes(&format!("{GOOD}{line}"));
            assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
            let found = mistakes(&format!("{GOOD}[attach]\n{line}"));
            assert!(found.len() == 1 && found[0].contains(": no "), "{found:?}");
            let partners = "[defaults]\nsend_proxy = 'v2'\naccept_proxy = ['10.0.0.1']\n";
            find_config(&format!("{partners}{GOOD}{line}")).unwrap();
        }
        // They are for those of the mappings that have headers.
        find_config(&format!("{together}{GOOD}")).unwrap();
        let off = format!("{together}{GOOD}send_proxy = 'off'\nsend_proxy_udp = 'each'\n");
        find_config(&off).unwrap();
    }

    #[test]
    fn names_of_attached_ports_are_refused() {
        let found = mistakes(&format!("{GOOD}name = 'docker/tcp/0.0.0.0:80'"));
        let expected = "4:8: name: names that start with docker/ are those of attached ports; choose another";
        assert_eq!(found, [expected]);
    }

    proptest! {
        #[test]
        fn what_is_printed_can_be_read_again(
            mapping in any_mapping(),
            of_attached in proptest::option::of((proptest::option::of("\\PC{1,20}|[\0-\u{7f}]{1,40}"), any_mapping())),
            metrics in proptest::option::of("unix:(\\PC{1,20}|[\0-\u{7f}]{1,40})|\\[::1\\]:[1-9]"),
        ) {
            let attach = of_attached.map(|(name, mapping)| AttachOptions {
                name: name.and_then(|name| parse_name(&name).ok()).unwrap_or_else(|| "rproxy".to_owned()),
                limits: Limits { freebind: false, require_resolved: false, ..mapping.limits().clone() },
            });
            let metrics: Option<MetricsAddr> = metrics.and_then(|text| text.parse().ok());
            let text = print([&mapping], attach.as_ref(), metrics.as_ref(), with_interface_name);
            let config = find_config(&text).map_err(|found| TestCaseError::fail(format!("{text}: {found:?}")))?;
            prop_assert_eq!(config.attach_options(None), attach, "{}", text);
            prop_assert_eq!(&config.metrics, &metrics, "{}", text);
            prop_assert_eq!(config.mappings, vec![mapping], "{}", text);
        }

        #[test]
        fn no_damage_to_a_file_does_harm(
            mapping in any_mapping(), at in any::<prop::sample::Index>(), junk in ".{0,4}", skip in 0..8_usize,
        ) {
            let text = print([&mapping], None, None, with_interface_name);
            let mut chars: Vec<char> = text.chars().collect();
            let at = at.index(chars.len());
            let end = chars.len().min(at + skip);
            chars.splice(at..end, junk.chars());
            let text: String = chars.into_iter().collect();
            if let Err(found) = find_mappings(&text) {
                prop_assert!(!Lines::of(&text).locate(found).is_empty());
            }
        }
    }
}
