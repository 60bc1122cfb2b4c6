//! The ground of these tests: namespaces, etcd servers, and how to wait.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use netctl::store::etcd::{Etcd, EtcdConfig};
use netctl::store::{Change, Event, Outcome, Revision, Store, Transaction, Watch};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long a condition is waited for before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Test = fn() -> Pin<Box<dyn Future<Output = ()>>>;
pub type Fact = fn(Arc<dyn Store>) -> Pin<Box<dyn Future<Output = ()>>>;

/// Lists facts by the names of their functions.
macro_rules! facts {
    ($($name:ident),* $(,)?) => {
        vec![$((stringify!($name), (|store| Box::pin($name(store))) as $crate::ground::Fact)),*]
    };
}

/// Lists tests by the names of their functions, and what stands before them.
macro_rules! tests {
    ($prefix:literal: $($name:ident),* $(,)?) => {
        vec![$((
            concat!($prefix, "::", stringify!($name)),
            (|| Box::pin($name())) as $crate::ground::Test,
        )),*]
    };
}
pub(crate) use {facts, tests};

/// Leaves the machine's network and mounts behind. To be called before there are threads.
pub fn enter() -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "not root");
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("private mounts")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("ip")?;
    ensure!(up.success(), "lo does not come up");
    ensure!(Command::new("etcd").arg("--version").output().is_ok(), "etcd is not installed");
    Ok(())
}

/// Runs a test on a runtime of its own.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(test);
}

/// Waits until there is something.
pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The next report of a watch.
pub async fn next(watch: &mut Watch) -> Event {
    let event = tokio::time::timeout(PATIENCE, watch.recv()).await;
    event.expect("a report in time").expect("a watch that goes on")
}

/// Commits what must not conflict.
pub async fn commit(store: &dyn Store, transaction: Transaction) -> Revision {
    match store.commit(transaction).await.unwrap() {
        Outcome::Committed(revision) => revision,
        Outcome::Conflict => panic!("a conflict"),
    }
}

/// The value of a key, as text.
pub async fn value(store: &dyn Store, key: &str) -> Option<String> {
    let entry = store.get(key).await.unwrap();
    entry.map(|entry| String::from_utf8(entry.value).unwrap())
}

/// What a receiver knows that believes a watch, checking that the reports fit each other.
#[derive(Debug, Default)]
pub struct Mirror {
    pub revision: Revision,
    pub entries: std::collections::BTreeMap<String, Vec<u8>>,
    pub snapshots: usize,
    pub lost: usize,
    /// Every key and revision that was reported as a change.
    pub puts: Vec<(String, Revision)>,
}

impl Mirror {
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Snapshot(listing) => {
                self.snapshots += 1;
                self.revision = listing.revision;
                let pairs = listing.entries.into_iter();
                self.entries = pairs.map(|(key, entry)| (key, entry.value)).collect();
            }
            Event::Changes(revision, changes) => {
                assert!(changes.is_empty() || revision > self.revision, "a revision twice");
                for change in changes {
                    match change {
                        Change::Put(key, entry) => {
                            assert!(entry.modified > self.revision && entry.modified <= revision);
                            self.puts.push((key.clone(), entry.modified));
                            self.entries.insert(key, entry.value);
                        }
                        Change::Delete(key) => drop(self.entries.remove(&key)),
                    }
                }
                self.revision = revision;
            }
            Event::Lost(_) => self.lost += 1,
        }
    }

    /// Reads the watch until this revision.
    pub async fn follow(&mut self, watch: &mut Watch, until: Revision) {
        while self.revision < until {
            self.take(next(watch).await);
        }
    }
}

/// An etcd of one member, ended when it is dropped.
pub struct Server {
    child: Child,
    folder: TempDir,
    port: u16,
    peer: u16,
    flags: Vec<String>,
}

impl Server {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let server = Self::spawn(|_| Vec::new());
        server.ready().await;
        server
    }

    /// Starts one with more flags, made from its client port.
    pub fn spawn(flags: impl FnOnce(u16) -> Vec<String>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (port, peer) = (free_port(), free_port());
        let mut flags = flags(port);
        if !flags.iter().any(|flag| flag.starts_with("--listen-client-urls")) {
            flags.extend(plain_urls(port));
        }
        let child = launch(&folder, peer, &flags);
        Self { child, folder, port, peer, flags }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn config(&self) -> EtcdConfig {
        EtcdConfig { endpoints: vec![self.url()], ..EtcdConfig::default() }
    }

    /// Waits until it answers without TLS.
    pub async fn ready(&self) {
        let store = Etcd::new(self.config()).unwrap();
        eventually("etcd answers", async || match store.get("is it there").await {
            Ok(_) | Err(netctl::store::StoreError::Denied { .. }) => Some(()),
            Err(_) => None,
        })
        .await;
    }

    /// A plain client, for what an administrator does.
    pub async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.url()], None).await.unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Stops it as it is; its connections stay. Done when each of its threads is stopped.
    pub async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        eventually("etcd is frozen", async || {
            let stopped = |task: std::io::Result<std::fs::DirEntry>| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            };
            std::fs::read_dir(&tasks).unwrap().all(stopped).then_some(())
        })
        .await;
    }

    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub fn stop(&mut self) {
        // One that was stopped already is waited for again, which does nothing.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub async fn restart(&mut self) {
        self.stop();
        self.child = launch(&self.folder, self.peer, &self.flags);
        self.ready().await;
    }

    /// Gives it another port, from its next start on. What is connected to it does not find it.
    pub fn move_to(&mut self, port: u16) {
        self.port = port;
        self.flags = plain_urls(port);
    }

    /// A copy of its data, to be made while it is stopped.
    pub fn copy(&self) -> PathBuf {
        let copy = self.folder.path().join("copy");
        copy_folder(&self.data(), &copy);
        copy
    }

    /// Starts it with a copy of data.
    pub async fn restore(&mut self, copy: &Path) {
        self.stop();
        std::fs::remove_dir_all(self.data()).unwrap();
        copy_folder(copy, &self.data());
        self.child = launch(&self.folder, self.peer, &self.flags);
        self.ready().await;
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Starts it anew without its data.
    pub async fn wipe(&mut self) {
        self.stop();
        std::fs::remove_dir_all(self.data()).unwrap();
        self.child = launch(&self.folder, self.peer, &self.flags);
        self.ready().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn plain_urls(port: u16) -> Vec<String> {
    let url = format!("client-urls=http://127.0.0.1:{port}");
    vec![format!("--listen-{url}"), format!("--advertise-{url}")]
}

fn copy_folder(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(done.success(), "{} is not copied", from.display());
}

fn launch(folder: &TempDir, peer: u16, flags: &[String]) -> Child {
    let log = File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
    let data = folder.path().join("data");
    Command::new("etcd")
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!("--initial-cluster=default=http://127.0.0.1:{peer}"))
        // Leases are not shorter than one and a half elections.
        .args(["--heartbeat-interval=50", "--election-timeout=500"])
        .args(flags)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("etcd starts")
}

/// A port that nobody listens on.
///
/// It is none of those that the kernel gives to clients (ip_local_port_range): one of them could get it while its
/// server is down.
pub fn free_port() -> u16 {
    static LAST: AtomicU16 = AtomicU16::new(0);
    let first = 12_000 + (std::process::id() % 10_000) as u16;
    loop {
        let port = first + LAST.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
