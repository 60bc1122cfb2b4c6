//! Names: what containers are answered, from which networks, and who is asked for the rest.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use world::{Node, Space, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::engine::is_ebpf;
use crate::forward::asking;
use crate::upstream::{Upstream, answered};

crate::tests![
    services_and_containers_are_found_by_name_on_every_machine,
    a_client_finds_the_names_of_its_own_networks_only,
    commands_of_run_find_names_with_the_systems_resolver,
    names_appear_and_vanish_with_what_they_stand_for,
    very_many_addresses_are_told_by_a_stream,
    names_stay_while_their_machines_agent_is_away,
    a_sandbox_that_is_made_anew_answers_again,
    no_query_is_lost_while_the_agent_is_started_again,
    aliases_and_named_ports_are_found,
    the_flood_of_one_client_does_not_hurt_another,
    many_queries_in_one_packet_count_as_many,
    a_query_by_hand_says_where_the_answer_is_from,
];

/// What `dig` printed.
#[derive(Debug)]
pub(crate) struct Dug {
    pub(crate) status: String,
    pub(crate) flags: String,
    /// The data of the answers, sorted.
    pub(crate) answers: Vec<String>,
    /// Their times to live.
    pub(crate) ttls: Vec<u32>,
    pub(crate) text: String,
}

/// Asks from a container; `question` has the name, the type and options. Without `+cookie` (RFC 7873) it is a query
/// as the C library sends it, which the kernel may answer.
#[track_caller]
pub(crate) fn dig(from: &Space, server: &str, question: &str) -> Dug {
    // Else it would take some names for types.
    let option = if question.starts_with('-') { "" } else { "-q " };
    let output = from.try_sh(&format!(
        "dig @{server} +tries=1 +time=10 +nocookie +noall +comments +answer {option}{question}"
    ));
    let text = output.stdout;
    let after = |start: &str, end: char| {
        let rest = text.split_once(start).map(|(_, rest)| rest).unwrap_or_default();
        rest.split(end).next().unwrap_or_default().trim().to_owned()
    };
    let records = text.lines().filter(|line| !line.starts_with(';') && !line.trim().is_empty());
    let records: Vec<Vec<&str>> = records.map(|line| line.split_whitespace().collect()).collect();
    let mut answers: Vec<String> = records.iter().map(|record| record[4..].join(" ")).collect();
    answers.sort();
    let ttls = records.iter().map(|record| record[1].parse().unwrap()).collect();
    Dug { status: after("status: ", ','), flags: after(";; flags: ", ';'), answers, ttls, text }
}

/// The data that a name has.
#[track_caller]
pub(crate) fn found(from: &Space, server: &str, question: &str) -> Vec<String> {
    let dug = dig(from, server, question);
    assert_eq!(dug.status, "NOERROR", "{question}: {}", dug.text);
    dug.answers
}

/// How a question is answered.
#[track_caller]
pub(crate) fn status(from: &Space, server: &str, question: &str) -> String {
    dig(from, server, question).status
}

#[track_caller]
pub(crate) fn service(node: &Node, name: &str, mode: &str, networks: &[&str]) -> Vec<String> {
    let spec = json!({"name": name, "networks": networks, "replicas": 2, "endpoint_mode": mode});
    let made = node.client().call("POST", "/v1/services", Some(&spec)).unwrap();
    assert_eq!(made.status, 201, "{made:?}");
    let id = node.network_id(networks[0]);
    let addresses = made.body["addresses"][id].as_array().cloned().unwrap_or_default();
    addresses.iter().map(|address| address.as_str().unwrap().to_owned()).collect()
}

