//! Containers' sockets that are asked for services.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use netctl::kernel::ebpf::{Maps, SocketMaps};
use serde_json::{Value, json};
use world::Transport::Tcp;
use world::{Config, Node, NodeOptions, Server, Session, Space, World, wait_for};

use crate::cluster::{Cluster, DUAL, Member, asking};
use crate::monitor::Watch;
use crate::shop::{Shop, answers, ask_all, call, each, parse, plug, servers, session_with, texts};

crate::tests![
    who_connects_to_a_service_speaks_with_a_backend_and_sees_the_service,
    who_sends_to_a_service_is_answered_by_it,
    a_drain_waits_for_what_sockets_have,
    a_socket_whose_backend_is_gone_hears_of_it_at_once,
    sockets_outlive_the_agent_and_are_asked_meanwhile,
    what_closed_unseen_is_not_waited_for,
    it_is_switched_off_and_on_under_running_connections,
    a_socket_finds_the_services_of_its_containers_networks_and_of_no_others,
    what_is_outside_is_reached_by_its_packets,
    what_somebody_takes_away_is_asked_again,
    what_cannot_be_asked_is_refused_and_cleanup_leaves_nothing,
];

/// A service with a backend on each of two machines, and a client on the first, whose sockets are asked.
struct Asked {
    shop: Shop,
    client: Member,
}

impl Asked {
    fn new(world: &World, resync: &str) -> Self {
        let adjust = |config| asking(config).set("lb", "ebpf").set("resync", resync);
        let shop = Shop::new(world, 2, json!({}), adjust);
        let client = plug(shop.cluster.n1(), "client", None);
        Self { shop, client }
    }

    fn from(&self) -> &Space {
        &self.client.container.space
    }

    fn n1(&self) -> &Node {
        self.shop.cluster.n1()
    }

    /// How many connections the first machine's maps have: of packets that are balanced, and of sockets.
    fn open(&self) -> (usize, usize) {
        (balanced(self.n1()), sockets(self.n1()))
    }
}

/// How many connections a machine has whose packets are balanced.
fn balanced(node: &Node) -> usize {
    node.space.enter(|| Maps::of_agent().unwrap().connections.entries().unwrap().len())
}

/// How many TCP sockets have asked for services.
fn sockets(node: &Node) -> usize {
    node.space.enter(|| SocketMaps::of_agent().unwrap().sockets.entries().unwrap().len())
}

/// A socket at a port of its own that is not connected.
fn unconnected(from: &Space, service: SocketAddr) -> UdpSocket {
    let any = if service.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.enter(|| UdpSocket::bind(any)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Sends a datagram; gives who answers, and from which address.
#[track_caller]
fn ask(socket: &UdpSocket, service: SocketAddr) -> (String, SocketAddr) {
    socket.send_to(b"who\n", service).unwrap();
    let mut buffer = [0; 100];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]);
    (text.split(' ').next().unwrap().to_owned(), from)
}

