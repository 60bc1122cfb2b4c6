//! Process 1 of the command's namespaces: it prepares them, starts the command, passes signals
//! on, reaps orphans, and ends with the command's status.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, close, sethostname, setpgid, write};

use super::files::Setup;
use super::signals::{self, Received};
use crate::cli::failure::complain;

/// Where the scratch file system is while the mounts are made: a directory that exists everywhere
/// and is about to get a new mount anyway.
const SCRATCH: &str = "/proc";
/// The host's control groups, which stay visible in the new `/sys`.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The pipes of process 1.
#[derive(Debug)]
pub(super) struct Ends {
    /// Where the [`Setup`] comes from; it ends without one when the parent gives up or dies.
    pub(super) setup: OwnedFd,
    /// Where a byte is written when the command is stopped.
    pub(super) notes: OwnedFd,
    /// The parent's ends, which we have copies of.
    pub(super) foreign: [RawFd; 2],
}

/// The whole life of process 1; gives its exit status.
pub(super) fn run(ends: Ends, command: &[String], own_group: bool) -> u8 {
    for descriptor in ends.foreign {
        let _ = close(descriptor);
    }
    if own_group {
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    }
    // If the parent died before this, the pipe ends without a setup; if it dies after it, the
    // kernel kills us.
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        complain(&format!("cannot tie the command to this process: {error}"));
        return 1;
    }
    let mut text = Vec::new();
    let read = File::from(ends.setup).read_to_end(&mut text);
    let Some(setup) = read.ok().and_then(|_| serde_json::from_slice::<Setup>(&text).ok()) else {
        return 1;
    };
    let live = prepare(&setup).and_then(|()| start(&setup, command)).and_then(|child| match child {
        Ok(child) => {
            live(child, &ends.notes).map_err(|error| format!("cannot receive signals: {error}"))
        }
        Err(status) => Ok(status),
    });
    live.unwrap_or_else(|message| {
        complain(&message);
        1
    })
}

/// Gives the namespaces their host name and mounts.
fn prepare(setup: &Setup) -> Result<(), String> {
    sethostname(&setup.hostname).map_err(|error| format!("cannot set the host name: {error}"))?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount_at(None, "/", None, flags, None)?;
    let closed = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at(Some("netctl"), SCRATCH, Some("tmpfs"), closed, Some("mode=0755,size=1m"))?;
    for (name, content) in &setup.files {
        place(name, content)?;
    }
    let kept = format!("{SCRATCH}/cgroup");
    let keep = fs::exists(CGROUPS).unwrap_or(false);
    if keep {
        fs::create_dir(&kept).map_err(|error| format!("cannot make {kept}: {error}"))?;
        mount_at(Some(CGROUPS), &kept, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    }
    mount_at(Some("sysfs"), "/sys", Some("sysfs"), closed, None)?;
    if keep {
        mount_at(Some(&kept), CGROUPS, None, MsFlags::MS_MOVE, None)?;
    }
    // The files stay: they have mounts of their own.
    umount2(SCRATCH, MntFlags::MNT_DETACH)
        .map_err(|error| format!("cannot unmount {SCRATCH}: {error}"))?;
    mount_at(Some("proc"), "/proc", Some("proc"), closed, None)
}

/// Puts a file over the one of that name in `/etc`.
fn place(name: &str, content: &str) -> Result<(), String> {
    let (scratch, target) = (format!("{SCRATCH}/{name}"), format!("/etc/{name}"));
    if !Path::new(&target).exists() {
        complain(&format!("{target} does not exist on this host, so the command has none"));
        return Ok(());
    }
    fs::write(&scratch, content).map_err(|error| format!("cannot write {target}: {error}"))?;
    mount_at(Some(&scratch), &target, None, MsFlags::MS_BIND, None)
}

fn mount_at(
    source: Option<&str>,
    target: &str,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<(), String> {
    mount(source, target, kind, flags, data).map_err(|error| {
        format!("cannot mount {} on {target}: {error}", kind.or(source).unwrap_or("private"))
    })
}

/// Starts the command. `Ok(Err(status))`: it cannot be started.
fn start(setup: &Setup, command: &[String]) -> Result<Result<Pid, u8>, String> {
    let [program, arguments @ ..] = command else { return Err("there is no command".to_owned()) };
    let environment = setup.environment.iter().map(|(key, value)| (key, value));
    let mut command = Command::new(program);
    command.args(arguments).envs(environment);
    // SAFETY: it only makes system calls.
    unsafe { command.pre_exec(signals::unblock) };
    match command.spawn() {
        Ok(child) => {
            let pid = i32::try_from(child.id()).map_err(|error| error.to_string())?;
            Ok(Ok(Pid::from_raw(pid)))
        }
        Err(error) => {
            complain(&format!("cannot run {program:?}: {error}"));
            Ok(Err(if error.kind() == ErrorKind::NotFound { 127 } else { 126 }))
        }
    }
}

/// Passes signals on and reaps until the command ends.
fn live(command: Pid, notes: &OwnedFd) -> nix::Result<u8> {
    let signals = SignalFd::with_flags(&signals::set(), SfdFlags::SFD_CLOEXEC)?;
    loop {
        let Some(received) = signals.read_signal()?.as_ref().and_then(Received::new) else { continue };
        match received {
            Received::Child => {
                if let Some(status) = reap(command, notes)? {
                    return Ok(status);
                }
            }
            // What comes from inside or from the terminal has reached the command, or is not for it.
            Received::Forward { signal, from_outside: true, .. } => {
                let _ = kill(command, signal);
            }
            Received::Forward { .. } | Received::Continue => {}
        }
    }
}

/// Reaps all that have ended; gives the command's status if it is one of them.
fn reap(command: Pid, notes: &OwnedFd) -> nix::Result<Option<u8>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED))? {
            WaitStatus::Exited(pid, status) if pid == command => return Ok(Some(status as u8)),
            WaitStatus::Signaled(pid, signal, _) if pid == command => {
                return Ok(Some(128 + signal as u8));
            }
            WaitStatus::Stopped(pid, _) if pid == command => {
                // Who reads it may have gone; then the kernel ends us soon.
                let _ = write(notes, b"s");
            }
            WaitStatus::StillAlive => return Ok(None),
            _ => {}
        }
    }
}
