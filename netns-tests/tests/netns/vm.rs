//! What needs a kernel that this machine may not have: run in the virtual machine of `scripts/vm`.

use std::io::ErrorKind;

use serde_json::json;
use world::{
    Config, DEADLINE, NodeOptions, Output, WithoutModule, World, ask_udp, eventually, wait_for,
};

use crate::cluster::{Cluster, DUAL};
use crate::engine::{balancing, without_ebpf};
use crate::shop::{Backend, answers, each, open, plug, session_with};

crate::tests![
    ipvs_balances_with_a_scheduler_that_is_loaded_on_demand,
    wireguard_dummy_devices_netem_and_esp_are_there,
    connections_go_on_when_ebpf_takes_over_from_ipvs,
];

/// Tests that take away a part of the kernel: one at a time, and nothing else beside them.
pub(crate) const ALONE: &[crate::Test] = &[
    ("without_vxlan_the_agent_does_not_start", without_vxlan_the_agent_does_not_start),
    (
        "without_vxlan_an_attach_is_refused_and_leaves_nothing",
        without_vxlan_an_attach_is_refused_and_leaves_nothing,
    ),
    (
        "a_service_that_the_kernel_cannot_balance_is_refused_with_the_modules_name",
        a_service_that_the_kernel_cannot_balance_is_refused_with_the_modules_name,
    ),
];

/// Tests of other suites, whose facts must hold on this older kernel too. Each takes a minute in there.
pub(crate) const AGAIN: &[&str] = &[
    "ground::a_hand_made_packet_is_a_valid_one",
    "single::the_embedded_store_outlives_the_agent",
    "reach::containers_of_two_nodes_reach_each_other_over_an_ipv4_underlay",
    "reach::an_address_that_nobody_has_fails_at_once",
];