fn who_connects_to_a_service_speaks_with_a_backend_and_sees_the_service(world: &World) {
    let asked = Asked::new(world, "60s");
    let before = balanced(asked.n1());
    for vip in &asked.shop.vips {
        let answers = ask_all(asked.from(), Tcp, vip, 80, 8);
        let own: BTreeSet<_> = answers.iter().map(|answer| answer.client.to_string()).collect();
        assert!(asked.client.addresses.iter().any(|address| own == [address.clone()].into()), "{own:?}");
        assert_eq!(servers(answers), each(&[("b1", 4), ("b2", 4)]));
        let session = session_with(asked.from(), vip, 80, "b2");
        assert_eq!(session.peer().unwrap(), SocketAddr::new(parse(vip), 80));
        // A backend that asks for its own service may get itself.
        let own = &asked.shop.backends[0].member.container.space;
        assert_eq!(self::answers(own, vip, 4), each(&[("b1", 2), ("b2", 2)]));
    }
    assert_eq!(balanced(asked.n1()), before, "no packet was balanced");
    let shown = asked.n1().ok("service inspect web").stdout;
    assert!(shown.contains("b1") && shown.contains("b2"), "{shown}");
    let node = asked.n1().ok("node inspect n1").stdout;
    assert!(node.contains("Asks sockets:") && node.contains("yes, those of /sys/fs/cgroup/"), "{node}");
    // Who watches sees what a socket gets, and its packets between containers.
    let watch = Watch::start(asked.n1(), "--endpoint client --sample 1 -o json");
    let (vip, own) = (&asked.shop.vips[1], &asked.client.addresses[1]);
    let connect = || drop(answers(asked.from(), vip, 1));
    let seen = watch.until("what a socket gets", connect, |sighting| {
        let packet = &sighting["packet"];
        packet["point"] == "socket" && packet["source"]["address"] == json!(own)
    });
    let packet = &seen["packet"];
    let ends =
        (&packet["source"]["port"], &packet["destination"]["service"], &packet["destination"]["port"]);
    assert_eq!(ends, (&Value::Null, &json!("web"), &json!(80)), "{packet}");
    let got = packet["translated"]["endpoint"].as_str().unwrap();
    assert!(["b1", "b2"].contains(&got) && packet["carrier"].is_null(), "{packet}");
    let syn = watch.until("its packets", connect, |sighting| sighting["packet"]["flags"] == "S");
    assert_eq!(syn["packet"]["destination"]["service"], "web", "{syn}");
    let lines = Watch::start(asked.n1(), "--service web --type flow");
    let line = format!(" flow socket shop tcp client/{own} > web/[{vip}]:80 => b");
    wait_for("a line", || {
        connect();
        lines.text().contains(&line)
    });
    // Nobody is ready: it is refused as ever.
    for backend in ["b1", "b2"] {
        asked.n1().ok(&format!("endpoint drain {backend} --wait"));
    }
    asked.shop.wait_weights(&[0, 0]);
    let refused = Session::open(asked.from(), Tcp, &asked.shop.vips[0], 80);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

fn who_sends_to_a_service_is_answered_by_it(world: &World) {
    let asked = Asked::new(world, "60s");
    for vip in &asked.shop.vips {
        let service = SocketAddr::new(parse(vip), 5000);
        let before = balanced(asked.n1());
        let clients: Vec<_> = (0..4).map(|_| unconnected(asked.from(), service)).collect();
        let first: Vec<_> = clients.iter().map(|client| ask(client, service)).collect();
        assert!(first.iter().all(|(_, from)| *from == service), "{first:?}");
        let mut counts = BTreeMap::new();
        for (server, _) in &first {
            *counts.entry(server.clone()).or_insert(0) += 1;
        }
        assert_eq!(counts, each(&[("b1", 2), ("b2", 2)]));
        for (client, first) in clients.iter().zip(&first) {
            assert_eq!(ask(client, service), *first, "it stays");
        }
        assert_eq!(balanced(asked.n1()), before, "no packet was balanced");
        // One that is connected has its packets balanced.
        let connected = unconnected(asked.from(), service);
        connected.connect(service).unwrap();
        connected.send(b"who\n").unwrap();
        connected.recv(&mut [0; 100]).unwrap();
        assert_eq!(balanced(asked.n1()), before + 2);
    }
    let service = SocketAddr::new(parse(&asked.shop.vips[0]), 5000);
    let client = unconnected(asked.from(), service);
    let (first, _) = ask(&client, service);
    let (at, other) = if first == "b1" { (0, "b2") } else { (1, "b1") };
    asked.shop.cluster.nodes[at].ok(&format!("endpoint detach {first}"));
    // From that moment on nothing is sent to the one that is gone.
    wait_for("the other one answers", || {
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        client.send_to(b"who\n", service).unwrap();
        let mut buffer = [0; 100];
        client.recv_from(&mut buffer).is_ok_and(|(_, from)| {
            assert_eq!(from, service);
            buffer.starts_with(other.as_bytes())
        })
    });
}

fn a_drain_waits_for_what_sockets_have(world: &World) {
    let asked = Asked::new(world, "60s");
    let n1 = asked.n1();
    let mut session = session_with(asked.from(), &asked.shop.vips[0], 80, "b2");
    let late = n1.ctl("endpoint drain b2 --wait --timeout 2s");
    assert_eq!(late.code, Some(6), "{late}");
    assert!(late.stderr.contains("1 open connection(s)"), "{late}");
    assert_eq!(answers(asked.from(), &asked.shop.vips[0], 4), each(&[("b1", 4)]));
    assert_eq!(session.ask().unwrap().server, "b2", "it goes on");
    let inspected = n1.ok("service inspect web").stdout;
    assert!(inspected.lines().any(|line| line.contains("b2") && line.contains('1')), "{inspected}");
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| n1.ctl("endpoint drain b2 --wait --timeout 60s"));
        drop(session);
        let done = drain.join().unwrap();
        assert!(done.success(), "{done}");
    });
}

