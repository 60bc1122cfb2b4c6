//! Services while agents, machines and tables fail, whichever engine balances.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netctl::kernel::ebpf::{self, Maps};
use serde_json::json;
use world::Transport::Tcp;
use world::{Config, Failure, Load, Node, Session, Space, World, ask, eventually, wait_for};

use crate::engine::{detach_containers, has_timeouts, is_ebpf, lb, saved};
use crate::shop::{
    Backend, PATIENCE, Shop, answers, call, create, destinations, each, open, plug, requests,
    session_with,
};

crate::tests![
    an_agents_death_ends_no_connection_and_what_others_change_comes_back,
    a_dead_nodes_backends_get_nothing_after_its_lease_and_are_used_again_when_it_returns,
    what_another_machine_sends_to_a_service_is_refused,
    nothing_of_a_table_is_left_when_nothing_is_to_be_balanced,
];

/// Those that take many minutes in there.
pub(crate) const LONG: &[crate::Test] = &[
    (
        "agents_that_are_killed_at_once_under_load_end_no_connection",
        agents_that_are_killed_at_once_under_load_end_no_connection,
    ),
    (
        "connections_to_a_dead_node_that_answers_go_on_for_another_lease",
        connections_to_a_dead_node_that_answers_go_on_for_another_lease,
    ),
];

/// What of a sandbox is compared: its table, and the rules that mark and refuse.
fn state(sandbox: &Space) -> (BTreeSet<String>, String) {
    let table = saved(sandbox).lines().map(str::to_owned).collect();
    (table, sandbox.try_sh("nft -s list table inet netctl").stdout)
}

/// Waits until an agent has the sandbox in hand: it tells how many connections its backends have.
#[track_caller]
fn wait_in_hand(node: &Node) {
    wait_for("the agent has looked at the network", || {
        let view = call(node, "GET", "/v1/services/web", &json!(null));
        view["backends"].as_array().unwrap().iter().all(|backend| !backend["connections"].is_null())
    });
}

