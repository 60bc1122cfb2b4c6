//! Names that are not ours: who is asked for them, and what is made of the answers.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use world::{Config, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::names::{dig, found, status};
use crate::upstream::{Upstream, answered, name_of};

crate::tests![
    names_of_others_are_asked_for_elsewhere_and_kept,
    an_internal_network_asks_nobody,
    upstreams_that_fail_are_borne,
    slow_upstreams_are_given_up_and_two_are_asked_at_most,
    names_that_lead_to_each_other_end,
    what_many_ask_at_once_is_asked_for_once,
    what_others_tell_of_names_of_ours_is_dropped,
];

/// A machine whose agent asks these servers for names of others.
pub(crate) fn asking(world: &World, servers: &[&str], more: &str) -> Cluster {
    Cluster::with(world, 1, &Default::default(), |config: Config| {
        config.raw("dns", &format!("{{ upstreams = {servers:?}{more} }}"))
    })
}

fn names_of_others_are_asked_for_elsewhere_and_kept(world: &World) {
    let cluster =
        asking(world, &["127.0.0.1:5300"], r#", forward = { "lab.example" = ["127.0.0.1:5400"] }"#);
    let n1 = cluster.n1();
    let upstream = Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| match &*name_of(query) {
        "no.example.org" => vec![answered(query, 0, 0, 3)],
        _ => vec![answered(query, 2, 7, 0)],
    });
    let lab = Upstream::start(&n1.space, "127.0.0.1:5400", |query, _| vec![answered(query, 1, 8, 0)]);
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let dug = dig(&a.space, "10.9.0.1", "www.Example.org A");
    assert_eq!(
        (dug.answers.as_slice(), dug.flags.as_str()),
        (&["192.0.2.7".to_owned(), "192.0.2.7".to_owned()][..], "qr rd ra"),
        "{}",
        dug.text
    );
    for server in ["10.9.0.1", "fd00:9::1"] {
        for way in ["", "+tcp"] {
            assert_eq!(found(&a.space, server, &format!("WWW.example.org A {way}")).len(), 2);
        }
    }
    assert_eq!(upstream.asked(), ["www.example.org"], "it was kept");
    wait_for("what is kept grows old", || dig(&a.space, "10.9.0.1", "www.example.org A").ttls[0] < 60);
    assert_eq!(status(&a.space, "10.9.0.1", "no.example.org A"), "NXDOMAIN");
    assert_eq!(found(&a.space, "10.9.0.1", "x.lab.example A"), ["192.0.2.8"]);
    assert_eq!(found(&a.space, "10.9.0.1", "lab.example A"), ["192.0.2.8"]);
    assert_eq!(lab.asked(), ["x.lab.example", "lab.example"]);
    assert_eq!(upstream.asked(), ["www.example.org", "no.example.org"]);
}

fn an_internal_network_asks_nobody(world: &World) {
    let cluster = asking(world, &["127.0.0.1:5300"], "");
    let n1 = cluster.n1();
    let upstream =
        Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| vec![answered(query, 1, 7, 0)]);
    n1.ok("network create inner --internal --subnet 10.8.0.0/24");
    n1.ok(&format!("network create shop {DUAL}"));
    let (inner, a) = (n1.attach("inner", "i"), n1.attach("shop", "a"));
    for name in ["secret.example.org", "8.8.8.8.in-addr.arpa", "com"] {
        assert_eq!(status(&inner.space, "10.8.0.1", &format!("{name} A")), "NXDOMAIN");
    }
    assert_eq!(found(&inner.space, "10.8.0.1", "i A"), n1.addresses("inner", "i"));
    // Also where it is on no other network, and on another such one.
    assert_eq!(found(&inner.space, "169.254.53.53", "i A"), n1.addresses("inner", "i"));
    n1.ok("network create core --internal --subnet 10.7.0.0/24");
    n1.ok(&format!("endpoint attach --network core --name i --netns {} --interface eth1", inner.path));
    for name in ["i.inner", "i.core"] {
        let network = name.trim_start_matches("i.");
        let addresses = n1.addresses(network, "i");
        assert_eq!(found(&inner.space, "169.254.53.53", &format!("{name} A")), addresses);
    }
    assert_eq!(status(&inner.space, "169.254.53.53", "example.com A"), "NXDOMAIN");
    n1.ok("endpoint detach --network inner i");
    wait_for("names are found through the network that is left", || {
        let dug = dig(&inner.space, "169.254.53.53", "i.core A +time=1");
        dug.answers == n1.addresses("core", "i")
    });
    assert_eq!(found(&a.space, "10.9.0.1", "example.org A"), ["192.0.2.7"]);
    assert_eq!(upstream.asked(), ["example.org"], "of the inside nothing is heard outside");
}

