//! The files of a machine: an archive that its kernel unpacks into memory.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::kernel::{Kernel, output};
use super::{Bootable, KERNEL_LINE, guest};
use crate::{require, rproxy};

/// What cases start in a machine, if it is installed. Busybox has the rest.
const PROGRAMS: [&str; 28] = [
    "conntrack",
    "curl",
    "docker-proxy",
    "ethtool",
    "ip",
    "ip6tables",
    "ip6tables-legacy",
    "ip6tables-legacy-restore",
    "ip6tables-legacy-save",
    "ip6tables-restore",
    "ip6tables-save",
    "iptables",
    "iptables-legacy",
    "iptables-legacy-restore",
    "iptables-legacy-save",
    "iptables-restore",
    "iptables-save",
    "nft",
    "nsenter",
    "prlimit",
    "ps",
    "setpriv",
    "socat",
    "ss",
    "strace",
    "sysctl",
    "tc",
    "unshare",
];

/// The programs under test are where the kit expects them: as cargo arranges them.
const TARGET: &str = "target";

/// The machine's first program.
const INIT: &str = include_str!("init.sh");

impl Bootable for Kernel {
    /// It takes a minute of processor time, and less than that if it has both processors.
    const PATIENCE: Duration = Duration::from_secs(600);

    fn dir(&self) -> PathBuf {
        self.kept()
    }

    fn prepare(&self, names: &[String], scratch: &Path, qemu: &mut Command) {
        qemu.arg("-kernel").arg(self.program()).arg("-initrd").arg(write(self, names, scratch));
        // A kernel that panics ends the machine.
        qemu.args(["-no-reboot", "-append", KERNEL_LINE]);
    }
}

/// Writes the archive for a machine that is to play the cases `names`, and returns its path.
fn write(kernel: &Kernel, names: &[String], scratch: &Path) -> PathBuf {
    let staged = tempfile::tempdir().unwrap();
    stage(staged.path(), names);
    let image = scratch.join("image.cpio");
    let userland = scratch.join("userland.cpio");
    archive(staged.path(), &userland).unwrap();
    // The kernel unpacks one archive after the other.
    let mut whole = File::create(&image).unwrap();
    for part in [&kernel.modules(), &userland] {
        io::copy(&mut File::open(part).unwrap(), &mut whole).unwrap();
    }
    image
}

fn stage(root: &Path, names: &[String]) {
    for dir in ["dev", "etc/sysctl.d", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "usr/lib"]
    {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for (name, target) in
        [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")]
    {
        symlink(target, root.join(name)).unwrap();
    }
    put(root, &require::find("busybox").unwrap(), "usr/bin/busybox");
    // What the kernel loads a missing module by.
    symlink("../bin/busybox", root.join("usr/sbin/modprobe")).unwrap();
    fs::write(root.join("init"), INIT).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").unwrap();
    fs::write(root.join(guest::LIST), names.join("\n")).unwrap();
    let own = env::current_exe().unwrap();
    let programs = PROGRAMS.iter().filter_map(|name| require::find(name));
    let programs: Vec<(PathBuf, String)> = programs
        .map(|path| (path.clone(), path.strip_prefix("/").unwrap().display().to_string()))
        .chain([
            (own, guest::SUITES.to_owned()),
            (rproxy::rproxy().to_owned(), format!("{TARGET}/release/rproxy")),
            (rproxy::rproxy_shim().to_owned(), format!("{TARGET}/release/rproxy-shim")),
            (rproxy::netns_setup().to_owned(), format!("{TARGET}/release/netns-setup")),
        ])
        .collect();
    let mut libraries: BTreeSet<PathBuf> = extensions_of_iptables();
    for (path, at) in &programs {
        libraries.extend(libraries_of(path));
        put(root, path, at);
        // Lines of debugging information would fill the machine's memory.
        Command::new("strip").arg(root.join(at)).stderr(Stdio::null()).status().ok();
    }
    for library in libraries {
        let at = library.strip_prefix("/").unwrap();
        // Debian has /lib as a link to /usr/lib.
        let at = if at.starts_with("usr") { at.to_owned() } else { Path::new("usr").join(at) };
        put(root, &library, at.to_str().unwrap());
    }
}

/// Copies what a path leads to.
fn put(root: &Path, from: &Path, at: &str) {
    let at = root.join(at.trim_start_matches('/'));
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    fs::copy(from, &at).unwrap();
}

/// The libraries that a program is linked with, also through each other; none if it is static.
fn libraries_of(program: &Path) -> BTreeSet<PathBuf> {
    let listed = output(Command::new("ldd").arg(program)).unwrap_or_default();
    let words = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

/// What iptables opens by name.
fn extensions_of_iptables() -> BTreeSet<PathBuf> {
    let dirs = ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/xtables"];
    let entries = dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// Writes an archive of a directory, all of which belongs to root.
pub(super) fn archive(dir: &Path, to: &Path) -> Result<(), String> {
    let busybox = require::find("busybox").ok_or("busybox is not installed")?;
    let script = "find . | \"$0\" cpio -o -H newc -R 0:0";
    let file = File::create(to).map_err(|error| error.to_string())?;
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(busybox).current_dir(dir).stdin(Stdio::null()).stdout(file);
    let status = shell.stderr(Stdio::null()).status().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", to.display())) }
}
