//! Benchmarks of netctl beside its peers, in sealed network namespaces.
//!
//! Each prints a table for people and ends with one line for programs: `RESULT NAME key=value …`.
//! On a shared machine only ratios count: both sides are measured in turns, and a ratio is the
//! median of the turns' own ratios.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a benchmark whose ground fails ends there and says why"
)]

mod attach;
mod bridge;
mod cni;
mod configure;
mod crowd;
mod datapath;
mod dns;
mod floor;
mod ipam;
mod lb_scale;
mod overlay;
mod plan;
mod report;
mod rest;
mod scale;
mod services;
mod traffic;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use world::{Config, World};

use report::Report;

/// A benchmark: its name, what it measures, and the function that does.
struct Bench {
    name: &'static str,
    help: &'static str,
    run: fn(&Ground) -> Report,
}

const BENCHES: [Bench; 10] = [
    Bench { name: "overlay", help: overlay::HELP, run: overlay::run },
    Bench { name: "datapath", help: datapath::HELP, run: datapath::run },
    Bench { name: "vip", help: datapath::VIP_HELP, run: datapath::run_vip },
    Bench { name: "attach", help: attach::HELP, run: attach::run },
    Bench { name: "scale", help: scale::HELP, run: scale::run },
    Bench { name: "plan", help: plan::HELP, run: plan::run },
    Bench { name: "ipam", help: ipam::HELP, run: ipam::run },
    Bench { name: "dns", help: dns::HELP, run: dns::run },
    Bench { name: "lb-scale", help: lb_scale::HELP, run: lb_scale::run },
    Bench { name: "services", help: services::HELP, run: services::run },
];

/// Where a benchmark runs.
struct Ground {
    world: World,
    /// Whether it must be done within a minute.
    quick: bool,
}

impl Ground {
    /// `quick` or `full`, as it was asked for.
    fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// An agent's configuration as operators have it: the defaults.
fn plain(config: Config) -> Config {
    config.set("log", "info").without("lb")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |flags: &[&str]| arguments.iter().any(|a| flags.contains(&a.as_str()));
    let known = ["--quick", "--help", "-h"];
    let names: Vec<&String> = arguments.iter().filter(|a| !known.contains(&a.as_str())).collect();
    let bench = names.first().and_then(|name| BENCHES.iter().find(|bench| bench.name == **name));
    match (bench, names.len()) {
        (None, 0) if asked(&["--help", "-h"]) => {
            print!("{}", usage());
            ExitCode::SUCCESS
        }
        (Some(bench), 1) if asked(&["--help", "-h"]) => {
            println!("{}", bench.help);
            ExitCode::SUCCESS
        }
        (Some(bench), 1) => {
            run(bench, asked(&["--quick"]));
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{}", usage());
            ExitCode::from(2)
        }
    }
}

fn usage() -> String {
    let mut text = "usage: scripts/bench NAME [--quick] [--help]\n\n".to_owned();
    for bench in &BENCHES {
        text.push_str(&format!("{:8} {}\n", bench.name, bench.help.lines().next().unwrap_or_default()));
    }
    text.push_str("\n--quick ends within a minute; NAME --help says what is measured and how.\n");
    text
}

fn run(bench: &Bench, quick: bool) {
    // One at a time: two would measure each other.
    let disk = disk();
    let lock = File::create(disk.with_extension("lock")).expect("the target directory can be written");
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
        .unwrap_or_else(|(_, error)| panic!("another benchmark runs: {error}"));
    // Of an earlier run that was killed; mostly there is none.
    let _ = fs::remove_dir_all(&disk);
    fs::create_dir_all(&disk).unwrap_or_else(|error| panic!("{}: {error}", disk.display()));
    world::seal();
    furnish(&disk);
    let ground = Ground { world: World::new(), quick };
    let report = (bench.run)(&ground);
    drop(ground);
    // What is left is removed by the next run.
    let _ = fs::remove_dir_all(&disk);
    report.print(bench.name);
}

/// A folder on the disk on which this program is: stores must not measure a memory file system.
fn disk() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    program.with_file_name("bench-files")
}

/// Puts the world's files on the disk.
fn furnish(disk: &Path) {
    const NONE: Option<&str> = None;
    let files = Path::new("/run/world");
    fs::create_dir_all(files).expect("the sealed room has a /run of its own");
    mount(Some(disk), files, NONE, MsFlags::MS_BIND, NONE)
        .unwrap_or_else(|error| panic!("mount {} at {}: {error}", disk.display(), files.display()));
}

/// Tells people what is being done.
fn progress(text: &str) {
    eprintln!("  {text}");
}
