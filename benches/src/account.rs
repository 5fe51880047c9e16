//! Resource use of processes, from /proc and their CPU clocks. Descendants are included, because nginx has
//! workers, and socat starts a process for each connection.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// The unit of times in /proc (`USER_HZ`), which is the same on every machine that Rust supports.
const TICK: Duration = Duration::from_millis(10);

/// CPU time used so far, as far as known.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CpuTimes {
    /// By the relay.
    pub(crate) peer: Option<Duration>,
    /// By everything on this machine, the relay included.
    pub(crate) machine: Option<Duration>,
}

impl CpuTimes {
    /// What was used since `start`.
    pub(crate) fn since(self, start: Self) -> Self {
        let used = |end: Option<Duration>, start| Some(end?.saturating_sub(start?));
        Self { peer: used(self.peer, start.peer), machine: used(self.machine, start.machine) }
    }
}

/// The time that the processors of this machine were busy (proc(5), the first line of `/proc/stat`), in ticks.
pub(crate) fn machine_cpu() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let fields = stat.lines().next()?.split_whitespace().skip(1);
    let [user, nice, system, _idle, _iowait, irq, softirq] =
        fields.take(7).map(|field| field.parse().ok()).collect::<Option<Vec<u64>>>()?.try_into().ok()?;
    Some(TICK * u32::try_from(user + nice + system + irq + softirq).ok()?)
}

/// Some processes and all their descendants.
#[derive(Clone, Debug, Default)]
pub(crate) struct Family {
    roots: Vec<Pid>,
}

/// The resource use of a family while idle.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Footprint {
    /// Private memory, in kB.
    pub(crate) private: f64,
    /// Memory with shared pages counted in proportion, in kB.
    pub(crate) pss: f64,
    /// Threads.
    pub(crate) threads: f64,
    /// Open descriptors.
    pub(crate) fds: f64,
}

impl Family {
    /// A family with these processes as its roots.
    pub(crate) fn of(roots: Vec<Pid>) -> Self {
        Self { roots }
    }

    /// The CPU time used so far: exact for living processes, in ticks for children that have exited.
    pub(crate) fn cpu(&self) -> Duration {
        self.members().into_iter().map(|pid| own_cpu(pid) + cpu_of_ended_children(pid)).sum()
    }

    /// Memory, threads and descriptors. Processes that exit meanwhile are not counted.
    pub(crate) fn footprint(&self) -> Footprint {
        let mut sum = Footprint::default();
        for pid in self.members() {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            sum.private += kilobytes(&rollup, "Private_Clean:") + kilobytes(&rollup, "Private_Dirty:");
            sum.pss += kilobytes(&rollup, "Pss:");
            sum.threads += entries(&format!("/proc/{pid}/task"));
            sum.fds += entries(&format!("/proc/{pid}/fd"));
        }
        sum
    }

    /// The living processes.
    pub(crate) fn members(&self) -> Vec<Pid> {
        let mut children: HashMap<Pid, Vec<Pid>> = HashMap::new();
        for (pid, parent) in processes() {
            children.entry(parent).or_default().push(pid);
        }
        let mut members = self.roots.clone();
        let mut next = 0;
        while let Some(pid) = members.get(next) {
            members.extend(children.remove(pid).unwrap_or_default());
            next += 1;
        }
        members
    }
}

/// Every process of this PID namespace and its parent.
fn processes() -> Vec<(Pid, Pid)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw));
    pids.filter_map(|pid| Some((pid, Pid::from_raw(stat(pid, 4)?.try_into().ok()?)))).collect()
}

fn own_cpu(pid: Pid) -> Duration {
    let clock = clock_getcpuclockid(pid).and_then(|clock| clock.now());
    clock.map_or(Duration::ZERO, Duration::from)
}

fn cpu_of_ended_children(pid: Pid) -> Duration {
    let ticks = stat(pid, 16).unwrap_or(0) + stat(pid, 17).unwrap_or(0);
    TICK * u32::try_from(ticks).unwrap_or(0)
}

/// A field of /proc/PID/stat by its number in proc(5), which must follow the name of the program.
fn stat(pid: Pid, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_name, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(field - 3)?.parse().ok()
}

fn kilobytes(rollup: &str, key: &str) -> f64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

fn entries(directory: &str) -> f64 {
    fs::read_dir(directory).map_or(0.0, |entries| entries.count() as f64)
}
