//! Who tries what, and that it fails; and that it works when the defence is taken away, so that
//! the attack is one.

use std::net::{Ipv4Addr, TcpListener};

use world::{
    Container, Inbox, Node, NodeOptions, Space, World, connects, datagram, ethernet, ipv4_udp, mac_of,
    vxlan, wait_for,
};

use crate::cluster::{Cluster, DUAL};

crate::tests![
    a_stranger_on_the_underlay_cannot_inject,
    a_stranger_on_an_ipv6_underlay_cannot_inject,
    a_container_cannot_send_into_a_tunnel,
    a_container_cannot_send_into_a_tunnel_over_ipv6,
    a_local_user_cannot_send_into_a_tunnel,
    a_local_user_cannot_send_into_a_tunnel_over_ipv6,
    a_container_cannot_use_a_foreign_source_address,
    a_container_does_not_reach_its_host,
    a_container_does_not_reach_another_network,
    an_outside_host_does_not_reach_containers,
];

/// Two machines; `a` runs on the first, `b` on the second, both in one network.
struct Scene {
    cluster: Cluster,
    a: Container,
    b: Container,
}

/// What the tunnels run over.
#[derive(Clone, Copy)]
enum Underlay {
    Ipv4,
    Ipv6,
}

impl Underlay {
    /// A machine's address there.
    fn of(self, node: &Node) -> &str {
        match self {
            Self::Ipv4 => node.ipv4(),
            Self::Ipv6 => node.ipv6(),
        }
    }

    /// Each machine itself, and where a socket is bound that may send to all.
    fn loopback_and_any(self) -> [&'static str; 2] {
        match self {
            Self::Ipv4 => ["127.0.0.1", "0.0.0.0:0"],
            Self::Ipv6 => ["::1", "[::]:0"],
        }
    }
}

impl Scene {
    fn new(world: &World) -> Self {
        Self::over(world, Underlay::Ipv4)
    }

    fn over(world: &World, underlay: Underlay) -> Self {
        let ipv4 = matches!(underlay, Underlay::Ipv4);
        let options = NodeOptions { ipv4, ..NodeOptions::default() };
        let cluster = Cluster::with(world, 2, &options, |config| config);
        cluster.n1().ok(&format!("network create shop {DUAL}"));
        let (a, b) = (cluster.n1().attach("shop", "a"), cluster.n2().attach("shop", "b"));
        let scene = Self { cluster, a, b };
        assert!(scene.a.space.reaches(&scene.address(1)));
        scene
    }

    fn n1(&self) -> &Node {
        self.cluster.n1()
    }

    /// The IPv4 address of `a` (0) or `b` (1).
    fn address(&self, index: usize) -> String {
        self.cluster.nodes[index].addresses("shop", ["a", "b"][index])[0].clone()
    }

    /// A VXLAN packet's payload that looks like `content` sent by one container to the other.
    fn forged(&self, from: usize, to: usize, content: &[u8]) -> Vec<u8> {
        let address = |index| self.address(index).parse::<Ipv4Addr>().unwrap();
        let network = self.n1().ok("-o json network inspect shop").json();
        let network = if network.is_array() { network[0].clone() } else { network };
        let vni = u32::try_from(network["vni"].as_u64().unwrap()).unwrap();
        let packet = ipv4_udp((address(from), 5), (address(to), 7002), content);
        vxlan(vni, &ethernet(self.vtep(to), self.vtep(from), &packet))
    }

    /// The Ethernet address of a machine's tunnel devices.
    fn vtep(&self, index: usize) -> [u8; 6] {
        mac_of(&self.cluster.nodes[index].sandbox("shop"), "vx0")
    }

    /// Kills both agents and takes away the rules of a machine, in the host and in the sandbox.
    fn disarm(&mut self, index: usize) {
        let sandbox = self.cluster.nodes[index].sandbox("shop");
        for agent in [0, 1] {
            if self.cluster.agent_runs(agent) {
                self.cluster.kill(agent);
            }
        }
        for space in [&self.cluster.nodes[index].space, &sandbox] {
            disarm(space);
        }
    }
}

