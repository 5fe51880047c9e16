//! What is in the packages, as files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use testkit::process::{Process, run};
use testkit::require::{self, Need};
use testkit::rproxy;
use testkit::suite::Case;

use super::{DEADLINE, DEBHELPER, build};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("lintian finds nothing, and nothing is missing", clean)
            .needs(DEBHELPER)
            .needs(&[Need::Program("lintian")])
            .deadline(DEADLINE),
        Case::new("the example of a configuration is right", example),
        Case::new("manuals and completions have all names", written).deadline(DEADLINE),
        Case::new("a version is not guessed", version).needs(DEBHELPER).needs(&[Need::Program("git")]),
    ]
}

fn clean() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(dir.path(), "1.0-1", |_command| ());
    let names: Vec<_> = built.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    for name in ["rproxy", "rproxy-netns", "rproxy-dbgsym", "rproxy-netns-dbgsym"] {
        assert!(names.iter().any(|file| file.starts_with(&format!("{name}_1.0-1_"))), "no {name}: {names:?}");
    }
    let mut lintian = require::command("lintian");
    lintian.args([
        "--allow-root",
        "--display-info",
        "--pedantic",
        "--fail-on",
        "error,warning,info,pedantic",
    ]);
    // The programs may be a build without debug information, which takes less time. Rust's strings have no terminator, so
    // that the ends of two look like one misspelt word, in one build and not in another.
    lintian.args(["--suppress-tags", "debug-file-with-no-debug-symbols,spelling-error-in-binary"]);
    lintian.args(built.iter().filter(|path| path.extension().is_some_and(|end| end == "changes")));
    let lintian = Process::spawn(lintian);
    lintian.wait_within(DEADLINE);
    let found = lintian.into_output();
    assert!(found.status.success() && found.stdout.is_empty(), "{found:#?}");
    let [of_relay, of_setup] = ["rproxy", "rproxy-netns"].map(|name| files(package(&built, name)));
    relay(&of_relay);
    netns_setup(&of_setup);
    // Directories, which end with a slash, may be in both.
    let in_both: Vec<_> = of_relay.intersection(&of_setup).filter(|path| !path.ends_with('/')).collect();
    assert!(in_both.is_empty(), "{in_both:?}");
    let conffiles = dpkg_deb(&["--info"], package(&built, "rproxy"), &["conffiles"]);
    assert_eq!(conffiles, "/etc/rproxy/rproxy.toml\n");
}

fn relay(files: &BTreeSet<String>) {
    let pages = pages(::rproxy::cli::Cli::command(), "rproxy");
    for file in pages.iter().map(String::as_str).chain([
        "/usr/bin/rproxy",
        "/usr/bin/rproxy-shim",
        "/usr/lib/rproxy/podman/rootlessport",
        "/lib/systemd/system/rproxy.service",
        "/lib/systemd/system/rproxy-attach.service",
        "/usr/lib/sysusers.d/rproxy.conf",
        "/usr/share/bash-completion/completions/rproxy",
        "/usr/share/zsh/vendor-completions/_rproxy",
        "/usr/share/fish/vendor_completions.d/rproxy.fish",
        "/usr/share/doc/rproxy/copyright",
        "/usr/share/doc/rproxy/changelog.gz",
        "/usr/share/doc/rproxy/README.md.gz",
        "/usr/share/man/man1/rproxy-shim.1.gz",
    ]) {
        assert!(files.contains(file), "no {file}: {files:#?}");
    }
}

fn netns_setup(files: &BTreeSet<String>) {
    let pages = pages(::netns_setup::cli::Cli::command(), "netns-setup");
    for file in pages.iter().map(String::as_str).chain([
        "/usr/bin/netns-setup",
        "/usr/bin/rproxy-portmap",
        "/usr/lib/cni/rproxy-portmap",
        "/usr/share/man/man1/rproxy-portmap.1.gz",
        "/lib/systemd/system/netns-setup-watch.service",
        "/usr/share/bash-completion/completions/netns-setup",
        "/usr/share/zsh/vendor-completions/_netns-setup",
        "/usr/share/fish/vendor_completions.d/netns-setup.fish",
        "/usr/share/doc/rproxy-netns/README.md.gz",
    ]) {
        assert!(files.contains(file), "no {file}: {files:#?}");
    }
}

