//! The sealed room: namespaces for the whole test program, which end with it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::OnceLock;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Uid, fork, getpid};

/// The programs that tests call.
const PROGRAMS: [&str; 8] = ["etcd", "etcdctl", "ip", "bridge", "nft", "ping", "strace", "sh"];

/// Where control groups are in the sealed room.
const GROUPS: &str = "/sys/fs/cgroup";
/// How the names of rooms' own control groups begin.
const GROUP_PREFIX: &str = "netctl-tests-";
/// The room's own control group.
static GROUP: OnceLock<PathBuf> = OnceLock::new();

/// Kernel features that every test needs, as commands which fail without them.
const FEATURES: [(&str, &str); 4] = [
    ("bridges", "ip link add name test0 type bridge && ip link del test0"),
    ("veth pairs", "ip link add name test0 type veth peer name test1 && ip link del test0"),
    ("VXLAN", "ip link add name test0 type vxlan id 1 dstport 4789 && ip link del test0"),
    (
        "nftables with NAT",
        "nft add table inet t && nft add chain inet t c '{ type nat hook postrouting priority 100; }' && nft add rule inet t c masquerade && nft delete table inet t",
    ),
];

/// Goes on in fresh network, mount and process namespaces; must be called before any thread
/// starts.
///
/// The caller's process stays behind, waits and ends with the same exit status. When it is killed,
/// the kernel kills everything that was started inside, and with that all namespaces vanish.
///
/// What is missing is named and ends the program with status 1: a test that cannot run has failed.
pub fn seal() {
    if !Uid::effective().is_root() {
        fail("these tests make network namespaces: run them as root");
    }
    let missing: Vec<_> = PROGRAMS.into_iter().filter(|program| !in_path(program)).collect();
    if !missing.is_empty() {
        fail(&format!("programs are missing ({}): run ./scripts/setup", missing.join(", ")));
    }
    let spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    let group = check("find the control group", own_group());
    check("make namespaces", unshare(spaces));
    // When all inside have ended.
    go_on_in_child(|| leave(&group));
    die_with_parent();
    check("seal the mounts", furnish());
    check("make a control group", enter(&group));
    GROUP.get_or_init(|| group);
    // The first process of a PID namespace reaps orphans; the tests run in its child.
    go_on_in_child(|| {});
    for (feature, trial) in FEATURES {
        let works = Command::new("sh").args(["-c", trial]).output();
        match works {
            Ok(output) if output.status.success() => {}
            Ok(output) => fail(&format!(
                "this kernel lacks {feature}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )),
            Err(error) => fail(&format!("cannot run sh: {error}")),
        }
    }
}

/// The control group (cgroup2) in which everything runs that the tests start.
///
/// # Panics
/// Outside of a sealed room.
pub fn group() -> &'static Path {
    GROUP.get().expect("the room is sealed")
}

/// The path that a control group of this room's own will have, below that of the process.
fn own_group() -> io::Result<PathBuf> {
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    // Until somebody has mounted them for the first time they are not told, and all are in the first one.
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(Path::new(GROUPS).join(own).join(format!("{GROUP_PREFIX}{}", getpid())))
}

fn enter(group: &Path) -> io::Result<()> {
    mount(Some("cgroup2"), GROUPS, Some("cgroup2"), MsFlags::empty(), None::<&str>)?;
    // Those of rooms that were killed: one with somebody in it cannot be removed.
    for other in group.parent().into_iter().flat_map(std::fs::read_dir).flatten().flatten() {
        if other.file_name().to_string_lossy().starts_with(GROUP_PREFIX) {
            let _ = std::fs::remove_dir(other.path());
        }
    }
    // As long as nobody is in it, another room that begins takes it for one that was left.
    loop {
        std::fs::create_dir(group)?;
        match std::fs::write(group.join("cgroup.procs"), "0") {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {}
            result => return result,
        }
    }
}

/// Removes the control group; nothing is in it any more but what the kernel has not done away with yet.
fn leave(group: &Path) {
    for _ in 0..100 {
        match std::fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// Forks and returns in the child; the parent waits, calls `after` and exits as the child did.
fn go_on_in_child(after: impl FnOnce()) {
    // SAFETY: no thread has been started yet, so the child may do anything.
    let child = match check("fork", unsafe { fork() }) {
        ForkResult::Child => return,
        ForkResult::Parent { child } => child,
    };
    let ended = loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, status)) if pid == child => break Ok(status),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                break Err(format!("ended by {signal}"));
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => break Err(format!("cannot wait for the tests: {error}")),
        }
    };
    after();
    exit(ended.unwrap_or_else(|error| fail(&error)))
}

/// Ends this process, and with it its namespaces, when the one outside ends.
fn die_with_parent() {
    check("watch the parent", nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL));
    if getpid().as_raw() != 1 {
        fail("the PID namespace was not entered");
    }
}

/// Makes the mounts private and gives this room a /proc, a /sys and a /run of its own.
fn furnish() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
}

fn in_path(program: &str) -> bool {
    let executable = |path: &Path| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    std::env::var_os("PATH")
        .is_some_and(|paths| std::env::split_paths(&paths).any(|dir| executable(&dir.join(program))))
}

fn check<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| fail(&format!("cannot {what}: {}", error.into())))
}

fn fail(message: &str) -> ! {
    eprintln!("netns-tests: {message}");
    exit(1)
}
