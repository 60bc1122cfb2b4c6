//! The host itself: which names it finds, and which networks' addresses it reaches.

use std::collections::BTreeSet;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use world::Transport::Tcp;
use world::{Config, KernelState, Node, Server, World, ask, connects, wait_for};

use crate::cluster::{Cluster, DUAL, alive};
use crate::engine::lb;
use crate::names::{dig, found, status};
use crate::upstream::{Upstream, answered};

crate::tests![
    the_host_finds_names_of_ours_and_no_others,
    no_query_of_the_host_is_lost_while_the_agent_is_started_again,
    a_port_that_somebody_else_has_is_taken_when_it_is_free,
    hosts_reach_containers_on_all_machines_by_name,
    only_the_host_itself_gets_into_a_network_and_nothing_gets_out,
    what_hosts_reach_overlaps_nothing,
    the_hosts_routes_follow_a_networks_subnets,
    a_network_that_hosts_are_on_goes_without_a_trace,
    what_somebody_takes_away_of_the_hosts_access_comes_back,
];

/// Where the host asks in these tests.
const HOST: &str = "127.0.0.110";

/// Machines whose hosts find names at this address.
fn answering(world: &World, count: usize, address: &str) -> Cluster {
    Cluster::with(world, count, &Default::default(), |config: Config| {
        config.raw("dns", &format!("{{ host = {address:?}, upstreams = [\"127.0.0.1:5300\"] }}"))
    })
}

fn the_host_finds_names_of_ours_and_no_others(world: &World) {
    let cluster = answering(world, 2, HOST);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create mail --internal --subnet 10.8.0.0/24");
    n1.ok("service create db --network shop --replicas 2 --port sql=5432:5433 --endpoint-mode dnsrr");
    let (a, _m) = (n1.attach("shop", "a"), n1.attach("mail", "m"));
    n2.attach_with("shop", "d2", "--service db");
    // What containers are answered and is kept is not for the host.
    let _upstream =
        Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| vec![answered(query, 1, 7, 0)]);
    assert_eq!(found(&a.space, "10.9.0.1", "www.example.org A"), ["192.0.2.7"]);
    let remote = n2.addresses("shop", "d2");
    let host = &n1.space;
    wait_for("the other machine's container is ready", || {
        dig(host, HOST, "db.shop.netctl.internal A").answers == remote[..1]
    });
    for way in ["+notcp", "+tcp"] {
        let found = |question: &str| found(host, HOST, &format!("{question} {way}"));
        for name in ["db", "tasks.db", "d2", "D2"] {
            assert_eq!(found(&format!("{name}.shop.netctl.internal A")), remote[..1]);
            assert_eq!(found(&format!("{name}.shop.netctl.internal AAAA")), remote[1..]);
        }
        assert_eq!(found("m.mail.netctl.internal A"), n1.addresses("mail", "m"));
        let port = found("_sql._tcp.db.shop.netctl.internal SRV");
        assert_eq!(port, ["0 0 5433 d2.shop.netctl.internal."]);
        for address in &remote {
            assert_eq!(found(&format!("-x {address}")), ["d2.shop.netctl.internal."]);
        }
        for (question, code) in [
            ("no.shop.netctl.internal A", "NXDOMAIN"),
            ("no.netctl.internal A", "NXDOMAIN"),
            ("-x 10.9.0.77", "NXDOMAIN"),
            ("netctl.internal SOA", "NOERROR"),
            ("a A", "REFUSED"),
            ("a.shop A", "REFUSED"),
            ("db TXT", "REFUSED"),
            ("www.example.org A", "REFUSED"),
            ("-x 192.0.2.1", "REFUSED"),
            ("db.shop.netctl.internal ANY", "REFUSED"),
        ] {
            assert_eq!(status(host, HOST, &format!("{question} {way}")), code, "{question} {way}");
        }
    }
    let transfer = dig(host, HOST, "shop.netctl.internal AXFR +tcp");
    assert!(transfer.text.contains("Transfer failed"), "{}", transfer.text);
    // Who does not come from the host's own loopback gets nothing.
    let stranger = dig(host, HOST, &format!("d2.shop.netctl.internal A -b {} +time=1", n1.ipv4()));
    assert_eq!(stranger.status, "", "{}", stranger.text);
    let printed = n1.ok("dns resolved").stdout;
    assert!(printed.ends_with("[Resolve]\nDNS=127.0.0.110\nDomains=~netctl.internal\n"), "{printed}");
    let json = n1.ok("-o json dns resolved").json();
    assert_eq!((&json["server"], &json["domains"]), (&json!(HOST), &json!(["netctl.internal"])));
}

