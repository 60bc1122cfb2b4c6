//! What the embedded store promises of its file.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use netctl::store::embedded::Embedded;
use netctl::store::{Event, Outcome, Revision, Store, StoreError, Transaction};
use nix::mount::{MsFlags, mount, umount};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::ground::{Mirror, Test, commit, eventually, next, run, tests, value};

pub fn tests() -> Vec<(&'static str, Test)> {
    tests![
    "embedded":
    what_was_written_is_there_after_it_is_opened_again,
    every_acknowledged_commit_survives_kill_9,
    a_file_that_another_process_has_open_is_refused,
    a_file_that_is_no_store_is_refused_and_left_as_it_is,
    a_damaged_file_is_refused,
    a_file_that_cannot_be_made_is_an_error_that_names_it,
    the_file_is_readable_by_its_owner_only,
    a_full_disk_fails_commits_and_loses_nothing,
    a_disk_that_is_full_no_more_is_used_again,
    what_needs_no_room_is_done_on_a_full_disk,
    a_removal_is_possible_when_others_have_filled_the_disk,
    requests_that_need_room_do_not_hold_up_those_that_do_not,
    a_revision_before_the_process_gets_a_snapshot,
    a_revision_that_the_history_has_forgotten_gets_a_snapshot,
    a_lease_has_its_whole_time_again_after_a_restart,
    a_thousand_commits_at_once_each_have_a_revision_of_their_own,
    ]
}

/// The variable that makes this program a writer of the file that it names.
pub const WRITER: &str = "NETCTL_TEST_STORE_WRITER";

