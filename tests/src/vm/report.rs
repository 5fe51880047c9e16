//! What a machine reports over its console: a line when a case begins, its output if it fails, and a line with its end.

use std::fs;

use libtest_mimic::Failed;

/// Before each line of a report.
const MARK: &str = "== case";

/// What became of a case.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Passed,
    /// It failed, with this output.
    Failed(String),
    /// It never ended, or never began; the last lines of the console say more.
    Missing(String),
}

/// A case begins.
#[expect(clippy::print_stdout, reason = "the report")]
pub(super) fn begin(name: &str) {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("up for {} s", uptime.split(' ').next().unwrap_or_default());
    println!("{MARK} begins: {name}");
}

/// A case has ended; there is none of that name if it has no outcome.
#[expect(clippy::print_stdout, reason = "the report")]
pub(super) fn end(name: &str, outcome: Option<Result<(), Failed>>) {
    match outcome {
        Some(Ok(())) => println!("{MARK} passed: {name}"),
        Some(Err(failure)) => println!("{}\n{MARK} failed: {name}", failure.message().unwrap_or_default()),
        None => println!("there is no such case\n{MARK} failed: {name}"),
    }
}

/// What the console says of a case.
pub(super) fn verdict(console: &str, name: &str) -> Verdict {
    let lines: Vec<&str> = console.lines().map(|line| line.trim_end_matches('\r')).collect();
    let find = |what: &str| lines.iter().position(|line| *line == format!("{MARK} {what}: {name}"));
    match (find("begins"), find("passed"), find("failed")) {
        (Some(_begin), Some(_end), None) => Verdict::Passed,
        (Some(begin), None, Some(end)) => Verdict::Failed(lines[begin + 1..end].join("\n")),
        _ => Verdict::Missing(lines[lines.len().saturating_sub(40)..].join("\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_has_its_own_verdict() {
        let console = "booting\r\n== case begins: a::b c\r\n== case passed: a::b c\r\n\
                       == case begins: d\r\nassertion\r\nfailed\r\n== case failed: d\r\n== case begins: e\r\n";
        assert_eq!(verdict(console, "a::b c"), Verdict::Passed);
        assert_eq!(verdict(console, "d"), Verdict::Failed("assertion\nfailed".to_owned()));
        assert!(matches!(verdict(console, "e"), Verdict::Missing(_)));
        assert!(matches!(verdict("", "e"), Verdict::Missing(text) if text.is_empty()));
    }
}
