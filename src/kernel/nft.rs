//! Our nftables table, through the `nft` program: one script is one transaction.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use netlink_packet_netfilter::nftables::{GenAttribute, GenMessage, NfTablesMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use nix::errno::Errno;
use serde_json::Value;

use super::Error;
use super::netlink::{Netlink, NetlinkError, Request};
use super::netns::Netns;
use crate::model::object::TABLE;

/// What a table is like, without what changes by itself. Two fingerprints may be compared within
/// one run of the program; they are not for keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64);

/// How often a table is installed again because somebody else changed nftables just then.
const INSTALLS: usize = 5;

/// Runs a script inside a namespace: all of it takes effect, or nothing.
pub fn install(netns: &Netns, script: &str) -> Result<(), Error> {
    let output = run(netns, &["-f", "-"], script)?;
    if output.status.success() { Ok(()) } else { Err(failed(netns, &output)) }
}

/// The same, and gives what our table is like then, and the generation. Where somebody else changed
/// nftables at that moment it is done again: what was listed would not be what was installed.
pub fn install_alone(netns: &Netns, script: &str) -> Result<(Fingerprint, u32), Error> {
    for _ in 0..INSTALLS {
        let before = generation(netns)?;
        install(netns, script)?;
        let found = fingerprint(netns)?;
        let after = generation(netns)?;
        if let Some(found) = found
            && after == before.wrapping_add(1)
        {
            return Ok((found, after));
        }
    }
    let message = "somebody else changes nftables all the time".to_owned();
    Err(Error::Nft { namespace: netns.label(), message })
}

/// Removes our table from a namespace. That it is gone already is success.
pub fn remove(netns: &Netns) -> Result<(), Error> {
    // Adding a table that is there does nothing, so deleting it never fails.
    install(netns, &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n"))
}

/// Reads our table's fingerprint; `None`: there is no such table.
pub fn fingerprint(netns: &Netns) -> Result<Option<Fingerprint>, Error> {
    let output = run(netns, &["-j", "list", "table", "inet", TABLE], "")?;
    if !output.status.success() {
        let absent = String::from_utf8_lossy(&output.stderr).contains("No such file or directory");
        return if absent { Ok(None) } else { Err(failed(netns, &output)) };
    }
    let listing: Value = serde_json::from_slice(&output.stdout).map_err(|error| Error::Nft {
        namespace: netns.label(),
        message: format!("its listing cannot be read: {error}"),
    })?;
    Ok(Some(digest(&listing)))
}

/// The number of the last change of a namespace's nftables, anybody's. As long as it stays, so do all
/// tables, but for what rules themselves add to sets.
pub fn generation(netns: &Netns) -> Result<u32, Error> {
    let ask = GenMessage { attributes: Vec::new() };
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let ask = Request::new(NetfilterMessage::new(header, NfTablesMessage::GetGen(ask)));
    let opened = netns.enter(Netlink::netfilter)?;
    let replies = opened.map_err(NetlinkError::from).and_then(|mut netlink| netlink.request(ask));
    let failed = Error::netlink("read the generation of nftables", netns.label());
    let replies: Vec<NetfilterMessage> = replies.map_err(failed)?;
    let found = replies.into_iter().find_map(|reply| match reply.inner {
        NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(reply)) => {
            reply.attributes.into_iter().find_map(|attribute| match attribute {
                GenAttribute::Id(generation) => Some(generation),
                _ => None,
            })
        }
        _ => None,
    });
    found.ok_or_else(|| Error::system("read the generation of nftables")(Errno::ENODATA))
}

/// Digests what a script determines: not handles, counts and remaining times, nor the elements of
/// sets that rules fill.
fn digest(listing: &Value) -> Fingerprint {
    let mut filled = BTreeSet::new();
    find_filled(listing, &mut filled);
    let mut hasher = DefaultHasher::new();
    hash(listing, &filled, &mut hasher);
    Fingerprint(hasher.finish())
}

