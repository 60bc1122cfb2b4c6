//! The test ground itself: what it makes is there, and its probes notice what they should.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use world::{
    DEADLINE, Inbox, NodeOptions, Process, Space, Stream, World, as_nobody, connects, ethernet,
    ipv4_udp, mac_of, output, tcp_transfer, wait_for,
};

crate::tests![
    machines_reach_each_other_over_both_families,
    an_underlay_can_have_one_family_and_a_smaller_mtu,
    a_machine_can_be_cut_off,
    containers_are_named_namespaces_on_their_own_machine,
    a_difference_of_the_kernel_state_is_found,
    a_stream_counts_what_is_lost,
    an_etcd_keeps_its_keys_over_a_restart_and_loses_them_when_wiped,
    a_frozen_etcd_does_not_answer,
    a_hand_made_packet_is_a_valid_one,
    tests_fail_where_they_cannot_run,
    tests_leave_nothing_behind,
];

/// These tests, as somebody runs one of them anew.
fn tests(space: &Space) -> Command {
    let mut command = space.command(std::env::current_exe().unwrap());
    command.args(["--exact", "ground::a_machine_can_be_cut_off"]);
    command
}

fn tests_fail_where_they_cannot_run(world: &World) {
    let n1 = world.node("n1");
    let (mut as_user, mut without_etcd) = (tests(&n1.space), tests(&n1.space));
    n1.space.sh("mkdir /run/bin && ln -s $(which ip bridge nft ping strace sh etcdctl) /run/bin/");
    for (command, words) in [
        (as_nobody(&mut as_user), ["run them as root", ""]),
        (without_etcd.env("PATH", "/run/bin"), ["missing (etcd)", "./scripts/setup"]),
    ] {
        let output = output(command, DEADLINE);
        assert_eq!(output.code, Some(1), "{output}");
        for word in words {
            assert!(output.stderr.contains(word), "{word}: {output}");
        }
        assert!(!output.stdout.contains("test result"), "{output}");
    }
}

