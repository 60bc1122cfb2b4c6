//! What is refused, with which words, and that it leaves nothing half-made.

use world::{Config, NodeOptions, Output, World, as_nobody, wait_for};

use crate::cluster::Cluster;

crate::tests![
    bad_requests_are_refused_by_name_and_change_nothing,
    the_same_attach_again_is_the_same_endpoint,
    an_agent_without_privileges_says_so,
    a_wrong_configuration_is_told_as_a_whole,
    an_ambiguous_underlay_lists_its_candidates,
    a_node_name_in_use_is_refused,
    only_root_may_use_the_socket,
    a_second_agent_on_the_same_machine_is_refused,
];

/// A command, the exit codes that are right for it, and words that must be in the message: what is wrong,
/// where, and what to do.
type Case = (&'static str, &'static [i32], &'static [&'static str]);

/// Bad input is told by the command (2) or by the agent (1).
const BAD: &[i32] = &[1, 2];

const CASES: &[Case] = &[
    (
        "network create x --subnet 10.20.0.7/24",
        BAD,
        &["10.20.0.7/24", "host bits", "did you mean 10.20.0.0/24"],
    ),
    (
        "network create x --subnet 10.20.0.0/24 --gateway 10.21.0.1",
        BAD,
        &["10.21.0.1", "10.20.0.0/24", "give one"],
    ),
    (
        "network create x --subnet 10.20.0.0/24 --gateway 10.20.0.255",
        BAD,
        &["10.20.0.255", "10.20.0.0/24", "give one"],
    ),
    (
        "network create x --subnet 10.20.0.0/24 --ip-range 10.21.0.0/25",
        BAD,
        &["10.21.0.0/25", "10.20.0.0/24", "give one"],
    ),
    (
        "network create x --subnet 10.20.0.0/24 --reserve 10.21.0.9",
        BAD,
        &["10.21.0.9", "10.20.0.0/24", "give one"],
    ),
    (
        "network create x --subnet 10.20.0.0/16 --subnet 10.20.1.0/24",
        BAD,
        &["10.20.0.0/16", "10.20.1.0/24", "overlap"],
    ),
    ("network create x --subnet 10.20.0.0/31", BAD, &["10.20.0.0/31", "give /8 to /30"]),
    ("network create x --subnet 10.20.0.1/32", BAD, &["10.20.0.1/32", "give /8 to /30"]),
    ("network create x --subnet 0.0.0.0/0", BAD, &["0.0.0.0/0", "give /8 to /30"]),
    ("network create x --subnet fd00:20::/127", BAD, &["fd00:20::/127", "give /16 to /126"]),
    ("network create x --subnet 127.0.0.0/16", BAD, &["127.0.0.0/16", "loopback", "choose another"]),
    ("network create x --subnet 224.0.0.0/8", BAD, &["224.0.0.0/8", "multicast", "choose another"]),
    ("network create x --subnet nonsense", &[2], &["nonsense", "--subnet", "such as"]),
    ("network create x --subnet 10.20.0.0/33", &[2], &["10.20.0.0/33", "such as"]),
    ("network create x --subnet 10.20.0.0", &[2], &["10.20.0.0", "prefix length", "such as"]),
    ("network create x/y --subnet 10.20.0.0/24", BAD, &["x/y", "NAME", "use a-z"]),
    ("network create Shop --subnet 10.20.0.0/24", BAD, &["Shop", "use a-z"]),
    ("network create -- -x", BAD, &["-x", "must begin"]),
    (
        "network create shop --subnet 10.20.0.0/24",
        &[5],
        &["shop", "netctl network rm shop", "another name"],
    ),
    ("network create x --subnet 10.20.0.0/24 --vni 77", &[5], &["77", "shop", "choose another"]),
    ("network create x --subnet 10.20.0.0/24 --vni 0", BAD, &["--vni", "1 to 16777215"]),
    ("network create x --subnet 10.20.0.0/24 --vni 16777216", BAD, &["16777216", "1 to 16777215"]),
    ("network create x --subnet 10.20.0.0/24 --mtu 1000", BAD, &["1000", "1280"]),
    ("network create x --subnet 10.20.0.0/24 --mtu 70000", BAD, &["70000", "1280 to 65535"]),
    ("network create", &[2], &["NAME"]),
    ("network rm shop", &[5], &["shop", "c1 on node n1", "detach"]),
    ("network rm nothing", &[4], &["nothing", "netctl network ls"]),
    ("network inspect nothing", &[4], &["nothing", "netctl network ls"]),
    ("endpoint inspect nothing", &[4], &["nothing", "netctl endpoint ls"]),
    ("endpoint attach --network nothing --netns /run/netns/c2", &[4], &["nothing", "netctl network ls"]),
    (
        "endpoint attach --network shop --netns /run/netns/none",
        BAD,
        &["/run/netns/none", "No such file"],
    ),
    (
        "endpoint attach --network shop --netns /etc/passwd",
        BAD,
        &["/etc/passwd", "regular file", "such as /run/netns/NAME"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns",
        BAD,
        &["/run/netns", "directory", "such as /run/netns/NAME"],
    ),
    (
        "endpoint attach --network shop --name c1 --netns /run/netns/c2",
        &[5],
        &["c1", "/run/netns/c1", "detach it first"],
    ),
    (
        "endpoint attach --network shop --name c/2 --netns /run/netns/c2",
        BAD,
        &["c/2", "--name", "use a-z"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --interface a/b",
        BAD,
        &["a/b", "--interface", "not allowed"],
    ),
    (
        "endpoint attach --network shop --name x --netns /run/netns/c1 --interface eth0",
        &[5],
        &["eth0", "/run/netns/c1", "choose another"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --ip 10.99.0.9",
        BAD,
        &["10.99.0.9", "shop", "10.9.0.0/24"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --ip fd00::9",
        BAD,
        &["fd00::9", "shop", "10.9.0.0/24"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --ip 10.9.0.0",
        BAD,
        &["10.9.0.0", "shop", "first or last"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --ip 10.9.0.1",
        BAD,
        &["10.9.0.1", "shop", "gateway"],
    ),
    (
        "endpoint attach --network shop --netns /run/netns/c2 --ip 10.9.0.9",
        &[5],
        &["10.9.0.9", "shop", "choose another"],
    ),
    ("node inspect nothing", &[4], &["nothing", "netctl node ls"]),
    ("nonsense", &[2], &["nonsense", "Usage"]),
];

fn bad_requests_are_refused_by_name_and_change_nothing(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24 --vni 77");
    n1.attach_with("shop", "c1", "--ip 10.9.0.9");
    n1.container("c2");
    let long = "x".repeat(300);
    let long = format!("network create {long} --subnet 10.20.0.0/24");
    let (keys, kernel) = (cluster.etcd.keys(), n1.kernel_state());
    let mut problems = String::new();
    let check = |command: &str, output: &Output, codes: &[i32], words: &[&str]| {
        let right = output.code.is_some_and(|code| codes.contains(&code))
            && words.iter().all(|word| output.stderr.contains(word))
            && output.stderr.len() < 2000;
        let difference = kernel.difference(&n1.kernel_state());
        let same = cluster.etcd.keys() == keys;
        if right && same && difference.is_empty() {
            return String::new();
        }
        format!(
            "{command}: {output}\nwanted one of {codes:?} with {words:?}; the store is the same: {same}; the kernel: {difference}\n"
        )
    };
    for (command, codes, words) in CASES {
        problems.push_str(&check(command, &n1.ctl(command), codes, words));
    }
    problems.push_str(&check(&long, &n1.ctl(&long), BAD, &["too long"]));
    assert!(problems.is_empty(), "{problems}");
}

fn the_same_attach_again_is_the_same_endpoint(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.container("c1");
    let attach = "-o json endpoint attach --network shop --name c1 --netns /run/netns/c1";
    let first = n1.ok(attach).json();
    let (keys, kernel) = (cluster.etcd.keys(), n1.kernel_state());
    assert_eq!(n1.ok(attach).json()["id"], first["id"]);
    assert_eq!(cluster.etcd.keys(), keys);
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
    n1.ok("endpoint detach --network shop c1");
    // A second detach is the same wish fulfilled.
    let again = n1.ctl("endpoint detach --network shop c1");
    assert!(matches!(again.code, Some(0 | 4)), "{again}");
}

fn an_agent_without_privileges_says_so(world: &World) {
    let n1 = world.node("n1");
    let kernel = n1.kernel_state();
    let mut command = n1.space.command(world::binary("netctld"));
    let state = n1.dir().join("state");
    command.args(["--node", "n1", "--underlay", n1.ipv4(), "--state-dir"]).arg(&state);
    let output = world::output(as_nobody(&mut command), world::DEADLINE);
    assert_eq!(output.code, Some(1), "{output}");
    let text = output.text().to_lowercase();
    assert!(text.contains("root") || text.contains("cap_net_admin"), "{output}");
    assert!(!state.exists());
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
}

fn a_wrong_configuration_is_told_as_a_whole(world: &World) {
    let n1 = world.node("n1");
    let config = Config::embedded()
        .set("lease", "soon")
        .raw("tunnel_port", "70000")
        .set("nonsense", "x")
        .raw("pool_prefix", "31");
    let kernel = n1.kernel_state();
    let output = n1.netctld(&config, &[]);
    assert!(matches!(output.code, Some(1 | 2)), "{output}");
    for word in ["lease", "soon", "tunnel_port", "70000", "nonsense", "pool_prefix", "netctld.toml"] {
        assert!(output.text().contains(word), "{word}: {output}");
    }
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
    let missing = Config::default().store("kind", "etcd");
    let output = n1.netctld(&missing, &[]);
    assert!(matches!(output.code, Some(1 | 2)), "{output}");
    assert!(output.text().contains("endpoints"), "{output}");
}

fn an_ambiguous_underlay_lists_its_candidates(world: &World) {
    let n1 = world.node("n1");
    n1.space.sh("ip address add 192.168.50.77/24 dev eth0");
    for (config, candidates) in [
        (Config::embedded().without("underlay"), vec!["192.168.50.77", n1.ipv4(), n1.ipv6(), "eth0"]),
        (Config::embedded().set("underlay", "192.168.50.0/24"), vec!["192.168.50.77", n1.ipv4()]),
        (Config::embedded().set("underlay", "eth0"), vec!["192.168.50.77", n1.ipv4()]),
        (Config::embedded().set("underlay", "192.168.99.1"), vec!["192.168.99.1", n1.ipv4()]),
    ] {
        let output = n1.netctld(&config, &[]);
        assert!(matches!(output.code, Some(1 | 2)), "{output}");
        for word in candidates {
            assert!(output.text().contains(word), "{word}: {output}");
        }
    }
}

fn a_node_name_in_use_is_refused(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n2 = world.node("n2");
    let imposter = Config::etcd(&cluster.etcd).set("node", "n1");
    let keys = cluster.etcd.keys();
    let output = n2.netctld(&imposter, &[]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.text().contains("n1") && output.text().contains("in use"), "{output}");
    assert_eq!(cluster.etcd.keys(), keys);
    // Its owner may take it again, at once.
    cluster.kill(0);
    cluster.start(0);
    cluster.n1().ok("node inspect n1");
}

fn only_root_may_use_the_socket(world: &World) {
    let n1 = world.node("n1");
    let _agent = n1.agent(&Config::embedded());
    let output = world::output(as_nobody(&mut n1.netctl_command(&["version"])), world::DEADLINE);
    assert_eq!(output.code, Some(3), "{output}");
    assert!(output.stderr.to_lowercase().contains("permission"), "{output}");
    let mode = |path: &str| n1.space.sh(&format!("stat -c %a {}/{path}", n1.dir().display()));
    assert_eq!(mode("netctl.sock").trim(), "600");
    assert_eq!(mode("state").trim(), "700");
}

fn a_second_agent_on_the_same_machine_is_refused(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config);
    let n1 = cluster.n1();
    let output = n1.netctld(&cluster.configs[0], &[]);
    assert_eq!(output.code, Some(1), "{output}");
    wait_for("the first one is not disturbed", || n1.ctl("version").success());
}
