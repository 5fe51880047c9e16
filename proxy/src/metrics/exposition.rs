//! The body of `/metrics`, written in parts as the client reads it: of ten thousand mappings, it has ten megabytes.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;

use super::families::{self, Write};
use super::format::Format;
use super::snapshot::Snapshot;

/// Metrics that are being written.
pub(super) struct Exposition {
    snapshot: Arc<Snapshot>,
    format: Format,
    /// What is still to be written.
    rest: &'static [Write],
    is_complete: bool,
}

impl Exposition {
    /// The metrics of `snapshot` in `format`.
    pub(super) fn new(snapshot: Snapshot, format: Format) -> Self {
        Self { snapshot: Arc::new(snapshot), format, rest: families::ALL, is_complete: false }
    }

    /// The next part, or `None` after the last.
    fn part(&mut self) -> Option<String> {
        if self.is_complete {
            return None;
        }
        let mut part = String::new();
        let written = match self.rest.split_first() {
            Some((write, rest)) => {
                self.rest = rest;
                let mut registry = Registry::default();
                registry.register_collector(Box::new(Families {
                    snapshot: self.snapshot.clone(),
                    write: *write,
                }));
                self.format.write(&mut part, &registry)
            }
            None => {
                self.is_complete = true;
                self.format.end(&mut part)
            }
        };
        written.expect("a string takes everything");
        Some(part)
    }
}

impl Body for Exposition {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            match self.part() {
                // A frame without data would end a chunked body.
                Some(part) if part.is_empty() => {}
                Some(part) => return Poll::Ready(Some(Ok(Frame::data(part.into())))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_complete
    }
}

/// Some families, as prometheus-client takes them.
#[derive(Debug)]
struct Families {
    snapshot: Arc<Snapshot>,
    write: Write,
}

impl Collector for Families {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.write)(&self.snapshot, encoder)
    }
}
