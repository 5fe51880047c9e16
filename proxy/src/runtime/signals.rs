//! Signals, read from a signalfd(2). One descriptor serves several signals; a handler for each would take as
//! much memory as a small mapping.

use std::io;
use std::mem::size_of;

use nix::libc::signalfd_siginfo;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::read;
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tracing::{error, warn};

/// A set of signals, blocked and queued from construction on.
#[derive(Debug)]
pub struct Signals(Watched);

impl Signals {
    /// Blocks `signals` and queues them. Call it before the process has other threads: a thread that does not
    /// block them would be killed by them.
    ///
    /// # Errors
    /// Those of sigprocmask(2), signalfd(2) and epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn catch(signals: impl IntoIterator<Item = Signal>) -> io::Result<Self> {
        let mask: SigSet = signals.into_iter().collect();
        // Threads started later inherit the mask; programs that std executes do not.
        mask.thread_block()?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Watched::new(fd, Interest::READABLE).map(Self)
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    /// Those of read(2).
    pub async fn next(&mut self) -> io::Result<Signal> {
        let mut info = [0; size_of::<signalfd_siginfo>()];
        self.0.io(Interest::READABLE, |fd| Ok(read(fd, &mut info)?)).await?;
        // The record begins with the number.
        let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        Ok(Signal::try_from(number)?)
    }
}

/// `SIGTERM`, `SIGINT` and `SIGQUIT`, which ask the process to end, and signals without a meaning to it. By
/// default, the latter would also end the process, without a drain.
#[derive(Debug)]
pub struct StopSignals(Signals);

impl StopSignals {
    /// Starts to catch them, and the `meaningless` ones.
    ///
    /// # Errors
    /// Those of [`Signals::catch`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn catch(meaningless: &[Signal]) -> io::Result<Self> {
        let stop = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT];
        Signals::catch(stop.iter().chain(meaningless).copied()).map(Self)
    }

    /// Waits for the next signal that asks the process to end, and returns its name. Others are logged.
    pub async fn next(&mut self) -> &'static str {
        loop {
            match self.0.next().await {
                Ok(signal @ (Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT)) => return signal.as_str(),
                Ok(signal) => warn!("{}", ignored(signal)),
                Err(error) => {
                    // There is no other way to stop the process now.
                    error!(%error, "cannot read signals");
                    return "no signal";
                }
            }
        }
    }
}

/// Why a signal is ignored.
fn ignored(signal: Signal) -> String {
    let reason = match signal {
        Signal::SIGHUP => "there is no --config to reload",
        Signal::SIGUSR2 => "a proxy started by dockerd cannot be upgraded",
        _ => "rproxy does not use it",
    };
    format!("{signal} is ignored: {reason}; SIGTERM ends this process")
}
