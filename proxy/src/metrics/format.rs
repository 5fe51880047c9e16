//! The formats of `/metrics`, and which one a client prefers.

use std::fmt;

use hyper::header::{ACCEPT, HeaderMap};
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::registry::Registry;

/// A format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The text format of Prometheus, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The format that a request prefers (RFC 9110, section 12.5.1): OpenMetrics if it has more weight than text, or as much
    /// and is named.
    pub(super) fn preferred(headers: &HeaderMap) -> Self {
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let ranges: Vec<_> = accepted.flat_map(|value| value.split(',')).filter_map(parse).collect();
        // The most specific range that matches a media type is the one that counts for it.
        let of = |media: &str| ranges.iter().filter(|range| range.0 == media).map(|range| range.1).max();
        let named = of("application/openmetrics-text");
        let open_metrics = named.or_else(|| of("application/*")).or_else(|| of("*/*")).unwrap_or(0);
        let text = of("text/plain").or_else(|| of("text/*")).or_else(|| of("*/*")).unwrap_or(0);
        let is_preferred = open_metrics > text || (named.is_some() && open_metrics == text);
        if open_metrics > 0 && is_preferred { Self::OpenMetrics } else { Self::Text }
    }

    /// The value of `Content-Type`.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Text => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes the metrics of `registry`, which may be a part of all.
    pub(super) fn write(self, out: &mut String, registry: &Registry) -> fmt::Result {
        match self {
            Self::Text => prometheus_text::encode(out, registry),
            Self::OpenMetrics => text::encode_registry(out, registry),
        }
    }

    /// What follows the last metric.
    pub(super) fn end(self, out: &mut String) -> fmt::Result {
        match self {
            Self::Text => Ok(()),
            Self::OpenMetrics => text::encode_eof(out),
        }
    }
}

/// The media type of a range, in lower case, and its weight in thousandths; `None` for a version that is not written.
fn parse(range: &str) -> Option<(String, u32)> {
    let mut parts = range.split(';').map(str::trim);
    let media = parts.next().unwrap_or_default().to_ascii_lowercase();
    let mut weight = 1000;
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        let (name, value) = (name.trim(), value.trim().trim_matches('"'));
        if name.eq_ignore_ascii_case("q") {
            weight = thousandths(value);
        }
        let is_written = match media.as_str() {
            "application/openmetrics-text" => ["1.0.0", "0.0.1"].contains(&value),
            _ => value == "0.0.4",
        };
        if name.eq_ignore_ascii_case("version") && !is_written {
            return None;
        }
    }
    Some((media, weight))
}

/// A weight, which is 0 if it is malformed.
fn thousandths(weight: &str) -> u32 {
    let (whole, part) = weight.split_once('.').unwrap_or((weight, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if part.len() > 3 || !digits(part) {
        return 0;
    }
    let number = format!("{whole}{part:0<3}").parse().unwrap_or(0);
    if number > 1000 { 0 } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preferred(accept: &[&str]) -> Format {
        let mut headers = HeaderMap::new();
        for value in accept {
            headers.append(ACCEPT, value.parse().unwrap());
        }
        Format::preferred(&headers)
    }

    #[test]
    fn open_metrics_is_for_those_that_prefer_it() {
        // What Prometheus 2.42 and 3.0 send, without and with protocol buffers.
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,\
                            application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                            application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,\
                            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for accept in [
            &[prometheus_2][..],
            &[prometheus_3],
            &["application/openmetrics-text"],
            &["Application/OpenMetrics-Text ; Version=\"1.0.0\" ; Q=0.001"],
            &["text/plain;q=0.5", "application/openmetrics-text;q=0.5"],
            &["application/openmetrics-text;q=0.5 , */*;q=0.5"],
            &["application/openmetrics-text;q=0.5, text/plain;q=0.1, */*"],
            &["application/*, text/*;q=0.5"],
        ] {
            assert_eq!(preferred(accept), Format::OpenMetrics, "{accept:?}");
        }
        for accept in [
            &[][..],
            &["*/*"],
            &["application/openmetrics-text; q=0.5 , */*;q=0.6"],
            &["application/openmetrics-text;q=0.5, text/*;q=0.6"],
            &["application/openmetrics-text;q=0, application/*, text/plain;q=0.1"],
            &["application/openmetrics-text;version=2.0.0, */*"],
            &["text/html,application/xhtml+xml,*/*;q=0.8"],
            &["text/plain;version=0.0.4,application/openmetrics-text;q=0.9"],
            &["application/openmetrics-text;q=0"],
            &["application/openmetrics-text;q=1.5"],
            &["application/openmetrics-text;q=0.1234"],
            &["application/openmetrics-text;q=x"],
            &["application/openmetrics-text;version=2.0.0"],
            &["application/json"],
            &[",;=,;;q"],
        ] {
            assert_eq!(preferred(accept), Format::Text, "{accept:?}");
        }
    }
}