/// The manual of a command, and those of the commands below it.
fn pages(command: clap::Command, name: &str) -> Vec<String> {
    let below = command
        .get_subcommands()
        .flat_map(|below| pages(below.clone(), &format!("{name}-{}", below.get_name())));
    [format!("/usr/share/man/man1/{name}.1.gz")].into_iter().chain(below).collect()
}

/// The package of this name.
fn package<'p>(built: &'p [PathBuf], name: &str) -> &'p Path {
    let is_it =
        |path: &&PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}_"));
    built.iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).find(is_it).unwrap()
}

/// The paths of the files in a package, all of which belong to root.
fn files(package: &Path) -> BTreeSet<String> {
    let list = dpkg_deb(&["--contents"], package, &[]);
    let of_root = |line: &str| {
        assert_eq!(line.split_whitespace().nth(1), Some("root/root"), "{line}");
        line.split_whitespace().nth(5).unwrap().trim_start_matches('.').to_owned()
    };
    list.lines().map(of_root).collect()
}

fn dpkg_deb(options: &[&str], package: &Path, more: &[&str]) -> String {
    let mut command = require::command("dpkg-deb");
    command.args(options).arg(package).args(more);
    run(command).success()
}

/// As it is, and with the examples in its comments.
fn example() {
    let dir = tempfile::tempdir().unwrap();
    let shipped = fs::read_to_string(rproxy::tree().join("contrib/rproxy.toml")).unwrap();
    let (commented, code) = ("#", "mapping = []\n");
    let lines = shipped
        .lines()
        .map(|line| line.strip_prefix(commented).filter(|rest| !rest.starts_with(' ')).unwrap_or(line));
    let examples = lines.collect::<Vec<_>>().join("\n").replace(code, "");
    for text in [&shipped, &examples] {
        let file = dir.path().join("rproxy.toml");
        fs::write(&file, text).unwrap();
        let checked = run(rproxy::command(&["check-config", file.to_str().unwrap()]));
        assert!(checked.status.success(), "{checked:#?}");
    }
    assert!(examples.contains("\n[[mapping]]\n") && examples.contains("\n[defaults]\n"), "{examples}");
}

fn written() {
    let temp = tempfile::tempdir().unwrap();
    let mut writer = Command::new(rproxy::target_with_manuals().join("debug/examples/manual"));
    writer.arg(temp.path());
    run(writer).success();
    let read = |name: &str| fs::read_to_string(temp.path().join(name)).unwrap();
    let title = format!("\"rproxy {}\"", env!("CARGO_PKG_VERSION"));
    for page in ["rproxy.1", "rproxy-ctl.1", "rproxy-ctl-add.1"].map(read) {
        let of_page = page.lines().find(|line| line.starts_with(".TH")).unwrap();
        assert!(of_page.contains(&title), "{of_page}");
    }
    for file in ["rproxy.1", "rproxy-ctl-add.1", "rproxy.bash", "_rproxy", "rproxy.fish"] {
        let text = read(file).replace('\\', "");
        assert!(text.contains("publish-all"), "{file}: {text}");
    }
}

/// A tree that git does not read.
fn version() {
    let temp = tempfile::tempdir().unwrap();
    for file in ["packaging/deb", "Cargo.toml"] {
        let copy = temp.path().join(file);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(rproxy::tree().join(file), copy).unwrap();
    }
    fs::write(temp.path().join(".git"), "nothing\n").unwrap();
    let mut deb = Command::new(temp.path().join("packaging/deb"));
    deb.arg(temp.path().join("out")).env_remove("DEB_VERSION");
    let refused = run(deb);
    assert_eq!(refused.status.code(), Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("set DEB_VERSION"), "{refused:#?}");
    assert!(!temp.path().join("out").exists());
}