fn no_query_of_the_host_is_lost_while_the_agent_is_started_again(world: &World) {
    let mut cluster = answering(world, 1, "::1");
    let n1 = cluster.nodes[0].clone();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.attach("shop", "a");
    let address = n1.addresses("shop", "a");
    wait_for("the host finds it", || {
        dig(&n1.space, "::1", "a.shop.netctl.internal A +time=1").answers == address
    });
    let end = Arc::new(AtomicBool::new(false));
    let askers = ["+notcp", "+tcp"].map(|way| {
        let (space, end, address) = (n1.space.clone(), end.clone(), address.clone());
        std::thread::spawn(move || {
            let mut count = 0;
            while !end.load(Ordering::Relaxed) {
                let dug = dig(&space, "::1", &format!("a.shop.netctl.internal A {way}"));
                assert_eq!(dug.answers, address, "{way}: {}", dug.text);
                count += 1;
            }
            count
        })
    });
    for _ in 0..2 {
        // Those of the network's gateway, of the fixed address, and of the host.
        wait_for("all sockets are kept", || cluster.agent(0).count_kept() == 6);
        let kept = cluster.terminate_keeping(0);
        assert!(kept.keys().any(|name| name.starts_with("u-host-")), "{kept:?}");
        cluster.start_with(0, kept);
    }
    end.store(true, Ordering::Relaxed);
    assert!(askers.into_iter().all(|asker| asker.join().unwrap() > 0));
}

fn a_port_that_somebody_else_has_is_taken_when_it_is_free(world: &World) {
    let n1 = world.node("n1");
    let other = n1.space.enter(|| UdpSocket::bind((HOST, 53))).unwrap();
    let config = Config::embedded().raw("dns", &format!("{{ host = {HOST:?} }}"));
    let agent = n1.agent(&config);
    wait_for("the reason is told", || {
        let log = agent.log_tail();
        log.contains("names are not answered yet") && log.contains("Address already in use")
    });
    drop(other);
    wait_for("it is answered", || status(&n1.space, HOST, "netctl.internal SOA +time=1") == "NOERROR");
    agent.terminate();
    let _agent = n1.agent(&Config::embedded());
    assert_eq!(status(&n1.space, HOST, "netctl.internal SOA +time=1"), "", "it is off by default");
    let refused = n1.ctl("dns resolved");
    assert!(refused.code == Some(1) && refused.stderr.contains("--dns-host"), "{refused}");
    let wrong = n1.netctld(&config.raw("dns", "{ host = \"127.0.0.53\" }"), &[]);
    assert!(!wrong.success() && wrong.text().contains("systemd-resolved's own"), "{wrong}");
}

/// A network that the hosts of these machines reach.
#[track_caller]
fn open(node: &Node, name: &str, subnets: &str) {
    node.ok(&format!("network create {name} {subnets} --host-access"));
}

/// The name of the device by which a machine is on a network.
#[track_caller]
fn device(node: &Node, network: &str) -> String {
    format!("nh-{}", node.network_id(network))
}

/// What a machine has of a network: addresses, routes and permanent neighbours of its device.
fn end(node: &Node, device: &str) -> String {
    node.space
        .try_sh(&format!(
            "ip -br address show dev {device} up | tr -s ' ' '\\n' | tail -n +3 | grep -v ^fe80 | sort
             ip route show dev {device} proto 110; ip -6 route show dev {device} proto 110
             ip neighbour show dev {device} nud permanent | cut -d' ' -f1 | sort"
        ))
        .stdout
}

#[track_caller]
fn reaches_all(node: &Node, addresses: &[String]) {
    for address in addresses {
        assert!(node.space.reaches(address), "{address} from {}", node.name());
    }
}