/// The other process: commits without end, several at once, and prints what was acknowledged.
pub fn write_until_killed(path: &Path) -> ExitCode {
    run(async {
        let store = Arc::new(Embedded::open(path).unwrap());
        println!("open");
        let mut tasks = JoinSet::new();
        for task in 0..16 {
            let store = store.clone();
            tasks.spawn(async move {
                for number in 0_u64.. {
                    let key = format!("{task}/{number}");
                    commit(&*store, Transaction::new().put(&key, vec![7; 100])).await;
                    let mut out = std::io::stdout().lock();
                    if writeln!(out, "{key}").and_then(|()| out.flush()).is_err() {
                        return;
                    }
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    });
    ExitCode::SUCCESS
}

/// A writer in another process, killed with this.
struct Writer(Child);

impl Writer {
    fn start(path: &Path) -> (Self, impl Iterator<Item = String> + use<>) {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program).env(WRITER, path).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert_eq!(lines.next().as_deref(), Some("open"));
        (Self(child), lines)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

async fn what_was_written_is_there_after_it_is_opened_again() {
    let folder = folder();
    let path = folder.path().join("store");
    let store = Embedded::open(&path).unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    commit(&store, Transaction::new().put("a", "1").put("b", "2")).await;
    commit(&store, Transaction::new().delete("a").put_leased("c", vec![0; 100 << 10], lease)).await;
    let before = store.list("").await.unwrap();
    drop(store);
    let store = Embedded::open(&path).unwrap();
    assert_eq!(store.list("").await.unwrap(), before);
    store.keep_alive(lease).await.unwrap();
    store.revoke(lease).await.unwrap();
    drop(store);
    let store = Embedded::open(&path).unwrap();
    assert_eq!(store.list("").await.unwrap().entries.into_keys().collect::<Vec<_>>(), ["b"]);
    assert!(store.keep_alive(lease).await.is_err());
}

async fn every_acknowledged_commit_survives_kill_9() {
    let folder = folder();
    let path = folder.path().join("store");
    let mut acknowledged = Vec::new();
    for round in 1..=5 {
        let (writer, mut lines) = Writer::start(&path);
        acknowledged.extend(lines.by_ref().take(100 * round));
        drop(writer);
        acknowledged.extend(lines);
        let store = Embedded::open(&path).unwrap();
        let found = store.list("").await.unwrap().entries;
        let missing: Vec<_> = acknowledged.iter().filter(|key| !found.contains_key(*key)).collect();
        assert!(missing.is_empty(), "lost: {missing:?}");
        assert!(found.values().all(|entry| entry.value == [7; 100]));
    }
    assert!(acknowledged.len() >= 1500);
}

async fn a_file_that_another_process_has_open_is_refused() {
    let folder = folder();
    let path = folder.path().join("store");
    let (writer, _lines) = Writer::start(&path);
    let error = Embedded::open(&path).err().expect("refused");
    let text = error.to_string();
    assert!(matches!(error, StoreError::Open { path: named, .. } if named == path));
    assert!(text.contains(path.to_str().unwrap()) && text.contains("another process"), "{text}");
    drop(writer);
    Embedded::open(&path).unwrap();
}

async fn a_file_that_is_no_store_is_refused_and_left_as_it_is() {
    let folder = folder();
    let path = folder.path().join("store");
    for content in [b"hello".to_vec(), vec![0; 10_000], b"#!/bin/sh\n".repeat(1000)] {
        std::fs::write(&path, &content).unwrap();
        let error = Embedded::open(&path).err().expect("refused");
        assert!(matches!(&error, StoreError::Open { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
}

async fn a_damaged_file_is_refused() {
    let folder = folder();
    let path = folder.path().join("store");
    let store = Embedded::open(&path).unwrap();
    for i in 0..200 {
        commit(&store, Transaction::new().put(format!("{i}"), vec![1; 1000])).await;
    }
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    let mut zeroed = whole.clone();
    zeroed[4096..].fill(0);
    let mut noise = whole.clone();
    noise[4096..].iter_mut().enumerate().for_each(|(i, byte)| *byte = ((i * 7919) >> 3) as u8);
    for damaged in [whole[..whole.len() / 2].to_vec(), whole[..4096].to_vec(), zeroed, noise] {
        std::fs::write(&path, damaged).unwrap();
        let error = Embedded::open(&path).err().expect("refused");
        assert!(matches!(&error, StoreError::Open { path: named, .. } if *named == path), "{error}");
    }
}

async fn a_file_that_cannot_be_made_is_an_error_that_names_it() {
    let folder = folder();
    for path in [folder.path().join("no/such/folder"), folder.path().to_owned()] {
        let error = Embedded::open(&path).err().expect("refused");
        assert!(matches!(&error, StoreError::Open { path: named, .. } if *named == path), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    let disk = Disk::new("64k", "ro");
    let error = Embedded::open(disk.file()).err().expect("refused");
    assert!(error.to_string().contains("Read-only file system"), "{error}");
}

async fn the_file_is_readable_by_its_owner_only() {
    let folder = folder();
    let path = folder.path().join("store");
    drop(Embedded::open(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// A small file system in memory.
struct Disk(TempDir);

impl Disk {
    fn new(size: &str, more: &str) -> Self {
        let folder = folder();
        let options = format!("size={size}");
        let flags = if more == "ro" { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount(Some("netctl-test"), folder.path(), Some("tmpfs"), flags, Some(&*options)).unwrap();
        Self(folder)
    }

    fn file(&self) -> std::path::PathBuf {
        self.0.path().join("store")
    }

    fn resize(&self, size: &str) {
        let options = format!("size={size}");
        mount(None::<&str>, self.0.path(), None::<&str>, MsFlags::MS_REMOUNT, Some(&*options)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount(self.0.path());
    }
}

/// Writes until the disk is full; returns how many were written.
async fn fill(store: &Embedded) -> usize {
    for i in 0..100_000 {
        match store.commit(Transaction::new().put(format!("fill/{i:05}"), vec![1; 6000])).await {
            Ok(outcome) => assert!(matches!(outcome, Outcome::Committed(_))),
            Err(error) => {
                assert!(matches!(&error, StoreError::Failed { .. }), "{error}");
                assert!(error.to_string().contains("No space left on device"), "{error}");
                return i;
            }
        }
    }
    panic!("the disk is never full")
}

async fn a_full_disk_fails_commits_and_loses_nothing() {
    let disk = Disk::new("8m", "");
    let store = Embedded::open(disk.file()).unwrap();
    let written = fill(&store).await;
    let before = store.list("").await.unwrap();
    assert_eq!(before.entries.len(), written, "a commit that failed is not seen");
    for _ in 0..3 {
        assert!(store.commit(Transaction::new().put("large", vec![1; 500_000])).await.is_err());
    }
    assert_eq!(store.list("").await.unwrap(), before);
    drop(store);
    let store = Embedded::open(disk.file()).unwrap();
    assert_eq!(store.list("").await.unwrap(), before);

    let disk = Disk::new("4k", "");
    let error = Embedded::open(disk.file()).err().expect("refused");
    assert!(error.to_string().contains("No space left on device"), "{error}");
}

async fn a_disk_that_is_full_no_more_is_used_again() {
    let disk = Disk::new("8m", "");
    let store = Embedded::open(disk.file()).unwrap();
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    let written = fill(&store).await;
    disk.resize("32m");
    let last = eventually("it is used again", async || {
        let after = Transaction::new().put("after", vec![1; 500_000]);
        match store.commit(after).await {
            Ok(Outcome::Committed(revision)) => Some(revision),
            Ok(Outcome::Conflict) | Err(_) => None,
        }
    })
    .await;
    let mut mirror = Mirror { revision: Revision(1), ..Mirror::default() };
    mirror.follow(&mut watch, last).await;
    assert_eq!((mirror.entries.len(), mirror.snapshots), (written + 1, 0));
}

async fn what_needs_no_room_is_done_on_a_full_disk() {
    for size in ["768k", "8m"] {
        let disk = Disk::new(size, "");
        let store = Embedded::open(disk.file()).unwrap();
        let lease = store.grant(Duration::from_secs(600)).await.unwrap();
        commit(&store, Transaction::new().put_leased("leased", "", lease).put("state", "attached"))
            .await;
        let written = fill(&store).await;
        commit(&store, Transaction::new().put("state", "released").delete("fill/00000")).await;
        store.revoke(lease).await.unwrap();
        assert_eq!(value(&store, "leased").await, None);
        for i in 1..written {
            commit(&store, Transaction::new().delete(format!("fill/{i:05}"))).await;
        }
        eventually("there is room", async || {
            store.commit(Transaction::new().put("room", vec![1; 6000])).await.ok()
        })
        .await;
        let filled_again = fill(&store).await;
        assert!(filled_again > written * 9 / 10, "{filled_again} of {written}");
        drop(store);
        let store = Embedded::open(disk.file()).unwrap();
        assert_eq!(store.list("fill/").await.unwrap().entries.len(), filled_again);
        commit(&store, Transaction::new().delete("fill/00000")).await;
    }
}

async fn a_removal_is_possible_when_others_have_filled_the_disk() {
    let disk = Disk::new("4m", "");
    let store = Embedded::open(disk.file()).unwrap();
    for i in 0..100 {
        commit(&store, Transaction::new().put(format!("{i}"), vec![1; 1000])).await;
    }
    let greedy = || {
        let path = disk.0.path().join("other");
        let mut other = std::fs::File::options().create(true).append(true).open(path).unwrap();
        while other.write_all(&[1; 4096]).is_ok() {}
    };
    greedy();
    assert!(store.commit(Transaction::new().put("more", vec![1; 900_000])).await.is_err());
    greedy();
    for i in 0..100 {
        commit(&store, Transaction::new().delete(format!("{i}"))).await;
    }
    assert!(store.list("").await.unwrap().entries.is_empty());
}

async fn requests_that_need_room_do_not_hold_up_those_that_do_not() {
    let disk = Disk::new("4m", "");
    let store = Arc::new(Embedded::open(disk.file()).unwrap());
    let written = fill(&store).await;
    let mut tasks = JoinSet::new();
    for i in 0..written.min(100) {
        let (put, remove) = (store.clone(), store.clone());
        tasks.spawn(async move {
            let put = put.commit(Transaction::new().put(format!("large/{i}"), vec![1; 900_000])).await;
            assert!(put.is_err());
        });
        tasks.spawn(async move {
            commit(&*remove, Transaction::new().delete(format!("fill/{i:05}"))).await;
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    assert_eq!(store.list("large/").await.unwrap().entries.len(), 0);
}

async fn a_revision_before_the_process_gets_a_snapshot() {
    let folder = folder();
    let path = folder.path().join("store");
    let store = Embedded::open(&path).unwrap();
    let first = commit(&store, Transaction::new().put("a", "1")).await;
    let second = commit(&store, Transaction::new().put("b", "2")).await;
    drop(store);
    let store = Embedded::open(&path).unwrap();
    let Event::Snapshot(listing) = next(&mut store.watch("", Some(first))).await else {
        panic!("no snapshot");
    };
    assert_eq!((listing.revision, listing.entries.len()), (second, 2));
    let mut watch = store.watch("", Some(second));
    commit(&store, Transaction::new().put("c", "3")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)), "nothing was missed");
}

async fn a_revision_that_the_history_has_forgotten_gets_a_snapshot() {
    let folder = folder();
    let store = Embedded::open(folder.path().join("store")).unwrap();
    let first = commit(&store, Transaction::new().put("first", "")).await;
    let mut slow = store.watch("", None);
    let mut last = first;
    for round in 0..100 {
        let transaction =
            (0..120).fold(Transaction::new(), |t, i| t.put(format!("{i}"), format!("{round}")));
        last = commit(&store, transaction).await;
    }
    let Event::Snapshot(listing) = next(&mut store.watch("", Some(first))).await else {
        panic!("no snapshot");
    };
    assert_eq!((listing.revision, listing.entries.len()), (last, 121));
    let mut mirror = Mirror::default();
    mirror.follow(&mut slow, last).await;
    assert_eq!(mirror.entries.len(), 121);
    assert!(mirror.entries.iter().all(|(key, value)| key == "first" || value == b"99"));
}

async fn a_lease_has_its_whole_time_again_after_a_restart() {
    let folder = folder();
    let path = folder.path().join("store");
    let store = Embedded::open(&path).unwrap();
    let lease = store.grant(Duration::from_secs(2)).await.unwrap();
    commit(&store, Transaction::new().put_leased("leased", "", lease)).await;
    drop(store);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let store = Embedded::open(&path).unwrap();
    assert!(value(&store, "leased").await.is_some(), "while nobody looked, no time passed");
    store.keep_alive(lease).await.unwrap();
    eventually("the lease ends", async || value(&store, "leased").await.is_none().then_some(())).await;
    drop(store);
    let store = Embedded::open(&path).unwrap();
    assert_eq!(value(&store, "leased").await, None, "its end is durable");
}

async fn a_thousand_commits_at_once_each_have_a_revision_of_their_own() {
    let folder = folder();
    let store = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
    let mut tasks = JoinSet::new();
    for i in 0..1000 {
        let store = store.clone();
        tasks.spawn(async move { commit(&*store, Transaction::new().put(format!("{i}"), "")).await });
    }
    let mut revisions: Vec<_> = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        revisions.push(ended.unwrap().0);
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (2..=1001).collect::<Vec<_>>(), "each has a revision of its own");
    assert_eq!(store.list("").await.unwrap().entries.len(), 1000);
}
