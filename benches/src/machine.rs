//! What the measurements ran on, for comparing reports of several machines.

use std::fs;

use serde_json::{Value, json};

use crate::backend::cores;

/// The processors, their caches, and the kernel. What is not known is `null`.
pub(crate) fn profile() -> Value {
    json!({
        "cpu": cpu_model(),
        "cores": cores(),
        "caches": caches(),
        "kernel": word("/proc/sys/kernel/osrelease"),
    })
}

fn cpu_model() -> Option<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().into())
}

/// The caches of the first processor (`/sys/devices/system/cpu` in the kernel's ABI documentation).
fn caches() -> Vec<Value> {
    let of = |index: u8, key: &str| word(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{key}"));
    let cache = |index| {
        let (level, size) = (of(index, "level")?, of(index, "size"));
        let (kind, shared) = (of(index, "type"), of(index, "shared_cpu_list"));
        Some(json!({ "level": level, "type": kind, "size": size, "processors": shared }))
    };
    (0..8).map_while(cache).collect()
}

fn word(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().into())
}