fn a_socket_whose_backend_is_gone_hears_of_it_at_once(world: &World) {
    let asked = Asked::new(world, "60s");
    let mut sessions: Vec<_> =
        asked.shop.vips.iter().map(|vip| session_with(asked.from(), vip, 80, "b2")).collect();
    let direct =
        Session::open(asked.from(), Tcp, &asked.shop.backends[1].member.addresses[0], 80).unwrap();
    let mut stays = session_with(asked.from(), &asked.shop.vips[0], 80, "b1");
    // It is not drained: whoever speaks with it is cut off, and waits for nothing.
    asked.shop.cluster.n2().ok("endpoint detach b2");
    for session in &mut sessions {
        let mut outcome = Ok(());
        wait_for("the connection has ended", || {
            outcome = session.ask().map(drop);
            outcome.is_err()
        });
        let ended = outcome.unwrap_err().kind();
        assert!(matches!(ended, ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe), "{ended}");
    }
    assert_eq!(stays.ask().unwrap().server, "b1");
    wait_for("only what stays is known", || asked.open().1 == 1);
    assert_eq!(answers(asked.from(), &asked.shop.vips[0], 4), each(&[("b1", 4)]));
    // What has connected by itself is its own.
    assert!(direct.peer().is_ok());
}

fn sockets_outlive_the_agent_and_are_asked_meanwhile(world: &World) {
    let mut asked = Asked::new(world, "60s");
    let vip = asked.shop.vips[0].clone();
    let service = SocketAddr::new(parse(&vip), 80);
    let mut session = session_with(asked.from(), &vip, 80, "b2");
    let udp = SocketAddr::new(parse(&vip), 5000);
    let client = unconnected(asked.from(), udp);
    let first = ask(&client, udp);
    asked.shop.cluster.kill(0);
    let before = balanced(asked.n1());
    let mut begun = session_with(asked.from(), &vip, 80, "b1");
    assert_eq!((session.ask().unwrap().server, begun.ask().unwrap().server), ("b2".into(), "b1".into()));
    assert_eq!(ask(&client, udp), first);
    assert_eq!(balanced(asked.n1()), before, "no packet was balanced");
    asked.shop.cluster.start(0);
    for session in [&mut session, &mut begun] {
        session.ask().unwrap();
        assert_eq!(session.peer().unwrap(), service);
    }
    assert_eq!(ask(&client, udp), first);
    assert_eq!(balanced(asked.n1()), before, "no packet was balanced");
    let late = asked.n1().ctl("endpoint drain b2 --wait --timeout 2s");
    assert!(late.stderr.contains("1 open connection(s)"), "{late}");
    asked.n1().ok("endpoint activate b2");
    // One that goes while the agent is away is seen when it is back.
    asked.shop.cluster.kill(0);
    asked.shop.cluster.n2().ok("endpoint detach b2");
    assert_eq!(session.peer().unwrap(), service);
    asked.shop.cluster.start(0);
    wait_for("its connection has ended", || session.ask().is_err());
    assert_eq!(begun.ask().unwrap().server, "b1");
}

fn what_closed_unseen_is_not_waited_for(world: &World) {
    let mut asked = Asked::new(world, "1s");
    let sessions = [0, 1].map(|vip| session_with(asked.from(), &asked.shop.vips[vip], 80, "b2"));
    wait_for("two are known", || asked.open().1 == 2);
    let [first, stays] = sessions;
    asked.shop.cluster.kill(0);
    // No program is there any more.
    asked.n1().space.sh("rm /sys/fs/bpf/netctl/*/link_*");
    drop(first);
    asked.shop.cluster.start(0);
    wait_for("one has closed", || asked.open().1 == 1);
    let late = asked.n1().ctl("endpoint drain b2 --wait --timeout 2s");
    assert!(late.stderr.contains("1 open connection(s)"), "{late}");
    drop(stays);
    asked.n1().ok("endpoint drain b2 --wait");
}

