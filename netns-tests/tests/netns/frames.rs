//! What a container with CAP_NET_RAW says on its own link: that it is the gateway, or another
//! container, or the router or the DHCP server for all. On a bridge its neighbours believe it.

use std::net::{Ipv4Addr, Ipv6Addr};

use world::{
    Frames, Inbox, NodeOptions, Space, World, datagram, ethernet, icmpv6, ipv4_udp, mac_of, send_frames,
    wait_for,
};

use crate::cluster::Cluster;

crate::tests![
    nobody_hears_what_a_container_says_on_its_link,
    nobody_hears_what_a_container_says_on_its_link_where_the_kernel_carries_packets,
    on_a_bridge_it_is_heard_and_believed,
    of_a_containers_senders_only_its_own_addresses_become_neighbours,
];

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 1);
const ALL: [u8; 6] = [0xff; 6];
/// All nodes of a link (RFC 4291), and the Ethernet address that this is sent to.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// Where bridges talk about the spanning tree (IEEE 802.1D).
const ALL_BRIDGES: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0];
/// The range that the false router announces.
const FALSE_RANGE: &str = "2001:db8:bad::/64";

/// Who attacks, and whose addresses it takes.
struct Attack {
    own: [u8; 6],
    victim: (Ipv4Addr, Ipv6Addr),
}

impl Attack {
    fn of(attacker: &Space, victim: [&str; 2]) -> Self {
        let victim = (victim[0].parse().unwrap(), victim[1].parse().unwrap());
        Self { own: mac_of(attacker, "eth0"), victim }
    }

    /// Every frame: that the attacker has the gateway's addresses and the victim's, that it is a
    /// router and has better ways, that it leases addresses, and that it is the root of all bridges.
    fn frames(&self) -> Vec<Vec<u8>> {
        let (v4, v6) = self.victim;
        let mut frames = vec![self.advertised(), self.leased(), self.spanning()];
        for (taken, told) in [(GATEWAY, v4), (v4, GATEWAY)] {
            frames.push(self.arp(2, taken, told));
            frames.push(self.arp(1, taken, told));
            // To nobody in particular (RFC 5227).
            frames.push(self.arp(1, taken, taken));
        }
        for taken in [GATEWAY6, v6] {
            frames.push(self.neighbour(taken));
        }
        frames.push(self.redirected());
        frames
    }

    /// "The address `sender` is at this Ethernet address" (RFC 826): a request or a reply.
    fn arp(&self, operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
        let head = [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, operation];
        let parts = [&ALL[..], &self.own, &head, &self.own, &sender.octets(), &ALL, &target.octets()];
        parts.concat()
    }

    /// A neighbour advertisement that overrides what is known (RFC 4861, section 4.4).
    fn neighbour(&self, taken: Ipv6Addr) -> Vec<u8> {
        let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &taken.octets(), &[2, 1], &self.own].concat();
        ethernet(ALL_NODES_MAC, self.own, &icmpv6(taken, ALL_NODES, &message))
    }

    /// "Who has the gateway's address? `sender` asks" (section 4.3).
    fn asked(&self, sender: Ipv6Addr) -> Vec<u8> {
        let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &GATEWAY6.octets(), &[1, 1], &self.own].concat();
        ethernet(ALL_NODES_MAC, self.own, &icmpv6(sender, GATEWAY6, &message))
    }

    /// A router advertisement (section 4.2): a way to everywhere, and a range to have addresses of.
    fn advertised(&self) -> Vec<u8> {
        let head = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
        let lives = [0, 0, 0x0e, 0x10];
        let range: Ipv6Addr = FALSE_RANGE.split('/').next().unwrap().parse().unwrap();
        let range = [&[3, 4, 64, 0xc0][..], &lives, &lives, &[0; 4], &range.octets()].concat();
        let message = [&head[..], &[1, 1], &self.own, &range].concat();
        ethernet(ALL_NODES_MAC, self.own, &icmpv6(self.link_local(), ALL_NODES, &message))
    }

    /// "For the gateway's other addresses there is a better way" (section 4.5).
    fn redirected(&self) -> Vec<u8> {
        let far: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let ways = [self.link_local().octets(), far.octets()].concat();
        let message = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &ways, &[2, 1], &self.own].concat();
        ethernet(ALL_NODES_MAC, self.own, &icmpv6(GATEWAY6, self.victim.1, &message))
    }

    fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.own;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }

    /// What a DHCP server says to all (RFC 2131).
    fn leased(&self) -> Vec<u8> {
        let packet = ipv4_udp((GATEWAY, 67), (Ipv4Addr::BROADCAST, 68), &dhcp(2, self.own));
        ethernet(ALL, self.own, &packet)
    }

    /// "I am the root of the spanning tree, with the highest priority."
    fn spanning(&self) -> Vec<u8> {
        let bridge = [&[0, 0][..], &self.own].concat();
        let times = [0, 0, 20, 0, 2, 0, 15, 0];
        let body = [&[0x42, 0x42, 3, 0, 0, 0, 0, 0][..], &bridge, &[0; 4], &bridge, &[0x80, 1], &times];
        let body = body.concat();
        [&ALL_BRIDGES[..], &self.own, &[0, u8::try_from(body.len()).unwrap()], &body].concat()
    }
}

