//! A terminal that is redrawn in place, by the control sequences that all terminals have in common (ECMA-48, and
//! xterm's alternate screen). It is left as it was found, however the program ends.

use std::io::{self, Read, Stdin};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getpid;
use rustix::termios::{self, Action, LocalModes, OptionalActions, Termios};

use crate::log::sink::Sink;

/// The alternate screen, without a cursor, and without a new line after a full one.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

/// The size of a terminal that does not tell it.
const USUAL_SIZE: (usize, usize) = (80, 24);

/// How long a terminal that is full may take for the end of what is written to it.
const LONGEST_FAREWELL: Duration = Duration::from_secs(1);

/// A terminal. Dropping it restores the terminal.
#[derive(Debug)]
pub(super) struct Screen {
    sink: Sink,
    /// What the terminal has not taken yet of the last frame.
    rest: Vec<u8>,
    signals: SignalFd,
    /// The keyboard, if standard input is one, and its modes before.
    keyboard: Option<(Stdin, Termios)>,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing, until the time was over.
    Nothing,
    /// The other thread has something.
    Told,
    /// The terminal has another size, or what it shows is lost.
    Redraw,
    /// The user asks for the end.
    Quit,
    /// A signal asks for the end.
    Signal(Signal),
}

impl Screen {
    /// Takes over the terminal. Blocks the signals that end or stop the program; call it before there are other
    /// threads.
    ///
    /// # Errors
    /// Those of sigprocmask(2), signalfd(2) and write(2).
    pub(super) fn open() -> io::Result<Self> {
        let signals = caught();
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let input = io::stdin();
        let keyboard = termios::tcgetattr(&input).ok().map(|modes| (input, modes));
        let mut screen = Self { sink: Sink::out(), rest: Vec::new(), signals, keyboard };
        screen.enter()?;
        Ok(screen)
    }

    fn enter(&mut self) -> io::Result<()> {
        if let Some((keyboard, modes)) = &self.keyboard {
            let mut modes = modes.clone();
            modes.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            termios::tcsetattr(keyboard, OptionalActions::Now, &modes)?;
        }
        self.write(ENTER.as_bytes())
    }