fn services_and_containers_are_found_by_name_on_every_machine(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let db = service(n1, "db", "dnsrr", &["shop"]);
    assert_eq!(db, [""; 0]);
    let long = "x".repeat(63);
    n1.attach_with("shop", "d1", "--service db");
    n2.attach_with("shop", "d2", "--service db");
    n2.attach("shop", &long);
    let address = |node: &Node, name: &str, family: usize| node.addresses("shop", name)[family].clone();
    let both: Vec<BTreeSet<String>> = (0..2)
        .map(|family| BTreeSet::from([address(n1, "d1", family), address(n2, "d2", family)]))
        .collect();
    wait_for("the other machine's container is ready", || {
        found(&a.space, "10.9.0.1", "db A").len() == 2
    });
    for server in ["10.9.0.1", "fd00:9::1", "169.254.53.53"] {
        for way in ["+notcp", "+tcp"] {
            let found = |question: &str| {
                let question = format!("{question} {way}");
                found(&a.space, server, &question).into_iter().collect::<BTreeSet<_>>()
            };
            for name in ["db", "tasks.db", "db.shop", "db.shop.netctl.internal", "DB.Shop"] {
                assert_eq!([found(&format!("{name} A")), found(&format!("{name} AAAA"))], both[..]);
            }
            assert_eq!(found(&format!("{long} A")), [address(n2, &long, 0)].into());
            assert_eq!(found("d2.shop.netctl.internal AAAA"), [address(n2, "d2", 1)].into());
            assert_eq!(found("gateway A"), ["10.9.0.1".to_owned()].into());
            assert_eq!(found("d2 TXT"), BTreeSet::new());
            for family in [0, 1] {
                let reverse = found(&format!("-x {}", address(n2, "d2", family)));
                assert_eq!(reverse, ["d2.shop.netctl.internal.".to_owned()].into());
            }
            for (question, code) in [
                ("no.shop.netctl.internal", "NXDOMAIN"),
                ("-x 10.9.0.77", "NXDOMAIN"),
                ("db ANY", "REFUSED"),
                ("shop.netctl.internal AXFR +tcp", "REFUSED"),
                ("version.bind CH TXT", "REFUSED"),
                ("db A +opcode=NOTIFY", "NOTIMP"),
                ("db A +edns=1 +noednsneg", "BADVERS"),
            ] {
                // Of a transfer dig tells only that it failed.
                let question = format!("{question} {way}");
                let dug = dig(&a.space, server, &question);
                let told = dug.status == code || dug.text.contains("Transfer failed");
                assert!(told, "{question}: {}", dug.text);
            }
        }
    }
    let dug = dig(&a.space, "10.9.0.1", "Db A");
    assert_eq!((dug.ttls, dug.flags.as_str()), (vec![5, 5], "qr aa rd ra"), "{}", dug.text);
    assert!(dug.text.contains("Db."), "the case is the question's: {}", dug.text);
}