/// What a container asks all for that lease addresses.
fn discovered(own: [u8; 6]) -> Vec<u8> {
    let ask = dhcp(1, own);
    ethernet(ALL, own, &ipv4_udp((Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), &ask))
}

/// A message of DHCP about a client's hardware address: a DISCOVER as a request, or an OFFER as a reply.
fn dhcp(operation: u8, client: [u8; 6]) -> Vec<u8> {
    let options = [0x63, 0x82, 0x53, 0x63, 53, 1, operation, 255];
    [&[operation, 1, 6, 0][..], &[0; 24], &client, &[0; 202], &options].concat()
}

fn has(frame: &[u8], mac: [u8; 6]) -> bool {
    frame.windows(6).any(|bytes| bytes == mac)
}

/// What a container believes of its neighbours, and where its packets go. Neighbours only as far as
/// somebody set them: what was asked for is forgotten by and by.
fn beliefs(space: &Space) -> String {
    space.sh("ip -4 neigh show nud permanent; ip -6 neigh show nud permanent
              ip -4 route show table all; ip -6 route show table all; ip -o address show")
}

fn nobody_hears_what_a_container_says_on_its_link(world: &World) {
    nobody_hears(&Cluster::new(world, 2));
}

fn nobody_hears_what_a_container_says_on_its_link_where_the_kernel_carries_packets(world: &World) {
    nobody_hears(&Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("lb", "none")));
}

fn nobody_hears(cluster: &Cluster) {
    let (attacker, far, far_address) = cluster.shop();
    let near = cluster.n1().attach("shop", "near");
    let addresses = cluster.n1().addresses("shop", "near");
    let attack = Attack::of(&attacker.space, [&addresses[0], &addresses[1]]);
    let sandbox = cluster.n1().sandbox("shop");
    let spaces = [&near.space, &far.space, &sandbox, &cluster.n1().space];
    let before = spaces.map(beliefs);
    let heard = [
        Frames::of(&near.space, "eth0"),
        Frames::of(&far.space, "eth0"),
        Frames::of(&cluster.n1().space, "eth0"),
    ];
    let at_attacker = Frames::of(&attacker.space, "eth0");
    let asks = mac_of(&near.space, "eth0");
    send_frames(&near.space, "eth0", [discovered(asks)]);
    for _ in 0..3 {
        send_frames(&attacker.space, "eth0", attack.frames());
    }
    // Whatever comes of them has come before this.
    for (space, address) in [(&near.space, &addresses[0]), (&far.space, &far_address)] {
        let inbox = Inbox::open(space, 7002);
        datagram(&attacker.space, None, address, 7002, b"after").unwrap();
        assert!(inbox.gets(b"after"), "{address}");
    }
    for (place, heard) in ["near", "far", "underlay"].into_iter().zip(heard) {
        let frames = heard.take();
        assert!(!frames.is_empty(), "{place}: the connection at least");
        let told: Vec<_> = frames.iter().filter(|frame| has(frame, attack.own)).collect();
        assert!(told.is_empty(), "{place}: {told:02x?}");
    }
    let asked = at_attacker.take();
    assert!(asked.iter().all(|frame| !has(frame, asks)), "it hears what others ask");
    assert_eq!(spaces.map(beliefs), before);
    for address in &addresses {
        assert!(far.space.reaches(address), "{address}");
    }
}

