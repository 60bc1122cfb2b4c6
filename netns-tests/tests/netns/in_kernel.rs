//! Names that the kernel answers, where a container's query enters its sandbox.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use netctl::kernel::ebpf::{Name, NameKey, NameMaps, Place, Telling};
use world::{Node, NodeOptions, Space, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::names::{dig, service};

crate::tests![
    what_the_kernel_knows_is_answered_while_the_agent_stands_still,
    what_changes_is_answered_so_and_outlives_the_agent,
    an_agent_that_is_gone_is_told_for_as_long_as_addresses_rest,
    what_another_hand_changes_is_put_right,
];

/// The gateways of [`DUAL`], and the address that is the same in all networks.
const SERVERS: [&str; 3] = ["10.9.0.1", "fd00:9::1", "169.254.53.53"];

/// What is answered at once to a question without options, or not at all.
fn at_once(from: &Space, server: &str, question: &str) -> Option<Vec<String>> {
    let dug = dig(from, server, &format!("{question} +time=1 +notcp"));
    (dug.status == "NOERROR" && dug.flags == "qr aa rd ra").then_some(dug.answers)
}

fn machines(world: &World, count: usize) -> Cluster {
    Cluster::with(world, count, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("resync", "1s")
    })
}

fn what_the_kernel_knows_is_answered_while_the_agent_stands_still(world: &World) {
    let mut cluster = machines(world, 1);
    let n1 = cluster.nodes[0].clone();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create mail --subnet 10.8.0.0/24");
    let (a, m) = (n1.attach("shop", "a"), n1.attach("mail", "m"));
    let web = service(&n1, "web", "vip", &["shop"]);
    let b = n1.addresses("shop", "a");
    service(&n1, "db", "dnsrr", &["shop"]);
    n1.attach_with("shop", "d1", "--service db");
    n1.attach_with("shop", "d2", "--service db");
    wait_for("all is known", || dig(&a.space, "10.9.0.1", "db A").answers.len() == 2);
    cluster.freeze(0);
    let mut options = ["+noedns", "+edns", "+dnssec"].into_iter().cycle();
    for server in SERVERS {
        for (name, addresses) in [("web", &web), ("a", &b)] {
            for form in ["", ".shop", ".shop.netctl.internal", ".SHOP.netctl.Internal"] {
                for (kind, address) in ["A", "AAAA"].into_iter().zip(addresses) {
                    let question = format!("{name}{form} {kind} {}", options.next().unwrap());
                    let told = at_once(&a.space, server, &question);
                    assert_eq!(told, Some(vec![address.clone()]), "{server} {question}");
                }
            }
        }
    }
    // Many addresses are drawn from, and texts there are none: the agent knows.
    std::thread::scope(|scope| {
        for question in ["db A", "tasks.db A", "web TXT", "web A +cookie"] {
            let asker = &a.space;
            scope.spawn(move || assert_eq!(at_once(asker, SERVERS[0], question), None, "{question}"));
        }
    });
    let nothing = dig(&m.space, "10.8.0.1", "m.mail.netctl.internal AAAA +authority +time=1");
    assert_eq!((nothing.status.as_str(), nothing.flags.as_str()), ("NOERROR", "qr aa rd ra"));
    assert!(
        nothing.text.contains("netctl.internal.") && nothing.text.contains("SOA"),
        "{}",
        nothing.text
    );
    assert_eq!(at_once(&m.space, "10.8.0.1", "a A"), None, "it is on another network");
    cluster.thaw(0);
    wait_for("the agent answers the rest", || dig(&a.space, "10.9.0.1", "db A").answers.len() == 2);
}

