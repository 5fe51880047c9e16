//! The log, which is the standard error of the supervisor. What the relay says comes by a pipe, so that one process writes
//! all of it, and can shorten it: it is in memory (`/run`), and a relay runs for months.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The longest log, in bytes. Its newer half is kept when it would be longer.
const LONGEST: u64 = 1024 * 1024;

/// The longest line that is written as a whole, in bytes.
const LINE: u64 = 16 * 1024;

/// The stack of a thread that passes lines on, in bytes.
const STACK: usize = 128 * 1024;

/// How long a relay's last lines are waited for.
const LAST_LINES: Duration = Duration::from_millis(200);

/// One line at a time.
static WRITING: Mutex<()> = Mutex::new(());

/// Writes a line to the log.
pub(super) fn log(line: &str) {
    write(format!("netns-setup: {line}\n").as_bytes());
}

/// Lines of a relay, which come until it has ended.
#[derive(Debug)]
pub(super) struct Lines(Receiver<()>);

impl Lines {
    /// Passes the lines on to the log.
    ///
    /// # Errors
    /// If there can be no thread for that.
    pub(super) fn follow(from: impl Read + Send + 'static) -> io::Result<Self> {
        let (end, ended) = mpsc::channel();
        let pass_on = move || {
            let (mut from, mut line) = (BufReader::new(from), Vec::new());
            while from.by_ref().take(LINE).read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                write(&line);
                line.clear();
            }
            drop(end);
        };
        thread::Builder::new().name("log".to_owned()).stack_size(STACK).spawn(pass_on)?;
        Ok(Self(ended))
    }

    /// Waits for the last ones of a relay that has ended.
    pub(super) fn finish(self) {
        // Another process may have its standard error, and say more.
        let _ended: Result<(), RecvTimeoutError> = self.0.recv_timeout(LAST_LINES);
    }
}

fn write(line: &[u8]) {
    let _one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut log = io::stderr();
    // There is nowhere to report an error.
    if let Ok(file) = log.as_fd().try_clone_to_owned() {
        drop(make_room(&File::from(file), line.len() as u64, LONGEST));
    }
    drop(log.write_all(line));
}

/// Removes the older half of a log that would be longer than `longest` with `more` bytes. Nobody else may write meanwhile.
fn make_room(mut log: &File, more: u64, longest: u64) -> io::Result<()> {
    let metadata = log.metadata()?;
    // Somebody may have started this process with a terminal.
    if !metadata.is_file() || metadata.len() + more <= longest {
        return Ok(());
    }
    let from = metadata.len().saturating_sub(longest / 2);
    let mut kept = Vec::new();
    while kept.len() as u64 + from < metadata.len() {
        let mut part = [0; 4096];
        let length = log.read_at(&mut part, from + kept.len() as u64)?;
        if length == 0 {
            break;
        }
        kept.extend_from_slice(&part[..length]);
    }
    let begin = kept.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    log.set_len(0)?;
    log.write_all(&kept[begin..])
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn a_log_keeps_its_newest_lines() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("log");
        let mut log = OpenOptions::new().read(true).append(true).create(true).open(&path).unwrap();
        for number in 0..1000 {
            let line = format!("line {number}\n");
            make_room(&log, line.len() as u64, 20_000).unwrap();
            log.write_all(line.as_bytes()).unwrap();
            assert!(log.metadata().unwrap().len() <= 20_000);
        }
        // 8,890 bytes are no reason to remove any.
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("line 0\n") && text.ends_with("line 999\n"));
        make_room(&log, 1, 8_000).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let first: u32 = text.lines().next().unwrap().strip_prefix("line ").unwrap().parse().unwrap();
        let expected: String = (first..1000).map(|number| format!("line {number}\n")).collect();
        assert!(text == expected && (3_900..=4_000).contains(&text.len()), "{first} {}", text.len());
    }

    #[test]
    fn what_is_no_file_is_left() {
        let pipe = io::pipe().unwrap();
        make_room(&File::from(std::os::fd::OwnedFd::from(pipe.1)), 1, 0).unwrap();
    }
}