fn upstreams_that_fail_are_borne(world: &World) {
    let cluster = asking(world, &["127.0.0.1:5300", "127.0.0.1:5400"], "");
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    assert_eq!(status(&a.space, "10.9.0.1", "dead.example A"), "SERVFAIL", "nobody listens there");
    let _good = Upstream::start(&n1.space, "127.0.0.1:5400", |query, _| {
        let fails = name_of(query).starts_with("first");
        vec![answered(query, u16::from(!fails), 2, if fails { 2 } else { 0 })]
    });
    let bad = Upstream::start(&n1.space, "127.0.0.1:5300", |query, by_stream| {
        let right = answered(query, 1, 1, 0);
        let changed = |at: usize, bits: u8| {
            let mut message = right.clone();
            message[at] ^= bits;
            message
        };
        match &*name_of(query) {
            "silent.example" => Vec::new(),
            "garbage.example" => vec![b"\0".to_vec(), vec![0xff; 700], right[..20].to_vec()],
            // Another name, number, and no answer at all; then the right one.
            "other.example" => vec![changed(13, 1), changed(0, 1), query.to_vec(), right],
            "fails.example" => vec![answered(query, 0, 0, 2)],
            "refused.example" => vec![answered(query, 0, 0, 5)],
            "huge.example" => vec![answered(query, 4000, 1, 0)],
            "long.example" if by_stream => vec![answered(query, 200, 1, 0)],
            "long.example" => vec![{
                let mut cut = answered(query, 3, 1, 0);
                cut[2] |= 2;
                cut
            }],
            _ => vec![right],
        }
    });
    for (number, (name, expected)) in [
        ("other.example", "192.0.2.1"),
        ("silent.example", "192.0.2.2"),
        ("garbage.example", "192.0.2.2"),
        ("fails.example", "192.0.2.2"),
        ("refused.example", "192.0.2.2"),
        ("huge.example", "192.0.2.2"),
    ]
    .into_iter()
    .enumerate()
    {
        // Who answered last is asked first.
        assert_eq!(found(&a.space, "10.9.0.1", &format!("first{number}.example A")), ["192.0.2.1"]);
        assert_eq!(found(&a.space, "10.9.0.1", &format!("{name} A")), [expected], "{name}");
        assert!(bad.asked().iter().any(|asked| asked == name), "{name}");
    }
    assert_eq!(found(&a.space, "10.9.0.1", "first.example A"), ["192.0.2.1"]);
    // dig asks again by a stream when the answer does not fit; so does the agent.
    assert_eq!(found(&a.space, "10.9.0.1", "long.example A").len(), 200);
    let cut = dig(&a.space, "10.9.0.1", "long.example A +ignore +noedns");
    assert!(cut.flags.contains("tc") && (20..40).contains(&cut.answers.len()), "{}", cut.text);
}

fn slow_upstreams_are_given_up_and_two_are_asked_at_most(world: &World) {
    let servers = ["127.0.0.1:5300", "127.0.0.1:5400", "127.0.0.1:5500"];
    let cluster = asking(world, &servers, "");
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    // Later than an agent waits for one of them, and than it asks the next.
    let late = |query: &[u8], last| {
        std::thread::sleep(Duration::from_millis(2_600));
        vec![answered(query, 1, last, 0)]
    };
    let first = Upstream::start(&n1.space, servers[0], move |query, _| late(query, 1));
    let others = [2, 3].map(|last| {
        Upstream::start(&n1.space, servers[usize::from(last) - 1], move |query, _| {
            match name_of(query).starts_with("both") {
                true => late(query, last),
                false => vec![answered(query, 1, last, 0)],
            }
        })
    });
    let start = Instant::now();
    assert_eq!(found(&a.space, "10.9.0.1", "one.example A"), ["192.0.2.2"]);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    // Who answered last is asked first, then the next of the list, and nobody else until it is asked again. A client
    // does that after five seconds.
    let start = Instant::now();
    assert_eq!(status(&a.space, "10.9.0.1", "both.example A"), "SERVFAIL");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // What came late is no answer to the next question.
    assert_eq!(found(&a.space, "10.9.0.1", "other.example A"), ["192.0.2.2"]);
    let asked = |upstream: &Upstream| upstream.asked().join(" ");
    assert_eq!(asked(&first), "one.example other.example");
    assert_eq!(others.each_ref().map(asked), ["one.example both.example other.example", "both.example"]);
}

