//! A running agent.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::etcd::Etcd;
use crate::node::Node;
use crate::process::Process;
use crate::wait::{DEADLINE, limit};

/// A program that was built beside the running test program.
///
/// # Panics
/// When it is not there, or older than its sources: a test of yesterday's program says nothing.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a program has a path");
    let folder = std::env::var_os("NETCTL_BIN_DIR")
        .map(PathBuf::from)
        .or_else(|| Some(test.parent()?.parent()?.to_owned()))
        .expect("the test program is in target/PROFILE/deps");
    let path = folder.join(name);
    let built = fs::metadata(&path).and_then(|data| data.modified());
    let built = built.unwrap_or_else(|error| panic!("{}: {error}: {BUILD}", path.display()));
    let sources = newest(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../src"));
    assert!(sources.is_none_or(|time| time <= built), "{} is too old: {BUILD}", path.display());
    path
}

const BUILD: &str = "run `cargo build --bins` first";

/// When a file below a folder was last written; `None`: the sources are not on this machine.
fn newest(folder: &Path) -> Option<SystemTime> {
    let time = |entry: fs::DirEntry| match entry.file_type().ok()?.is_dir() {
        true => newest(&entry.path()),
        false => entry.metadata().ok()?.modified().ok(),
    };
    fs::read_dir(folder).ok()?.flatten().filter_map(time).max()
}

/// An agent's configuration file, as far as it differs from the test ground's own.
#[derive(Debug, Clone, Default)]
pub struct Config {
    keys: BTreeMap<String, String>,
    store: BTreeMap<String, String>,
}

impl Config {
    /// With the embedded store.
    pub fn embedded() -> Self {
        Self::default().store("kind", "embedded")
    }

    /// With this etcd.
    pub fn etcd(etcd: &Etcd) -> Self {
        Self::etcd_at(&etcd.endpoint())
    }

    /// With an etcd at this URL.
    pub fn etcd_at(url: &str) -> Self {
        // Two seconds is the most that an agent takes.
        let timeout = limit(Duration::from_secs(1)).min(Duration::from_secs(2));
        let timeout = format!("{}s", timeout.as_secs());
        let mut config = Self::default().store("kind", "etcd").store("timeout", &timeout);
        config.store.insert("endpoints".into(), format!("[{url:?}]"));
        config
    }

    /// With this etcd, over IPv6.
    pub fn etcd6(etcd: &Etcd) -> Self {
        Self::etcd_at(&etcd.endpoint6())
    }

    /// Sets a key to a text.
    #[must_use]
    pub fn set(self, key: &str, value: &str) -> Self {
        self.raw(key, &format!("{value:?}"))
    }

    /// Sets a key to a number, list or whatever else TOML has.
    #[must_use]
    pub fn raw(mut self, key: &str, value: &str) -> Self {
        self.keys.insert(key.into(), value.into());
        self
    }

    /// Leaves out a key that the test ground would set.
    #[must_use]
    pub fn without(self, key: &str) -> Self {
        self.raw(key, "")
    }

    /// Sets a key of the store to a text.
    #[must_use]
    pub fn store(mut self, key: &str, value: &str) -> Self {
        self.store.insert(key.into(), format!("{value:?}"));
        self
    }

    /// Writes the file for a node and returns its path.
    pub(crate) fn write(&self, node: &Node) -> PathBuf {
        let dir = node.dir();
        let path = |name: &str| format!("\"{}\"", dir.join(name).display());
        let mut keys = BTreeMap::from([
            ("node".to_owned(), format!("{:?}", node.name())),
            ("underlay".to_owned(), format!("{:?}", node.ipv4())),
            ("state_dir".to_owned(), path("state")),
            ("run_dir".to_owned(), path("run")),
            ("socket".to_owned(), path("netctl.sock")),
            ("log".to_owned(), "\"info,netctl=debug\"".to_owned()),
            // What balances is tested where the kernel has it (balance.rs); the addresses of
            // services are also tested where it has not.
            ("lb".to_owned(), "\"none\"".to_owned()),
        ]);
        keys.extend(self.keys.clone());
        let lines = |keys: &BTreeMap<String, String>| {
            let set = keys.iter().filter(|(_, value)| !value.is_empty());
            set.map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join("\n")
        };
        let file = dir.join("netctld.toml");
        let text = format!("{}\n[store]\n{}\n", lines(&keys), lines(&self.store));
        fs::write(&file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        file
    }
}

/// An agent that was started; dropping it kills it without a chance to clean up.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    manager: Arc<Manager>,
    log: PathBuf,
}

/// What an agent tells its service manager, which a thread listens to; it ends with the socket's file.
#[derive(Debug, Default)]
struct Manager {
    lines: Mutex<Vec<String>>,
    /// The sockets that are kept for the next agent.
    kept: Mutex<Sockets>,
    end: AtomicBool,
}

/// Sockets by the names under which a service manager keeps them.
pub type Sockets = BTreeMap<String, OwnedFd>;