fn a_client_finds_the_names_of_its_own_networks_only(world: &World) {
    let cluster = Cluster::with(world, 1, &Default::default(), |config| {
        config.raw("dns", r#"{ domain = "corp.example", ttl = "1s" }"#)
    });
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("network create mail --subnet 10.8.0.0/24");
    let (a, b) = (n1.attach("shop", "a"), n1.attach("mail", "b"));
    let both = n1.container("both");
    for network in ["shop", "mail"] {
        n1.ok(&format!(
            "endpoint attach --network {network} --name on-{network} --netns {} --interface {network}0",
            both.path
        ));
    }
    let address = |network: &str, name: &str| n1.addresses(network, name);
    assert_eq!(found(&a.space, "10.9.0.1", "on-shop A"), address("shop", "on-shop"));
    assert_eq!(found(&b.space, "10.8.0.1", "on-mail A"), address("mail", "on-mail"));
    for name in ["b.mail.corp.example", "on-mail.mail.corp.example", "mail.corp.example"] {
        assert_eq!(status(&a.space, "10.9.0.1", name), "NXDOMAIN", "{name}");
    }
    // Whom the other network asks is not reached.
    assert_eq!(status(&a.space, "10.8.0.1", "b.mail.corp.example +time=1"), "");
    for server in ["10.9.0.1", "10.8.0.1"] {
        wait_for("who is on both finds the names of both", || {
            dig(&both.space, server, "b.mail.corp.example A").answers == address("mail", "b")
        });
        assert_eq!(found(&both.space, server, "a A"), address("shop", "a"));
        assert_eq!(found(&both.space, server, "b A"), address("mail", "b"));
        assert_eq!(dig(&both.space, server, "a.shop A").ttls, [1]);
    }
}

fn commands_of_run_find_names_with_the_systems_resolver(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.attach("shop", "db");
    let addresses = n1.addresses("shop", "db");
    let run = |script: &str| {
        let output = n1.netctl(&["run", "--network", "shop", "--", "sh", "-c", script]);
        assert!(output.success(), "{output}");
        output.stdout
    };
    let file =
        "search shop.netctl.internal\noptions ndots:0\nnameserver 10.9.0.1\nnameserver fd00:9::1\n";
    assert_eq!(run("cat /etc/resolv.conf"), file);
    for name in ["db", "db.shop", "db.shop.netctl.internal", "DB"] {
        let v4 = run(&format!("getent ahostsv4 {name}"));
        let v6 = run(&format!("getent ahostsv6 {name}"));
        assert!(v4.starts_with(&addresses[0]) && v6.starts_with(&addresses[1]), "{name}: {v4} {v6}");
        // It is linked with musl.
        let lookup = lookup(n1, name);
        assert_eq!(
            run(&lookup).lines().collect::<BTreeSet<_>>(),
            addresses.iter().map(String::as_str).collect()
        );
    }
    assert!(run(&format!("getent hosts {}", addresses[0])).contains("db.shop.netctl.internal"));
    assert!(run("busybox nslookup db.shop.netctl.internal 10.9.0.1").contains(&addresses[0]));
    assert_eq!(run("getent hosts no.shop || echo none"), "none\n");
    // The longest name, and the other family alone.
    let longest = "x".repeat(63);
    n1.ok("network create six --subnet fd00:6::/64");
    n1.attach("shop", &longest);
    let other = n1.container("other");
    n1.ok(&format!("endpoint attach --network six --name {longest} --netns {}", other.path));
    for network in ["shop", "six"] {
        let address = n1.addresses(network, &longest).pop().unwrap();
        for script in [format!("getent ahostsv6 {longest}"), lookup(n1, &longest)] {
            let output = n1.netctl(&["run", "--network", network, "--", "sh", "-c", &script]);
            assert!(output.success() && output.stdout.contains(&address), "{network}: {output}");
        }
    }
}

/// A command that looks a name up with musl's resolver.
fn lookup(node: &Node, name: &str) -> String {
    const SOURCE: &str = r#"
        #include <netdb.h>
        #include <stdio.h>
        int main(int count, char **words) {
            struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
            char text[64];
            if (count < 2 || getaddrinfo(words[1], "80", &hints, &found)) return 1;
            for (; found; found = found->ai_next) {
                getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
                puts(text);
            }
        }
    "#;
    let program = node.dir().join("lookup");
    if !program.exists() {
        let source = node.dir().join("lookup.c");
        std::fs::write(&source, SOURCE).unwrap();
        node.space.sh(&format!("musl-gcc -static -o {} {}", program.display(), source.display()));
    }
    format!("{} {name}", program.display())
}

fn names_appear_and_vanish_with_what_they_stand_for(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    let (a, b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    service(n1, "db", "dnsrr", &["shop"]);
    let asks = [&a.space, &b.space].map(|space| move |name: &str| dig(space, "10.9.0.1", name));
    let everywhere = |name: &str, expected: &[String]| {
        wait_for(&format!("{name} is {expected:?} everywhere"), || {
            asks.iter().all(|ask| ask(name).answers == expected)
        });
    };
    everywhere("db.shop.netctl.internal A", &[]);
    assert_eq!(status(&a.space, "10.9.0.1", "db.shop.netctl.internal A"), "NOERROR");
    n2.attach_with("shop", "d1", "--service db");
    let address = [n2.addresses("shop", "d1")[0].clone()];
    everywhere("db A", &address);
    everywhere("d1 A", &address);
    n2.ok("endpoint drain --network shop d1");
    everywhere("db.shop A", &[]);
    wait_for("who is drained has no name", || {
        status(&a.space, "10.9.0.1", "d1.shop.netctl.internal A") == "NXDOMAIN"
    });
    n1.ok("endpoint activate --network shop d1");
    everywhere("db.shop A", &address);
    n2.ok("endpoint detach --network shop d1");
    everywhere("db A", &[]);
    n1.ok("service rm db");
    wait_for("the service has no name", || {
        status(&b.space, "10.9.0.1", "db.shop.netctl.internal A") == "NXDOMAIN"
    });
    n1.ok("network expand shop --subnet 10.8.0.0/24");
    wait_for("names are answered at the new gateway", || {
        dig(&a.space, "10.8.0.1", "a A +time=1").answers == [n1.addresses("shop", "a")[0].clone()]
    });
}

fn very_many_addresses_are_told_by_a_stream(world: &World) {
    const COUNT: usize = 64;
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let targets: Vec<String> =
        (1..=COUNT).map(|last| format!("--external 2001:db8::{last:x}")).collect();
    n1.ok(&format!("service create db --network shop --endpoint-mode dnsrr {}", targets.join(" ")));
    // 28 bytes for each, and 512 or 1,232 for all.
    for (options, most) in [("+noedns", 17), ("+bufsize=512", 17), ("+bufsize=4096", 43)] {
        let part = dig(&a.space, "10.9.0.1", &format!("db AAAA +ignore {options}"));
        let count = part.answers.len();
        assert!(part.flags.contains("tc") && (most - 3..=most).contains(&count), "{}", part.text);
    }
    let different = |addresses: Vec<String>| addresses.into_iter().collect::<BTreeSet<_>>().len();
    // Who is told that there is more asks again by a stream.
    assert_eq!(different(found(&a.space, "10.9.0.1", "db AAAA")), COUNT);
    let output = n1.ok("run --network shop -- getent ahostsv6 db").stdout;
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    assert_eq!(different(output.lines().filter_map(first).collect()), COUNT, "{output}");
    let looked_up = n1.netctl(&["run", "--network", "shop", "--", "sh", "-c", &lookup(n1, "db")]);
    // musl asks by a stream too (since 1.2.4), or has what fits.
    assert!(different(looked_up.stdout.lines().map(str::to_owned).collect()) > 10, "{looked_up}");
}

fn names_stay_while_their_machines_agent_is_away(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    service(&n1, "db", "dnsrr", &["shop"]);
    n2.attach_with("shop", "d1", "--service db");
    let address = vec![n2.addresses("shop", "d1")[0].clone()];
    let asked = ["db A", "d1 A", "tasks.db A"];
    for question in asked {
        wait_for("it is found", || dig(&a.space, "10.9.0.1", question).answers == address);
    }
    cluster.kill(1);
    for _ in 0..5 {
        for question in asked {
            assert_eq!(found(&a.space, "10.9.0.1", question), address, "{question}");
        }
    }
    cluster.start(1);
    for question in asked {
        assert_eq!(found(&a.space, "10.9.0.1", question), address, "{question}");
    }
    // Who is away for longer is in no service any more; its containers are still where they were.
    cluster.kill(1);
    wait_for("the dead machine's container is no part of the service", || {
        dig(&a.space, "10.9.0.1", "db.shop.netctl.internal A").answers.is_empty()
    });
    assert_eq!(found(&a.space, "10.9.0.1", "d1 A"), address);
}

fn a_sandbox_that_is_made_anew_answers_again(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n1 = cluster.nodes[0].clone();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let address = [n1.addresses("shop", "a")[0].clone()];
    assert_eq!(found(&a.space, "10.9.0.1", "a A"), address);
    cluster.kill(0);
    cluster.start(0);
    wait_for("the next agent answers", || dig(&a.space, "10.9.0.1", "a A +time=1").answers == address);
    n1.ok("endpoint detach --network shop a");
    n1.ok("network rm shop");
    n1.ok(&format!("network create shop {DUAL}"));
    let again = n1.attach("shop", "again");
    assert_eq!(found(&again.space, "10.9.0.1", "again A"), [n1.addresses("shop", "again")[0].clone()]);
}

fn aliases_and_named_ports_are_found(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("service create db --network shop --replicas 2 --port sql=5432:5433 --endpoint-mode dnsrr");
    let a = n1.attach_with("shop", "a", "--alias cache --alias queue");
    n1.attach_with("shop", "d1", "--service db --alias cache");
    let refused = n1.ctl(&format!("endpoint attach --network shop --name a --netns {}", a.path));
    assert!(refused.stderr.contains("its aliases are cache, queue"), "{refused}");
    let address = |name: &str| n1.addresses("shop", name)[0].clone();
    let mut both = [address("a"), address("d1")];
    both.sort();
    wait_for("the alias is of both", || dig(&a.space, "10.9.0.1", "cache A").answers == both);
    assert_eq!(found(&a.space, "10.9.0.1", "queue.shop.netctl.internal A"), [address("a")]);
    assert_eq!(
        found(&a.space, "10.9.0.1", &format!("-x {}", address("a"))),
        ["a.shop.netctl.internal."]
    );
    let port = found(&a.space, "10.9.0.1", "_sql._tcp.db SRV");
    assert_eq!(port, ["0 0 5433 d1.shop.netctl.internal."]);
    n1.ok("service update db --port sql=5432:6000");
    wait_for("the other port is told", || {
        dig(&a.space, "10.9.0.1", "_sql._tcp.db SRV").answers == ["0 0 6000 d1.shop.netctl.internal."]
    });
    let b = n1.attach("shop", "b");
    n1.ok("endpoint detach --network shop a");
    wait_for("the alias is of one", || dig(&b.space, "10.9.0.1", "cache A").answers == [address("d1")]);
}

/// Asks for a name as fast as it can until it is told to end; gives how often.
fn flood(from: &Space, query: &'static [u8], end: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let end = end.clone();
    from.spawn(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut sent = 0_u64;
        while !end.load(Ordering::Relaxed) && sent < 3_000_000 {
            // A full queue of the interface is as good.
            let _ = socket.send_to(query, "10.9.0.1:53");
            sent += 1;
        }
        sent
    })
}

fn the_flood_of_one_client_does_not_hurt_another(world: &World) {
    let cluster =
        Cluster::with(world, 1, &Default::default(), |config| config.raw("dns", "{ rate = 200 }"));
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let (loud, quiet) = (n1.attach("shop", "loud"), n1.attach("shop", "quiet"));
    let address = [n1.addresses("shop", "quiet")[0].clone()];
    wait_for("it is known", || dig(&quiet.space, "10.9.0.1", "quiet A").answers == address);
    // An address the kernel may tell; a text the agent is asked for, of whom each has its share.
    let address_of = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x05quiet\0\0\x01\0\x01";
    let text_of = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x05quiet\0\0\x10\0\x01";
    for (query, is_bounded) in [(address_of, !is_ebpf()), (text_of, true)] {
        let end = Arc::new(AtomicBool::new(false));
        let flood = flood(&loud.space, query, &end);
        for _ in 0..20 {
            for question in ["quiet A", "quiet A +cookie"] {
                assert_eq!(found(&quiet.space, "10.9.0.1", question), address);
            }
        }
        let dropped = n1.sandbox("shop").sh("nft list table inet netctl");
        end.store(true, Ordering::Relaxed);
        let sent = flood.join().unwrap();
        let count = dropped.lines().find(|line| line.contains("names-flood")).unwrap();
        assert_eq!(!count.contains("packets 0 "), is_bounded, "{sent} were sent: {count}");
    }
    wait_for("the loud one is answered again", || {
        dig(&loud.space, "10.9.0.1", "quiet A +time=1 +cookie").answers == address
    });
}

fn many_queries_in_one_packet_count_as_many(world: &World) {
    const TOGETHER: usize = 40;
    const PACKETS: usize = 100;
    let cluster =
        Cluster::with(world, 1, &Default::default(), |config| config.raw("dns", "{ rate = 200 }"));
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let loud = n1.attach("shop", "loud");
    let dropped = || -> usize {
        let table = n1.sandbox("shop").sh("nft list table inet netctl");
        let floods = table.lines().filter(|line| line.contains("names-flood"));
        let packets = |line: &str| -> Option<usize> {
            line.split_once("counter packets ")?.1.split(' ').next()?.parse().ok()
        };
        floods.map(|line| packets(line).expect("a counter has its packets")).sum()
    };
    assert_eq!(dropped(), 0);
    loud.space.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.9.0.1:53").unwrap();
        let name = [b'x'; 60];
        let query = [b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x3c", &name[..], b"\0\0\x01\0\x01"].concat();
        setsockopt(&socket, sockopt::UdpGsoSegment, &i32::try_from(query.len()).unwrap()).unwrap();
        for _ in 0..PACKETS {
            socket.send(&query.repeat(TOGETHER)).unwrap();
        }
    });
    // Of packets twenty pass at once; of bytes those of two hundred and twenty usual queries.
    let count = dropped();
    assert!((90..PACKETS).contains(&count), "{count} of {PACKETS} packets were dropped");
}

