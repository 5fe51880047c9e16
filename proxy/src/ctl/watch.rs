//! `rproxy ctl stats`: looks at the counters once, or again and again. A terminal is redrawn in place; anything else gets
//! one table, or one line of JSON, after the other.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::screen::{Event, Screen, end_by};
use super::stats::{History, Look, View};
use super::stats_table::{Fit, cut, fitted, whole};
use super::table::human_rate;
use super::{Connection, CtlError};
use crate::cli::ctl::{Ctl, StatsArgs};
use crate::control::protocol::Request;
use crate::log::console;

/// The pause before the next look after one that took longer than the interval, so that the server can rest.
const LEAST_PAUSE: Duration = Duration::from_millis(200);

/// Shows the counters.
pub(super) fn stats(ctl: &Ctl, args: &StatsArgs) -> Result<(), CtlError> {
    let begun = Instant::now();
    let mut history = History::default();
    let view = View::of(look(ctl.control())?, args, &mut history)?;
    if let Some(pattern) = view.missing(args) {
        return Err(CtlError::NoMapping(pattern.to_string()));
    }
    let Some(seconds) = args.watch else {
        console::out(&shown(view, ctl.json, false));
        return Ok(());
    };
    let watch = Watch { ctl, args, every: Duration::from_secs(seconds), history, view };
    match !ctl.json && can_be_redrawn() {
        true => watch.redraw(begun),
        false => watch.repeat(begun),
    }
}

/// Whether standard output is a terminal that understands control sequences.
fn can_be_redrawn() -> bool {
    let terminal = std::env::var_os("TERM").unwrap_or_default();
    io::stdout().is_terminal() && !terminal.is_empty() && terminal != "dumb"
}

/// Asks for the counters, on a connection of its own: the server ends those that are quiet for long.
fn look(control: &Path) -> Result<Look, CtlError> {
    let answer = Connection::open(control)?.ask(Request::Stats)?;
    Ok(Look { at: Instant::now(), answer })
}

fn shown(view: View, is_json: bool, is_repeated: bool) -> String {
    match is_json {
        true => view.into_json(is_repeated).to_string(),
        false => whole(&view, is_repeated),
    }
}

/// Counters that are looked at again and again.
struct Watch<'a> {
    ctl: &'a Ctl,
    args: &'a StatsArgs,
    every: Duration,
    history: History,
    view: View,
}

