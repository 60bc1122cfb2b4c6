//! The signals of `netctl run`: blocked, and read one by one.
//!
//! Process 1 of the namespaces inherits the block, so nothing that is sent to it early is lost. The
//! command starts without it.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use tokio::io::unix::AsyncFd;

use crate::cli::failure::Failure;

/// Those that go to the command.
const FORWARDED: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGWINCH,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// What was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// A child changed its state.
    Child,
    /// This process was stopped and goes on.
    Continue,
    /// A signal for the command.
    Forward {
        /// The signal.
        signal: Signal,
        /// Whether the kernel sent it, for the terminal, to a whole process group.
        from_terminal: bool,
        /// Whether a process of another PID namespace sent it.
        from_outside: bool,
    },
}

impl Received {
    /// What a record of a signalfd says; `None`: a signal that we did not ask for.
    pub(super) fn new(info: &siginfo) -> Option<Self> {
        let signal = Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()?;
        let from_terminal = info.ssi_code == libc::SI_KERNEL;
        match signal {
            Signal::SIGCHLD => Some(Self::Child),
            Signal::SIGCONT => Some(Self::Continue),
            // The kernel gives the sender as 0 where it has no number in the receiver's namespace.
            _ if FORWARDED.contains(&signal) => {
                let from_outside = !from_terminal && info.ssi_pid == 0;
                Some(Self::Forward { signal, from_terminal, from_outside })
            }
            _ => None,
        }
    }
}

/// Whether a signal that is not handled ends a process.
pub(super) fn ends(signal: Signal) -> bool {
    signal != Signal::SIGWINCH
}

/// The signals that we read.
pub(super) fn set() -> SigSet {
    FORWARDED.into_iter().chain([Signal::SIGCHLD, Signal::SIGCONT]).collect()
}

/// Those that are blocked: what we read, and SIGTTOU, which stops a background process that gives
/// the terminal away.
fn blocked() -> SigSet {
    let mut blocked = set();
    blocked.add(Signal::SIGTTOU);
    blocked
}

/// Blocks the signals in this process.
pub(super) fn block() -> Result<(), Failure> {
    blocked().thread_block().map_err(fail)
}

/// Undoes [`block`], for the command. Only system calls: it may run between fork and exec.
pub(super) fn unblock() -> std::io::Result<()> {
    Ok(blocked().thread_unblock()?)
}

fn fail(error: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("cannot receive signals: {error}"))
}

/// Reads signals within a runtime.
#[derive(Debug)]
pub(super) struct Signals(AsyncFd<SignalFd>);

impl Signals {
    /// Reads those that [`block`] has blocked.
    pub(super) fn new() -> Result<Self, Failure> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let descriptor = SignalFd::with_flags(&set(), flags).map_err(fail)?;
        // SAFETY: the descriptor is the signalfd's own, which the registration takes and keeps open.
        unsafe { AsyncFd::register(descriptor) }.map(Self).map_err(fail)
    }

    /// Waits for the next one. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> Result<Received, Failure> {
        loop {
            let mut ready = self.0.readable().await.map_err(fail)?;
            match self.0.get_ref().read_signal().map_err(fail)? {
                Some(info) => {
                    if let Some(received) = Received::new(&info) {
                        return Ok(received);
                    }
                }
                None => ready.clear_ready(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(signal: Signal, code: i32, sender: u32) -> Option<Received> {
        // SAFETY: a record of numbers only; zero is a value of each.
        let mut info: siginfo = unsafe { std::mem::zeroed() };
        (info.ssi_signo, info.ssi_code, info.ssi_pid) = (signal as u32, code, sender);
        Received::new(&info)
    }

    #[test]
    fn who_sent_a_signal_is_seen() {
        let signal = Signal::SIGINT;
        for (code, sender, from_terminal, from_outside) in [
            (libc::SI_KERNEL, 0, true, false),
            (libc::SI_USER, 0, false, true),
            (libc::SI_USER, 7, false, false),
        ] {
            let expected = Received::Forward { signal, from_terminal, from_outside };
            assert_eq!(received(signal, code, sender), Some(expected));
        }
        assert_eq!(received(Signal::SIGCHLD, libc::CLD_EXITED, 7), Some(Received::Child));
        assert_eq!(received(Signal::SIGALRM, libc::SI_USER, 0), None);
    }
}