    /// Restores the terminal, also one that is stopped (Ctrl-S).
    fn leave(&mut self) {
        // What cannot be restored is gone, as after a hangup.
        // Linux continues what Ctrl-S has stopped only after another stop.
        for action in [Action::OOff, Action::OOn] {
            self.sink.with_fd(|fd| termios::tcflow(fd, action)).ok();
        }
        self.rest.extend_from_slice(LEAVE.as_bytes());
        let until = Instant::now() + LONGEST_FAREWELL;
        while self.flush().is_ok() && !self.rest.is_empty() && Instant::now() < until {
            let wait = PollTimeout::from(100_u8);
            self.sink.with_fd(|fd| poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], wait)).ok();
        }
        if let Some((keyboard, modes)) = &self.keyboard {
            termios::tcsetattr(keyboard, OptionalActions::Now, modes).ok();
        }
    }

    /// The number of columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        let size = self.sink.with_fd(|fd| termios::tcgetwinsize(fd));
        match size.map(|size| (size.ws_col.into(), size.ws_row.into())) {
            Ok((0, _) | (_, 0)) | Err(_) => USUAL_SIZE,
            Ok(size) => size,
        }
    }

    /// Whether the last frame is not written yet, because the terminal is stopped or slow.
    pub(super) fn is_behind(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Shows lines, which have to fit.
    ///
    /// # Errors
    /// Those of write(2).
    pub(super) fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        self.write(frame(lines, self.size().1).as_bytes())
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        self.rest.extend_from_slice(text);
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.sink.write_now(&self.rest)?;
        self.rest.drain(..written);
        Ok(())
    }

    /// Waits for the next event, until `until` at most. `told` is how another thread wakes this one up.
    ///
    /// # Errors
    /// Those of poll(2), and of a terminal that is gone.
    pub(super) fn wait(&mut self, until: Instant, told: &EventFd) -> io::Result<Event> {
        loop {
            let [signal, told_now, key, writable] = self.ready(until, told)?;
            if signal && let Some(event) = self.signal()? {
                return Ok(event);
            }
            if writable {
                self.flush()?;
            }
            if key && self.has_quit()? {
                return Ok(Event::Quit);
            }
            if told_now {
                told.read()?;
                return Ok(Event::Told);
            }
            if Instant::now() >= until {
                return Ok(Event::Nothing);
            }
        }
    }

    /// Which of signals, `told`, the keyboard and the terminal are ready.
    fn ready(&self, until: Instant, told: &EventFd) -> io::Result<[bool; 4]> {
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up, as the time would not be over otherwise.
        let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let keyboard = self.keyboard.as_ref().map(|(keyboard, _modes)| keyboard.as_fd());
        self.sink.with_fd(|terminal| {
            let write = if self.rest.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            let mut fds = vec![
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(told.as_fd(), PollFlags::POLLIN),
                PollFd::new(terminal, write),
            ];
            fds.extend(keyboard.map(|keyboard| PollFd::new(keyboard, PollFlags::POLLIN)));
            match poll(&mut fds, left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let is = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
            Ok([is(0), is(1), is(3), is(2)])
        })
    }

    /// The next signal; `None` if it was not for us.
    fn signal(&mut self) -> io::Result<Option<Event>> {
        let Some(info) = self.signals.read_signal()? else { return Ok(None) };
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        match Signal::try_from(number)? {
            Signal::SIGWINCH => Ok(Some(Event::Redraw)),
            Signal::SIGTSTP => {
                self.leave();
                nix::sys::signal::kill(getpid(), Signal::SIGSTOP)?;
                Ok(None)
            }
            Signal::SIGCONT => {
                self.enter()?;
                Ok(Some(Event::Redraw))
            }
            signal => Ok(Some(Event::Signal(signal))),
        }
    }

    /// Whether the user has pressed q or Ctrl-D, or the terminal is gone.
    fn has_quit(&mut self) -> io::Result<bool> {
        let Some((keyboard, _modes)) = &mut self.keyboard else { return Ok(false) };
        let mut keys = [0; 64];
        let read = keyboard.read(&mut keys)?;
        Ok(read == 0 || keys[..read].iter().any(|key| matches!(key, b'q' | b'Q' | 0x04)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The signals that end or stop the program, or say that the screen has changed.
fn caught() -> SigSet {
    use Signal::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};

    [SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGTSTP, SIGCONT, SIGWINCH].into_iter().collect()
}

/// Ends the program by a signal, as if it had not been caught: whoever started it sees that.
pub(super) fn end_by(signal: Signal) -> io::Result<()> {
    SigSet::from(signal).thread_unblock()?;
    nix::sys::signal::raise(signal)?;
    Ok(())
}

/// What draws `lines` on a screen of a height. Each line is cleared before it is written, because the last character of
/// a full one would be cleared afterwards.
fn frame(lines: &[String], height: usize) -> String {
    let mut frame = "\x1b[H".to_owned();
    for (index, line) in lines.iter().take(height).enumerate() {
        frame += if index == 0 { "\x1b[K" } else { "\r\n\x1b[K" };
        frame += line;
    }
    if lines.len() < height {
        frame += "\r\n\x1b[J";
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_clears_what_was_there_and_does_not_scroll() {
        let lines = ["one".to_owned(), "two".to_owned()];
        assert_eq!(frame(&lines, 3), "\x1b[H\x1b[Kone\r\n\x1b[Ktwo\r\n\x1b[J");
        assert_eq!(frame(&lines, 2), "\x1b[H\x1b[Kone\r\n\x1b[Ktwo");
        assert_eq!(frame(&lines, 1), "\x1b[H\x1b[Kone");
    }
}
