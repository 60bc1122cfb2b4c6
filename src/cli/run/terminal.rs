//! The terminal of an interactive `netctl run`: its foreground belongs to the command.
//!
//! As a shell does with its jobs: the command's process group gets the foreground, so Ctrl-C and
//! Ctrl-Z reach it alone. When it is stopped, this process takes the foreground back and stops
//! too, so that the shell outside sees a stopped job.

use std::fs::File;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgrp, getpid, isatty, tcgetpgrp, tcsetpgrp};

use crate::cli::failure::Failure;

/// The terminal that this process has the foreground of. Dropping it takes the foreground back.
#[derive(Debug)]
pub(super) struct Terminal {
    device: File,
    group: Pid,
}

impl Terminal {
    /// The terminal, where input and output are one and we are in its foreground. In a pipeline
    /// the other commands need the foreground as well, so there is nothing to give away.
    pub(super) fn ours() -> Option<Self> {
        let interactive = isatty(std::io::stdin()).ok()? && isatty(std::io::stdout()).ok()?;
        let device = File::options().read(true).write(true).open("/dev/tty").ok()?;
        let group = getpgrp();
        let foreground = tcgetpgrp(&device).is_ok_and(|owner| owner == group);
        (interactive && foreground).then_some(Self { device, group })
    }

    /// Gives the foreground to a process group.
    pub(super) fn give_to(&self, group: Pid) {
        // It fails when the terminal is gone; the command will notice that by itself.
        let _ = tcsetpgrp(&self.device, group);
    }

    /// Takes the foreground back and stops this process, until somebody continues it.
    pub(super) fn stop_with_it(&self) -> Result<(), Failure> {
        self.give_to(self.group);
        kill(getpid(), Signal::SIGSTOP).map_err(|error| Failure::failed(format!("cannot stop: {error}")))
    }

    /// Continues the command: in the foreground when we were put there, else in the background.
    pub(super) fn resume(&self, group: Pid) {
        if tcgetpgrp(&self.device).is_ok_and(|owner| owner == self.group) {
            self.give_to(group);
        }
        // That it has ended meanwhile is told by another signal.
        let _ = killpg(group, Signal::SIGCONT);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.give_to(self.group);
    }
}
