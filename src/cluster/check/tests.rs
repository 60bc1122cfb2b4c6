use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::model::FindingKind as K;
use crate::store::{Comparison, Entry, Write};

const NET: &str = "0000000000aa";
const A: &str = "00000000000a";
const B: &str = "00000000000b";
const NONE: &str = "00000000000f";

/// A store in memory.
#[derive(Clone, Default)]
struct Keys(BTreeMap<String, Entry>, u64);

impl Keys {
    fn put(&mut self, key: &str, value: impl Into<Vec<u8>>) {
        self.1 += 1;
        self.0.insert(
            key.to_owned(),
            Entry { value: value.into(), modified: Revision(self.1), leased: false },
        );
    }

    fn set(&mut self, key: &str, value: &Value) {
        self.put(key, value.to_string());
    }

    fn delete(&mut self, key: &str) {
        self.0.remove(key).unwrap();
    }

    fn found(&self) -> Vec<Inconsistency> {
        rules::inconsistencies(&Book::read(&self.0))
    }

    /// Does a repair; `false`: something had changed.
    fn commit(&mut self, transaction: &Transaction) -> bool {
        let holds = |comparison: &Comparison| match comparison {
            Comparison::Absent(key) => !self.0.contains_key(key),
            Comparison::Modified(key, at) => self.0.get(key).is_some_and(|e| e.modified == *at),
        };
        if !transaction.comparisons.iter().all(holds) {
            return false;
        }
        for write in &transaction.writes {
            match write {
                Write::Put { key, value, .. } => self.put(key, value.clone()),
                Write::Delete(key) => drop(self.0.remove(key)),
            }
        }
        true
    }

    fn endpoint(&mut self, id: &str, name: &str, node: &str, addresses: &[&str]) {
        let attachment = json!({"netns": "/n", "inode": 1, "boot": "b", "interface": "eth0"});
        let endpoint = json!({
            "id": id, "name": name, "network": NET, "node": node, "addresses": addresses,
            "mac": "02:00:00:00:00:01", "attachment": attachment,
        });
        self.set(&format!("members/{NET}/endpoints/{id}"), &endpoint);
        self.set(&format!("members/{NET}/names/{name}"), &json!(id));
        self.put(&format!("local/{node}/{NET}/{id}"), "");
        for address in addresses {
            self.set(&format!("members/{NET}/addresses/{address}"), &json!(id));
        }
    }
}

/// Two nodes, one network, an endpoint on each node, an address that rests.
fn healthy() -> Keys {
    let mut keys = Keys::default();
    keys.set("base/cluster", &json!({"schema": 1, "id": "0123456789ab"}));
    keys.put("base/networks-guard", "");
    let subnets = json!([
        {"cidr": "10.9.0.0/24", "gateway": "10.9.0.1", "block_prefix": 28},
        {"cidr": "fd00:9::/64", "gateway": "fd00:9::1", "block_prefix": 120},
    ]);
    let network = json!({
        "id": NET, "name": "web", "subnets": subnets, "vni": 4097, "uplink": 0, "mtu": null,
        "internal": false, "labels": {}, "removing": false,
    });
    keys.set(&format!("base/networks/{NET}"), &network);
    for (number, name) in ["n1", "n2"].into_iter().enumerate() {
        let node = json!({
            "id": NONE, "name": name, "underlay": format!("192.0.2.{number}"), "mtu": 1450,
            "vtep_mac": "02:00:00:00:00:02", "tunnel_port": 4789, "subnets_in_use": [],
            "labels": {}, "version": "0.1.0",
        });
        keys.set(&format!("base/nodes/{name}"), &node);
        keys.set(&format!("base/alive/{name}"), &json!(NONE));
    }
    keys.endpoint(A, "a", "n1", &["10.9.0.2", "fd00:9::2"]);
    keys.endpoint(B, "b", "n2", &["10.9.0.18", "fd00:9::102"]);
    let resting = format!("members/{NET}/addresses/10.9.0.3");
    keys.put(&resting, "");
    keys.0.get_mut(&resting).unwrap().leased = true;
    // Of another version: what checks write is nobody's.
    keys.put("base/checks/0000000000cc", "?");
    keys.put("checks/0000000000cc/n2", "?");
    keys.set(&members("reservations/held"), &json!({"count": 3, "drawn": 0}));
    keys.0.get_mut(&members("reservations/held")).unwrap().leased = true;
    keys.set(&members(&format!("acks/{A}/n2")), &json!({"revision": 7, "connections": 0}));
    keys.set(&format!("members/{NET}/blocks/10.9.0.0/28"), &json!("n1"));
    keys.set(&format!("members/{NET}/blocks/10.9.0.16/28"), &json!("n2"));
    keys
}

