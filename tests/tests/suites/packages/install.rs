//! `packaging/install`: the same files without a package.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use testkit::machine::{self, Booted, Machine};
use testkit::process::{Output, run};
use testkit::require;
use testkit::rproxy::{target_with_manuals, tree};
use testkit::suite::Case;

use super::{DEADLINE, packaging};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("everything goes into a directory, and away again", directory).deadline(DEADLINE),
        Case::new("a changed configuration stays", changed).deadline(DEADLINE),
        Case::new("mistakes are named", mistakes).deadline(DEADLINE),
        Case::new("a machine is as it was", live).needs(machine::NEEDS).deadline(DEADLINE),
    ]
}

fn install(destination: &Path, prefix: &str, arguments: &[&str]) -> Output {
    packaging("install", |command| {
        command.args(arguments).env("DESTDIR", destination).env("PREFIX", prefix);
    })
}

/// The files below a directory.
fn files(root: &Path) -> BTreeSet<String> {
    let mut find = require::command("find");
    find.arg(root).args(["-mindepth", "1", "-printf", "/%P\n"]);
    run(find).success().lines().map(String::from).collect()
}

fn directory() {
    for (prefix, etc) in [("/usr/local", "/etc"), ("/opt/rproxy", "/opt/rproxy/etc")] {
        let temp = tempfile::tempdir().unwrap();
        let destination = temp.path().join("destination");
        install(&destination, prefix, &[]).success();
        let first = files(&destination);
        let read = |path: &str| fs::read_to_string(destination.join(path.trim_start_matches('/'))).unwrap();
        let unit = read(&format!("{prefix}/lib/systemd/system/rproxy.service"));
        assert!(
            unit.contains(&format!("ExecStart={prefix}/bin/rproxy --config {etc}/rproxy/rproxy.toml")),
            "{unit}"
        );
        // Whatever is listed is there, and the other way round.
        let listed = read(&format!("{prefix}/share/rproxy/installed"));
        let listed = listed.lines().map(|path| path.trim_end_matches('/').to_owned()).collect();
        assert_eq!(first, listed);
        // Again, as for a new version, of which a file has gone.
        let gone = destination.join(prefix.trim_start_matches('/')).join("bin/of-the-old-version");
        fs::write(&gone, "").unwrap();
        let list = destination.join(format!("{prefix}/share/rproxy/installed").trim_start_matches('/'));
        fs::write(&list, format!("{}{prefix}/bin/of-the-old-version\n", fs::read_to_string(&list).unwrap()))
            .unwrap();
        install(&destination, prefix, &["--strip"]).success();
        assert_eq!(files(&destination), first);
        install(&destination, prefix, &["--remove"]).success();
        assert_eq!(files(&destination), BTreeSet::new());
    }
}

fn changed() {
    let temp = tempfile::tempdir().unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    let file = temp.path().join("etc/rproxy/rproxy.toml");
    fs::write(&file, "mapping = []\n").unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    assert_eq!(fs::read_to_string(&file).unwrap(), "mapping = []\n");
    let removed = install(temp.path(), "/usr/local", &["--remove"]).success();
    assert!(removed.contains("etc/rproxy/rproxy.toml stays, because it was changed"), "{removed}");
    let left = ["/etc", "/etc/rproxy", "/etc/rproxy/rproxy.toml"].map(String::from);
    assert_eq!(files(temp.path()), left.into());
}

fn mistakes() {
    let temp = tempfile::tempdir().unwrap();
    for (prefix, arguments, status, part) in [
        ("/usr/local", &["--strp"][..], 2, "--strp is unknown; usage:"),
        ("/usr/local", &["--strip", "--remove"], 2, "--remove is one argument too many"),
        ("usr", &[], 2, "PREFIX: usr is not an absolute path"),
        ("/usr/local", &["--remove"], 1, "so nothing was installed there"),
    ] {
        let output = install(temp.path(), prefix, arguments);
        assert_eq!(output.status.code(), Some(status), "{output:#?}");
        assert!(output.stderr.contains(part) && output.stderr.lines().count() == 1, "{part}: {output:#?}");
    }
    let unbuilt = packaging("install", |command| {
        command.env("CARGO_TARGET_DIR", temp.path()).env("DESTDIR", temp.path());
    });
    assert!(unbuilt.stderr.contains("run: cargo build --release --workspace"), "{unbuilt:#?}");
    assert_eq!(files(temp.path()), BTreeSet::new());
}

/// With the units, the user and the directories.
fn live() {
    let target = target_with_manuals();
    let machine = Machine::boot(&[tree(), target]);
    let before = machine.written();
    let script = |arguments: &str| {
        let (tree, target) = (tree().display(), target.display());
        machine.sh(&format!("CARGO_TARGET_DIR='{target}' '{tree}/packaging/install' {arguments}")).success();
    };
    script("");
    machine.sh("systemctl enable --now rproxy rproxy-attach").success();
    machine.sh("rproxy ctl list").success();
    script("--strip");
    assert_eq!(machine.sh("systemctl is-active rproxy").stdout, "active\n");
    script("--remove");
    assert_eq!(machine.sh("pgrep --list-full rproxy").stdout, "");
    let after = machine.written();
    let left: Vec<_> =
        after.difference(&before).filter(|path| path.contains("rproxy") || path.contains("netns")).collect();
    assert_eq!(left, Vec::<&String>::new());
    assert!(!machine.sh("getent passwd rproxy").status.success(), "the user is still there");
}
