//! Error messages for when descriptors run out.

use std::io;

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};

/// Formats `error`. If it is a lack of descriptors, of which at least `more` are needed, the message says how
/// to raise the limit.
pub(crate) fn explain(error: &io::Error, more: usize) -> String {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _hard)| soft);
            too_many(limit, u64::try_from(more).unwrap_or(u64::MAX))
        }
        Some(libc::ENFILE) => {
            format!("{error}: the machine's limit of open files is reached; raise fs.file-max with sysctl")
        }
        _ => error.to_string(),
    }
}

/// Whether an error means that descriptors have run out.
pub(crate) fn has_run_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The message for when `limit` descriptors are open and `more` are needed.
fn too_many(limit: u64, more: u64) -> String {
    let needed = limit.saturating_add(more);
    // Connections need descriptors, too.
    let enough = needed.saturating_mul(2).next_power_of_two();
    format!(
        "too many open files: {needed} descriptors are needed, and the limit is {limit}; set LimitNOFILE={enough} in \
         the unit, `ulimit -n {enough}` before the start, or --ulimit nofile={enough} for docker"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_descriptors_is_one() {
        let run_out = |errno| has_run_out(&io::Error::from_raw_os_error(errno));
        assert!(run_out(libc::EMFILE) && run_out(libc::ENFILE) && !run_out(libc::EADDRINUSE));
    }

    #[test]
    fn need_limit_and_remedy_are_named() {
        let message = explain(&io::Error::from_raw_os_error(libc::EMFILE), 1);
        let limit = getrlimit(Resource::RLIMIT_NOFILE).unwrap().0;
        assert!(
            message.contains(&format!("{} descriptors are needed, and the limit is {limit};", limit + 1)),
            "{message}"
        );
        assert!(too_many(1024, 9000).contains("LimitNOFILE=32768"), "{}", too_many(1024, 9000));
        assert!(explain(&io::Error::from_raw_os_error(libc::ENFILE), 1).contains("fs.file-max"));
        assert!(!explain(&io::Error::from_raw_os_error(libc::EINVAL), 1).contains("limit"));
    }
}