/// Collects the sets and maps that rules add to or update: statements `{"op": …, "set": "@name"}`.
/// Their flag `dynamic` is not in every version's listing.
fn find_filled<'a>(value: &'a Value, filled: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(fields) => {
            if fields.contains_key("op") {
                let names = ["set", "map"].iter().filter_map(|key| fields.get(*key)?.as_str());
                filled.extend(names.filter_map(|name| name.strip_prefix('@')));
            }
            fields.values().for_each(|value| find_filled(value, filled));
        }
        Value::Array(values) => values.iter().for_each(|value| find_filled(value, filled)),
        _ => {}
    }
}

fn hash(value: &Value, filled: &BTreeSet<&str>, hasher: &mut DefaultHasher) {
    match value {
        Value::Object(fields) => {
            let name = fields.get("name").and_then(Value::as_str);
            let dynamic = name.is_some_and(|name| filled.contains(name));
            for (key, value) in fields {
                let changes =
                    matches!(key.as_str(), "handle" | "packets" | "bytes" | "used" | "expires");
                if changes || key == "metainfo" || (dynamic && key == "elem") {
                    continue;
                }
                key.hash(hasher);
                hash(value, filled, hasher);
            }
        }
        Value::Array(values) => {
            values.len().hash(hasher);
            for value in values {
                hash(value, filled, hasher);
            }
        }
        other => other.to_string().hash(hasher),
    }
}

fn failed(netns: &Netns, output: &Output) -> Error {
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let message = if message.is_empty() { output.status.to_string() } else { message };
    Error::Nft { namespace: netns.label(), message }
}

fn run(netns: &Netns, arguments: &[&str], input: &str) -> Result<Output, Error> {
    let mut command = Command::new("nft");
    command.args(arguments).env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A child begins in the namespace of the thread that spawns it.
    let mut child = match netns.enter(|| command.spawn())? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NftMissing),
        result => result.map_err(Error::system("start nft"))?,
    };
    remember(&child);
    let stdin = child.stdin.take();
    // `nft` reads all of its input before it writes anything. When it ended early, its message
    // says more than the broken pipe.
    let _ = stdin.map(|mut stdin| stdin.write_all(input.as_bytes()));
    child.wait_with_output().map_err(Error::system("run nft"))
}

/// The last processes that changed tables for us: a process's first netlink socket has its number
/// as its port.
static OURS: Mutex<VecDeque<u32>> = Mutex::new(VecDeque::new());
const REMEMBERED: usize = 64;

fn remember(child: &Child) {
    let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    if ours.len() == REMEMBERED {
        ours.pop_front();
    }
    ours.push_back(child.id());
}

/// Whether a notification was caused by a script of ours.
pub(super) fn is_own_port(port: u32) -> bool {
    OURS.lock().unwrap_or_else(PoisonError::into_inner).contains(&port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Fingerprint {
        digest(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn counts_and_handles_do_not_count() {
        let one = r#"{"rule": {"handle": 4, "expr": [{"counter": {"packets": 1, "bytes": 60}}, {"drop": null}]}}"#;
        let two = r#"{"rule": {"handle": 9, "expr": [{"counter": {"packets": 7, "bytes": 99}}, {"drop": null}]}}"#;
        let other = r#"{"rule": {"handle": 4, "expr": [{"counter": {"packets": 1, "bytes": 60}}, {"accept": null}]}}"#;
        assert_eq!(of(one), of(two));
        assert_ne!(of(one), of(other));
    }

    #[test]
    fn elements_count_but_for_those_of_sets_that_rules_fill() {
        let table = |rule: &str, elem: &str| {
            of(&format!(
                r#"[{{"set": {{"name": "seen", "elem": {elem}}}}}, {{"rule": {{"expr": [{rule}]}}}}]"#
            ))
        };
        let (reads, fills) =
            (r#"{"match": {"right": "@seen"}}"#, r#"{"set": {"op": "add", "set": "@seen"}}"#);
        assert_ne!(table(reads, "[1]"), table(reads, "[2]"));
        assert_eq!(table(fills, "[1]"), table(fills, "[2]"));
    }
}
