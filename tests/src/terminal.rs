//! A program on a terminal (a pseudo-terminal), and what the terminal shows.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use nix::pty::{OpenptyResult, openpty};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::process::{self, Process};
use crate::{eventually, require};

/// A program whose standard input and output are a terminal of its own, which also controls it: Ctrl-C reaches it.
pub struct Terminal {
    /// The program. Its standard error is captured.
    pub process: Process,
    master: File,
    /// Keeps the terminal open, so that its modes can be read once the program has ended.
    _slave: OwnedFd,
    display: Arc<Mutex<Display>>,
}

impl Terminal {
    /// Starts a command on a terminal of a size in columns and lines. Needs setsid(1).
    #[track_caller]
    pub fn start(command: &Command, size: (u16, u16)) -> Self {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let master = File::from(master);
        resize(&master, size);
        let mut setsid = require::command("setsid");
        setsid.arg("--ctty");
        // Of a known kind, unless the command says otherwise.
        setsid.env("TERM", "xterm");
        let mut command = process::prefixed(setsid, command);
        let standard = [0, 1].map(|child_fd| FdMapping { parent_fd: slave.try_clone().unwrap(), child_fd });
        command.fd_mappings(standard.into()).unwrap();
        let process = Process::spawn(command);
        let display = Arc::new(Mutex::new(Display::default()));
        let (mut reader, shown) = (master.try_clone().unwrap(), display.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                shown.lock().unwrap().take(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Self { process, master, _slave: slave, display }
    }

    /// Types keys.
    pub fn type_keys(&self, keys: &str) {
        (&self.master).write_all(keys.as_bytes()).unwrap();
    }

    /// Changes the size, in columns and lines.
    pub fn resize(&self, size: (u16, u16)) {
        let mut display = self.display.lock().unwrap();
        display.lines.truncate(size.1.into());
        resize(&self.master, size);
    }

    /// The lines that are shown, without trailing blanks.
    pub fn lines(&self) -> Vec<String> {
        self.display.lock().unwrap().lines.iter().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits until the lines are as `wanted`.
    #[track_caller]
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
        let lines = Mutex::new(Vec::new());
        eventually(&format!("the terminal shows {what}"), || {
            *lines.lock().unwrap() = self.lines();
            wanted(&lines.lock().unwrap())
        });
        lines.into_inner().unwrap()
    }

    /// Whether the program has taken it over: the alternate screen, no cursor, and no echo.
    pub fn is_taken_over(&self) -> bool {
        let display = self.display.lock().unwrap();
        let states = [display.is_alternate, display.is_cursor_hidden, display.is_unwrapped, !self.echoes()];
        assert!(states.iter().all(|state| *state == states[0]), "half taken over: {states:?}");
        states[0]
    }

    /// Waits until it is as it was before the program.
    #[track_caller]
    pub fn wait_until_restored(&self) {
        eventually("the terminal is restored", || {
            let display = self.display.lock().unwrap();
            let is_changed = display.is_alternate || display.is_cursor_hidden || display.is_unwrapped;
            !is_changed && self.echoes()
        });
    }

    fn echoes(&self) -> bool {
        tcgetattr(&self.master).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }
}

fn resize(master: &File, (columns, lines): (u16, u16)) {
    tcsetwinsize(master, Winsize { ws_col: columns, ws_row: lines, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

/// What a terminal shows that knows only the control sequences that `rproxy` may use. Others are a failure of the test.
#[derive(Default)]
struct Display {
    lines: Vec<String>,
    row: usize,
    is_alternate: bool,
    is_cursor_hidden: bool,
    is_unwrapped: bool,
    /// The start of a control sequence.
    escape: String,
    wrong: Vec<String>,
}

impl Display {
    fn take(&mut self, text: &str) {
        for character in text.chars() {
            match character {
                '\x1b' => self.escape = character.into(),
                _ if !self.escape.is_empty() => {
                    self.escape.push(character);
                    if character.is_ascii_alphabetic() {
                        let escape = std::mem::take(&mut self.escape);
                        self.control(&escape);
                    }
                }
                '\r' => {}
                '\n' => self.row += 1,
                _ => self.line().push(character),
            }
        }
    }

    fn line(&mut self) -> &mut String {
        if self.lines.len() <= self.row {
            self.lines.resize(self.row + 1, String::new());
        }
        &mut self.lines[self.row]
    }

    fn control(&mut self, escape: &str) {
        match escape {
            "\x1b[?1049h" | "\x1b[?1049l" => {
                self.is_alternate = escape.ends_with('h');
                self.lines.clear();
                self.row = 0;
            }
            "\x1b[?25h" | "\x1b[?25l" => self.is_cursor_hidden = escape.ends_with('l'),
            "\x1b[?7h" | "\x1b[?7l" => self.is_unwrapped = escape.ends_with('l'),
            "\x1b[H" => self.row = 0,
            "\x1b[K" => self.line().clear(),
            "\x1b[J" => self.lines.truncate(self.row),
            _ => self.wrong.push(escape.to_owned()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let display = self.display.lock().unwrap();
        if !thread::panicking() {
            assert!(display.wrong.is_empty(), "unknown control sequences: {:?}", display.wrong);
        }
    }
}
