//! `packaging/install`: the same files without a package.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use testkit::machine::{self, Booted, Machine};
use testkit::process::{Output, run};
use testkit::require;
use testkit::rproxy::{target_with_manuals, tree};
use testkit::suite::Case;

use super::{DEADLINE, DEBHELPER, build, packaging};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("everything goes into a directory, and away again", directory).deadline(DEADLINE),
        Case::new("a changed configuration stays", changed).deadline(DEADLINE),
        Case::new("mistakes are named", mistakes).deadline(DEADLINE),
        Case::new("the default is replaced by that of a new version", default).deadline(DEADLINE),
        Case::new("others can read what is installed, whatever the umask", readable).deadline(DEADLINE),
        Case::new("a directory is found from where the script is called", relative).deadline(DEADLINE),
        Case::new("a failure takes back what was made", taken_back).deadline(DEADLINE),
        Case::new("what others have beside it stays", beside_others).deadline(DEADLINE),
        Case::new("what an earlier version had goes, also after a failure", earlier).deadline(DEADLINE),
        Case::new("a machine is as it was", live).needs(machine::NEEDS).deadline(DEADLINE),
        Case::new("a package keeps what it has, too", beside_package)
            .needs(machine::NEEDS)
            .needs(DEBHELPER)
            .deadline(DEADLINE),
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
        ("/opt/my app", &[], 2, "PREFIX: /opt/my app has more than letters"),
        ("/opt/a&b", &[], 2, "PREFIX: /opt/a&b has more than letters"),
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

fn default() {
    let temp = tempfile::tempdir().unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    // As if it were the default of an earlier version.
    let [file, example] = ["etc/rproxy/rproxy.toml", "usr/local/share/doc/rproxy/examples/rproxy.toml"]
        .map(|path| temp.path().join(path));
    let new = fs::read_to_string(&file).unwrap();
    for path in [&file, &example] {
        fs::write(path, format!("# Of an earlier version.\n{new}")).unwrap();
    }
    install(temp.path(), "/usr/local", &[]).success();
    assert_eq!(fs::read_to_string(&file).unwrap(), new);
    install(temp.path(), "/usr/local", &["--remove"]).success();
    assert_eq!(files(temp.path()), BTreeSet::new());
}

fn readable() {
    let temp = tempfile::tempdir().unwrap();
    let mut shell = require::command("sh");
    shell.args(["-c", "umask 077 && \"$0\""]).arg(tree().join("packaging/install"));
    shell.env("CARGO_TARGET_DIR", target_with_manuals()).env("DESTDIR", temp.path());
    run(shell).success();
    let mut find = require::command("find");
    find.arg(temp.path()).args(["-mindepth", "1", "-not", "-perm", "-444"]);
    find.args(["-or", "-mindepth", "1", "-type", "d", "-not", "-perm", "755"]);
    assert_eq!(run(find).success(), "");
}

fn relative() {
    let temp = tempfile::tempdir().unwrap();
    let in_temp = |arguments: &[&str]| {
        let change = |command: &mut Command| {
            command.args(arguments).env("DESTDIR", "destination").current_dir(temp.path());
        };
        packaging("install", change).success();
    };
    in_temp(&[]);
    assert!(temp.path().join("destination/usr/local/bin/rproxy").exists());
    in_temp(&["--remove"]);
    assert_eq!(files(&temp.path().join("destination")), BTreeSet::new());
}

/// The reason is told. What was there before stays, and can be removed.
fn taken_back() {
    let temp = tempfile::tempdir().unwrap();
    let obstacle = temp.path().join("usr/local/bin/netns-setup");
    fs::create_dir_all(&obstacle).unwrap();
    let before = files(temp.path());
    let fails = |part: &str, arguments: &[&str]| {
        let failed = install(temp.path(), "/usr/local", arguments);
        assert_eq!(failed.status.code(), Some(1), "{failed:#?}");
        assert!(failed.stderr.contains(part) && failed.stderr.lines().count() == 1, "{part}: {failed:#?}");
    };
    fails("cannot overwrite directory", &[]);
    assert_eq!(files(temp.path()), before);
    fs::remove_dir(&obstacle).unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    let installed = files(temp.path());
    fs::remove_file(&obstacle).unwrap();
    fs::create_dir(&obstacle).unwrap();
    fails("cannot overwrite directory", &[]);
    assert_eq!(files(temp.path()), installed);
    // A removal that fails can be repeated.
    fails("Is a directory", &["--remove"]);
    fs::remove_dir(&obstacle).unwrap();
    install(temp.path(), "/usr/local", &["--remove"]).success();
    assert_eq!(files(temp.path()), ["/usr", "/usr/local", "/usr/local/bin"].map(String::from).into());
}