fn tests_leave_nothing_behind(world: &World) {
    let n1 = world.node("n1");
    // The files of the world, which all tests have, are on another file system.
    let look = || -> BTreeSet<String> {
        let shown = n1.space.sh("cat /proc/mounts; find /run -xdev
                                 find /sys/fs/cgroup -type d -name 'netctl-tests-*'");
        shown.lines().map(str::to_owned).collect()
    };
    let pass = || {
        let passed = output(&mut tests(&n1.space), Duration::from_secs(60));
        assert!(passed.success() && passed.stdout.contains("1 passed"), "{passed}");
    };
    // It also takes away what is left of those that somebody has killed.
    pass();
    let before = look();
    pass();
    assert_eq!(look().symmetric_difference(&before).collect::<Vec<_>>(), [""; 0]);
    // One that is killed ends with all that it has started.
    let log = File::create(n1.dir().join("killed.log")).unwrap();
    let mut killed = Process::start(&mut tests(&n1.space), &log);
    let first = killed.pid().as_raw();
    // The one that has waited, the first of its namespace, and the one with the tests.
    wait_for("the tests run", || descendants(first).len() >= 2);
    let all = descendants(first);
    killed.stop(Signal::SIGKILL);
    wait_for("all have ended", || all.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
    // The control group that nobody could remove then, the next one does.
    pass();
    assert_eq!(look().symmetric_difference(&before).collect::<Vec<_>>(), [""; 0]);
}

/// The processes that one has started, and those that they have.
fn descendants(pid: i32) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().map(|child| child.parse().unwrap());
    children.flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}

fn machines_reach_each_other_over_both_families(world: &World) {
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    assert!(n1.space.reaches(n2.ipv4()) && n1.space.reaches(n2.ipv6()));
    tcp_transfer(&n1.space, &n2.space, n2.ipv4(), 1 << 20).unwrap();
    tcp_transfer(&n1.space, &n2.space, n2.ipv6(), 1 << 20).unwrap();
}

fn an_underlay_can_have_one_family_and_a_smaller_mtu(world: &World) {
    let options = NodeOptions { ipv4: false, mtu: 1400, ..NodeOptions::default() };
    let (n1, n2) = (world.node_with("n1", &options), world.node_with("n2", &options));
    assert!(n1.space.reaches(n2.ipv6()) && !n1.space.ping(n2.ipv4()));
    let ping = |size| n1.space.try_sh(&format!("ping -c 1 -W 1 -M do -s {size} {}", n2.ipv6()));
    assert!(ping(1400 - 48).success() && !ping(1400 - 47).success());
}

fn a_machine_can_be_cut_off(world: &World) {
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    assert!(n1.space.reaches(n2.ipv4()));
    world.connect(&n2, false);
    assert!(!n1.space.ping(n2.ipv4()));
    world.connect(&n2, true);
    assert!(n1.space.reaches(n2.ipv4()));
}

fn containers_are_named_namespaces_on_their_own_machine(world: &World) {
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    let container = n1.container("c1");
    assert_eq!(n1.kernel_state().namespaces(), ["c1"]);
    assert_eq!(n2.kernel_state().namespaces(), [""; 0]);
    assert!(!container.space.ping(n1.ipv4()) && container.space.ping("127.0.0.1"));
    assert_eq!(n1.space.sh("ip netns exec c1 ip -o link | wc -l").trim(), "1");
    assert_eq!(n1.space.sh("ls /sys/class/net").split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"]);
}

fn a_difference_of_the_kernel_state_is_found(world: &World) {
    let n1 = world.node("n1");
    let container = n1.container("c1");
    let before = n1.kernel_state();
    assert_eq!(before.difference(&n1.kernel_state()), "");
    for (there, command, view) in [
        (&n1.space, "ip route add unreachable 10.1.0.0/16", "host routes + unreachable"),
        (&container.space, "ip address add 10.2.0.1/32 dev lo", "c1 addresses + "),
        (&container.space, "nft add table inet t", "c1 nftables + table inet t"),
        (
            &n1.space,
            "ip neigh add 192.168.50.99 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
            "host neighbours + ",
        ),
        (&n1.space, "ip link add vx0 type vxlan id 7 dstport 4789", "host links + "),
        (&n1.space, "bridge fdb append 02:00:00:00:00:01 dev vx0 dst 192.168.50.9", "host fdb + "),
    ] {
        there.sh(command);
        let difference = before.difference(&n1.kernel_state());
        assert!(difference.contains(view), "{command}: {difference}");
    }
}

fn a_stream_counts_what_is_lost(world: &World) {
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    let stream = Stream::start(&n1.space, &n2.space, n2.ipv4(), 5000);
    stream.wait(5000);
    let report = stream.stop();
    assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
    let stream = Stream::start(&n1.space, &n2.space, n2.ipv4(), 5000);
    stream.wait(1000);
    world.connect(&n2, false);
    world.connect(&n2, true);
    stream.wait(1000);
    let report = stream.stop();
    assert!(report.lost > 0 && report.duplicated == 0, "{report:?}");
}

fn an_etcd_keeps_its_keys_over_a_restart_and_loses_them_when_wiped(world: &World) {
    let mut etcd = world.etcd();
    let n1 = world.node("n1");
    etcd.put("/a/b", "one");
    etcd.stop();
    assert!(connects(&n1.space, "192.168.50.1", 2379).is_err());
    etcd.start();
    assert!(connects(&n1.space, "192.168.50.1", 2379).is_ok());
    assert_eq!(etcd.keys().get("/a/b").map(String::as_str), Some("one"));
    etcd.wipe();
    assert!(etcd.keys().is_empty());
}

fn a_frozen_etcd_does_not_answer(world: &World) {
    let mut etcd = world.etcd();
    let n1 = world.node("n1");
    let ask = format!(
        "ETCDCTL_API=3 etcdctl --endpoints {} --command-timeout=500ms endpoint health",
        etcd.endpoint()
    );
    assert!(n1.space.try_sh(&ask).success());
    etcd.freeze();
    assert!(!n1.space.try_sh(&ask).success());
    etcd.thaw();
    assert!(n1.space.try_sh(&ask).success());
}

fn a_hand_made_packet_is_a_valid_one(world: &World) {
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    let to = mac_of(&n2.space, "eth0");
    let inbox = Inbox::open(&n2.space, 7002);
    let four = ipv4_udp((n1.ipv4().parse().unwrap(), 1), (n2.ipv4().parse().unwrap(), 7002), b"four");
    let six =
        world::ipv6_udp((n1.ipv6().parse().unwrap(), 1), (n2.ipv6().parse().unwrap(), 7002), b"six");
    for packet in [four, six] {
        world::send_frame(&n1.space, "eth0", &ethernet(to, [2, 0, 0, 0, 0, 9], &packet));
    }
    assert!(inbox.gets(b"four") && inbox.gets(b"six"));
}
