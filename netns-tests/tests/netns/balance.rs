//! Services: how connections are balanced, by whichever engine.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};

use serde_json::{Value, json};
use world::Transport::{self, Sctp, Tcp};
use world::{Answer, Config, Node, Server, Session, Space, World, ask, ask_udp, wait_for};

use crate::cluster::{DUAL, Member};
use crate::engine::{
    balancing, has_timeouts, is_established, lb, with_affinity, with_all_ports, without_ebpf,
};
use crate::shop::{
    Backend, GATEWAYS, Shop, answers, ask_all, each, open, parse, plug, servers, session_with, weights,
};

crate::tests![
    one_machine_balances_until_its_backends_leave,
    what_can_be_used_is_taken_and_why_is_said,
    connections_are_spread_over_three_machines_as_the_service_says,
];

/// Those that take many minutes in there.
pub(crate) const LONG: &[crate::Test] = &[(
    "who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones",
    who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones,
)];

fn one_machine_balances_until_its_backends_leave(world: &World) {
    let n1 = world.node("n1");
    let _agent = n1.agent(&Config::embedded().set("lb", &lb()));
    assert_eq!(balancing(&n1), format!("{} (it is asked for)", lb()));
    let ports =
        [json!({"port": 80, "target": 8080}), json!({"port": 53, "target": 5000, "protocol": "udp"})];
    let vips = open(&n1, json!({"ports": ports}));
    let client = plug(&n1, "client", None);
    nobody_answers(&client, &vips);
    let backends = ["b1", "b2"].map(|name| Backend::start(&n1, name));
    let sandbox = n1.sandbox("shop");
    wait_for("both are balanced", || weights(&sandbox, &backends) == [1, 1]);
    for (family, vip) in vips.iter().enumerate() {
        assert!(client.container.space.ping(vip), "an address with backends answers pings");
        clients_show_their_own_address(&client, family, vip, &each(&[("b1", 2), ("b2", 2)]));
        a_backend_meets_itself(&backends[0], family, vip, 4);
    }
    what_a_released_backend_had_goes_with_it(&n1, &client, &vips);
    an_idle_connection_that_expired_is_reset(&n1, &client, &vips[1]);
    n1.ok("endpoint detach b2 --network shop");
    nobody_answers(&client, &vips);
}

fn what_can_be_used_is_taken_and_why_is_said(world: &World) {
    let n1 = world.node("n1");
    let config = Config::embedded().set("lb", "auto");
    let agent = n1.agent(&config);
    assert_eq!(balancing(&n1), "ebpf (the faster one, and this kernel takes its programs)");
    agent.terminate();
    without_ebpf(&n1);
    let refused = n1.netctld(&Config::embedded().set("lb", "ebpf"), &[]);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.stderr.contains("lb is ebpf, but it cannot be used"), "{refused}");
    let _agent = n1.agent(&config);
    let said = balancing(&n1);
    if world::in_vm() {
        assert!(said.starts_with("ipvs (ebpf cannot be used here: "), "{said}");
        return;
    }
    assert!(said.starts_with("missing (this kernel has no IPVS, and ebpf cannot be used: "), "{said}");
    n1.ok(&format!("network create shop {DUAL}"));
    let refused = n1.ctl("service create web --network shop");
    assert_eq!(refused.code, Some(1), "{refused}");
    for word in ["eBPF", "modprobe ip_vs", "node inspect", "--endpoint-mode dnsrr"] {
        assert!(refused.stderr.contains(word), "{word}: {refused}");
    }
    n1.ok("service create web --network shop --endpoint-mode dnsrr");
}

/// Without a backend pings and connections are refused at once.
#[track_caller]
fn nobody_answers(client: &Member, vips: &[String]) {
    let from = &client.container.space;
    for vip in vips {
        let refused = ask(from, Tcp, vip, 80).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{vip}: {refused}");
        wait_for("a ping is refused at once", || {
            let ping = from.try_sh(&format!("ping -n -c 1 -W 60 {vip}"));
            !ping.success() && ping.stdout.contains("nreachable")
        });
    }
}