fn what_changes_is_answered_so_and_outlives_the_agent(world: &World) {
    let mut cluster = machines(world, 2);
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let b = n2.attach("shop", "b");
    let ask = |question: &str| at_once(&a.space, "10.9.0.1", question);
    let address = |name: &str| Some(vec![n2.addresses("shop", name)[0].clone()]);
    let first = address("b");
    wait_for("b is found", || ask("b A") == first);
    n2.ok("endpoint detach --network shop b");
    wait_for("b is gone", || dig(&a.space, "10.9.0.1", "b.shop.netctl.internal A").status == "NXDOMAIN");
    // It gets another address, since the first one rests.
    n2.ok(&format!("endpoint attach --network shop --name b --netns {}", b.path));
    n2.attach("shop", "c");
    let (second, c) = (address("b"), address("c"));
    assert_ne!(first, second);
    wait_for("both are found", || ask("b A") == second && ask("c A") == c);
    cluster.kill(0);
    assert_eq!((ask("b A"), ask("c.shop A")), (second, c.clone()), "no agent is needed for that");
    n2.ok("endpoint detach --network shop b");
    cluster.start(0);
    wait_for("the next agent has seen it", || {
        dig(&a.space, "10.9.0.1", "b.shop.netctl.internal A").status == "NXDOMAIN"
    });
    cluster.kill(0);
    assert_eq!((ask("b A"), ask("c.shop A")), (None, c));
    cluster.start(0);
    n1.ok("endpoint detach --network shop a");
    n2.ok("endpoint detach --network shop c");
    n1.ok("network rm shop");
    wait_for("nothing is known of a network that is gone", || {
        let (names, suffixes, servers) = known(&n1);
        names.is_empty() && suffixes.is_empty() && servers.is_empty()
    });
}

fn an_agent_that_is_gone_is_told_for_as_long_as_addresses_rest(world: &World) {
    let mut cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("lease", "2s").set("rest", "4s")
    });
    let n1 = cluster.nodes[0].clone();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let address = Some(vec![n1.addresses("shop", "a")[0].clone()]);
    let ask = || at_once(&a.space, "10.9.0.1", "a A");
    wait_for("it is told", || ask() == address);
    // While it runs it says so again and again: what it has said first is over by then.
    let start = Instant::now();
    wait_for("some time has passed", || start.elapsed() > Duration::from_secs(5));
    cluster.kill(0);
    let gone = Instant::now();
    assert_eq!(ask(), address);
    wait_for("nobody tells it any more", || ask().is_none());
    assert!(gone.elapsed() < Duration::from_secs(7), "{:?}", gone.elapsed());
    cluster.start(0);
    wait_for("it is told again", || ask() == address);
}

/// All that the kernel knows of names.
type Known = (BTreeMap<NameKey, Name>, BTreeMap<NameKey, u32>, BTreeMap<Place, u32>);

fn known(node: &Node) -> Known {
    node.space.enter(|| {
        let NameMaps { names, suffixes, servers, .. } = NameMaps::of_agent().unwrap();
        (
            names.entries().unwrap().into_iter().collect(),
            suffixes.entries().unwrap().into_iter().collect(),
            servers.entries().unwrap().into_iter().collect(),
        )
    })
}

/// What another hand does to that: what it is called, and how.
type Damage = (&'static str, fn(&NameMaps, &Known));

fn what_another_hand_changes_is_put_right(world: &World) {
    let cluster = machines(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let expected = Some(vec![n1.addresses("shop", "a")[0].clone()]);
    let is_told = || at_once(&a.space, "10.9.0.1", "a A") == expected;
    wait_for("it is told", || is_told() && known(n1).0.len() == 2);
    let before = known(n1);
    let damages: [Damage; 4] = [
        ("names are gone", |maps, (names, ..)| {
            maps.names.remove_all(&names.keys().copied().collect::<Vec<_>>()).unwrap();
        }),
        ("names have other addresses", |maps, (names, ..)| {
            for key in names.keys() {
                let other = Name::with(Some([10, 9, 0, 99].into()), None);
                maps.names.insert(key, &other).unwrap();
            }
        }),
        ("suffixes are gone", |maps, (_, suffixes, _)| {
            maps.suffixes.remove_all(&suffixes.keys().copied().collect::<Vec<_>>()).unwrap();
        }),
        ("nobody is asked, and nothing told", |maps, (.., servers)| {
            maps.servers.remove_all(&servers.keys().copied().collect::<Vec<_>>()).unwrap();
            maps.telling.insert(&0, &Telling::new(0, 0, &[])).unwrap();
        }),
    ];
    for (what, damage) in damages {
        n1.space.enter(|| damage(&NameMaps::of_agent().unwrap(), &before));
        wait_for(&format!("put right: {what}"), || known(n1) == before && is_told());
    }
}
