//! A control group of a test's own, in which the test's process is meanwhile.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MsFlags, mount};

/// Where the control groups are mounted.
const FILE_SYSTEM: &str = "/run/cgroup";

pub struct Group {
    pub path: PathBuf,
    /// The one that the process was in.
    home: PathBuf,
}

impl Group {
    /// Makes one, and moves the process there.
    pub fn enter() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let file_system = Path::new(FILE_SYSTEM);
        if !file_system.exists() {
            std::fs::create_dir(file_system).unwrap();
            mount(Some("cgroup2"), file_system, Some("cgroup2"), MsFlags::empty(), None::<&str>)
                .unwrap();
        }
        let of_process = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let home = of_process.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let home = file_system.join(home);
        let name = format!("netctl-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = home.join(name);
        std::fs::create_dir(&path).unwrap();
        let group = Self { path, home };
        move_to(&group.path);
        group
    }
}

impl Group {
    /// Makes it anew: what was attached to it is not any more.
    pub fn again(self) -> Self {
        move_to(&self.home);
        std::fs::remove_dir(&self.path).unwrap();
        std::fs::create_dir(&self.path).unwrap();
        move_to(&self.path);
        self
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        move_to(&self.home);
        let below = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        for group in below.filter(|entry| entry.path().is_dir()) {
            let _ = std::fs::remove_dir(group.path());
        }
        let removed = std::fs::remove_dir(&self.path);
        assert!(std::thread::panicking() || removed.is_ok(), "{removed:?}");
    }
}

fn move_to(group: &Path) {
    std::fs::write(group.join("cgroup.procs"), "0").unwrap();
}
