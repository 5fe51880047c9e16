//! `rproxy ctl connections`: what is live, and how fast. A rate takes two answers.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::table::{human, table};
use crate::control::answers::{Connection, ConnectionList};

/// The time between the two answers.
pub(super) const INTERVAL: Duration = Duration::from_millis(500);

/// The connections and flows, and their rates.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RatedList {
    connections: Vec<Rated>,
    total: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Rated {
    #[serde(flatten)]
    connection: Connection,
    /// Bytes per second.
    rate_in: u64,
    rate_out: u64,
}

impl RatedList {
    /// What there is `now`, with the rates since `before`.
    pub(super) fn new(before: &ConnectionList, now: ConnectionList) -> Self {
        let before: HashMap<u64, &Connection> =
            before.connections.iter().map(|connection| (connection.id, connection)).collect();
        let rated = |connection: Connection| Rated::new(before.get(&connection.id).copied(), connection);
        Self { connections: now.connections.into_iter().map(rated).collect(), total: now.total }
    }

    /// Formats them as a table.
    pub(super) fn to_table(&self) -> String {
        const HEADER: [&str; 13] = [
            "ID",
            "PROTO",
            "CLIENT",
            "HOST",
            "BACKEND",
            "MAPPING",
            "STATE",
            "BY",
            "AGE",
            "IDLE",
            "IN",
            "OUT",
            "RATE IN/OUT",
        ];
        let mut text = table(&HEADER, self.connections.iter().map(Rated::to_row));
        let missing = self.total.saturating_sub(self.connections.len());
        if missing > 0 {
            text.push_str(&format!(
                "\n{missing} more; choose some with --mapping or --client, or raise --limit"
            ));
        }
        text
    }
}

impl Rated {
    /// Of one that was not there before, all of its bytes are new.
    fn new(before: Option<&Connection>, connection: Connection) -> Self {
        let [age, bytes_in, bytes_out] =
            before.map_or([0; 3], |before| [before.age_ms, before.bytes_in, before.bytes_out]);
        let milliseconds = connection.age_ms.saturating_sub(age).max(1);
        let rate = |bytes: u64| bytes.saturating_mul(1000) / milliseconds;
        let rate_in = rate(connection.bytes_in.saturating_sub(bytes_in));
        let rate_out = rate(connection.bytes_out.saturating_sub(bytes_out));
        Self { rate_in, rate_out, connection }
    }

    fn to_row(&self) -> Vec<String> {
        let Self { connection, rate_in, rate_out } = self;
        let by = match connection.spliced {
            None => "-",
            Some(true) => "splice",
            Some(false) => "copy",
        };
        vec![
            connection.id.to_string(),
            connection.protocol.clone(),
            connection.client.to_string(),
            connection.host.to_string(),
            connection.backend.clone(),
            connection.mapping.clone(),
            connection.state.clone(),
            by.to_owned(),
            time(connection.age_ms),
            time(connection.idle_ms),
            human(connection.bytes_in),
            human(connection.bytes_out),
            format!("{}/{}", human(*rate_in), human(*rate_out)),
        ]
    }
}

/// A time in the unit that fits it: `250ms`, `12s`, `5m`, `3h`, `9d`.
fn time(milliseconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let unit = UNITS.iter().find(|(length, _name)| milliseconds >= *length);
    unit.map_or_else(
        || format!("{milliseconds}ms"),
        |(length, name)| format!("{}{name}", milliseconds / length),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(id: u64, age_ms: u64, bytes_in: u64) -> Connection {
        Connection {
            id,
            protocol: "tcp".to_owned(),
            mapping: "web".to_owned(),
            client: "192.0.2.7:5000".parse().unwrap(),
            host: "203.0.113.1:80".parse().unwrap(),
            backend: "172.17.0.2:80".parse().unwrap(),
            state: "open".to_owned(),
            spliced: Some(false),
            age_ms,
            idle_ms: 3,
            bytes_in,
            bytes_out: 0,
            datagrams_in: None,
            datagrams_out: None,
        }
    }

    #[test]
    fn rates_are_those_since_the_first_answer() {
        let before = ConnectionList { connections: vec![connection(1, 1000, 500)], total: 1 };
        let now = ConnectionList {
            connections: vec![connection(1, 1500, 1500), connection(2, 100, 300)],
            total: 3,
        };
        let rated = RatedList::new(&before, now);
        let rates: Vec<u64> = rated.connections.iter().map(|rated| rated.rate_in).collect();
        assert_eq!(rates, [2000, 3000]);
        let text = rated.to_table();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("192.0.2.7:5000") && lines[1].contains("1s"), "{text}");
        assert!(lines[1].ends_with("2.0k/0") && lines[3].starts_with("1 more"), "{text}");
    }

    #[test]
    fn a_time_has_one_unit() {
        let times = [999, 1000, 59_999, 60_000, 7_200_000, 86_400_000].map(time);
        assert_eq!(times, ["999ms", "1s", "59s", "1m", "2h", "1d"]);
    }
}
