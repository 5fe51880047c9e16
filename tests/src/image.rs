//! The only image of containers in these tests.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

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

/// The same image as `docker save` writes it, for `ctr image import`; returns its archive.
///
/// # Panics
/// If busybox, tar or sha256sum is missing.
pub fn docker_archive(dir: &Path, name: &str) -> PathBuf {
    let layer = busybox(dir);
    let parts = dir.join("archive");
    fs::create_dir(&parts).unwrap();
    fs::copy(&layer, parts.join("layer.tar")).unwrap();
    let mut sum = require::command("sha256sum");
    sum.arg(&layer);
    let sum = run(sum).success();
    let digest = format!("sha256:{}", sum.split_whitespace().next().unwrap());
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [digest] }
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(parts.join("config.json"), config.to_string()).unwrap();
    fs::write(parts.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = parts.with_extension("tar");
    let mut tar = require::command("tar");
    tar.arg("-C").arg(&parts).arg("-cf").arg(&archive).args(["manifest.json", "config.json", "layer.tar"]);
    run(tar).success();
    archive
}
