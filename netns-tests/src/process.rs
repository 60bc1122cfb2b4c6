//! Programs that tests start: with a deadline, and never left behind.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{self, eventually};

/// What a program printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; `None`: ended by a signal.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is not JSON or the program failed.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        assert!(self.success(), "{self}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}:\n{self}"))
    }

    /// Both streams, for looking for a word.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => writeln!(f, "exit code {code}")?,
            None => writeln!(f, "ended by a signal")?,
        }
        write!(f, "stdout: {}\nstderr: {}", self.stdout.trim_end(), self.stderr.trim_end())
    }
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started or has not ended within `limit`, on a machine of usual speed (it is
/// killed then).
#[track_caller]
pub fn output(command: &mut Command, limit: Duration) -> Output {
    let (mut stdout, mut stderr) = (scratch(), scratch());
    let shown = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().expect("a file can be cloned"))
        .stderr(stderr.try_clone().expect("a file can be cloned"))
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let mut process = Process { child };
    let ended = eventually(limit, || process.status().is_some());
    let code = process.stop(Signal::SIGKILL).code();
    let output = Output { code, stdout: all(&mut stdout), stderr: all(&mut stderr) };
    assert!(ended, "not ended within {:?}: {shown}\n{output}", wait::limit(limit));
    output
}

/// A program that runs until it is stopped; dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts a command whose both outputs are appended to a log.
    pub fn start(command: &mut Command, log: &File) -> Self {
        let shown = format!("{command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be cloned"))
            .stderr(log.try_clone().expect("a file can be cloned"))
            .spawn()
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
        Self { child }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// How it ended; `None`: it runs.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.status().is_none() {
            kill(self.pid(), signal).expect("a child can be signalled");
        }
    }

    /// Sends a signal and waits for the end; kills it when that does not come.
    ///
    /// # Panics
    /// When it did not end by itself within ten seconds.
    #[track_caller]
    pub fn stop(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let ended = self.ended();
        if !ended {
            self.signal(Signal::SIGKILL);
        }
        let status = self.child.wait().expect("a child can be waited for");
        assert!(ended, "the process did not end in time after {signal}");
        status
    }

    /// Waits up to ten seconds for the end.
    pub fn ended(&mut self) -> bool {
        eventually(Duration::from_secs(10), || self.status().is_some())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a command run as the user nobody, without any group or capability.
pub fn as_nobody(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only system calls are made, nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            become_nobody();
            Ok(())
        })
    }
}

/// Makes the calling thread, and no other, that of the user nobody.
///
/// # Panics
/// When the kernel refuses.
pub fn become_nobody() {
    const NOBODY: libc::c_long = 65_534;
    // SAFETY: the list of groups is empty, so the pointer to it is not read.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) };
    assert_eq!(result, 0, "leave all groups: {}", std::io::Error::last_os_error());
    for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
        // SAFETY: the calls take three numbers; made directly they change this thread only.
        let result = unsafe { libc::syscall(call, NOBODY, NOBODY, NOBODY) };
        assert_eq!(result, 0, "become nobody: {}", std::io::Error::last_os_error());
    }
}

fn scratch() -> File {
    File::from(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).expect("a memory file can be made"))
}

fn all(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a memory file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}
