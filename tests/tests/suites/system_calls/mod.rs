//! How many system calls serving takes: most of the relay's speed is calls that it does not make. They are counted, not
//! timed, so that a busy machine changes nothing; each bound has room for a call more here and there, and none for one
//! more per message.

mod idle;
mod tcp;
mod udp;

use testkit::require::Need;
use testkit::suite::Case;

/// As the event loops of different crates, and of different machines, ask for events.
const WAITS: [&str; 3] = ["epoll_wait", "epoll_pwait", "epoll_pwait2"];

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![idle, tcp, udp]
}

fn case(name: &str, body: fn()) -> Case {
    Case::new(name, body).needs(&[Need::Program("strace")])
}