fn it_is_switched_off_and_on_under_running_connections(world: &World) {
    let mut asked = Asked::new(world, "60s");
    let vip = asked.shop.vips[0].clone();
    let mut first = session_with(asked.from(), &vip, 80, "b2");
    let on = asked.shop.cluster.configs[0].clone();
    asked.shop.cluster.configs[0] = on.clone().without("socket_lb").without("cgroup");
    asked.shop.cluster.terminate(0);
    asked.shop.cluster.start(0);
    assert_eq!(first.ask().unwrap().server, "b2");
    // The kernel detaches what nobody keeps a moment later.
    let mut opened = None;
    wait_for("its packets are balanced", || {
        let before = balanced(asked.n1());
        opened = Some(session_with(asked.from(), &vip, 80, "b2"));
        balanced(asked.n1()) > before
    });
    let mut second = opened.expect("it was waited for");
    assert_eq!(second.peer().unwrap(), SocketAddr::new(parse(&vip), 80));
    let node = asked.n1().ok("node inspect n1").stdout;
    assert!(
        node.lines().any(|line| line.starts_with("Asks sockets:") && line.ends_with("no")),
        "{node}"
    );
    asked.shop.cluster.configs[0] = on;
    asked.shop.cluster.terminate(0);
    asked.shop.cluster.start(0);
    for session in [&mut first, &mut second] {
        assert_eq!(session.ask().unwrap().server, "b2");
    }
    wait_for("no packet is balanced any more", || {
        let before = balanced(asked.n1());
        let mut third = session_with(asked.from(), &vip, 80, "b2");
        assert_eq!(third.ask().unwrap().server, "b2");
        balanced(asked.n1()) == before
    });
}

fn a_socket_finds_the_services_of_its_containers_networks_and_of_no_others(world: &World) {
    let cluster =
        Cluster::with(world, 1, &NodeOptions::default(), |config| asking(config).set("lb", "ebpf"));
    let n1 = cluster.n1();
    // Two networks with the same subnets, in which the same address is another service's, and a third.
    let networks = [("red", DUAL), ("blue", DUAL), ("green", "--subnet 10.10.0.0/24")];
    let mut kept = Vec::new();
    for (network, subnets) in networks {
        n1.ok(&format!("network create {network} {subnets}"));
        n1.ok(&format!("service create {network} --network {network} --replicas 1"));
        let name = format!("{network}-1");
        let backend = n1.attach_with(network, &name, &format!("--service {network}"));
        kept.push((Server::start(&backend.space, Tcp, 80, &name), backend));
    }
    let vip = |network: &str| {
        let service = n1.ok(&format!("-o json service inspect {network}")).json()[0].clone();
        texts(service["addresses"].as_object().unwrap().values().next().unwrap()).remove(0)
    };
    assert_eq!(vip("red"), vip("blue"));
    let red = n1.attach("red", "r");
    let blue = n1.attach("blue", "b");
    assert_eq!(answers(&red.space, &vip("red"), 2), each(&[("red-1", 2)]));
    assert_eq!(answers(&blue.space, &vip("blue"), 2), each(&[("blue-1", 2)]));
    let open = |from: &Space, address: &str| {
        let to = SocketAddr::new(parse(address), 80);
        from.enter(|| Session::connect(Tcp, to, Duration::from_secs(2)))
    };
    assert!(open(&red.space, &vip("green")).is_err());
    assert!(open(&n1.space, &vip("red")).is_err(), "the host is in no network");
    // As soon as it is in that network too, and no longer.
    let request = json!({"network": "green", "name": "r", "netns": red.path, "interface": "eth1"});
    call(n1, "POST", "/v1/endpoints", &request);
    let before = balanced(n1);
    for _ in 0..2 {
        assert_eq!(answers(&red.space, &vip("green"), 2), each(&[("green-1", 2)]));
        assert_eq!(answers(&red.space, &vip("red"), 2), each(&[("red-1", 2)]));
    }
    assert_eq!(balanced(n1), before, "no packet was balanced");
    n1.ok("endpoint detach r --network green");
    assert!(open(&red.space, &vip("green")).is_err());
    assert_eq!(answers(&red.space, &vip("red"), 2), each(&[("red-1", 2)]));
}

