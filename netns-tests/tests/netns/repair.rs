//! What somebody takes away comes back; what is not ours is left alone.

use std::time::Duration;

use world::{Config, Container, Node, NodeOptions, Space, World, eventually, wait_for};

use crate::cluster::{Cluster, DUAL};

crate::tests![
    what_is_removed_from_a_sandbox_comes_back,
    what_stood_on_the_tunnel_comes_back_with_it_in_one_go,
    what_is_removed_from_the_host_comes_back,
    a_removed_sandbox_comes_back_with_its_containers,
    what_is_not_ours_is_left_alone,
    what_is_in_the_way_of_our_devices_is_replaced,
];

/// Two machines with a container on each, an outside host, and what must work between them.
struct Scene {
    cluster: Cluster,
    a: Container,
    /// What `a` must reach.
    targets: Vec<String>,
}

impl Scene {
    /// The agents are told of what is taken away: they do not look by themselves for a long time.
    fn new(world: &World) -> Self {
        Self::with_resync(world, "10m")
    }

    fn with_resync(world: &World, resync: &str) -> Self {
        let resync = |config: Config| config.set("resync", resync);
        let cluster = Cluster::with(world, 2, &NodeOptions::default(), resync);
        let outside = world.outside("client");
        cluster.n1().ok(&format!("network create shop {DUAL}"));
        let a = cluster.n1().attach("shop", "a");
        cluster.n1().attach("shop", "neighbour");
        cluster.n2().attach("shop", "b");
        let mut targets = vec![outside.ipv4().to_owned(), outside.ipv6().to_owned()];
        targets.extend(cluster.n1().addresses("shop", "neighbour"));
        targets.extend(cluster.n2().addresses("shop", "b"));
        let scene = Self { cluster, a, targets };
        assert_eq!(scene.unreachable(), [""; 0]);
        scene
    }

    fn n1(&self) -> &Node {
        self.cluster.n1()
    }

    /// Which targets stay out of reach.
    fn unreachable(&self) -> Vec<&str> {
        let out = self.targets.iter().filter(|address| !self.a.space.reaches(address));
        out.map(String::as_str).collect()
    }

    /// Does some damage behind the agent's back and waits until there is no trace of it.
    #[track_caller]
    fn heals(&mut self, place: &Space, damage: &str) {
        let before = self.n1().kernel_state().shape();
        self.cluster.freeze(0);
        place.sh(damage);
        let difference = || before.difference(&self.cluster.n1().kernel_state().shape());
        assert_ne!(difference(), "", "`{damage}` does something");
        self.cluster.thaw(0);
        let difference = || before.difference(&self.cluster.n1().kernel_state().shape());
        let healed = eventually(Duration::from_secs(20), || difference().is_empty());
        assert!(healed, "after `{damage}`:\n{}", difference());
        assert_eq!(self.unreachable(), [""; 0], "after `{damage}`");
    }
}

fn what_is_removed_from_a_sandbox_comes_back(world: &World) {
    let mut scene = Scene::new(world);
    let own = scene.n1().addresses("shop", "a");
    let remote = scene.cluster.n2().addresses("shop", "b");
    let sandbox = scene.n1().sandbox("shop");
    for damage in [
        format!("ip route del {}", own[0]),
        format!("ip -6 route del {}", own[1]),
        format!("ip route del $(ip route show match {} dev vx0 | cut -d' ' -f1)", remote[0]),
        format!("ip -6 route del $(ip -6 route show match {} dev vx0 | cut -d' ' -f1)", remote[1]),
        "ip route del unreachable 10.9.0.0/24".to_owned(),
        "ip route del default".to_owned(),
        "bridge fdb show dev vx0 | while read mac rest; do bridge fdb del $mac dev vx0; done".to_owned(),
        "ip -4 neighbour flush dev vx0 nud permanent".to_owned(),
        "ip -6 neighbour flush dev vx0 nud permanent".to_owned(),
        "ip link set vx0 down".to_owned(),
        "ip link set vx0 mtu 1280".to_owned(),
        "ip link del vx0".to_owned(),
        "ip link set up0 down".to_owned(),
        "ip link del up0".to_owned(),
        "ip link del fp0".to_owned(),
        "ip link set lo down".to_owned(),
        "ip address del 10.9.0.1/32 dev lo".to_owned(),
        "ip address flush dev up0".to_owned(),
        "nft delete table inet netctl".to_owned(),
        "nft flush table inet netctl".to_owned(),
        "nft flush ruleset".to_owned(),
    ] {
        scene.heals(&sandbox, &damage);
    }
}

fn what_stood_on_the_tunnel_comes_back_with_it_in_one_go(world: &World) {
    let mut scene = Scene::new(world);
    let sandbox = scene.n1().sandbox("shop");
    for damage in ["ip link set vx0 down", "ip link set vx0 mtu 1280", "ip link del vx0"] {
        scene.heals(&sandbox, damage);
        let log = scene.cluster.agent(0).log_tail();
        assert!(!log.contains("step failed"), "after `{damage}`: {log}");
    }
}

fn what_is_removed_from_the_host_comes_back(world: &World) {
    let mut scene = Scene::new(world);
    let host = scene.n1().space.clone();
    let uplink = format!("nc-{}", scene.n1().network_id("shop"));
    for damage in [
        format!("ip link set {uplink} down"),
        format!("ip address flush dev {uplink}"),
        format!("ip link del {uplink}"),
        format!("ip link del nf-{}", scene.n1().network_id("shop")),
        "nft delete table inet netctl".to_owned(),
        "nft flush table inet netctl".to_owned(),
        "nft flush ruleset".to_owned(),
        "echo 0 >/proc/sys/net/ipv4/ip_forward".to_owned(),
        "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding".to_owned(),
    ] {
        scene.heals(&host, &damage);
    }
}

fn a_removed_sandbox_comes_back_with_its_containers(world: &World) {
    // Of a name that is gone the kernel tells nobody.
    let mut scene = Scene::with_resync(world, "1s");
    let name = format!("netctl-{}", scene.n1().network_id("shop"));
    let host = scene.n1().space.clone();
    scene.heals(&host, &format!("ip netns del {name}"));
}

fn what_is_not_ours_is_left_alone(world: &World) {
    let mut scene = Scene::new(world);
    let (host, sandbox) = (scene.n1().space.clone(), scene.n1().sandbox("shop"));
    host.sh("ip route add 10.77.0.0/16 via 192.168.50.99 dev eth0
             ip link add name nc0 type bridge
             ip address add 10.78.0.1/24 dev nc0
             nft 'table inet admin { chain input { type filter hook input priority 0; ct state new accept; }; }'
             ip netns add netctl");
    sandbox.sh("ip route add 10.79.0.0/16 dev up0
                nft add table inet admin");
    let before = scene.n1().kernel_state().shape();
    // Repairing something shows that the agent has looked at everything since.
    scene.heals(&sandbox, "ip link del vx0");
    scene.heals(&host, "nft delete table inet netctl");
    let mut cluster = scene.cluster;
    cluster.kill(0);
    cluster.start(0);
    assert_eq!(before.difference(&cluster.n1().kernel_state().shape()), "");
}

fn what_is_in_the_way_of_our_devices_is_replaced(world: &World) {
    let scene = Scene::new(world);
    let sandbox = scene.n1().sandbox("shop");
    sandbox.sh("ip link del vx0; ip link add name vx0 type bridge || true");
    wait_for("the tunnel device is one again", || {
        sandbox.sh("ip -d link show vx0 2>&1 || true").contains("vxlan id")
    });
    assert_eq!(scene.unreachable(), [""; 0]);
}
