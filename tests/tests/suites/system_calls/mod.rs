//! The number of system calls for serving: most of the relay's speed comes from avoiding calls. They are counted, not
//! timed, so that load on the machine does not matter. Each bound allows some additional calls, but not one more per
//! message.

mod idle;
mod tcp;
mod udp;

use testkit::require::Need;
use testkit::suite::Case;

/// As the event loops of different crates, and of different machines, ask for events.
const WAITS: [&str; 3] = ["epoll_wait", "epoll_pwait", "epoll_pwait2"];

/// The options of a process that records its connections and flows, and those of one that does not.
const UNRECORDED_AND_RECORDED: [&[&str]; 2] =
    [&[], &["--metrics", "127.0.0.1:0", "--access-log", "/dev/null"]];

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![idle, tcp, udp]
}

fn case(name: &str, body: fn()) -> Case {
    Case::new(name, body).needs(&[Need::Program("strace")])
}
