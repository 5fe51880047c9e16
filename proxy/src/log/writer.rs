//! Standard error as the log writes to it: a log line never blocks. If there is no room for it, it is lost
//! and counted.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rproxy_mapping::escape::{escaped, is_plain};
use serde_json::json;

use crate::log::sink::Sink;

/// Lines that this process has lost.
static LOST: AtomicU64 = AtomicU64::new(0);

/// How many log lines this process has lost, because they did not fit standard error.
pub(crate) fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for programs.
    Json,
}

/// Writes each buffer as one line, or loses it.
#[derive(Debug)]
pub(crate) struct LogWriter {
    format: Format,
    sink: Sink,
    /// The unwritten end of the last line, written first.
    rest: Vec<u8>,
    /// Lines lost since the last one that was written.
    lost: u64,
}

impl LogWriter {
    /// Opens a file if standard error is a terminal.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, sink: Sink::err(), rest: Vec::new(), lost: 0 }
    }

    /// Writes `text` and keeps what does not fit. Returns whether any of it was written.
    fn put(&mut self, text: &[u8]) -> bool {
        let written = self.sink.write_now(text).unwrap_or(0);
        if written > 0 {
            self.rest = text[written..].to_vec();
        }
        written > 0
    }

    /// Writes the rest of the last line. Returns whether it is complete.
    fn finish(&mut self) -> bool {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() && !self.put(&rest) {
            self.rest = rest;
        }
        self.rest.is_empty()
    }

    /// The line that reports lost lines.
    fn note(&self) -> String {
        const MESSAGE: &str = "log lines were lost because nobody read them";
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        let lost = self.lost;
        match self.format {
            Format::Text => format!("{now}  WARN {MESSAGE} lines={lost}\n"),
            Format::Json => {
                let fields = json!({ "message": MESSAGE, "lines": lost });
                let note = json!({ "timestamp": now.to_string(), "level": "WARN", "fields": fields });
                format!("{note}\n")
            }
        }
    }
}

/// A line without control characters but its end. Values in it may come from the command line or the network.
fn shown(line: &[u8]) -> Cow<'_, [u8]> {
    let text = String::from_utf8_lossy(line);
    let body = text.strip_suffix('\n').unwrap_or(&text);
    match body.chars().all(is_plain) {
        true => line.into(),
        false => format!("{}\n", escaped(body)).into_bytes().into(),
    }
}

impl Write for LogWriter {
    /// Never fails: there is nowhere to report it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let shown = shown(line);
        let is_written = self.finish()
            && match self.lost {
                0 => self.put(&shown),
                // In one write, because there may be room for only one.
                _ => self.put(&[self.note().as_bytes(), &shown].concat()),
            };
        self.lost = if is_written { 0 } else { self.lost + 1 };
        LOST.fetch_add(u64::from(!is_written), Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::thread;

    use nix::pty::{OpenptyResult, openpty};

    use super::*;
    use crate::log::sink::open_anew;

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(*shown(b"INFO serving name=\"web\"\n"), *b"INFO serving name=\"web\"\n");
        let forged = b"WARN not reloaded: /etc/a\n2026-01-01 INFO b\x1b[2J\n";
        assert_eq!(*shown(forged), *b"WARN not reloaded: /etc/a\\n2026-01-01 INFO b\\u{1b}[2J\n");
    }

    #[test]
    fn lines_are_whole_or_missing_and_what_is_missing_is_told() {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let sink = Sink::Terminal(open_anew(slave.as_fd()).unwrap());
        let mut log = LogWriter { format: Format::Text, sink, rest: Vec::new(), lost: 0 };
        let line = format!("{}\n", "x".repeat(149));
        let mut lines = 0;
        while log.lost < 5 {
            log.write_all(line.as_bytes()).unwrap();
            lines += 1;
        }
        assert!(!log.rest.is_empty(), "a terminal takes part of a line");
        let reader = thread::spawn(move || {
            let lines = BufReader::new(File::from(master)).lines().map(Result::unwrap);
            lines.take_while(|line| line != "end").collect::<Vec<_>>()
        });
        while log.lost > 0 {
            log.write_all(line.as_bytes()).unwrap();
            lines += 1;
        }
        while !log.finish() {}
        log.write_all(b"end\n").unwrap();
        while !log.finish() {}
        let (whole, others): (Vec<_>, Vec<_>) =
            reader.join().unwrap().into_iter().partition(|read| *read == line.trim_end());
        // More than one if the terminal made room in between.
        let told = |note: &String| {
            let lost = note.split_once(" WARN log lines were lost because nobody read them lines=");
            lost.and_then(|(_time, lines)| lines.parse::<usize>().ok()).unwrap_or_else(|| panic!("{note}"))
        };
        assert_eq!(others.iter().map(told).sum::<usize>(), lines - whole.len());
        assert!(!others.is_empty());
    }
}
