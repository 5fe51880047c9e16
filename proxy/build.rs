//! Tells the binary which commit it was built from, as `docker-proxy -v` does.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=../.git/HEAD");
    println!("cargo::rerun-if-changed=../.git/refs/heads");
    println!("cargo::rerun-if-env-changed=RPROXY_COMMIT");
    let commit = std::env::var("RPROXY_COMMIT").ok().or_else(git_commit);
    println!("cargo::rustc-env=RPROXY_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// The commit checked out, or `None` outside a git checkout (a source archive, say).
fn git_commit() -> Option<String> {
    let git = Command::new("git").args(["rev-parse", "--short=7", "HEAD"]).output().ok()?;
    git.status.success().then(|| String::from_utf8_lossy(&git.stdout).trim().to_owned())
}
