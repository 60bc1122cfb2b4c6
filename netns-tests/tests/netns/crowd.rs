//! Very many services: their records are written to the store at once, as if many had been at work.
//! For a kernel that has IPVS.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use netctl::store::{Outcome, Store as _, Transaction};
use serde_json::{Value, json};
use world::{Load, NodeOptions, Space, World, wait_for};

use crate::cluster::Cluster;
use crate::engine::{lb, rows};
use crate::shop::{Backend, PATIENCE, create, plug, requests};

crate::tests![fifty_services_of_ten_backends_appear_change_and_vanish];

/// Those that take many minutes in there.
pub(crate) const LONG: &[crate::Test] = &[(
    "a_thousand_services_of_ten_backends_appear_change_and_vanish",
    a_thousand_services_of_ten_backends_appear_change_and_vanish,
)];

/// Each has one backend of each service.
const MACHINES: usize = 10;
/// What etcd takes in one transaction by default.
const OPERATIONS: usize = 128;
/// Of the services and of their backends.
const FIRST_VIP: u32 = u32::from_be_bytes([10, 64, 8, 0]);
const FIRST_BACKEND: u32 = u32::from_be_bytes([10, 64, 16, 0]);

fn fifty_services_of_ten_backends_appear_change_and_vanish(world: &World) {
    appear_change_and_vanish(world, 50);
}

fn a_thousand_services_of_ten_backends_appear_change_and_vanish(world: &World) {
    appear_change_and_vanish(world, 1000);
}

/// Records by key; nothing: the key goes.
pub(crate) type Records = BTreeMap<String, Option<String>>;

fn appear_change_and_vanish(world: &World, services: usize) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config.set("lb", &lb()));
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.64.0.0/18");
    let vips = create(n1, "web", json!({"ports": [{"port": 80, "target": 8080}]}));
    let _backend = Backend::start(n1, "b1");
    let client = plug(n1, "client", None);
    let sandbox = n1.sandbox("shop");
    let count = |weight: Option<u32>| {
        rows(&sandbox).iter().filter(|row| weight.is_none_or(|weight| row.1 == weight)).count()
    };
    wait_for("the first service is balanced", || count(Some(1)) == 1);
    let crowd = Crowd::like_what_is_there(&cluster, services);
    let all = services * MACHINES;

    // What was there before goes on all the time.
    let load = Load::start([&client.container.space], requests(&vips[0], PATIENCE));
    let takes = |what: &str, space: &Space, records: &Records, done: &dyn Fn() -> bool| {
        write(&cluster, space, records);
        wait_for(what, done);
        load.goes_on(3, what);
    };
    let space = &n1.space;
    takes("all appear", space, &crowd.everything(), &|| count(Some(1)) == all + 1);
    takes("weights change", space, &crowd.weighing(0, 7), &|| count(Some(7)) == services);
    n1.ok("node drain m1");
    wait_for("a machine's backends are drained", || count(Some(0)) == services);
    n1.ok("node activate m1");
    wait_for("they are back", || count(Some(0)) == 0);
    takes("a machine's backends vanish", space, &crowd.without(2), &|| {
        count(None) == all + 1 - services
    });
    takes("all vanish", space, &crowd.nothing(), &|| count(None) == 1);
    let (requests, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {requests}: {failures:?}", failures.len());
}

/// Machines, services and backends, as records.
struct Crowd {
    services: usize,
    network: String,
    node: Value,
    service: Value,
    endpoint: Value,
}

impl Crowd {
    /// Takes the records of `n1`, `web` and `b1` as patterns.
    #[track_caller]
    fn like_what_is_there(cluster: &Cluster, services: usize) -> Self {
        let (keys, network) = (cluster.etcd.keys(), cluster.n1().network_id("shop"));
        let record = |text: &String| serde_json::from_str::<Value>(text).unwrap();
        let mut endpoints = keys
            .iter()
            .filter(|(key, value)| key.contains("/endpoints/") && value.contains("\"name\":\"b1\""));
        Self {
            services,
            network,
            node: record(&keys["netctl/base/nodes/n1"]),
            service: record(&keys["netctl/base/services/web"]),
            endpoint: record(endpoints.next().unwrap().1),
        }
    }

    fn everything(&self) -> Records {
        let mut records: Records = (0..MACHINES).flat_map(|machine| self.machine(machine)).collect();
        records.extend((0..self.services).map(|number| self.service(number)));
        for machine in 0..MACHINES {
            records.extend(self.weighing(machine, 1));
        }
        records
    }

    fn nothing(&self) -> Records {
        let services = (0..self.services).map(|number| self.service(number));
        services.map(|(key, _)| (key, None)).collect()
    }

    /// The backends of a machine, with this weight.
    fn weighing(&self, machine: usize, weight: u16) -> Records {
        (0..self.services).map(|number| self.backend(machine, number, weight)).collect()
    }

    fn without(&self, machine: usize) -> Records {
        self.weighing(machine, 1).into_keys().map(|key| (key, None)).collect()
    }

    fn machine(&self, machine: usize) -> [(String, Option<String>); 2] {
        let (name, id) = (format!("m{machine}"), id(1 << 32 | machine));
        let mut node = self.node.clone();
        node["name"] = json!(name);
        node["id"] = json!(id);
        node["vtep_mac"] = json!(format!("02:00:00:01:00:{machine:02x}"));
        node["underlay"] = json!(Ipv4Addr::from([192, 168, 60, 1 + machine as u8]));
        [
            (format!("base/nodes/{name}"), Some(node.to_string())),
            // Without a lease it is alive for good.
            (format!("base/alive/{name}"), Some(json!(id).to_string())),
        ]
    }

    fn service(&self, number: usize) -> (String, Option<String>) {
        let name = format!("s{number}");
        let mut service = self.service.clone();
        service["name"] = json!(name);
        service["id"] = json!(id(2 << 32 | number));
        service["addresses"] = json!({&self.network: [nth(FIRST_VIP, number)]});
        (format!("base/services/{name}"), Some(service.to_string()))
    }

    fn backend(&self, machine: usize, number: usize, weight: u16) -> (String, Option<String>) {
        let index = machine * self.services + number;
        let id = id(3 << 32 | index);
        let mut endpoint = self.endpoint.clone();
        endpoint["id"] = json!(id);
        endpoint["name"] = json!(format!("e{index}"));
        endpoint["node"] = json!(format!("m{machine}"));
        endpoint["service"] = json!(format!("s{number}"));
        endpoint["addresses"] = json!([nth(FIRST_BACKEND, index)]);
        endpoint["weight"] = json!(weight);
        (format!("members/{}/endpoints/{id}", self.network), Some(endpoint.to_string()))
    }
}

pub(crate) fn id(number: usize) -> String {
    format!("{number:012x}")
}

fn nth(first: u32, number: usize) -> IpAddr {
    Ipv4Addr::from(first + number as u32).into()
}

/// Writes records, as many at a time as etcd takes.
pub(crate) fn write(cluster: &Cluster, from: &Space, records: &Records) {
    let writing = async {
        let store = cluster.etcd.store(Duration::from_secs(10));
        let records: Vec<_> = records.iter().collect();
        for part in records.chunks(OPERATIONS) {
            let change =
                |transaction: Transaction, (key, value): &(&String, &Option<String>)| match value {
                    Some(value) => transaction.put(key.as_str(), value.as_str()),
                    None => transaction.delete(key.as_str()),
                };
            let done = store.commit(part.iter().fold(Transaction::new(), change)).await;
            assert!(matches!(done, Ok(Outcome::Committed(_))), "{done:?}");
        }
    };
    from.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(writing);
    });
}