impl Watch<'_> {
    /// Prints what is seen, until nobody reads it. If the server is gone, says so, and waits for the next one.
    fn repeat(self, mut begun: Instant) -> Result<(), CtlError> {
        let Self { ctl, args, every, mut history, view } = self;
        let (mut view, mut is_away, mut is_first) = (Some(view), false, true);
        loop {
            if let Some(view) = view.take() {
                let blank = if ctl.json || is_first { "" } else { "\n" };
                let text = format!("{blank}{}\n", shown(view, ctl.json, true));
                if !write(&text)? {
                    return Ok(());
                }
                is_first = false;
            }
            if is_unread_for(next_look(begun, every))? {
                return Ok(());
            }
            begun = Instant::now();
            match look(ctl.control()) {
                Ok(look) => {
                    if std::mem::take(&mut is_away) {
                        console::err(&"rproxy: a running rproxy answers again");
                    }
                    view = Some(View::of(look, args, &mut history)?);
                }
                Err(error) if error.is_passing() => {
                    history.clear();
                    if !std::mem::replace(&mut is_away, true) {
                        console::err(&format_args!("rproxy: {error}; looking again every {every:?}"));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Shows what is seen on the terminal, until the user or a signal ends it.
    fn redraw(self, begun: Instant) -> Result<(), CtlError> {
        let Self { ctl, args, every, mut history, mut view } = self;
        let mut screen = Screen::open().map_err(CtlError::Terminal)?;
        let asker = Asker::start(ctl.control().to_owned()).map_err(CtlError::Terminal)?;
        let (mut trouble, mut asked) = (None, None);
        let mut due = next_look(begun, every);
        let mut is_stale = true;
        let end = loop {
            if is_stale && !screen.is_behind() {
                let size = screen.size();
                screen
                    .draw(&page(&view, args, every, trouble.as_deref(), size))
                    .map_err(CtlError::Terminal)?;
                is_stale = false;
            }
            if asked.is_none() && Instant::now() >= due {
                asker.ask();
                asked = Some(Instant::now());
            }
            // While an answer is awaited, the user sees how long.
            let until = if asked.is_some() { Instant::now() + Duration::from_secs(1) } else { due };
            match screen.wait(until, &asker.told).map_err(CtlError::Terminal)? {
                Event::Quit => break None,
                Event::Signal(signal) => break Some(signal),
                Event::Redraw => is_stale = true,
                Event::Nothing => {
                    if let Some(asked) = asked {
                        let waiting = asked.elapsed().as_secs().max(1);
                        trouble = Some(format!("the running rproxy has not answered for {waiting} s"));
                        is_stale = true;
                    }
                }
                Event::Told => {
                    let Ok(answer) = asker.answers.try_recv() else { continue };
                    due = next_look(asked.take().unwrap_or_else(Instant::now), every);
                    is_stale = true;
                    trouble = match answer {
                        Ok(look) => {
                            view = View::of(look, args, &mut history)?;
                            None
                        }
                        Err(error) if error.is_passing() => {
                            history.clear();
                            Some(format!("not up to date: {error}"))
                        }
                        Err(error) => return Err(error),
                    };
                }
            }
        };
        drop(screen);
        end.map_or(Ok(()), |signal| end_by(signal).map_err(CtlError::Terminal))
    }
}

/// When to look next, after a look that began at `begun`.
fn next_look(begun: Instant, every: Duration) -> Instant {
    (begun + every).max(Instant::now() + LEAST_PAUSE)
}

/// What a terminal of a size shows: the sums, what is wrong, and the table.
fn page(
    view: &View,
    args: &StatsArgs,
    every: Duration,
    trouble: Option<&str>,
    (width, height): (usize, usize),
) -> Vec<String> {
    let mut lines = vec![cut(&summary(view, every), width)];
    let trouble: Vec<char> = trouble.unwrap_or_default().chars().collect();
    lines.extend(trouble.chunks(width.max(1)).map(String::from_iter));
    if trouble.is_empty() {
        lines.push(String::new());
    }
    let height_left = height.saturating_sub(lines.len());
    lines.extend(fitted(view, Fit { width, height: height_left, sort: args.sort }));
    lines.truncate(height);
    lines
}

/// The sums of all mappings that are shown.
fn summary(view: &View, every: Duration) -> String {
    let sum = |count: fn(&super::stats::Row) -> u64| view.rows.iter().map(count).sum::<u64>();
    let rates = || view.rows.iter().filter_map(|row| row.rates);
    let (bytes_in, bytes_out) =
        (rates().map(|rates| rates.bytes_in).sum(), rates().map(|rates| rates.bytes_out).sum());
    let (mappings, connections, flows) =
        (view.rows.len(), sum(|row| row.stats.connections), sum(|row| row.stats.flows));
    let (bytes_in, bytes_out) = (human_rate(bytes_in), human_rate(bytes_out));
    format!(
        "{mappings} mappings, {connections} connections, {flows} flows, {bytes_in}B/s in, {bytes_out}B/s out; \
         every {every:?}, q ends"
    )
}

/// Writes to standard output. Returns whether there is somebody who reads it.
fn write(text: &str) -> Result<bool, CtlError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CtlError::Output(error)),
    }
}

/// Waits until a time, or until nobody reads standard output any more. Returns whether that is so.
fn is_unread_for(until: Instant) -> Result<bool, CtlError> {
    let out = io::stdout();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(out.as_fd(), PollFlags::empty())];
        match poll(&mut fds, left) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(CtlError::Output(error.into())),
        }
    }
}

/// A thread that asks for the counters, so that a server that does not answer holds up neither keys nor signals.
struct Asker {
    requests: mpsc::Sender<()>,
    answers: mpsc::Receiver<Result<Look, CtlError>>,
    /// Ready once there is an answer.
    told: Arc<EventFd>,
}

impl Asker {
    fn start(control: PathBuf) -> io::Result<Self> {
        let (requests, asked) = mpsc::channel::<()>();
        let (answer, answers) = mpsc::channel();
        let told = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let tell = told.clone();
        thread::Builder::new().spawn(move || {
            while asked.recv().is_ok() {
                if answer.send(look(&control)).is_err() || tell.write(1).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { requests, answers, told })
    }

    /// Asks for an answer. One is asked for at a time.
    fn ask(&self) {
        // The thread ends only after this value.
        self.requests.send(()).ok();
    }
}