fn a_query_by_hand_says_where_the_answer_is_from(world: &World) {
    let cluster = asking(world, &["127.0.0.1:5300"], "");
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create inner --internal --subnet 10.8.0.0/24");
    n1.ok("service create web --network shop --replicas 1 --endpoint-mode dnsrr");
    let (_a, _i) = (n1.attach_with("shop", "a", "--service web"), n1.attach("inner", "i"));
    let address = &n1.addresses("shop", "a")[0];
    let query = |arguments: &str| n1.ctl(&format!("dns query {arguments}"));
    wait_for("the view shows it", || query("web --from a").success());
    let own = query("web --from a");
    for part in ["NAME", "web", address, "NOERROR", "network shop: the ready endpoints of a service"] {
        assert!(own.stdout.contains(part), "{part}: {own}");
    }
    let json = n1.ok("-o json dns query web.shop --type aaaa").json();
    assert_eq!((&json["code"], &json["networks"]), (&json!("NOERROR"), &json!(["inner", "shop"])));
    assert_eq!(json["records"][0]["data"], json!(n1.addresses("shop", "a")[1]));
    let missing = query("no.shop.netctl.internal --from a");
    assert_eq!(missing.code, Some(4), "{missing}");
    assert!(missing.stdout.contains("NXDOMAIN") && missing.stdout.contains("no such name"), "{missing}");
    let inside = query("example.org --from i");
    assert!(inside.stdout.contains("an internal network asks no one outside"), "{inside}");
    let dead = query("example.org --network shop");
    assert!(dead.stdout.contains("127.0.0.1:5300 gave no answer"), "{dead}");
    let _upstream =
        Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| vec![answered(query, 1, 7, 0)]);
    let asked = query("example.org --from a");
    assert!(
        asked.stdout.contains("192.0.2.7") && asked.stdout.contains("127.0.0.1:5300, in "),
        "{asked}"
    );
    let kept = query("example.org --from a");
    assert!(kept.stdout.contains("127.0.0.1:5300, 0 s ago, kept for"), "{kept}");
    for (arguments, code, part) in [
        ("web --from nobody", 4, "nobody"),
        ("web --network none", 4, "none"),
        ("a..b", 2, "is no name"),
        ("web --type X1", 2, "X1"),
    ] {
        let refused = query(arguments);
        assert!(refused.code == Some(code) && refused.stderr.contains(part), "{arguments}: {refused}");
    }
    let path = n1.dir().join("resolv.conf");
    let box_ = n1.container("box");
    n1.ok(&format!(
        "endpoint attach --network shop --name box --netns {} --resolv-conf {} --dns-option ndots:2",
        box_.path,
        path.display()
    ));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text,
        "search shop.netctl.internal\noptions ndots:2\nnameserver 10.9.0.1\nnameserver fd00:9::1\n"
    );
}

