//! A whole Debian with systemd and Docker, of the release of this machine, on a disk.
//!
//! It is made of the archive that this machine installs packages from, and kept in the target directory until what it is made of
//! changes. What a run writes to the disk is forgotten. A second disk has the suites and what the cases need.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::kernel::{archive_uri, command, output};
use super::{Bootable, KERNEL_LINE, guest};
use crate::process::run;
use crate::{require, rproxy};

/// What is installed on it, besides what is on each Debian.
const PACKAGES: &str = "systemd-sysv,dbus,udev,kmod,linux-image-cloud-amd64,initramfs-tools,zstd,iproute2,iptables,nftables,procps,\
                        docker.io,apparmor,busybox-static,curl,man-db";

/// Makes its files, and a disk of them.
const MAKE: &str = include_str!("debian/make.sh");

/// Plays the cases, at each start.
const UNIT: &str = include_str!("debian/play.service");

/// What the unit starts.
const PLAY: &str = include_str!("debian/play.sh");

/// A whole Debian that is to play cases.
pub struct Debian {
    /// Puts what they need into a directory, which is `/run/host` there.
    pub stage: fn(&Path),
}

impl Debian {
    /// Makes it, unless it is there.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub fn make() -> Result<(), String> {
        static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
        TRIED.get_or_init(make_once).clone()
    }
}

impl fmt::Display for Debian {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the whole Debian")
    }
}

fn make_once() -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let (release, archive) = (release()?, archive_uri()?);
    let parts = [&release, &archive, PACKAGES, MAKE, UNIT];
    // Written last.
    let made_of = dir().join("made-of");
    if fs::read_to_string(&made_of).is_ok_and(|known| known == parts.concat()) {
        return Ok(());
    }
    fs::remove_file(&made_of).ok();
    let unit = dir().join("play.service");
    fs::write(&unit, UNIT).map_err(text)?;
    // A namespace of mounts, so that none is left of those that debootstrap makes.
    let mut make = command("unshare")?;
    make.args(["--mount", "--propagation", "private", "sh", "-c", MAKE])
        .arg(command("debootstrap")?.get_program());
    make.args([&release, &archive, PACKAGES]).current_dir(dir());
    output(&mut make)?;
    fs::write(&made_of, parts.concat()).map_err(text)
}

/// The release of this machine, whose libraries the suites and the packages take.
fn release() -> Result<String, String> {
    let known = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = known.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(str::to_owned).ok_or_else(|| "/etc/os-release has no VERSION_CODENAME".to_owned())
}

fn dir() -> PathBuf {
    let dir = rproxy::target_dir().join("vm/debian");
    fs::create_dir_all(&dir).unwrap();
    dir
}

impl Bootable for Debian {
    /// It takes some minutes, and longer on a busy host.
    const PATIENCE: Duration = Duration::from_secs(1800);

    fn dir(&self) -> PathBuf {
        dir()
    }

    fn prepare(&self, names: &[String], scratch: &Path, qemu: &mut Command) {
        let files = scratch.join("files");
        fs::create_dir(&files).unwrap();
        (self.stage)(&files);
        fs::write(files.join("play"), PLAY).unwrap();
        fs::write(files.join(guest::LIST), names.join("\n")).unwrap();
        let suites = files.join(guest::SUITES);
        fs::create_dir_all(suites.parent().unwrap()).unwrap();
        fs::copy(env::current_exe().unwrap(), suites).unwrap();
        let archive = scratch.join("files.tar");
        let mut tar = require::command("tar");
        tar.arg("-C").arg(&files).arg("-cf").arg(&archive).arg(".");
        run(tar).success();
        qemu.arg("-kernel").arg(dir().join("kernel")).arg("-initrd").arg(dir().join("initrd"));
        qemu.args(["-append", &format!("root=/dev/vda rw systemd.show_status=error {KERNEL_LINE}")]);
        disk(qemu, &dir().join("disk"), "snapshot=on");
        disk(qemu, &archive, "readonly=on");
    }
}

/// Adds a disk. A comma in a path is doubled (qemu(1)).
fn disk(qemu: &mut Command, file: &Path, option: &str) {
    let file = file.to_str().unwrap().replace(',', ",,");
    qemu.arg("-drive").arg(format!("file={file},format=raw,if=virtio,{option}"));
}