#[track_caller]
fn clients_show_their_own_address(
    client: &Member,
    family: usize,
    vip: &str,
    expected: &BTreeMap<String, usize>,
) {
    let times = expected.values().sum();
    let answers = ask_all(&client.container.space, Tcp, vip, 80, times);
    assert!(answers.iter().all(|answer| is_from(client, family, answer)), "{answers:?}");
    assert_eq!(servers(answers), *expected, "{vip}");
}

fn is_from(client: &Member, family: usize, answer: &Answer) -> bool {
    answer.client == parse(&client.addresses[family])
}

/// A backend is a client of its service like any other, and meets itself: then it sees the gateway.
#[track_caller]
fn a_backend_meets_itself(backend: &Backend, family: usize, vip: &str, times: usize) {
    let member = &backend.member;
    let answers = ask_all(&member.container.space, Tcp, vip, 80, times);
    for answer in &answers {
        let own = answer.server == backend.name;
        let seen = if own { GATEWAYS[family] } else { &member.addresses[family] };
        assert_eq!(answer.client, parse(seen), "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.server == backend.name), "{answers:?}");
}

/// A client's port that stays: all that it sends belongs together.
const OWN_PORT: u16 = 4321;

/// `b1` is released: what comes over its connections is answered by a reset, and datagrams that went
/// to it go to the other one.
#[track_caller]
fn what_a_released_backend_had_goes_with_it(node: &Node, client: &Member, vips: &[String]) {
    let from = &client.container.space;
    let mut sessions: Vec<Session> = vips.iter().map(|vip| session_with(from, vip, 80, "b1")).collect();
    let flows: Vec<(&String, u16)> = vips
        .iter()
        .map(|vip| {
            let asked = |port: &u16| ask_udp(from, vip, 53, *port).unwrap().server == "b1";
            (vip, (OWN_PORT..).take(10).find(asked).expect("b1 is one of two"))
        })
        .collect();
    for (vip, port) in &flows {
        assert_eq!(ask_udp(from, vip, 53, *port).unwrap().server, "b1", "its entry is kept");
    }
    node.ok("endpoint detach b1 --network shop");
    for session in &mut sessions {
        is_reset(session);
    }
    for (vip, port) in flows {
        assert_eq!(ask_udp(from, vip, 53, port).unwrap().server, "b2", "{vip}");
    }
}

#[track_caller]
fn is_reset(session: &mut Session) {
    let reset: Error = session.ask().unwrap_err();
    assert!(matches!(reset.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{reset}");
}

/// An entry that has expired is no connection any more: the client is told.
#[track_caller]
fn an_idle_connection_that_expired_is_reset(node: &Node, client: &Member, vip: &str) {
    let mut session = session_with(&client.container.space, vip, 80, "b2");
    node.ok("service update web --timeout tcp=3s");
    let shown = node.ok("service inspect web").stdout;
    assert!(shown.contains("tcp 3s, tcp-fin 2m, udp 5m"), "{shown}");
    let sandbox = node.sandbox("shop");
    wait_for("it is set", || has_timeouts(&sandbox, [3, 120, 300]));
    assert_eq!(session.ask().unwrap().server, "b2", "what it has now counts from here");
    wait_for("the entry has expired", || !is_established(&sandbox, &session));
    is_reset(&mut session);
}

fn connections_are_spread_over_three_machines_as_the_service_says(world: &World) {
    // The third machine is in a zone of its own.
    let made = Cell::new(0);
    let zone = |config: Config| {
        made.set(made.get() + 1);
        config.raw("labels", if made.get() == 3 { "{zone = \"b\"}" } else { "{zone = \"a\"}" })
    };
    let shop = Shop::new(world, 3, json!({"ports": [{"port": 80, "target": 8080}]}), zone);
    let clients: Vec<Member> = shop
        .cluster
        .nodes
        .iter()
        .map(|node| plug(node, &format!("{}-client", node.name()), None))
        .collect();
    for (client, backend) in clients.iter().zip(&shop.backends) {
        for (family, vip) in shop.vips.iter().enumerate() {
            let all = each(&[("b1", 1), ("b2", 1), ("b3", 1)]);
            clients_show_their_own_address(client, family, vip, &all);
            a_backend_meets_itself(backend, family, vip, 3);
        }
    }
    heavier_backends_get_more(&shop, &clients[0]);
    near_backends_come_first(&shop, &clients);
    every_port_is_balanced_over_every_protocol(&shop, &clients[1]);
    a_client_keeps_its_backend(&shop, &clients[2]);
}

#[track_caller]
fn heavier_backends_get_more(shop: &Shop, client: &Member) {
    shop.update(&json!({"scheduler": "wrr"}));
    shop.edit("b2", |endpoint| endpoint["weight"] = json!(3));
    shop.wait_weights(&[1, 3, 1]);
    for vip in &shop.vips {
        let spread = answers(&client.container.space, vip, 10);
        assert_eq!(spread, each(&[("b1", 2), ("b2", 6), ("b3", 2)]), "{vip}");
    }
    shop.edit("b2", |endpoint| endpoint["weight"] = json!(1));
    shop.update(&json!({"scheduler": "rr"}));
    shop.wait_weights(&[1, 1, 1]);
}

/// Waits until the machines give the backends these weights, and checks who answers.
#[track_caller]
fn prefer(shop: &Shop, clients: &[Member], what: &str, expected: [[u32; 3]; 3]) {
    wait_for(what, || (0..3).all(|index| shop.weights(index) == expected[index]));
    for (client, weights) in clients.iter().zip(expected) {
        let names = ["b1", "b2", "b3"].into_iter().zip(weights);
        let near: Vec<_> = names.filter(|(_, weight)| *weight > 0).map(|(name, _)| (name, 1)).collect();
        let spread = answers(&client.container.space, &shop.vips[0], near.len());
        assert_eq!(spread, each(&near), "{what}: {}", client.container.name);
    }
}

#[track_caller]
fn near_backends_come_first(shop: &Shop, clients: &[Member]) {
    shop.update(&json!({"prefer": "node"}));
    prefer(shop, clients, "each machine prefers its own", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]);
    shop.update(&json!({"prefer": "label=zone"}));
    prefer(shop, clients, "each zone prefers its own", [[1, 1, 0], [1, 1, 0], [0, 0, 1]]);
    shop.edit("b3", |endpoint| endpoint["state"] = json!("draining"));
    prefer(shop, clients, "the far ones serve where none is near", [[1, 1, 0]; 3]);
    shop.edit("b3", |endpoint| drop(endpoint.as_object_mut().unwrap().remove("state")));
    shop.update(&json!({"no_prefer": true}));
    shop.wait_weights(&[1, 1, 1]);
}

#[track_caller]
fn every_port_is_balanced_over_every_protocol(shop: &Shop, client: &Member) {
    shop.update(&json!({"all_ports": true}));
    let all_ports = |sandbox: &Space| with_all_ports(sandbox) == 6;
    wait_for("all ports are balanced", || shop.sandboxes.iter().all(all_ports));
    let from = &client.container.space;
    // Some kernels have no SCTP.
    let has_sctp = world::has_sctp();
    let sctp = |b: &Backend| Server::start(&b.member.container.space, Sctp, 5001, &b.name);
    let _servers: Vec<_> = shop.backends.iter().filter(|_| has_sctp).map(sctp).collect();
    let all = each(&[("b1", 1), ("b2", 1), ("b3", 1)]);
    for (family, vip) in shop.vips.iter().enumerate() {
        let connected = |transport: Transport, port| ask_all(from, transport, vip, port, 3);
        let udp = (0..3).map(|_| ask_udp(from, vip, 5000, 0).unwrap()).collect();
        let mut kinds = vec![("TCP", connected(Tcp, 80)), ("UDP", udp)];
        if has_sctp {
            kinds.push(("SCTP", connected(Sctp, 5001)));
        }
        for (what, answers) in kinds {
            assert!(answers.iter().all(|answer| is_from(client, family, answer)), "{what}: {answers:?}");
            assert_eq!(servers(answers), all, "{vip} over {what}");
        }
        assert!(from.ping(vip), "an address with backends answers pings");
        // Nobody listens there: the backend says so.
        let refused = ask(from, Tcp, vip, 81).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
        a_backend_meets_itself(&shop.backends[0], family, vip, 3);
    }
}

#[track_caller]
fn a_client_keeps_its_backend(shop: &Shop, client: &Member) {
    shop.update(&json!({"affinity": 300}));
    wait_for("clients stay where they are", || {
        shop.sandboxes.iter().all(|sandbox| with_affinity(sandbox, 300) == 2)
    });
    for vip in &shop.vips {
        let spread = answers(&client.container.space, vip, 5);
        assert_eq!(spread.len(), 1, "{vip}: {spread:?}");
    }
}

fn who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones(world: &World) {
    let balancing = json!({"scheduler": "wrr", "ports": [{"port": 80, "target": 80}]});
    let shop = Shop::new(world, 3, balancing, |config| config);
    let client = plug(shop.cluster.n1(), "client", None);
    let from = &client.container.space;
    shop.edit("b1", |endpoint| endpoint["weight"] = json!(3));
    shop.wait_weights(&[3, 1, 1]);
    let mut session = session_with(from, &shop.vips[0], 80, "b2");
    assert_eq!(acks(&shop), [0; 0]);
    shop.edit("b2", |endpoint| endpoint["state"] = json!("draining"));
    shop.wait_weights(&[3, 0, 1]);
    wait_for("all machines have acknowledged", || acks(&shop).len() == 3);
    assert_eq!(acks(&shop).iter().sum::<u64>(), 1, "one connection is open");
    for vip in &shop.vips {
        assert_eq!(answers(from, vip, 8), each(&[("b1", 6), ("b3", 2)]), "{vip}");
    }
    assert_eq!(session.ask().unwrap().server, "b2", "what was open goes on");
    drop(session);
    wait_for("the drain is over", || acks(&shop) == [0, 0, 0]);

    // Nobody is ready: what is open goes on, what is new is refused at once.
    let mut session = Session::open(from, Tcp, &shop.vips[0], 80).unwrap();
    let server = session.ask().unwrap().server;
    let n1 = shop.cluster.n1();
    n1.ok("service update web --health-tcp 9999 --health-interval 1s --health-retries 1");
    shop.wait_weights(&[0, 0, 0]);
    nobody_answers(&client, &shop.vips);
    assert_eq!(session.ask().unwrap().server, server);
    n1.ok("service update web --no-health");
    shop.wait_weights(&[3, 0, 1]);
    assert_eq!(session.ask().unwrap().server, server);

    // One that is released goes from every machine, with all that it had.
    n1.ok("endpoint detach b1 --network shop");
    shop.wait_weights(&[0, 1]);
    assert_eq!(answers(from, &shop.vips[1], 3), each(&[("b3", 3)]));
}

/// What the machines have acknowledged of drained endpoints: how many connections are open.
fn acks(shop: &Shop) -> Vec<u64> {
    let keys = shop.cluster.etcd.keys();
    let acks = keys.iter().filter(|(key, _)| key.contains("/acks/"));
    let open = |value: &String| serde_json::from_str::<Value>(value).unwrap()["connections"].as_u64();
    acks.filter_map(|(_, value)| open(value)).collect()
}
