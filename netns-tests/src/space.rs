//! One namespace, and how threads and programs get into it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::{self, Output};
use crate::wait::eventually;

/// A network namespace together with a mount namespace; cheap to clone.
///
/// Both live until the last clone, process and mount that refers to them is gone.
#[derive(Debug, Clone)]
pub struct Space {
    name: String,
    net: Arc<File>,
    mounts: Arc<File>,
}

impl Space {
    /// Makes new network and mount namespaces; `furnish` runs inside before anything else does.
    pub fn new(name: &str, furnish: impl FnOnce() + Send) -> Self {
        in_thread(|| {
            let spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
            unshare(spaces).expect("namespaces can be made");
            furnish();
            Self { name: name.to_owned(), net: own("net"), mounts: own("mnt") }
        })
    }

    /// Makes a new network namespace that sees the same mounts as this one; `furnish` runs inside.
    pub fn new_net(&self, name: &str, furnish: impl FnOnce() + Send) -> Self {
        self.enter(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made");
            furnish();
            Self { name: name.to_owned(), net: own("net"), mounts: Arc::clone(&self.mounts) }
        })
    }

    /// The network namespace at `path`, as it is seen from here, with the mounts of this space.
    pub fn at(&self, name: &str, path: &str) -> Self {
        let net = self.enter(|| File::open(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { name: name.to_owned(), net: Arc::new(net), mounts: Arc::clone(&self.mounts) }
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path at which other programs find the network namespace.
    pub fn net_path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.net.as_raw_fd())
    }

    /// Runs a function inside, on a thread of its own, and returns what it returned.
    pub fn enter<T: Send>(&self, function: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            self.join();
            function()
        })
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(
        &self,
        function: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let space = self.clone();
        thread::spawn(move || {
            space.join();
            function()
        })
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let space = self.clone();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only system calls are made, nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                setns(&*space.mounts, CloneFlags::CLONE_NEWNS)?;
                setns(&*space.net, CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        command
    }

    /// Runs a shell script inside, whatever its exit status.
    pub fn try_sh(&self, script: &str) -> Output {
        let mut command = self.command("sh");
        command.args(["-ec", script]);
        process::output(&mut command, Duration::from_secs(60))
    }

    /// Runs a shell script inside and returns what it printed.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        assert!(output.success(), "in {}: {script}\n{output}", self.name);
        output.stdout
    }

    /// Sends one echo request and tells whether it was answered within a second.
    pub fn ping(&self, address: &str) -> bool {
        self.try_sh(&format!("ping -n -c 1 -W 1 {address}")).success()
    }

    /// Tells whether an echo request is answered within the next seconds, trying again.
    pub fn reaches(&self, address: &str) -> bool {
        eventually(Duration::from_secs(15), || self.ping(address))
    }

    /// Writes a kernel setting of this network namespace, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/{key}");
        self.enter(|| std::fs::write(&path, value)).unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    fn join(&self) {
        unshare(CloneFlags::CLONE_FS).expect("a thread can have its own root");
        setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS).expect("the mounts can be entered");
        setns(self.net.as_fd(), CloneFlags::CLONE_NEWNET).expect("the network can be entered");
    }
}

fn own(kind: &str) -> Arc<File> {
    let path = format!("/proc/thread-self/ns/{kind}");
    Arc::new(File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}")))
}

/// Runs a function on a new thread, so that what it changes of its namespaces ends with it.
fn in_thread<T: Send>(function: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| scope.spawn(function).join());
    result.unwrap_or_else(|panic| resume_unwind(panic))
}