fn no_query_is_lost_while_the_agent_is_started_again(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n1 = cluster.nodes[0].clone();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let address = [n1.addresses("shop", "a")[0].clone()];
    // What was asked before the agent ended is answered by the next one.
    let end = Arc::new(AtomicBool::new(false));
    let askers: Vec<_> = ["10.9.0.1", "fd00:9::1", "169.254.53.53"]
        .into_iter()
        .flat_map(|server| ["+notcp", "+tcp"].map(|way| (server, way)))
        .map(|(server, way)| {
            let (space, end, address) = (a.space.clone(), end.clone(), address.clone());
            std::thread::spawn(move || {
                let mut count = 0;
                while !end.load(Ordering::Relaxed) {
                    assert_eq!(
                        dig(&space, server, &format!("a A {way} +cookie")).answers,
                        address,
                        "{server} {way}"
                    );
                    count += 1;
                }
                count
            })
        })
        .collect();
    for _ in 0..3 {
        wait_for("all sockets are kept", || cluster.agent(0).count_kept() == 6);
        let kept = cluster.terminate_keeping(0);
        cluster.start_with(0, kept);
    }
    end.store(true, Ordering::Relaxed);
    for asker in askers {
        assert!(asker.join().unwrap() > 0);
    }
    n1.ok("endpoint detach --network shop a");
    n1.ok("network rm shop");
    wait_for("nothing is kept of a network that is gone", || cluster.agent(0).count_kept() == 0);
}