fn beside_others() {
    let temp = tempfile::tempdir().unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    let [draft, directory, config] =
        ["etc/rproxy/rproxy.toml.new", "usr/local/bin/rproxy.new", "etc/rproxy/rproxy.toml"]
            .map(|path| temp.path().join(path));
    fs::write(&draft, "a draft").unwrap();
    fs::create_dir(&directory).unwrap();
    // What it leads to may not be mounted yet.
    fs::remove_file(&config).unwrap();
    symlink("/nonexistent/rproxy.toml", &config).unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    install(temp.path(), "/usr/local", &["--remove"]).success();
    assert_eq!(fs::read_to_string(&draft).unwrap(), "a draft");
    assert!(directory.is_dir() && config.is_symlink());
}

fn earlier() {
    let temp = tempfile::tempdir().unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    let installed = files(temp.path());
    let names = ["/usr/local/bin/old", "/usr/local/bin/older"];
    let [old, obstacle] = names.map(|name| temp.path().join(name.trim_start_matches('/')));
    let list = temp.path().join("usr/local/share/rproxy/installed");
    let listed = fs::read_to_string(&list).unwrap();
    fs::write(&list, format!("{listed}{}\n{}\n", names[0], names[1])).unwrap();
    fs::write(&old, "").unwrap();
    fs::create_dir(&obstacle).unwrap();
    let failed = install(temp.path(), "/usr/local", &[]);
    assert!(failed.status.code() == Some(1) && failed.stderr.contains("Is a directory"), "{failed:#?}");
    assert!(!old.exists(), "it goes although the other one cannot");
    fs::remove_dir(&obstacle).unwrap();
    fs::write(&obstacle, "").unwrap();
    install(temp.path(), "/usr/local", &[]).success();
    assert_eq!(files(temp.path()), installed);
    let sorted = |listed: &str| listed.lines().map(String::from).collect::<BTreeSet<_>>();
    assert_eq!(sorted(&fs::read_to_string(&list).unwrap()), sorted(&listed));
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
    machine.sh("systemctl reload rproxy-attach").success();
    // A program that cannot take over.
    machine.sh("ln -s -f /bin/false /usr/local/bin/rproxy").success();
    let refused = machine.sh("systemctl reload rproxy-attach");
    assert!(
        !refused.status.success() && refused.stderr.contains("rproxy-attach.service failed"),
        "{refused:#?}"
    );
    script("--strip");
    assert_eq!(machine.sh("systemctl is-active rproxy").stdout, "active\n");
    // A unit that is gone does not keep the others.
    machine.sh("rm /usr/local/lib/systemd/system/netns-setup-watch.service").success();
    script("--remove");
    assert_eq!(machine.sh("pgrep --list-full rproxy").stdout, "");
    let after = machine.written();
    let left: Vec<_> =
        after.difference(&before).filter(|path| path.contains("rproxy") || path.contains("netns")).collect();
    assert_eq!(left, Vec::<&String>::new());
    assert!(!machine.sh("getent passwd rproxy").status.success(), "the user is still there");
}

/// The configuration, the user, and a unit that runs.
fn beside_package() {
    let target = target_with_manuals();
    let machine = Machine::boot(&[tree(), target]);
    build(machine.shared(), "1.0-1", |command| {
        command.env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    });
    let script = |variables: &str, arguments: &str| {
        let (tree, target) = (tree().display(), target.display());
        machine.sh(&format!("CARGO_TARGET_DIR='{target}' {variables} '{tree}/packaging/install' {arguments}"))
    };
    script("", "").success();
    machine.sh("systemctl enable --now rproxy").success();
    let installed = machine.sh("dpkg --install /run/host/rproxy_1.0-1_*.deb");
    assert!(installed.stderr.contains("'packaging/install --remove' takes it away"), "{installed:#?}");
    let removed = script("", "--remove").success();
    assert!(removed.contains("'systemctl restart rproxy.service' changes to the program"), "{removed}");
    assert_eq!(machine.sh("dpkg --verify rproxy").success(), "");
    machine.sh("systemctl is-enabled rproxy && systemctl restart rproxy && rproxy ctl list").success();
    // Nor does another installation take its files.
    let refused = script("PREFIX=/usr", "");
    assert!(refused.stderr.contains("apt remove rproxy"), "{refused:#?}");
    let warned = script("", "").success();
    assert!(warned.contains("of the Debian package are not used"), "{warned}");
}