fn hosts_reach_containers_on_all_machines_by_name(world: &World) {
    let cluster = answering(world, 2, HOST);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let before: Vec<String> =
        [n1, n2].map(|node| node.space.sh("ip route; ip -6 route; cat /etc/resolv.conf")).into();
    open(n1, "shop", DUAL);
    open(n1, "inner", "--internal --subnet 10.7.0.0/24");
    n1.ok(&format!("network create mail {DUAL}"));
    // One address on two networks: it is the host's neighbour that is meant by it.
    let (_a, _b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let shared = n1.addresses("shop", "a").remove(0);
    let _m = n1.attach_with("mail", "m", &format!("--ip {shared}"));
    wait_for("the host finds whom it reaches", || {
        dig(&n1.space, HOST, &format!("-x {shared}")).answers == ["a.shop.netctl.internal."]
    });
    let _i = n2.attach("inner", "i");
    for node in [n1, n2] {
        for name in ["a", "b"] {
            reaches_all(node, &n1.addresses("shop", name));
        }
        reaches_all(node, &n1.addresses("inner", "i"));
    }
    std::fs::write(n1.dir().join("resolv.conf"), format!("nameserver {HOST}\n")).unwrap();
    let resolved = n1.space.sh("getent ahostsv4 b.shop.netctl.internal");
    assert!(resolved.starts_with(&n1.addresses("shop", "b")[0]), "{resolved}");
    let of_hosts = n1.addresses("shop", "host-n2");
    assert_eq!(
        found(&n1.space, HOST, &format!("-x {}", of_hosts[0])),
        ["host-n2.shop.netctl.internal."]
    );
    for (node, before) in [n1, n2].iter().zip(&before) {
        let now = node.space.sh(
            "ip route | grep -v 'dev nh-'; ip -6 route | grep -v 'dev n[hc]-'; cat /etc/resolv.conf",
        );
        let lines = |text: &str| -> Vec<String> {
            let ours = |line: &&str| line.starts_with("169.254.64.") || line.starts_with("nameserver");
            text.lines().filter(|line| !ours(line)).map(str::to_owned).collect()
        };
        assert_eq!(lines(&now), lines(before), "nothing else is routed otherwise on {}", node.name());
    }
    let listed = n1.ok("endpoint ls --network shop --node n2").stdout;
    assert!(listed.contains("host-n2") && listed.contains(&device(n1, "shop")), "{listed}");
    let shown = n1.ok("endpoint inspect host-n1 --network shop").stdout;
    assert!(shown.contains("the host's own"), "{shown}");
    let shown = n1.ok("network inspect shop").stdout;
    let says_so = |line: &str| line.starts_with("Hosts:") && line.ends_with(" reach it");
    assert!(shown.lines().any(says_so), "{shown}");
    let refused = n1.ctl("endpoint detach host-n1 --network shop");
    assert!(refused.code == Some(5) && refused.stderr.contains("goes with the network"), "{refused}");
    n1.ok("ipam check");
    let printed = n1.ok("dns resolved --reverse").stdout;
    let domains = [
        "~netctl.internal",
        "~0.0.0.0.0.0.0.0.9.0.0.0.0.0.d.f.ip6.arpa",
        "~0.7.10.in-addr.arpa",
        "~0.9.10.in-addr.arpa",
    ];
    assert!(printed.ends_with(&format!("Domains={}\n", domains.join(" "))), "{printed}");
}

fn only_the_host_itself_gets_into_a_network_and_nothing_gets_out(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    open(&n1, "shop", DUAL);
    n1.ok("network create mail --subnet 10.8.0.0/24");
    let (a, b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let m = n1.attach("mail", "m");
    let (target, remote) = (n1.addresses("shop", "a"), n1.addresses("shop", "b"));
    reaches_all(&n1, &[target.clone(), remote].concat());
    let hosts = n1.addresses("shop", "host-n1");
    let _listener = n1.space.enter(|| TcpListener::bind("[::]:7100")).unwrap();
    let outside = world.outside("outside");
    outside.space.sh(&format!("ip route add 10.9.0.0/24 via {}", n1.ipv4()));
    // What an administrator may have: packets of others leave with the address of the device.
    n1.space.sysctl("net/ipv4/ip_forward", "1");
    n1.space.sh("nft 'table inet own { chain out { type nat hook postrouting priority 90;
                 oifname \"nh-*\" masquerade; }; }'");
    // All at once: who is not let in waits for seconds.
    let opens = || -> Vec<bool> {
        let ways = [&a, &b].into_iter().flat_map(|from| hosts.iter().map(move |host| (from, host)));
        std::thread::scope(|scope| {
            let tries =
                ways.map(|(from, host)| scope.spawn(move || connects(&from.space, host, 7100).is_ok()));
            let tries: Vec<_> = tries.collect();
            tries.into_iter().map(|attempt| attempt.join().unwrap()).collect()
        })
    };
    assert_eq!(opens(), [false; 4], "from both containers, to both addresses");
    for from in [&outside.space, &m.space] {
        assert!(!from.ping(&target[0]), "{}", from.name());
    }
    let rules = n1.space.sh("nft list table inet netctl");
    for reason in ["container-to-host", "forwarded-by-host-access"] {
        let counts = |line: &&str| line.contains(reason) && !line.contains("packets 0 ");
        assert!(rules.lines().find(counts).is_some(), "{reason}: {rules}");
    }
    cluster.kill(0);
    n1.space.sh("nft delete table inet netctl");
    assert_eq!(opens(), [true; 4], "the attack is one");
    for from in [&outside.space, &m.space] {
        assert!(from.reaches(&target[0]), "the attack is one: {}", from.name());
    }
}

fn what_hosts_reach_overlaps_nothing(world: &World) {
    let cluster = Cluster::with(world, 2, &Default::default(), |config| config.set("resync", "1s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.space.sh("ip route add 10.66.0.0/16 dev eth0");
    n2.space.sh("ip route add 10.9.0.0/16 dev eth0");
    open(n1, "shop", DUAL);
    for (create, part) in [
        ("other --subnet 10.9.0.128/25 --host-access", "subnet 10.9.0.0/24 of network shop"),
        ("other --subnet 10.8.0.0/24 --subnet fd00:9::/48 --host-access", "fd00:9::/64 of network shop"),
        ("other --subnet 192.168.50.0/26 --host-access", "192.168.50.0/24, to which this host"),
        ("other --subnet 10.66.1.0/24 --host-access", "10.66.0.0/16, to which this host"),
    ] {
        let refused = n1.ctl(&format!("network create {create}"));
        assert!(refused.code == Some(5) && refused.stderr.contains(part), "{create}: {refused}");
    }
    n1.ok("network create plain --subnet 10.9.0.0/24");
    n1.ok("network create away --subnet 10.66.1.0/24");
    for subnet in ["10.66.2.0/24", "10.9.0.0/25"] {
        let refused = n1.ctl(&format!("network expand shop --subnet {subnet}"));
        assert_eq!(refused.code, Some(5), "{refused}");
    }
    let _a = n1.attach("shop", "a");
    reaches_all(n1, &n1.addresses("shop", "a"));
    let reason = "reach it, but not this node's: 10.9.0.0/16, to which this host has a route";
    let says = || n2.ok("network inspect shop").stdout.contains(reason);
    let has_device = || n2.space.try_sh(&format!("ip link show {}", device(n1, "shop"))).success();
    wait_for("the other machine says why it does not", says);
    assert!(!has_device() && !n1.ok("endpoint ls").stdout.contains("host-n2"));
    n2.space.sh("ip route del 10.9.0.0/16 dev eth0");
    reaches_all(n2, &n1.addresses("shop", "a"));
    assert!(!says());
    n2.space.sh("ip route add 10.9.0.0/16 dev eth0");
    wait_for("it leaves", || says() && !has_device());
}

fn the_hosts_routes_follow_a_networks_subnets(world: &World) {
    let cluster = Cluster::with(world, 2, &Default::default(), |config| config.set("rest", "0s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    open(n1, "shop", DUAL);
    let a = n1.attach("shop", "a");
    reaches_all(n2, &n1.addresses("shop", "a"));
    n1.ok("network expand shop --subnet 10.10.0.0/24");
    let c = n1.container("c");
    n1.ok(&format!("endpoint attach --network shop --name c --netns {} --ip 10.10.0.9", c.path));
    for node in [n1, n2] {
        reaches_all(node, &["10.10.0.9".to_owned()]);
    }
    // The hosts themselves have addresses of the first subnet, and so has the container.
    let refused = n1.ctl("network shrink shop --subnet 10.9.0.0/24");
    assert!(refused.code == Some(5) && refused.stderr.contains("such as"), "{refused}");
    assert!(refused.stderr.contains("1 address(es)") && !refused.stderr.contains("host-"), "{refused}");
    n1.ok("endpoint detach a --network shop");
    drop(a);
    wait_for("it is free", || n1.ctl("network shrink shop --subnet 10.9.0.0/24").success());
    for node in [n1, n2] {
        let device = device(n1, "shop");
        wait_for("the host has another address", || {
            let end = end(node, &device);
            end.contains("10.10.0.0/24 via 10.10.0.1") && !end.contains("10.9.0.")
        });
        reaches_all(node, &["10.10.0.9".to_owned()]);
    }
}

fn a_network_that_hosts_are_on_goes_without_a_trace(world: &World) {
    let cluster = Cluster::with(world, 2, &Default::default(), |config| config.set("rest", "0s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    for node in [n1, n2] {
        // Forwarding stays on: others may need it by then.
        node.space.sysctl("net/ipv4/ip_forward", "1");
        node.space.sysctl("net/ipv6/conf/all/forwarding", "1");
    }
    n1.ok("network create other");
    let keys = cluster.etcd.lasting_keys();
    let a = n1.container("a");
    let before = [n1.kernel_state(), n2.kernel_state()];
    open(n1, "shop", DUAL);
    n1.ok(&format!("endpoint attach --network shop --name a --netns {}", a.path));
    for node in [n1, n2] {
        reaches_all(node, &n1.addresses("shop", "a"));
    }
    let refused = n1.ctl("network rm shop");
    assert!(refused.stderr.contains("1 endpoint(s), such as a on node n1"), "{refused}");
    n1.ok("endpoint detach a --network shop");
    n1.ok("network rm shop");
    wait_for("nothing is left in the store", || cluster.etcd.lasting_keys() == keys);
    for (node, before) in [n1, n2].iter().zip(&before) {
        let before: KernelState = before.shape();
        wait_for("nothing is left in the kernel", || {
            before.difference(&node.kernel_state().shape()).is_empty()
        });
    }
}

fn what_somebody_takes_away_of_the_hosts_access_comes_back(world: &World) {
    let mut cluster = Cluster::with(world, 2, &Default::default(), |config| {
        config.set("resync", "1s").set("lease", "2s")
    });
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    cluster.terminate(1);
    open(&n1, "shop", DUAL);
    // Somebody has the name of the second host.
    let named = n1.attach("shop", "host-n2");
    cluster.start(1);
    let targets = n1.addresses("shop", "host-n2");
    for node in [&n1, &n2] {
        reaches_all(node, &targets);
    }
    let device = device(&n1, "shop");
    let whole = end(&n1, &device);
    assert_eq!(whole.lines().count(), 2 + 4 + 2, "{whole}");
    let comes_back = |what: &str| {
        wait_for(&format!("{what}: all is back"), || end(&n1, &device) == whole);
        reaches_all(&n1, &targets);
    };
    for harm in
        ["ip link del", "ip link set down", "ip address flush", "ip route flush", "ip -6 route flush"]
    {
        n1.space.sh(&format!("{harm} dev {device}"));
        comes_back(harm);
    }
    n1.space.sh(&format!("ip link set {device} down && ip link set {device} name nh-mine"));
    comes_back("another name");
    cluster.kill(0);
    n1.space.sh(&format!("ip link del {device}"));
    cluster.start(0);
    comes_back("while there was no agent");
    let described = n1.ok("-o json node inspect n1").stdout;
    assert!(described.contains("192.168.50.0/24") && !described.contains("10.9.0."), "{described}");
    cluster.kill(1);
    wait_for("it is dead", || alive(&n1) == ["n1"]);
    n1.ok("node rm n2");
    let left = n1.ok("-o json endpoint ls --network shop").json();
    let names: Vec<_> = left.as_array().unwrap().iter().map(|e| e["name"].clone()).collect();
    assert_eq!(names, [json!("host-n1"), json!("host-n2")], "{}", named.name);
}

/// For a kernel that has IPVS.
pub(crate) const BALANCED: &[crate::Test] =
    &[("a_host_reaches_a_service_that_is_balanced", a_host_reaches_a_service_that_is_balanced)];

fn a_host_reaches_a_service_that_is_balanced(world: &World) {
    let n1 = world.node("n1");
    let _agent = n1.agent(&Config::embedded().set("lb", &lb()));
    open(&n1, "shop", DUAL);
    n1.ok("service create web --network shop --replicas 2 --port 80:8080");
    let web = n1.ok("-o json service inspect web").json();
    let web = if web.is_array() { web[0].clone() } else { web };
    let vips = &web["addresses"][n1.network_id("shop")];
    let backend = |name: &str| {
        let container = n1.attach_with("shop", name, "--service web");
        let server = Server::start(&container.space, Tcp, 8080, name);
        (container, server)
    };
    let _backends = (backend("b1"), backend("b2"));
    for vip in vips.as_array().unwrap() {
        let vip = vip.as_str().unwrap();
        let mut met = BTreeSet::new();
        wait_for("the host meets both", || {
            met.extend(ask(&n1.space, Tcp, vip, 80).map(|answer| answer.server));
            met.len() == 2
        });
    }
}