fn what_is_outside_is_reached_by_its_packets(world: &World) {
    let asked = Asked::new(world, "60s");
    let outside = world.outside("outside");
    let _server = Server::start(&outside.space, Tcp, 8080, "outside");
    let made = asked.n1().ok(&format!(
        "-o json service create db --network shop --external {}:8080 --port 80:8080",
        outside.ipv4()
    ));
    let vip = texts(made.json()["addresses"].as_object().unwrap().values().next().unwrap()).remove(0);
    wait_for("it is reached", || Session::open(asked.from(), Tcp, &vip, 80).is_ok());
    let sockets = asked.open().1;
    assert_eq!(answers(asked.from(), &vip, 2), each(&[("outside", 2)]));
    assert_eq!(asked.open().1, sockets);
}

fn what_somebody_takes_away_is_asked_again(world: &World) {
    let asked = Asked::new(world, "1s");
    let (n1, vip) = (asked.n1(), &asked.shop.vips[0]);
    let is_asked = || {
        let before = balanced(n1);
        let answer = answers(asked.from(), vip, 2);
        assert_eq!(answer, each(&[("b1", 1), ("b2", 1)]), "it goes on by its packets");
        balanced(n1) == before
    };
    assert!(is_asked());
    let repairs = || crate::metrics::socket(n1)["netctl_reconcile_repairs_total"];
    let before = repairs();
    // The containers are forgotten, and the pins of the links.
    n1.space.enter(|| {
        let namespaces = SocketMaps::of_agent().unwrap().namespaces;
        let keys: Vec<u64> = namespaces.entries().unwrap().into_iter().map(|(key, _)| key).collect();
        assert!(keys.len() >= 2);
        namespaces.remove_all(&keys).unwrap();
    });
    assert!(!is_asked());
    n1.space.sh("rm /sys/fs/bpf/netctl/*/link_netctl_connect4");
    wait_for("they are asked again", is_asked);
    wait_for("it is pinned again", || {
        n1.space.try_sh("ls /sys/fs/bpf/netctl/*/link_netctl_connect4").success()
    });
    assert!(repairs() > before);
}

fn what_cannot_be_asked_is_refused_and_cleanup_leaves_nothing(world: &World) {
    let mut asked = Asked::new(world, "60s");
    let vip = asked.shop.vips[0].clone();
    assert!(Session::open(asked.from(), Tcp, &vip, 80).is_ok());
    asked.shop.cluster.terminate(0);
    let config = asked.shop.cluster.configs[0].clone();
    let refused = |config: Config| {
        let output = asked.n1().netctld(&config, &[]);
        assert!(!output.success(), "{output}");
        output.text()
    };
    let text = refused(config.clone().set("lb", "ipvs"));
    assert!(text.contains("socket_lb") && text.contains("only ebpf asks sockets"), "{text}");
    let text = refused(config.clone().set("cgroup", "/run"));
    assert!(text.contains("cannot use as a control group /run: it is not one of cgroup2"), "{text}");
    assert_eq!(text.matches("it is not one of").count(), 1, "{text}");
    let text = refused(config.clone().set("cgroup", "/sys/fs/cgroup/none-of-this-name"));
    assert!(text.contains("/sys/fs/cgroup/none-of-this-name"), "{text}");
    let text = refused(config.clone().set("cgroup", "cgroup"));
    assert!(text.contains("cgroup"), "{text}");
    // What was asked is still: a refused agent changes nothing.
    let to = SocketAddr::new(parse(&vip), 80);
    let open = || asked.from().enter(|| Session::connect(Tcp, to, Duration::from_secs(1)));
    let before = balanced(asked.n1());
    let mut session = open().unwrap();
    assert_eq!(balanced(asked.n1()), before);
    let cleaned = asked.n1().netctld(&config, &["--cleanup"]);
    assert!(cleaned.success(), "{cleaned}");
    assert!(!asked.n1().space.try_sh("ls /sys/fs/bpf/netctl").success());
    let gone: io::Result<_> = session.ask();
    assert!(gone.is_err());
    assert!(open().is_err());
}