fn ipvs_balances_with_a_scheduler_that_is_loaded_on_demand(world: &World) {
    let n1 = world.node("n1");
    n1.space.sh("modprobe ip_vs");
    let table = n1.space.sh("ipvsadm -Ln");
    assert!(table.starts_with("IP Virtual Server version 1.2.1"), "{table}");
    n1.space.sh("! grep -qw ip_vs_wrr /proc/modules
                 ipvsadm -A -t 10.1.0.1:80 -s wrr
                 ipvsadm -a -t 10.1.0.1:80 -r 10.1.0.2:8080 -m -w 3
                 grep -qw ip_vs_wrr /proc/modules");
    let table = n1.space.sh("ipvsadm -Sn");
    assert_eq!(table, "-A -t 10.1.0.1:80 -s wrr\n-a -t 10.1.0.1:80 -r 10.1.0.2:8080 -m -w 3\n");
    assert_eq!(world.node("n2").space.sh("ipvsadm -Sn"), "", "tables belong to their namespaces");
}

fn wireguard_dummy_devices_netem_and_esp_are_there(world: &World) {
    let n1 = world.node("n1");
    n1.space.sh("ip link add name wg0 type wireguard
                 ip link add name dummy0 type dummy
                 tc qdisc add dev eth0 root netem delay 1ms
                 ip xfrm state add src 10.1.0.1 dst 10.1.0.2 proto esp spi 1 mode transport \\
                     aead 'rfc4106(gcm(aes))' 0x0102030405060708090a0b0c0d0e0f1011121314 128");
    let seen = n1.space.sh("ip -d link show; tc qdisc show dev eth0; ip xfrm state");
    for word in ["wireguard", "dummy", "netem", "rfc4106(gcm(aes))"] {
        assert!(seen.contains(word), "{word}: {seen}");
    }
}

/// What a message about the missing part must name: what, and what to do.
fn tells_of_vxlan(text: &str) {
    for word in ["VXLAN", "modprobe vxlan"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

fn without_vxlan_the_agent_does_not_start(world: &World) {
    let n1 = world.node("n1");
    let kernel = n1.kernel_state();
    let without = WithoutModule::new("vxlan");
    let output = n1.netctld(&Config::embedded(), &[]);
    assert_eq!(output.code, Some(1), "{output}");
    tells_of_vxlan(&output.text());
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
    assert!(!n1.dir().join("state").exists());
    drop(without);
    let _agent = n1.agent(&Config::embedded());
}

fn without_vxlan_an_attach_is_refused_and_leaves_nothing(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let c1 = n1.container("c1");
    // Forwarding stays on: others may need it by then.
    n1.space.sysctl("net/ipv4/ip_forward", "1");
    n1.space.sysctl("net/ipv6/conf/all/forwarding", "1");
    let (kernel, keys) = (n1.kernel_state(), cluster.etcd.lasting_keys());
    let without = WithoutModule::new("vxlan");
    let attach = format!("endpoint attach --network shop --name c1 --netns {}", c1.path);
    let output = n1.ctl(&attach);
    assert_eq!(output.code, Some(1), "{output}");
    tells_of_vxlan(&output.stderr);
    assert!(output.stderr.contains("node n1"), "the machine that lacks it is named: {output}");
    let left = || kernel.difference(&n1.kernel_state());
    assert!(eventually(DEADLINE, || left().is_empty()), "in the kernel: {}", left());
    let left = || cluster.etcd.lasting_keys();
    assert!(eventually(DEADLINE, || left() == keys), "in the store: {:?}, not {keys:?}", left());
    drop(without);
    n1.ok(&attach);
    assert!(c1.space.reaches("10.9.0.1"));
}

fn a_service_that_the_kernel_cannot_balance_is_refused_with_the_modules_name(world: &World) {
    let n1 = world.node("n1");
    let without = WithoutModule::new("ip_vs");
    let output = n1.netctld(&Config::embedded().set("lb", "ipvs"), &[]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.text().contains("modprobe ip_vs"), "{output}");

    let config = Config::embedded().set("lb", "auto");
    without_ebpf(&n1);
    let agent = n1.agent(&config);
    n1.ok(&format!("network create shop {DUAL}"));
    let refused = n1.ctl("service create web --network shop");
    refuses(&refused, &["module ip_vs)", "modprobe ip_vs", "--endpoint-mode dnsrr"]);
    n1.ok("service create names --network shop --endpoint-mode dnsrr");
    let named = n1.attach_with("shop", "named", "--service names");
    assert!(named.space.reaches("10.9.0.1"));
    drop(without);
    agent.terminate();

    let _agent = n1.agent(&config);
    assert!(balancing(&n1).starts_with("ipvs (ebpf cannot be used here: "), "{}", balancing(&n1));
    let without = WithoutModule::new("ip_vs_mh");
    let create = "service create web --network shop --scheduler mh";
    refuses(&n1.ctl(create), &["scheduler mh", "module ip_vs_mh", "modprobe ip_vs_mh"]);
    assert_eq!(n1.ok("service ls -q").stdout, "names\n");
    n1.ok("service create web --network shop --scheduler sh");
    let update = "service update web --scheduler mh";
    refuses(&n1.ctl(update), &["scheduler mh", "module ip_vs_mh"]);
    drop(without);
    n1.ok(update);
    let saved = || n1.sandbox("shop").sh("ipvsadm -Sn");
    wait_for("it is balanced so", || saved().contains("-s mh"));
}

fn connections_go_on_when_ebpf_takes_over_from_ipvs(world: &World) {
    let n1 = world.node("n1");
    let with = |lb: &str| Config::embedded().set("lb", lb);
    let agent = n1.agent(&with("ipvs"));
    let ports =
        [json!({"port": 80, "target": 8080}), json!({"port": 53, "target": 5000, "protocol": "udp"})];
    let vips = open(&n1, json!({"ports": ports}));
    let client = plug(&n1, "client", None);
    let backends = ["b1", "b2"].map(|name| Backend::start(&n1, name));
    let (from, sandbox) = (&client.container.space, n1.sandbox("shop"));
    let saved = || sandbox.sh("ipvsadm -Sn");
    let log = || std::fs::read_to_string(n1.dir().join("netctld.log")).unwrap();
    wait_for("both are balanced", || saved().matches(" -w 1").count() == 8);
    let mut sessions = Vec::new();
    for vip in &vips {
        for server in ["b1", "b2"] {
            sessions.push((server, session_with(from, vip, 80, server)));
        }
    }
    let ask_by_port = || ask_udp(from, &vips[0], 53, 7100).unwrap().server;
    let asked = ask_by_port();
    let own = session_with(&backends[0].member.container.space, &vips[0], 80, "b1");
    agent.terminate();
    let agent = n1.agent(&with("ebpf"));
    wait_for("nothing is left in IPVS", || saved().is_empty());
    for (server, session) in &mut sessions {
        assert_eq!(session.ask().unwrap().server, *server, "it goes on");
    }
    assert_eq!(ask_by_port(), asked, "datagrams too");
    for vip in &vips {
        assert_eq!(answers(from, vip, 4), each(&[("b1", 2), ("b2", 2)]), "{vip}");
    }
    let said = log();
    assert!(said.contains("connections of IPVS go on with eBPF"), "{said}");
    let port = own.local().port();
    let lost =
        |line: &&str| line.contains("cannot carry it on") && line.contains(&format!(":{port} -> "));
    assert_eq!(said.lines().filter(lost).count(), 1, "who meets itself is listed: {said}");
    agent.terminate();

    // IPVS takes nothing over, and says so.
    let _agent = n1.agent(&with("ipvs"));
    wait_for("both are balanced", || saved().matches(" -w 1").count() == 8);
    let said = log();
    assert!(said.contains("connections that eBPF balanced end"), "{said}");
    for (_, session) in &mut sessions {
        let error = session.ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    for vip in &vips {
        assert_eq!(answers(from, vip, 4), each(&[("b1", 2), ("b2", 2)]), "{vip}");
    }
}

#[track_caller]
fn refuses(output: &Output, words: &[&str]) {
    assert_eq!(output.code, Some(1), "{output}");
    assert!(words.iter().all(|word| output.stderr.contains(word)), "{output}");
}
