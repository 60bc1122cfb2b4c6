//! The host itself: which names it finds, and which networks' addresses it reaches.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use world::{Config, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::names::{dig, found, status};

crate::tests![
    the_host_finds_names_of_ours_and_no_others,
    no_query_of_the_host_is_lost_while_the_agent_is_started_again,
    a_port_that_somebody_else_has_is_taken_when_it_is_free,
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
    let (_a, _m) = (n1.attach("shop", "a"), n1.attach("mail", "m"));
    n2.attach_with("shop", "d2", "--service db");
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
