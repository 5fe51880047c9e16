//! The body of `/metrics`, written in parts as the client reads it: of ten thousand mappings, it has ten megabytes, of which
//! a client that does not read holds one small part.

use std::convert::Infallible;
use std::fmt;
use std::ops::Range;
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

/// How many mappings one part is about, each of which may have twenty lines.
const MAPPINGS: usize = 32;

/// Metrics that are being written.
pub(super) struct Exposition {
    snapshot: Arc<Snapshot>,
    format: Format,
    /// What is still to be written.
    rest: &'static [Write],
    /// How many mappings the first of these has written.
    written: usize,
    is_complete: bool,
}

impl Exposition {
    /// The metrics of `snapshot` in `format`.
    pub(super) fn new(snapshot: Snapshot, format: Format) -> Self {
        Self { snapshot: Arc::new(snapshot), format, rest: families::ALL, written: 0, is_complete: false }
    }

    /// The next part, or `None` after the last.
    fn part(&mut self) -> Option<String> {
        if self.is_complete {
            return None;
        }
        let Some((write, rest)) = self.rest.split_first() else {
            self.is_complete = true;
            let mut part = String::new();
            self.format.end(&mut part).expect("a string takes everything");
            return Some(part);
        };
        let (first, all) = (self.written, self.snapshot.server.counted.len());
        self.written = match write {
            Write::Process(_) => all,
            Write::Mappings(_) => all.min(first + MAPPINGS),
        };
        let mut part = self.encode(Families {
            snapshot: self.snapshot.clone(),
            write: *write,
            mappings: first..self.written,
        });
        if first > 0 {
            // The first part of a family describes it.
            part.drain(..described(&part));
        }
        if self.written == all {
            (self.rest, self.written) = (rest, 0);
        }
        Some(part)
    }

    fn encode(&self, families: Families) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(families));
        let mut part = String::new();
        self.format.write(&mut part, &registry).expect("a string takes everything");
        part
    }
}

/// The length of the lines that `part` begins with and that describe a family.
fn described(part: &str) -> usize {
    part.split_inclusive('\n').take_while(|line| line.starts_with('#')).map(str::len).sum()
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
    /// Which mappings it is about.
    mappings: Range<usize>,
}

impl Collector for Families {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        match self.write {
            Write::Process(write) => write(&self.snapshot, encoder),
            Write::Mappings(write) => write(&self.snapshot.server.counted[self.mappings.clone()], encoder),
        }
    }
}
