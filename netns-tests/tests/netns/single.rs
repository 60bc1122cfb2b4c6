//! One machine, as the README begins: no etcd, nothing to configure.

use nix::sys::signal::Signal;
use world::{Config, DEADLINE, NodeOptions, Process, World, binary, output, tcp_transfer, wait_for};

use crate::cluster::DUAL;

crate::tests![
    three_commands_are_enough_where_nothing_is_configured,
    one_machine_needs_no_store_of_its_own,
    the_embedded_store_outlives_the_agent,
    a_reboot_keeps_networks_and_forgets_containers,
];

fn three_commands_are_enough_where_nothing_is_configured(world: &World) {
    // With one address there is no question where the tunnels run.
    let n1 = world.node_with("n1", &NodeOptions { ipv6: false, ..NodeOptions::default() });
    // What this machine keeps for good is not to be seen.
    n1.space
        .sh("mount -t tmpfs tmpfs /var/lib; test ! -e /etc/netctl || mount -t tmpfs tmpfs /etc/netctl");
    let log = std::fs::File::create(n1.dir().join("bare.log")).unwrap();
    let mut agent = Process::start(&mut n1.space.command(binary("netctld")), &log);
    let netctl = |words: &str| {
        let mut command = n1.space.command(binary("netctl"));
        output(command.args(words.split(' ')), DEADLINE)
    };
    wait_for("the agent answers", || netctl("network ls").success());
    let created = netctl("network create --subnet 10.9.0.0/24 web");
    assert!(created.success(), "{created}");
    let shown = netctl("run --network web --name a -- ip -o -4 address show dev eth0");
    assert!(shown.success() && shown.stdout.contains("10.9.0.2/"), "{shown}");
    let node = netctl("-o json node ls").json();
    assert_eq!(node[0]["underlay"], n1.ipv4(), "{node}");
    assert_eq!(node[0]["lb"], "ebpf", "{node}");
    n1.space.sh("test -S /run/netctl/netctl.sock && test -s /var/lib/netctl/store.redb");
    assert!(agent.stop(Signal::SIGTERM).success());
}

fn one_machine_needs_no_store_of_its_own(world: &World) {
    let n1 = world.node("n1");
    let outside = world.outside("client");
    let _agent = n1.agent(&Config::embedded());
    n1.ok("network create shop");
    let (a, b) = (n1.attach("shop", "a"), n1.attach("shop", "b"));
    let address = n1.addresses("shop", "b")[0].clone();
    assert!(a.space.reaches(&address));
    tcp_transfer(&a.space, &b.space, &address, 1 << 20).unwrap();
    assert!(a.space.reaches(outside.ipv4()));
    assert_eq!(n1.ctl("network rm shop").code, Some(5));
    n1.ok("endpoint detach --network shop a");
    n1.ok("endpoint detach --network shop b");
    n1.ok("network rm shop");
}

fn the_embedded_store_outlives_the_agent(world: &World) {
    let n1 = world.node("n1");
    let agent = n1.agent(&Config::embedded());
    n1.ok(&format!("network create shop {DUAL}"));
    let (a, _b) = (n1.attach("shop", "a"), n1.attach("shop", "b"));
    let address = n1.addresses("shop", "b")[0].clone();
    let (before, endpoints) = (n1.kernel_state(), n1.ok("-o json endpoint ls").json());
    agent.kill();
    assert!(a.space.ping(&address));
    let agent = n1.agent(&Config::embedded());
    assert_eq!(n1.ok("-o json endpoint ls").json(), endpoints);
    assert_eq!(before.difference(&n1.kernel_state()), "");
    agent.terminate();
}

fn a_reboot_keeps_networks_and_forgets_containers(world: &World) {
    let n1 = world.node("n1");
    let agent = n1.agent(&Config::embedded());
    n1.ok(&format!("network create shop {DUAL}"));
    n1.attach("shop", "a");
    agent.kill();
    // What a reboot takes: all namespaces, links and rules.
    let id = n1.space.sh("ls /run/netns | grep netctl-");
    n1.space.sh(&format!(
        "ip netns del {id}; ip netns del a; rm -rf /run/netctl; nft flush ruleset",
        id = id.trim()
    ));
    let _agent = n1.agent(&Config::embedded());
    n1.ok("network inspect shop");
    let again = n1.attach("shop", "a");
    assert!(again.space.reaches("10.9.0.1"));
}