impl Manager {
    /// Takes one message, if there is one soon.
    fn listen(&self, socket: &UnixDatagram) {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
        let Ok(message) = message else { return };
        let mut passed = Vec::new();
        for part in message.cmsgs().expect("there is room for them") {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just made them for this process.
                passed.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let told = |line: &str| lines.iter().any(|told| told == line);
        if let Some(name) = lines.iter().find_map(|line| line.strip_prefix("FDNAME=")) {
            let mut kept = self.kept.lock().expect("no thread panicked");
            if told("FDSTORE=1") {
                kept.extend(passed.pop().map(|socket| (name.to_owned(), socket)));
            } else if told("FDSTOREREMOVE=1") {
                kept.remove(name);
            }
        }
        self.lines.lock().expect("no thread panicked").extend(lines);
    }
}

impl Agent {
    pub(crate) fn start(node: &Node, config: &Config, wrapper: &[&str]) -> Self {
        Self::start_with(node, config, wrapper, Sockets::new())
    }

    /// Starts it with sockets that an earlier one had kept (sd_listen_fds(3)).
    pub(crate) fn start_with(node: &Node, config: &Config, wrapper: &[&str], sockets: Sockets) -> Self {
        let config = config.write(node);
        let (log, notify) = (node.dir().join("netctld.log"), node.dir().join("notify"));
        // Of an earlier agent; that there was none is no error.
        let _ = fs::remove_file(&notify);
        let notices =
            UnixDatagram::bind(&notify).unwrap_or_else(|error| panic!("{}: {error}", notify.display()));
        let copy = |(name, socket): (&String, &OwnedFd)| {
            (name.clone(), socket.try_clone().expect("a socket can be cloned"))
        };
        // They are kept until the agent says otherwise.
        let kept = Mutex::new(sockets.iter().map(copy).collect());
        let manager = Arc::new(Manager { kept, ..Manager::default() });
        let listener = manager.clone();
        notices.set_read_timeout(Some(Duration::from_millis(50))).expect("a socket has a time-out");
        std::thread::spawn(move || {
            while !listener.end.load(Ordering::Relaxed) {
                listener.listen(&notices);
            }
        });
        let program = binary("netctld");
        let mut words = wrapper.iter().map(PathBuf::from).chain([program]);
        let mut command = node.space.command(words.next().expect("there is a program"));
        command.args(words).arg("--config").arg(config).env("NOTIFY_SOCKET", &notify);
        let names: Vec<&str> = sockets.keys().map(String::as_str).collect();
        let (count, names) = (names.len().to_string(), names.join(":"));
        if !sockets.is_empty() {
            command.env("LISTEN_FDS", count).env("LISTEN_FDNAMES", names);
            pass(&mut command, sockets);
        }
        let process = Process::start(&mut command, &append(&log));
        Self { process, manager, log }
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Panics
    /// When it ends instead, or says nothing within [`DEADLINE`].
    #[track_caller]
    pub fn wait_ready(&mut self) {
        let ready = self.told("READY=1");
        assert!(ready, "the agent is not ready; its log ends with:\n{}", self.log_tail());
    }

    /// Waits until the agent tells its service manager a line such as `READY=1`; `false` when it
    /// ended or [`DEADLINE`] passed before.
    pub fn told(&mut self, line: &str) -> bool {
        let (start, mut last) = (Instant::now(), false);
        while start.elapsed() < limit(DEADLINE) {
            let ended = self.process.status().is_some();
            let mut lines = self.manager.lines.lock().expect("no thread panicked");
            if let Some(place) = lines.iter().position(|told| told == line) {
                lines.drain(..=place);
                return true;
            }
            drop(lines);
            if ended && last {
                return false;
            }
            // What it said last may still be on its way.
            last = ended;
            std::thread::sleep(Duration::from_millis(if ended { 200 } else { 5 }));
        }
        false
    }

    /// How many sockets it has its service manager keep.
    pub fn count_kept(&self) -> usize {
        self.manager.kept.lock().expect("no thread panicked").len()
    }

    /// The sockets that it has its service manager keep; they are the caller's from now on.
    pub fn take_kept(&self) -> Sockets {
        std::mem::take(&mut *self.manager.kept.lock().expect("no thread panicked"))
    }

    /// The agent's process id.
    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw()
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.process.status().is_none()
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits up to ten seconds for its end.
    pub fn ended(&mut self) -> bool {
        self.process.ended()
    }

    /// Kills it without warning, and waits for the end.
    pub fn kill(mut self) {
        self.process.stop(Signal::SIGKILL);
    }

    /// Asks it to end, as a service manager does.
    ///
    /// # Panics
    /// When it does not end with status 0.
    #[track_caller]
    pub fn terminate(mut self) {
        let status = self.process.stop(Signal::SIGTERM);
        assert!(status.success(), "the agent ended with {status}:\n{}", self.log_tail());
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log, 30)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.manager.end.store(true, Ordering::Relaxed);
    }
}

/// Has a command begin with sockets as its file descriptors from 3 on.
fn pass(command: &mut std::process::Command, sockets: Sockets) {
    // Away from where they are to be.
    let above = |socket: OwnedFd| fcntl(&socket, FcntlArg::F_DUPFD_CLOEXEC(500)).expect("there is room");
    let numbers: Vec<RawFd> = sockets.into_values().map(above).collect();
    let place = move || {
        for (number, target) in numbers.iter().zip(3..) {
            // SAFETY: it makes a number of this process's own mean the socket; nobody else runs in it.
            if unsafe { libc::dup2(*number, target) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, nothing is allocated.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, place) };
}

/// Opens a log at its end.
pub(crate) fn append(path: &Path) -> File {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The last lines of a file.
pub(crate) fn tail(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
