//! The lines of the access log: one for each connection or flow that has ended, and for each client that is not served.

use std::fmt::{self, Display, Formatter};
use std::io::Write;
use std::time::{Duration, SystemTime};

use humantime::{Rfc3339Timestamp, format_rfc3339_micros};
use rproxy_mapping::addr::{HostSocketAddr, Protocol};
use serde::{Serialize, Serializer};

use crate::log::Format;
use crate::state::backend_text::BackendText;
use crate::state::client::ClientAddr;
use crate::state::record::{Ending, Record, RecordedPort, Traffic};

/// The fields of a line. Those that mean nothing for what it is about are missing.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// When it ended: RFC 3339, UTC.
    #[serde(serialize_with = "as_text")]
    time: Rfc3339Timestamp,
    mapping: &'a str,
    protocol: &'static str,
    client: ClientAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_pid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_gid: Option<u32>,
    #[serde(serialize_with = "as_text")]
    host: &'a HostSocketAddr,
    backend: BackendText<'a>,
    bytes_in: u64,
    bytes_out: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    datagrams_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    datagrams_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_ms: Option<Milliseconds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_byte_ms: Option<Milliseconds>,
    duration_ms: Milliseconds,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    spliced: Option<bool>,
}

/// Appends the line of `record`, which has ended.
pub(super) fn write(text: &mut Vec<u8>, format: Format, record: &Record) {
    let Record { port, to_backend, to_client, .. } = record;
    let is_tcp = port.port_mapping.protocol == Protocol::Tcp;
    let is_udp = port.port_mapping.protocol == Protocol::Udp;
    let datagrams = |traffic: &Traffic| is_udp.then(|| traffic.datagrams());
    let line = Line {
        host: &record.host,
        backend: record.backend_text(),
        bytes_in: to_backend.bytes(),
        bytes_out: to_client.bytes(),
        datagrams_in: datagrams(to_backend),
        datagrams_out: datagrams(to_client),
        connect_ms: record.connect_time().map(Milliseconds),
        first_byte_ms: record.first_byte_time().map(Milliseconds),
        duration_ms: Milliseconds(record.age()),
        spliced: is_tcp.then(|| record.is_spliced()),
        ..Line::new(port, record.client(), record.ending().unwrap_or(Ending::Drain))
    };
    line.write(text, format);
}

/// Appends the line of a client that is not served.
pub(super) fn write_refusal(
    text: &mut Vec<u8>,
    format: Format,
    client: ClientAddr,
    port: &RecordedPort,
    ending: Ending,
) {
    Line::new(port, client.canonical(), ending).write(text, format);
}

fn as_text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// A time, written in milliseconds with three decimals: without floating point, which takes several times as long.
#[derive(Clone, Copy, Debug)]
struct Milliseconds(Duration);

impl Display for Milliseconds {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{:03}", self.0.as_millis(), self.0.subsec_micros() % 1000)
    }
}

impl Serialize for Milliseconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_micros() as f64 / 1000.0)
    }
}

impl<'a> Line<'a> {
    fn new(port: &'a RecordedPort, client: ClientAddr, ending: Ending) -> Self {
        let RecordedPort { mapping, port_mapping, unresolved, .. } = port;
        let process = client.credentials();
        Self {
            time: format_rfc3339_micros(SystemTime::now()),
            mapping: mapping.as_str(),
            protocol: port_mapping.protocol.as_str(),
            client,
            client_pid: process.map(|process| process.pid),
            client_uid: process.map(|process| process.uid),
            client_gid: process.map(|process| process.gid),
            host: &port_mapping.host,
            backend: BackendText::of(&port_mapping.backend, unresolved.as_ref()),
            bytes_in: 0,
            bytes_out: 0,
            datagrams_in: None,
            datagrams_out: None,
            connect_ms: None,
            first_byte_ms: None,
            duration_ms: Milliseconds(Duration::ZERO),
            reason: ending.as_str(),
            spliced: None,
        }
    }

    fn write(&self, text: &mut Vec<u8>, format: Format) {
        // Nothing fails that is written to memory.
        match format {
            Format::Json => serde_json::to_writer(&mut *text, self).ok(),
            Format::Text => self.write_text(text).ok(),
        };
        text.push(b'\n');
    }

    fn write_text(&self, text: &mut Vec<u8>) -> std::io::Result<()> {
        let Line { time, mapping, protocol, client, host, backend, bytes_in, bytes_out, .. } = self;
        write!(text, "{time} {mapping} {protocol} {client} {host} {backend}")?;
        write!(text, " bytes_in={bytes_in} bytes_out={bytes_out}")?;
        if let (Some(datagrams_in), Some(datagrams_out)) = (self.datagrams_in, self.datagrams_out) {
            write!(text, " datagrams_in={datagrams_in} datagrams_out={datagrams_out}")?;
        }
        for (name, time) in [("connect_ms", self.connect_ms), ("first_byte_ms", self.first_byte_ms)] {
            if let Some(time) = time {
                write!(text, " {name}={time}")?;
            }
        }
        write!(text, " duration_ms={} reason={}", self.duration_ms, self.reason)?;
        match self.spliced {
            Some(is_spliced) => write!(text, " spliced={is_spliced}"),
            None => Ok(()),
        }
    }
}
