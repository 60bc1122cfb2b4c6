//! What a process takes: processor time and memory.

use std::fs;
use std::time::{Duration, Instant};

use nix::unistd::{SysconfVar, sysconf};

/// The share of one core that a process takes over a while, in percent.
pub fn cpu_percent(pid: i32, time: Duration) -> f64 {
    let (start, before) = (Instant::now(), cpu_seconds(pid));
    std::thread::sleep(time);
    (cpu_seconds(pid) - before) / start.elapsed().as_secs_f64() * 100.0
}

/// The processor time that a process has taken, its ended children's too.
pub fn cpu_seconds(pid: i32) -> f64 {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    // proc_pid_stat(5): fields 14 to 17, where the name, in parentheses, is the second.
    let (_, rest) = stat.rsplit_once(')').expect("the name is in parentheses");
    let ticks: f64 =
        rest.split_whitespace().skip(11).take(4).filter_map(|f| f.parse::<f64>().ok()).sum();
    let second = sysconf(SysconfVar::CLK_TCK).ok().flatten().expect("the kernel has a clock");
    ticks / second as f64
}

/// A figure of /proc/PID/status such as `VmRSS`, in MiB.
pub fn memory_mib(pid: i32, key: &str) -> f64 {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or_else(|| panic!("no {key} in {path}")) / 1024.0
}