fn an_agents_death_ends_no_connection_and_what_others_change_comes_back(world: &World) {
    let n1 = world.node("n1");
    // Another program balances on this machine too.
    if !is_ebpf() {
        n1.space.sh("ipvsadm -A -t 192.168.50.99:80 -s rr
                     ipvsadm -a -t 192.168.50.99:80 -r 192.168.50.98:80 -m");
    }
    let hosts = n1.space.try_sh("ipvsadm -Sn").stdout;
    let config = Config::embedded().set("lb", &lb()).set("resync", "1s");
    let agent = n1.agent(&config);
    let vips = open(&n1, json!({"ports": [{"port": 80, "target": 8080}]}));
    let every_port = create(&n1, "every-port", json!({}));
    let backends = [("web", "b1"), ("web", "b2"), ("every-port", "b3")];
    let backends = backends.map(|(service, name)| Backend::of(&n1, service, name));
    let client = plug(&n1, "client", None);
    let (from, sandbox) = (&client.container.space, n1.sandbox("shop"));
    wait_for("all are balanced", || destinations(&sandbox).values().filter(|w| **w == 1).count() == 6);
    let before = state(&sandbox);

    let load = Load::start([from], requests(&vips[0], PATIENCE));
    let mut sessions = ["b1", "b2"].map(|name| session_with(from, &vips[1], 80, name));
    load.goes_on(5, "at first");
    agent.kill();
    load.goes_on(10, "without an agent");
    assert_eq!(state(&sandbox), before);
    let agent = n1.agent(&config);
    wait_in_hand(&n1);
    load.goes_on(10, "with the next agent");
    assert_eq!(state(&sandbox), before);
    for (session, name) in sessions.iter_mut().zip(["b1", "b2"]) {
        assert_eq!(session.ask().unwrap().server, name, "its connection goes on");
    }
    let (requests, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {requests}: {failures:?}", failures.len());

    let damages: Vec<(&str, Damage)> = match is_ebpf() {
        true => EBPF_DAMAGES.to_vec(),
        false => IPVS_DAMAGES.map(|script| (script, damage_ipvs as Damage)).to_vec(),
    };
    for (what, damage) in damages {
        damage(what, &sandbox, &vips[0], &backends[1].member.addresses[0]);
        wait_for(&format!("put right: {what}"), || {
            state(&sandbox) == before
                && has_timeouts(&sandbox, [900, 120, 300])
                && ask(from, Tcp, &vips[0], 80).is_ok()
        });
    }
    assert_eq!(answers(from, &vips[0], 4), each(&[("b1", 2), ("b2", 2)]));
    assert_eq!(answers(from, &every_port[1], 1), each(&[("b3", 1)]));
    assert_eq!(n1.space.try_sh("ipvsadm -Sn").stdout, hosts, "the host's own table is its own");

    agent.terminate();
    let cleaned = n1.netctld(&config, &["--cleanup"]);
    assert!(cleaned.success(), "{cleaned}");
    assert_eq!(n1.kernel_state().namespaces(), ["b1", "b2", "b3", "client"]);
    assert_eq!(n1.space.try_sh("ipvsadm -Sn").stdout, hosts, "the host's own table is its own");
    assert!(!n1.space.try_sh("ls /sys/fs/bpf/netctl").success(), "the pins are gone");
}

/// What another hand does to a sandbox: what it is called, the sandbox, an address of a service, and one
/// of a backend.
type Damage = fn(&str, &Space, &str, &str);

fn damage_ipvs(script: &str, sandbox: &Space, vip: &str, backend: &str) {
    sandbox.sh(&script.replace("$VIP", vip).replace("$BACKEND", backend));
}

const EBPF_DAMAGES: [(&str, Damage); 5] = [
    ("all maps are emptied", |_, sandbox, _, _| {
        sandbox.enter(|| {
            let maps = Maps::of_agent().unwrap();
            fn keys<K, V>(entries: Vec<(K, V)>) -> Vec<K> {
                entries.into_iter().map(|(key, _)| key).collect()
            }
            let numbers = keys(maps.backends.entries().unwrap());
            maps.counts.remove_all(&numbers).unwrap();
            maps.backends.remove_all(&numbers).unwrap();
            maps.addresses.remove_all(&keys(maps.addresses.entries().unwrap())).unwrap();
            maps.gateways.remove_all(&keys(maps.gateways.entries().unwrap())).unwrap();
            maps.fronts.remove_all(&keys(maps.fronts.entries().unwrap())).unwrap();
            maps.slots.remove_all(&keys(maps.slots.entries().unwrap())).unwrap();
            maps.timeouts.remove_all(&keys(maps.timeouts.entries().unwrap())).unwrap();
            maps.connections.remove_all(&keys(maps.connections.entries().unwrap())).unwrap();
        });
    }),
    ("what is counted is forgotten, weights are others, an address is added", |_, sandbox, _, _| {
        sandbox.enter(|| {
            let maps = Maps::of_agent().unwrap();
            for (number, backend) in maps.backends.entries().unwrap() {
                maps.counts.remove(&number).unwrap();
                maps.backends.insert(&number, &ebpf::Backend { weight: 7, ..backend }).unwrap();
            }
            let (place, kind) = maps.addresses.entries().unwrap().remove(0);
            let address = IpAddr::from([10, 9, 0, 99]).into();
            maps.addresses.insert(&ebpf::Place { address, ..place }, &kind).unwrap();
        });
    }),
    ("programs are detached", |_, sandbox, _, _| assert_eq!(detach_containers(sandbox), 4)),
    ("pins are removed", |_, sandbox, _, _| {
        sandbox.sh("rm -r /sys/fs/bpf/netctl");
    }),
    ("rules are flushed", |_, sandbox, _, _| {
        sandbox.sh("nft flush table inet netctl");
    }),
];

/// What another hand may do to a table of IPVS.
const IPVS_DAMAGES: [&str; 4] = [
    "ipvsadm -C",
    "ipvsadm -D -t $VIP:80
     ipvsadm -A -t $VIP:99 -s rr
     ipvsadm --set 5 5 5",
    "ipvsadm -E -t $VIP:80 -s lc
     ipvsadm -e -t $VIP:80 -r $BACKEND:8080 -m -w 7
     ipvsadm -a -t $VIP:80 -r $BACKEND:9999 -m -w 1",
    "nft flush table inet netctl",
];

/// How long a client of the failing machine waits: far longer than an answer takes.
const SHORT: Duration = Duration::from_secs(3);
/// As [`Shop`] sets it.
const LEASE: Duration = Duration::from_secs(20);
/// How long the others take to act upon the end of a lease.
const REACTION: Duration = Duration::from_secs(3);

fn a_dead_nodes_backends_get_nothing_after_its_lease_and_are_used_again_when_it_returns(world: &World) {
    let ports = json!({"ports": [{"port": 80, "target": 8080}]});
    let mut shop = Shop::new(world, 2, ports, |config| config);
    let (n1, n2) = (shop.cluster.nodes[0].clone(), shop.cluster.nodes[1].clone());
    let clients = ["c1", "c2", "c3"].map(|name| plug(&n1, name, None));
    let spaces = clients.iter().map(|client| &client.container.space);
    let load = Load::start(spaces, requests(&shop.vips[0], SHORT));
    load.goes_on(20, "both machines serve");
    assert_eq!(load.served().len(), 2);
    assert!(load.failures().is_empty(), "{:?}", load.failures());

    shop.cluster.kill(1);
    let died = Instant::now();
    world.connect(&n2, false);
    assert!(eventually(2 * LEASE, || shop.weights(0) == [1, 0]), "the dead node's backend gets nothing");
    load.goes_on(60, "the other machine serves");
    let begun_after = |time: Instant| -> Vec<Failure> {
        load.failures().into_iter().filter(|failure| failure.begun > time).collect()
    };
    assert!(!begun_after(died).is_empty(), "the machine was cut off under load");
    let late = begun_after(died + LEASE + REACTION);
    assert!(late.is_empty(), "{late:?}");

    drop(load);

    world.connect(&n2, true);
    shop.cluster.start(1);
    let from = &clients[0].container.space;
    wait_for("its backend is used again", || {
        ask(from, Tcp, &shop.vips[0], 80).is_ok_and(|answer| answer.server == "b2")
    });
}

fn connections_to_a_dead_node_that_answers_go_on_for_another_lease(world: &World) {
    let ports = json!({"ports": [{"port": 80, "target": 8080}]});
    let mut shop = Shop::new(world, 2, ports, |config| config);
    let n1 = shop.cluster.nodes[0].clone();
    let client = plug(&n1, "client", None);
    let from = &client.container.space;
    let mut session = session_with(from, &shop.vips[0], 80, "b2");
    // Only its agent ends.
    shop.cluster.kill(1);
    assert!(eventually(2 * LEASE, || shop.weights(0) == [1, 0]), "its backend gets no new connections");
    assert_eq!(session.ask().unwrap().server, "b2", "its connection goes on");
    assert!(eventually(2 * LEASE, || shop.weights(0) == [1]), "its backend has gone");
    let ended = session.ask().unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::ConnectionReset, "{ended}");
}

fn what_another_machine_sends_to_a_service_is_refused(world: &World) {
    let ports = json!({"ports": [{"port": 80, "target": 8080}]});
    let mut shop = Shop::new(world, 2, ports, |config| config);
    let client = plug(&shop.cluster.nodes[0], "client", None);
    let from = &client.container.space;
    assert!(ask(from, Tcp, &shop.vips[0], 80).is_ok());
    // The first machine sends on what it should balance itself.
    shop.cluster.kill(0);
    let (vip, there) = (&shop.vips[0], &shop.backends[1].member.addresses[0]);
    match is_ebpf() {
        true => assert_eq!(detach_containers(&shop.sandboxes[0]), 2),
        false => drop(shop.sandboxes[0].sh("ipvsadm -C")),
    }
    shop.sandboxes[0].sh(&format!(
        "ip address del {vip}/32 dev lo
         way=$(ip -o route get {there} | sed -n 's/.* \\(via .* dev vx0\\).*/\\1/p')
         ip route replace {vip}/32 $way onlink"
    ));
    let refused = ask(from, Tcp, vip, 80).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    let table = shop.sandboxes[1].sh("nft list table inet netctl");
    let counted =
        table.lines().any(|line| line.contains("not-balanced-there") && !line.contains("packets 0"));
    assert!(counted, "{table}");
}

fn nothing_of_a_table_is_left_when_nothing_is_to_be_balanced(world: &World) {
    let n1 = world.node("n1");
    let config = Config::embedded().set("lb", &lb());
    let agent = n1.agent(&config);
    let vips = open(&n1, json!({"ports": [{"port": 80, "target": 8080}]}));
    let _backend = Backend::of(&n1, "web", "b1");
    let client = plug(&n1, "client", None);
    let (from, sandbox) = (&client.container.space, n1.sandbox("shop"));
    wait_for("it is balanced", || ask(from, Tcp, &vips[0], 80).is_ok());
    agent.terminate();
    assert_ne!(saved(&sandbox), "");
    let _agent = n1.agent(&config.set("lb", "none"));
    wait_for("the table is empty", || saved(&sandbox).is_empty());
    for vip in &vips {
        wait_for("connections are refused at once", || {
            let refused = ask(from, Tcp, vip, 80).map_err(|error| error.kind());
            matches!(refused, Err(ErrorKind::ConnectionRefused))
        });
    }
}

fn agents_that_are_killed_at_once_under_load_end_no_connection(world: &World) {
    let ports = json!({"ports": [{"port": 80, "target": 8080}]});
    // Longer than all that happens here: no agent is to take another for dead.
    let mut shop = Shop::new(world, 3, ports, |config| config.set("lease", "300s"));
    let node = |index: usize| shop.cluster.nodes[index].clone();
    let clients: Vec<_> = (0..3).map(|index| plug(&node(index), &format!("c{index}"), None)).collect();
    let before: Vec<_> = shop.sandboxes.iter().map(state).collect();
    let spaces = clients.iter().map(|client| &client.container.space);
    let load = Load::start(spaces, requests(&shop.vips[0], PATIENCE));
    let mut sessions: Vec<(Session, &str)> = clients
        .iter()
        .flat_map(|client| {
            let from = &client.container.space;
            ["b1", "b2", "b3"].map(|name| (session_with(from, &shop.vips[1], 80, name), name))
        })
        .collect();
    for _ in 0..3 {
        (0..3).for_each(|index| shop.cluster.kill(index));
        load.goes_on(20, "without agents");
        for index in 0..3 {
            shop.cluster.start(index);
            wait_in_hand(&shop.cluster.nodes[index]);
        }
        load.goes_on(20, "with the next agents");
        let after: Vec<_> = shop.sandboxes.iter().map(state).collect();
        assert_eq!(after, before);
        for (session, name) in &mut sessions {
            assert_eq!(session.ask().unwrap().server, *name);
        }
    }
    let (requests, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {requests}: {failures:?}", failures.len());
}