fn names_that_lead_to_each_other_end(world: &World) {
    let cluster = asking(world, &["127.0.0.1:5300"], "");
    let n1 = cluster.n1();
    // `a.loop` is another name of `b.loop`, and that of `a.loop`; and one that is another name of itself.
    let upstream = Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| {
        let mut message = answered(query, 0, 0, 0);
        let name = name_of(query);
        let first = name.as_bytes()[0];
        let other = if first == b'a' { b'b' } else { first };
        message[7] = if first == b's' { 1 } else { 2 };
        // A name that points to the one that is asked for, and has `<other>.loop` as its other name.
        message.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 8]);
        let target = message.len();
        message.extend([1, other, 4]);
        message.extend(b"loop");
        message.push(0);
        if first != b's' {
            message.extend([0xc0, target as u8, 0, 5, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0, 12]);
        }
        vec![message]
    });
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    for (name, expected) in [("a.loop", &["a.loop.", "b.loop."][..]), ("s.loop", &["s.loop."])] {
        for way in ["+notcp", "+tcp"] {
            let question = format!("{name} A {way}");
            assert_eq!(found(&a.space, "10.9.0.1", &question), expected, "{question}");
        }
    }
    let asked = upstream.asked();
    assert_eq!(asked.len(), 4, "each query was asked for once, and nothing was followed: {asked:?}");
    assert_eq!(found(&a.space, "10.9.0.1", "a A"), n1.addresses("shop", "a")[..1]);
}

fn what_many_ask_at_once_is_asked_for_once(world: &World) {
    const COUNT: usize = 40;
    let cluster = asking(world, &["127.0.0.1:5300"], "");
    let n1 = cluster.n1();
    let gate = std::sync::Arc::new(Mutex::new(()));
    let closed = gate.clone();
    let held = gate.lock().unwrap();
    let upstream = Upstream::start(&n1.space, "127.0.0.1:5300", move |query, _| {
        drop(closed.lock().unwrap());
        // It does not know what came to DNS later.
        match query[11] {
            0 => vec![answered(query, 1, 7, 0)],
            _ => vec![answered(query, 0, 0, 1)],
        }
    });
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let ask = |name: &str, id: usize| {
        let mut query = vec![0, id as u8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() as u8];
        query.extend(name.as_bytes());
        query.extend([4, b't', b'e', b's', b't', 0, 0, 1, 0, 1]);
        query
    };
    let socket = a.space.enter(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.connect("10.9.0.1:53").unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    for id in 0..COUNT {
        socket.send(&ask("same", id)).unwrap();
    }
    wait_for("it is asked for", || !upstream.asked().is_empty());
    drop(held);
    let mut seen = std::collections::BTreeSet::new();
    let mut buffer = [0; 512];
    while seen.len() < COUNT {
        let length = socket.recv(&mut buffer).expect("all are answered");
        assert_eq!(buffer[length - 4..length], [192, 0, 2, 7]);
        seen.insert(buffer[1]);
    }
    // Once more without what the server did not know.
    assert_eq!(upstream.asked(), ["same.test", "same.test"]);
}

fn what_others_tell_of_names_of_ours_is_dropped(world: &World) {
    let cluster = asking(world, &["127.0.0.1:5300"], "");
    let n1 = cluster.n1();
    n1.ok("network create secret --subnet 10.8.0.0/24");
    n1.ok(&format!("network create shop {DUAL}"));
    let (a, _db) = (n1.attach("shop", "a"), n1.attach("secret", "db"));
    // As a resolver of the host would that asks the agent for names below the domain.
    let _upstream = Upstream::start(&n1.space, "127.0.0.1:5300", |query, _| {
        let name = name_of(query);
        if name == "good.example" {
            return vec![answered(query, 1, 7, 0)];
        }
        let mut message = answered(query, 0, 0, 0);
        message[7] = 1;
        let kind: u8 = if name.ends_with("arpa") { 12 } else { 5 };
        let target = b"\x02db\x06secret\x06netctl\x08internal\0";
        message.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 60, 0, target.len() as u8]);
        message.extend(target);
        vec![message]
    });
    for question in ["x.evil.example A", "-x 10.8.0.2"] {
        assert_eq!(status(&a.space, "10.9.0.1", question), "SERVFAIL", "{question}");
    }
    assert_eq!(found(&a.space, "10.9.0.1", "good.example A"), ["192.0.2.7"]);
}
