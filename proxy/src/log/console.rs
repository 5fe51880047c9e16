//! Output for the user or program that started the process. The reader may have closed its end, which must
//! not affect clients: a serving process ignores write errors.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use rproxy_mapping::escape::escaped;
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::runtime::Handle;

use crate::log::sink::Sink;

/// The last error of [`out`], except that the reader closed the pipe.
static UNWRITTEN: Mutex<Option<io::Error>> = Mutex::new(None);

/// Writes a line to standard output.
pub fn out(line: &impl Display) {
    if let Err(error) = writeln!(io::stdout().lock(), "{line}")
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        *UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Returns the exit status of a command whose purpose is its output: `status`, or failure if output was lost.
pub fn finish(status: ExitCode) -> ExitCode {
    match UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner).take() {
        None => status,
        Some(error) => fail(&format_args!("standard output: {error}")),
    }
}

/// Standard output of a serving process.
#[derive(Debug)]
pub struct Output(Sink);

impl Output {
    /// Opens a file if standard output is a terminal; call it before confinement forbids that.
    pub fn open() -> Self {
        Self(Sink::out())
    }

    /// Writes lines without blocking. What standard output does not accept now is written by a task on
    /// `runtime` when there is room.
    pub fn write(self, runtime: &Handle, lines: &[String]) {
        let rest = self.write_now(lines);
        if !rest.is_empty() {
            let Self(sink) = self;
            runtime.spawn(async move { drop(write_rest(&sink, &rest).await) });
        }
    }

    /// Writes lines without blocking, and returns what standard output does not accept now.
    pub fn write_now(&self, lines: &[String]) -> Vec<u8> {
        let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
        // On failure, nobody reads the lines.
        let written = self.0.write_now(text.as_bytes()).unwrap_or(text.len());
        text.as_bytes()[written..].to_vec()
    }
}

async fn write_rest(sink: &Sink, mut rest: &[u8]) -> io::Result<()> {
    let watched = Watched::new(sink.with_fd(|fd| fd.try_clone_to_owned())?, Interest::WRITABLE)?;
    while !rest.is_empty() {
        let write = |_fd: BorrowedFd<'_>| match sink.write_now(rest)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            written => Ok(written),
        };
        let written = watched.io(Interest::WRITABLE, write).await?;
        rest = &rest[written..];
    }
    Ok(())
}

/// Writes a line to standard error.
pub fn err(line: &impl Display) {
    // User input may contain control characters that a terminal interprets.
    let text = line.to_string();
    let lines: Vec<String> = text.split('\n').map(|line| escaped(line).to_string()).collect();
    drop(writeln!(io::stderr().lock(), "{}", lines.join("\n")));
}

/// Prints an error to standard error and returns the exit status for failure.
pub fn fail(error: &impl Display) -> ExitCode {
    for line in error.to_string().lines() {
        err(&format_args!("rproxy: {line}"));
    }
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::pty::{OpenptyResult, openpty};

    use super::*;
    use crate::log::sink::open_anew;
    use crate::runtime::new_runtime;

    #[test]
    fn what_there_is_no_room_for_is_written_as_it_is_read() {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let sink = Sink::Terminal(open_anew(slave.as_fd()).unwrap());
        let text = "line\n".repeat(100_000);
        let length = text.len();
        let reader = std::thread::spawn(move || {
            // A terminal sends a carriage return before each end of line.
            let mut read = vec![0; length + length / 5];
            io::Read::read_exact(&mut File::from(master), &mut read).unwrap();
            String::from_utf8(read).unwrap().replace('\r', "")
        });
        new_runtime().unwrap().block_on(write_rest(&sink, text.as_bytes())).unwrap();
        assert_eq!(reader.join().unwrap(), text);
    }
}
