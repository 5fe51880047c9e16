//! The only image of containers in these tests.

use std::fs;
use std::path::{Path, PathBuf};

use crate::process::run;
use crate::require;

/// Makes an image with nothing but busybox, in a directory; returns its archive, for `podman import`.
///
/// # Panics
/// If busybox or tar is missing.
pub fn busybox(dir: &Path) -> PathBuf {
    let root = dir.join("image");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(require::find("busybox").unwrap(), root.join("bin/busybox")).unwrap();
    let archive = root.with_extension("tar");
    let mut tar = require::command("tar");
    tar.arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".");
    run(tar).success();
    archive
}