/// What was done to a healthy store, what is found then, and whether it can be repaired.
type Case = (fn(&mut Keys), K, &'static str, bool);

const CASES: &[Case] = &[
    (
        |keys| keys.set(&members("addresses/10.9.0.9"), &json!(NONE)),
        K::LeakedAddress,
        "addresses/10.9.0.9",
        true,
    ),
    (
        |keys| keys.set(&members("addresses/10.9.0.9"), &json!(A)),
        K::LeakedAddress,
        "addresses/10.9.0.9",
        true,
    ),
    (|keys| keys.put(&members("addresses/10.9.0.9"), ""), K::LeakedAddress, "addresses/10.9.0.9", true),
    (|keys| keys.set(&members("names/c"), &json!(NONE)), K::LeakedName, "names/c", true),
    (
        |keys| keys.put(&format!("local/n1/{NET}/{NONE}"), ""),
        K::LeakedLocal,
        "local/n1/0000000000aa/00000000000f",
        true,
    ),
    (
        |keys| keys.put(&format!("local/n2/{NET}/{A}"), ""),
        K::LeakedLocal,
        "local/n2/0000000000aa/00000000000a",
        true,
    ),
    (
        |keys| keys.put(&format!("local/n1/{NONE}/{A}"), ""),
        K::LeakedLocal,
        "local/n1/00000000000f/00000000000a",
        true,
    ),
    (
        |keys| {
            keys.set(&members(&format!("acks/{NONE}/n1")), &json!({"revision": 7, "connections": 1}));
        },
        K::LeakedAck,
        "acks/00000000000f/n1",
        true,
    ),
    (
        |keys| keys.set(&members("reservations/plan"), &json!({"count": 3, "drawn": 0})),
        K::LeakedReservation,
        "reservations/plan",
        true,
    ),
    (|keys| keys.put(&members(&format!("acks/{A}/n1")), "x"), K::Unreadable, "acks/", false),
    (
        |keys| keys.set(&members("blocks/10.9.0.32/28"), &json!("n9")),
        K::LeakedBlock,
        "blocks/10.9.0.32/28",
        true,
    ),
    (
        |keys| keys.set(&members("blocks/10.8.0.32/28"), &json!("n1")),
        K::OutsideBlock,
        "blocks/10.8.0.32/28",
        true,
    ),
    (
        |keys| {
            for number in 0..250 {
                keys.put(&format!("members/{NONE}/addresses/10.1.0.{number}"), "");
            }
        },
        K::LeakedMembers,
        "members/00000000000f/",
        true,
    ),
    (|keys| keys.delete(&members("addresses/10.9.0.2")), K::MissingAddress, "addresses/10.9.0.2", true),
    (|keys| keys.put(&members("addresses/10.9.0.2"), ""), K::MissingAddress, "addresses/10.9.0.2", true),
    (
        |keys| keys.set(&members("addresses/10.9.0.2"), &json!(B)),
        K::MissingAddress,
        "addresses/10.9.0.2",
        true,
    ),
    (|keys| keys.delete(&members("names/a")), K::MissingName, "names/a", true),
    (
        |keys| keys.delete(&format!("local/n1/{NET}/{A}")),
        K::MissingLocal,
        "local/n1/0000000000aa/00000000000a",
        true,
    ),
    (
        |keys| keys.endpoint(NONE, "c", "n1", &["10.9.0.2"]),
        K::DoubleAddress,
        "addresses/10.9.0.2",
        false,
    ),
    (|keys| keys.endpoint(NONE, "a", "n1", &["10.9.0.9"]), K::DoubleName, "names/a", false),
    (
        |keys| keys.endpoint(NONE, "c", "n1", &["10.8.0.2"]),
        K::OutsideAddress,
        "endpoints/00000000000f",
        false,
    ),
    (
        |keys| keys.endpoint(NONE, "c", "n9", &["10.9.0.9"]),
        K::LostEndpoint,
        "endpoints/00000000000f",
        false,
    ),
    (|keys| keys.put(&members("endpoints/00000000000a"), "{"), K::Unreadable, "endpoints/", false),
    (|keys| keys.put(&members("addresses/x"), "\"x\""), K::Unreadable, "addresses/x", false),
    (|keys| keys.put(&members("addresses/10.9.0.2"), "x"), K::Unreadable, "addresses/10.9.0.2", false),
    (|keys| keys.put(&members("blocks/10.9.0.0/28"), ""), K::Unreadable, "blocks/", false),
    (|keys| keys.put(&format!("base/networks/{NET}"), "{"), K::Unreadable, "base/networks/", false),
    (|keys| keys.put("base/nodes/n1", ""), K::Unreadable, "base/nodes/n1", false),
];

fn members(rest: &str) -> String {
    format!("members/{NET}/{rest}")
}

#[test]
fn nothing_is_found_in_a_healthy_store() {
    assert_eq!(healthy().found(), []);
    assert_eq!(Keys::default().found(), []);
}

#[test]
fn each_inconsistency_is_found_alone_and_repaired_where_that_is_safe() {
    for (harm, kind, what, repairable) in CASES {
        let mut keys = healthy();
        harm(&mut keys);
        let found = keys.found();
        let [only] = found.as_slice() else { panic!("{kind} {what}: {found:?}") };
        assert_eq!((only.finding.kind, only.finding.repairable), (*kind, *repairable), "{found:?}");
        assert!(only.finding.what.contains(what), "{found:?}");
        assert_eq!(only.repair.is_empty(), !repairable);
        for transaction in &only.repair {
            assert!(transaction.comparisons.len() < Transaction::MAX_STEPS, "one more is added");
            assert!(keys.commit(transaction), "{found:?}");
        }
        assert_eq!(keys.found().is_empty(), *repairable, "{kind} {what}");
    }
}

#[test]
fn a_repair_does_nothing_when_what_it_is_about_has_changed() {
    for (harm, kind, what, _) in CASES.iter().filter(|(.., repairable)| *repairable) {
        let mut keys = healthy();
        harm(&mut keys);
        let found = keys.found().remove(0);
        let first = &found.repair[0];
        for comparison in &first.comparisons {
            let mut changed = keys.clone();
            match comparison {
                Comparison::Absent(key) => changed.put(key, ""),
                Comparison::Modified(key, _) => {
                    let same = changed.0[key].value.clone();
                    changed.put(key, same);
                }
            }
            let before = changed.0.clone();
            assert!(!changed.commit(first), "{kind} {what}: {comparison:?}");
            assert_eq!(changed.0, before);
        }
        // Every key that it writes is compared.
        for write in &first.writes {
            let (Write::Put { key, .. } | Write::Delete(key)) = write;
            let compared = first.comparisons.iter().any(|comparison| match comparison {
                Comparison::Absent(other) | Comparison::Modified(other, _) => other == key,
            });
            assert!(compared, "{kind} {what}: {key}");
        }
    }
}

#[test]
fn what_another_sort_of_record_has_is_no_leak() {
    let mut keys = healthy();
    keys.set(&members(&format!("others/{NONE}")), &json!({}));
    keys.set(&members("addresses/10.9.0.9"), &json!(NONE));
    keys.set(&members("names/c"), &json!(NONE));
    assert_eq!(keys.found(), []);
    // But an endpoint that has the same address is one too many.
    keys.set(&members("addresses/10.9.0.2"), &json!(NONE));
    let found = keys.found();
    assert_eq!((found.len(), found[0].finding.kind), (1, K::DoubleAddress), "{found:?}");
}