fn on_a_bridge_it_is_heard_and_believed(world: &World) {
    let node = world.node("bridge");
    node.space.sh("ip link add br0 type bridge mcast_snooping 0
                   ip address add 10.9.0.1/24 dev br0
                   ip address add fd00:9::1/64 dev br0 nodad; ip link set br0 up");
    let [attacker, victim] = [2, 3].map(|number| {
        let container = node.container(&format!("box{number}"));
        node.space.sh(&format!(
            "ip link add vc{number} type veth peer name eth0 netns {}; ip link set vc{number} master br0 up",
            container.space.net_path()
        ));
        container.space.sh(&format!(
            "ip address add 10.9.0.{number}/24 dev eth0
             ip address add fd00:9::{number}/64 dev eth0 nodad; ip link set eth0 up"
        ));
        container
    });
    let attack = Attack::of(&attacker.space, ["10.9.0.3", "fd00:9::3"]);
    for gateway in ["10.9.0.1", "fd00:9::1"] {
        wait_for("the gateway answers", || victim.space.ping(gateway));
    }
    let own = attack.own.map(|byte| format!("{byte:02x}")).join(":");
    let believes = |what: &str, text: &str| victim.space.sh(what).contains(text);
    let [heard, asked] = [&victim, &attacker].map(|container| Frames::of(&container.space, "eth0"));
    let mut frames = Vec::new();
    wait_for("the victim believes all of it", || {
        send_frames(&attacker.space, "eth0", attack.frames());
        frames.extend(heard.take());
        believes("ip neigh show 10.9.0.1", &own)
            && believes("ip neigh show fd00:9::1", &own)
            && believes("ip -6 route show default", "proto ra")
            && believes("ip -6 route", FALSE_RANGE)
    });
    for frame in attack.frames() {
        assert!(frames.contains(&frame), "{frame:02x?}");
    }
    let ask = discovered(mac_of(&victim.space, "eth0"));
    send_frames(&victim.space, "eth0", [&ask]);
    wait_for("it hears what others ask", || asked.take().contains(&ask));
}

/// How many senders there are of each sort; the kernel has room for 1,024 neighbours, over all namespaces
/// (`net.ipv4.neigh.default.gc_thresh3`), and other tests run beside this one.
const SENDERS: u16 = 200;

fn of_a_containers_senders_only_its_own_addresses_become_neighbours(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n1 = cluster.nodes[0].clone();
    // There is an unreachable route for all of the subnets, and another range beside them.
    n1.ok("network create shop --subnet 10.9.0.0/16 --subnet fd00:9::/64");
    let container = n1.attach("shop", "a");
    let sandbox = n1.sandbox("shop");
    let attack = Attack::of(&container.space, ["10.9.0.2", "fd00:9::2"]);
    let flood = || {
        let senders = (0..SENDERS).flat_map(|number| {
            let [high, low] = (number + 1000).to_be_bytes();
            [
                attack.arp(1, Ipv4Addr::new(10, 9, high, low), GATEWAY),
                attack.arp(1, Ipv4Addr::new(10, 77, high, low), GATEWAY),
                attack.asked(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 1, number)),
                attack.asked(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, number)),
            ]
        });
        send_frames(&container.space, "eth0", senders.collect::<Vec<_>>());
    };
    let neighbours = |family: &str| -> usize {
        let shown = sandbox.sh(&format!("ip {family} neigh show | grep -cv PERMANENT || true"));
        shown.trim().parse().unwrap()
    };
    flood();
    // What was sent after it has come: so has the flood.
    assert!(container.space.ping("10.9.0.1") && container.space.ping("fd00:9::1"));
    assert_eq!(["-4", "-6"].map(neighbours), [0, 0]);
    // Its own it may ask for, and others are answered for.
    let own: Ipv4Addr = n1.addresses("shop", "a")[0].parse().unwrap();
    let answered = Frames::of(&container.space, "eth0");
    send_frames(&container.space, "eth0", [attack.arp(1, own, GATEWAY)]);
    let mut heard = Vec::new();
    wait_for("the gateway's answer", || {
        heard.extend(answered.take());
        heard.iter().any(|frame| frame[12..14] == [0x08, 0x06] && frame[21] == 2)
    });
    cluster.kill(0);
    sandbox.sh("nft delete table inet netctl
                for key in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$key; done");
    flood();
    // Of IPv6 none does: the gateway's address is of no container's device.
    wait_for("without the checks they become neighbours", || neighbours("-4") > 150);
}
