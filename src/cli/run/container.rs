//! Process 1 as its parent sees it: started, told to begin, signalled, ended.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2, setpgid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::files::Setup;
use super::init::{self, Ends};
use crate::cli::failure::Failure;

/// The size of process 1's stack.
const STACK: usize = 1 << 20;

/// How process 1 ended, and with it the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// With this status.
    Exited(u8),
    /// By this signal.
    Killed(u8),
}

/// Process 1 of the command's namespaces. Dropping it kills it and everything beside it.
#[derive(Debug)]
pub(super) struct Container {
    pid: Pid,
    ended: bool,
    /// Where it reads its [`Setup`]; closed when that is sent.
    setup: Option<File>,
}

/// Where process 1 writes a byte when the command is stopped.
#[derive(Debug)]
pub(super) struct Stops(Receiver);

impl Stops {
    /// Registers the pipe with the runtime.
    pub(super) fn new(pipe: OwnedFd) -> Result<Self, Failure> {
        Receiver::from_owned_fd(pipe).map(Self).map_err(Self::fail)
    }

    /// Waits for the next stop. When there cannot be one any more it waits for ever.
    pub(super) async fn next(&mut self) -> Result<(), Failure> {
        match self.0.read_u8().await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => std::future::pending().await,
            Err(error) => Err(Self::fail(error)),
        }
    }

    fn fail(error: std::io::Error) -> Failure {
        Failure::failed(format!("cannot follow the command: {error}"))
    }
}

impl Container {
    /// Starts process 1 in new namespaces, in a process group of its own when `own_group`. It
    /// waits for [`Container::begin`]. The pipe is for [`Stops`].
    pub(super) fn start(command: &[String], own_group: bool) -> Result<(Self, OwnedFd), Failure> {
        let fail = |error| Failure::failed(format!("cannot make a pipe: {error}"));
        let (setup_out, setup_in) = pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
        let (notes_out, notes_in) = pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
        // Numbers only: the copies of the parent's ends that the new process must close.
        let foreign = [setup_in.as_raw_fd(), notes_out.as_raw_fd()];
        let mut ends = Some(Ends { setup: setup_out, notes: notes_in, foreign });
        let run = || match ends.take() {
            Some(ends) => init::run(ends, command, own_group) as isize,
            None => 1,
        };
        let flags = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS;
        let mut stack = vec![0; STACK];
        // SAFETY: this process has one thread, so its copy (no CLONE_VM) finds every lock free; the
        // stack is the copy's own from then on; the function never returns into our frames, its
        // result is the exit status.
        let pid = unsafe { clone(Box::new(run), &mut stack, flags, Some(libc::SIGCHLD)) };
        let pid = pid.map_err(|error| match error {
            Errno::EPERM => Failure::failed("permission denied for new namespaces: run this as root"),
            error => Failure::failed(format!("cannot make new namespaces: {error}")),
        })?;
        if own_group {
            // It does so as well; who comes first does not matter.
            let _ = setpgid(pid, pid);
        }
        Ok((Self { pid, ended: false, setup: Some(setup_in.into()) }, notes_out))
    }

    /// Its number, also of its process group if it has its own.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// The path of its network namespace, valid while it lives.
    pub(super) fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid).into()
    }

    /// Tells it to start the command.
    pub(super) fn begin(&mut self, setup: &Setup) -> Result<(), Failure> {
        let fail = |error: std::io::Error| Failure::failed(format!("cannot start the command: {error}"));
        let text = serde_json::to_vec(setup).map_err(|error| fail(error.into()))?;
        self.setup.take().map_or(Ok(()), |mut pipe| pipe.write_all(&text)).map_err(fail)
    }

    /// Passes a signal on to it.
    pub(super) fn signal(&self, signal: Signal) {
        if !self.ended {
            // It is our child and not waited for, so the number is still its own.
            let _ = kill(self.pid, signal);
        }
    }

    /// Its status if it has ended.
    pub(super) fn status(&mut self) -> Result<Option<u8>, Failure> {
        let fail = |error| Failure::failed(format!("cannot wait for the command: {error}"));
        let ended = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)).map_err(fail)? {
            WaitStatus::Exited(_, status) => Ended::Exited(status as u8),
            WaitStatus::Signaled(_, signal, _) => Ended::Killed(signal as u8),
            _ => return Ok(None),
        };
        self.ended = true;
        Ok(Some(ended.into()))
    }

    /// Ends it and everything in its namespaces, and waits for that.
    pub(super) fn kill(&mut self) {
        if !self.ended {
            let _ = kill(self.pid, Signal::SIGKILL);
            while waitpid(self.pid, None) == Err(Errno::EINTR) {}
            self.ended = true;
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill();
    }
}
