//! Checks by a command that runs in the endpoint's network namespace.

use std::io;
use std::process::{ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, setgid, setgroups, setuid};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::{self, Receiver};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::HealthUser;
use crate::kernel::{self, Netns};
use crate::model::Attachment;

/// How much of a command's output is kept.
const MAX_OUTPUT: usize = 4096;
/// Where programs are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a command did not say that all is well.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommandError {
    #[error(transparent)]
    Namespace(#[from] kernel::Error),
    #[error("cannot run {0}: {1}")]
    Start(String, io::Error),
    #[error("{0}{gap}{1}", gap = if .1.is_empty() { "" } else { ": " })]
    Failed(ExitStatus, String),
}

/// Runs a program with its arguments as a user in an endpoint's network namespace; status 0 is well.
/// The environment has `PATH` and what is given, nothing else. When it has ended, or is not waited for
/// any longer, it is killed with all of its process group.
pub(super) async fn run(
    user: &HealthUser,
    attachment: &Attachment,
    words: &[String],
    environment: impl IntoIterator<Item = (&'static str, String)>,
) -> Result<(), CommandError> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let fail = |error| CommandError::Start(program.clone(), error);
    let netns = open(attachment).await?;
    let (input, mut output) = pipe::pipe().map_err(fail)?;
    let errors = input.into_blocking_fd().map_err(fail)?;
    let stdout = errors.try_clone().map_err(fail)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).envs(environment);
    command.stdin(Stdio::null()).stdout(stdout).stderr(errors).process_group(0).kill_on_drop(true);
    command.current_dir("/");
    let (uid, gid) = (user.uid, user.gid);
    let prepare = move || {
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        setgroups(&[])?;
        setgid(gid)?;
        setuid(uid)?;
        set_no_new_privs()?;
        // Should the agent be killed, nobody else would end it. Another user forgets that.
        set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, nothing is allocated.
    unsafe { command.pre_exec(prepare) };
    // From before the start, so that its end cannot be missed.
    let mut ends = signal(SignalKind::child()).map_err(fail)?;
    let mut child = command.spawn().map_err(fail)?;
    // It holds the pipe's other end.
    drop(command);
    let Some(pid) = child.id() else { return Ok(()) };
    let group = Group(Pid::from_raw(pid.cast_signed()));
    let mut text = Vec::new();
    let mut open = true;
    loop {
        tokio::select! {
            more = read(&mut output, &mut text), if open => open = more,
            _ = ends.recv() => if group.leader_has_ended() { break },
        }
    }
    // Nobody else has its number as long as its status was not fetched.
    drop(group);
    let status = child.wait().await.map_err(fail)?;
    if status.success() {
        return Ok(());
    }
    // Who has left the group may hold the pipe open: only what is there already is read.
    let mut rest = [0; MAX_OUTPUT];
    if let Ok(length) = output.try_read(&mut rest) {
        keep(&mut text, &rest[..length]);
    }
    Err(CommandError::Failed(status, String::from_utf8_lossy(&text).trim().to_owned()))
}

/// Opens the endpoint's namespace, and no other one that its path may lead to by now.
async fn open(attachment: &Attachment) -> Result<Netns, kernel::Error> {
    let (path, expected) = (attachment.netns.clone(), attachment.inode);
    let opened = tokio::task::spawn_blocking(move || {
        let netns = Netns::open(&path)?;
        match netns.inode() {
            found if found == expected => Ok(netns),
            found => Err(kernel::Error::Replaced { path, expected, found }),
        }
    });
    let stopped = |error: tokio::task::JoinError| kernel::Error::System {
        action: "open a namespace",
        source: error.into(),
    };
    opened.await.map_err(stopped)?
}

/// Reads what a command writes; `false`: it will write no more.
async fn read(output: &mut Receiver, text: &mut Vec<u8>) -> bool {
    let mut part = [0; MAX_OUTPUT];
    match output.read(&mut part).await {
        Ok(0) | Err(_) => false,
        Ok(length) => {
            keep(text, &part[..length]);
            true
        }
    }
}

/// Keeps the beginning of a text.
fn keep(text: &mut Vec<u8>, part: &[u8]) {
    let room = MAX_OUTPUT - text.len();
    text.extend_from_slice(&part[..room.min(part.len())]);
}

/// The processes of a command; dropping it kills them.
struct Group(Pid);

impl Group {
    /// Whether the command itself has ended; its status can still be fetched.
    fn leader_has_ended(&self) -> bool {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(self.0), look), Ok(WaitStatus::StillAlive) | Err(Errno::EINTR))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // All have ended already, or the kernel does what it is asked for.
        let _ = killpg(self.0, Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_beginning_of_an_output_is_kept() {
        let mut text = vec![b'a'; MAX_OUTPUT - 2];
        keep(&mut text, b"bcd");
        assert!(text.len() == MAX_OUTPUT && text.ends_with(b"abc"));
        keep(&mut text, b"e");
        assert!(text.len() == MAX_OUTPUT && text.ends_with(b"abc"));
    }
}