fn disarm(space: &Space) {
    space.sh("nft delete table inet netctl
              for key in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$key; done");
}

fn a_stranger_on_the_underlay_cannot_inject(world: &World) {
    stranger_cannot_inject(world, Underlay::Ipv4);
}

fn a_stranger_on_an_ipv6_underlay_cannot_inject(world: &World) {
    stranger_cannot_inject(world, Underlay::Ipv6);
}

fn stranger_cannot_inject(world: &World, underlay: Underlay) {
    let mut scene = Scene::over(world, underlay);
    let stranger = world.outside("stranger");
    let inbox = Inbox::open(&scene.a.space, 7002);
    let n1 = scene.cluster.nodes[0].clone();
    let packet = |content: &[u8]| scene.forged(1, 0, content);
    let (plain, accepted, disarmed) = (packet(b"plain"), packet(b"accepted"), packet(b"disarmed"));
    let send =
        |content: &[u8]| datagram(&stranger.space, None, underlay.of(&n1), 4789, content).unwrap();
    send(&plain);
    n1.space.sh("nft 'table inet admin {
        chain early { type filter hook prerouting priority -500; accept; };
        chain input { type filter hook input priority -500; udp dport 4789 accept; }; }'");
    send(&accepted);
    assert!(!inbox.gets(b"plain") && inbox.sender_of(b"accepted").is_none());
    scene.disarm(0);
    send(&disarmed);
    assert!(inbox.gets(b"disarmed"), "the forged packet is a good one");
}

fn a_container_cannot_send_into_a_tunnel(world: &World) {
    container_cannot_inject(world, Underlay::Ipv4);
}

fn a_container_cannot_send_into_a_tunnel_over_ipv6(world: &World) {
    container_cannot_inject(world, Underlay::Ipv6);
}

fn container_cannot_inject(world: &World, underlay: Underlay) {
    let mut scene = Scene::over(world, underlay);
    let n1 = scene.cluster.nodes[0].clone();
    let n2 = scene.cluster.nodes[1].clone();
    let outside = world.outside("client");
    n1.attach("shop", "victim");
    let (here, there) = (Inbox::open(&scene.a.space, 7002), Inbox::open(&scene.b.space, 7002));
    // The sender is a container of the same network: it knows all it needs for a forged packet.
    let sender = n1.attach("shop", "sender");
    assert!(sender.space.reaches(underlay.of(&outside)), "it has a way out");
    let forged = |content: &[u8]| (scene.forged(1, 0, content), scene.forged(0, 1, content));
    let (armed, disarmed) = (forged(b"armed"), forged(b"disarmed"));
    let send = |(to_own, to_other): &(Vec<u8>, Vec<u8>)| {
        // Whether the socket takes it does not matter, only what arrives.
        let _ = datagram(&sender.space, None, underlay.of(&n1), 4789, to_own);
        let _ = datagram(&sender.space, None, underlay.of(&n2), 4789, to_other);
    };
    send(&armed);
    assert!(!there.gets(b"armed") && here.sender_of(b"armed").is_none());
    let sandbox = n1.sandbox("shop");
    scene.disarm(0);
    for (space, out) in [(&sandbox, "up0"), (&n1.space, "eth0")] {
        space.sh(&format!(
            "nft 'table inet own {{ chain out {{ type nat hook postrouting priority 100;
             oifname \"{out}\" masquerade; }}; }}'"
        ));
    }
    send(&disarmed);
    assert!(there.gets(b"disarmed") && here.gets(b"disarmed"), "the forged packets are good ones");
}

fn a_local_user_cannot_send_into_a_tunnel(world: &World) {
    local_user_cannot_inject(world, Underlay::Ipv4);
}

fn a_local_user_cannot_send_into_a_tunnel_over_ipv6(world: &World) {
    local_user_cannot_inject(world, Underlay::Ipv6);
}

fn local_user_cannot_inject(world: &World, underlay: Underlay) {
    let mut scene = Scene::over(world, underlay);
    let n1 = scene.cluster.nodes[0].clone();
    let n2 = scene.cluster.nodes[1].clone();
    let (here, there) = (Inbox::open(&scene.a.space, 7002), Inbox::open(&scene.b.space, 7002));
    let forged = |content: &[u8]| (scene.forged(1, 0, content), scene.forged(0, 1, content));
    let (armed, disarmed) = (forged(b"armed"), forged(b"disarmed"));
    let send = |(to_own, to_other): &(Vec<u8>, Vec<u8>)| {
        n1.space.enter(|| {
            world::become_nobody();
            let [loopback, any] = underlay.loopback_and_any();
            let socket = std::net::UdpSocket::bind(any).unwrap();
            let _ = socket.send_to(to_own, (underlay.of(&n1), 4789));
            let _ = socket.send_to(to_own, (loopback, 4789));
            let _ = socket.send_to(to_other, (underlay.of(&n2), 4789));
        });
    };
    send(&armed);
    assert!(!there.gets(b"armed") && here.sender_of(b"armed").is_none());
    scene.disarm(0);
    send(&disarmed);
    assert!(there.gets(b"disarmed") && here.gets(b"disarmed"), "the forged packets are good ones");
}

fn a_container_cannot_use_a_foreign_source_address(world: &World) {
    let mut scene = Scene::new(world);
    let n1 = scene.cluster.nodes[0].clone();
    let victim = n1.attach("shop", "victim");
    let targets = n1.addresses("shop", "victim");
    let inbox = Inbox::open(&victim.space, 7002);
    let foreign = ["10.9.0.99", "192.168.50.77", "fd00:9::99", "2001:db8::1"];
    let other = scene.cluster.n2().addresses("shop", "b");
    for address in foreign.into_iter().chain(other.iter().map(String::as_str)) {
        let length = if address.contains(':') { 128 } else { 32 };
        scene.a.space.sh(&format!("ip address add {address}/{length} dev lo"));
    }
    let attacker = scene.a.space.clone();
    let send = |source: &str, round: &str| {
        let target = &targets[usize::from(source.contains(':'))];
        let content = format!("{round} {source}").into_bytes();
        datagram(&attacker, Some(source), target, 7002, &content).unwrap();
        content
    };
    let sources: Vec<_> = foreign.into_iter().chain(other.iter().map(String::as_str)).collect();
    let armed: Vec<_> = sources.iter().map(|source| send(source, "armed")).collect();
    let own = n1.addresses("shop", "a");
    for source in &own {
        let content = send(source, "own");
        assert!(inbox.gets(&content), "{source}");
    }
    for content in &armed {
        assert!(inbox.sender_of(content).is_none(), "{}", String::from_utf8_lossy(content));
    }
    scene.disarm(0);
    for source in &sources {
        let content = send(source, "disarmed");
        assert!(inbox.gets(&content), "{source} arrives without the check");
    }
}

fn a_container_does_not_reach_its_host(world: &World) {
    let mut scene = Scene::new(world);
    let n1 = scene.cluster.nodes[0].clone();
    let _service = n1.space.enter(|| TcpListener::bind("[::]:8080")).unwrap();
    let id = n1.network_id("shop");
    let uplink = n1
        .space
        .sh(&format!("ip -o address show dev nc-{id} scope global; ip -4 -o address show dev nc-{id}"));
    let uplink = uplink.lines().filter_map(|line| line.split_whitespace().nth(3)?.split('/').next());
    let mut targets: Vec<_> = uplink.map(str::to_owned).collect();
    assert!(targets.len() >= 2, "{targets:?}");
    targets.extend([n1.ipv4(), n1.ipv6(), "10.9.0.1", "fd00:9::1"].map(str::to_owned));
    for address in &targets {
        assert!(connects(&scene.a.space, address, 8080).is_err(), "{address}");
    }
    scene.cluster.kill(0);
    disarm(&n1.space);
    assert!(connects(&scene.a.space, n1.ipv4(), 8080).is_ok());
    assert!(connects(&scene.a.space, n1.ipv6(), 8080).is_ok());
}

fn a_container_does_not_reach_another_network(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n1 = cluster.nodes[0].clone();
    n1.ok("network create red --subnet 10.8.0.0/24");
    n1.ok("network create blue --subnet 10.9.0.0/24");
    let (red, _blue) = (n1.attach("red", "r"), n1.attach("blue", "b"));
    let uplink = up0_address(&n1.sandbox("blue"));
    assert!(!red.space.ping(&n1.addresses("blue", "b")[0]));
    assert!(!red.space.ping("10.9.0.1"));
    assert!(!red.space.ping(&uplink));
    cluster.kill(0);
    disarm(&n1.space);
    n1.space.sh(
        "nft 'table inet own { chain out { type nat hook postrouting priority 100; masquerade; }; }'",
    );
    wait_for("the other uplink answers without our rules", || red.space.ping(&uplink));
}

fn an_outside_host_does_not_reach_containers(world: &World) {
    let mut scene = Scene::new(world);
    let outside = world.outside("client");
    let n1 = scene.cluster.nodes[0].clone();
    let uplink = up0_address(&n1.sandbox("shop"));
    let inbox = Inbox::open(&scene.a.space, 7002);
    outside.space.sh(&format!(
        "ip route add 10.9.0.0/24 via {0}; ip route add 169.254.64.0/18 via {0}
         ip -6 route add fd00:9::/64 via {1}",
        n1.ipv4(),
        n1.ipv6()
    ));
    for address in n1.addresses("shop", "a") {
        datagram(&outside.space, None, &address, 7002, b"in").unwrap();
        assert!(!outside.space.ping(&address), "{address}");
    }
    assert!(!outside.space.ping(&uplink));
    assert!(inbox.sender_of(b"in").is_none());
    scene.cluster.kill(0);
    disarm(&n1.space);
    wait_for("the uplink answers without our rules", || outside.space.ping(&uplink));
}

/// The IPv4 address of a sandbox's end of its uplink.
fn up0_address(sandbox: &Space) -> String {
    let text = sandbox.sh("ip -4 -o address show dev up0");
    text.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned()
}
