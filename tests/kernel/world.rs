//! Nodes, containers and what is between them, all of it in namespaces.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use netctl::kernel::{self, Error, Host, Netns, Sandbox};
use netctl::model::object::{
    Device, HostPair, Link, LinkKind, Object, Plug, Route, Step, Target, sandbox_name, uplink_name,
};
use netctl::model::{EndpointId, MacAddr, NetworkId, Vni};

pub const MTU: u32 = 1400;
pub const PORT: u16 = 4789;

/// Runs a command line, which must succeed, in the test's own namespace.
pub fn sh(line: &str) -> String {
    let (success, output) = try_sh(line);
    assert!(success, "{line}: {output}");
    output
}

/// Runs a command line and returns what it wrote.
pub fn try_sh(line: &str) -> (bool, String) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "not so after 10 s: {what}");
        std::thread::yield_now();
    }
}

pub fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A namespace made by others, which goes with this value.
pub struct Space {
    pub name: String,
}

impl Space {
    pub fn new(prefix: &str) -> Self {
        let name = unique(prefix);
        sh(&format!("ip netns add {name}"));
        Self { name }
    }

    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    pub fn netns(&self) -> Netns {
        Netns::open(&self.path()).unwrap()
    }

    /// Runs a command line inside, which must succeed.
    pub fn sh(&self, line: &str) -> String {
        sh(&self.inside(line))
    }

    pub fn try_sh(&self, line: &str) -> (bool, String) {
        try_sh(&self.inside(line))
    }

    fn inside(&self, line: &str) -> String {
        format!("ip netns exec {} {line}", self.name)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        try_sh(&format!("ip netns del {}", self.name));
    }
}

/// A node: a namespace for its host, and a sandbox of one network.
pub struct Node {
    pub space: Space,
    pub host: Host,
    pub sandbox: Sandbox,
    pub network: NetworkId,
    pub underlay: IpAddr,
    pub mac: MacAddr,
    pub vni: Vni,
}

impl Node {
    /// A node with this number and underlay address.
    pub fn new(number: u8, underlay: &str, vni: u32) -> Self {
        let space = Space::new("node");
        space.sh("ip link set lo up");
        let host = space.netns().enter(Host::open).unwrap().unwrap();
        let network = NetworkId::random(&mut rand::rng());
        let sandbox = Sandbox::create(&sandbox_name(network)).unwrap();
        let mac = MacAddr([2, 0, 0, 0, 0, number]);
        Self { space, host, sandbox, network, underlay: ip(underlay), mac, vni: Vni::new(vni).unwrap() }
    }

    /// A node that has no other.
    pub fn alone() -> Self {
        let node = Self::new(1, "192.0.2.1", 77);
        node.space.sh("ip link add ul type bridge");
        node.space.sh("ip addr add 192.0.2.1/24 dev ul");
        node.space.sh("ip link set ul up");
        node
    }

    /// Two nodes with an underlay between them.
    pub fn pair(underlays: [&str; 2], prefix: u8) -> [Self; 2] {
        let nodes = [Self::new(1, underlays[0], 42), Self::new(2, underlays[1], 42)];
        let [a, b] = &nodes;
        sh(&format!("ip -n {} link add ul type veth peer name ul netns {}", a.space.name, b.space.name));
        for node in &nodes {
            node.space.sh(&format!("ip addr add {}/{prefix} dev ul nodad", node.underlay));
            node.space.sh("ip link set ul up");
        }
        nodes
    }

    pub fn sandbox_name(&self) -> String {
        sandbox_name(self.network)
    }

    /// Runs a command line in the sandbox.
    pub fn sh(&self, line: &str) -> String {
        sh(&format!("ip netns exec {} {line}", self.sandbox_name()))
    }

    pub fn uplink(&self) -> HostPair {
        let addresses = vec![net("169.254.64.0/31"), net("fd6e:6574:6374:6c00::/127")];
        let (network, device) = (self.network, Device::Uplink);
        HostPair { network, device, name: uplink_name(network), mtu: MTU, addresses }
    }

    /// The key of the neighbour entry for this node in the others' sandboxes.
    fn next_hop(&self, ipv4: bool) -> IpAddr {
        match self.underlay {
            IpAddr::V4(_) if ipv4 => self.underlay,
            IpAddr::V4(_) | IpAddr::V6(_) => self.mac.link_local().into(),
        }
    }

    pub fn tunnel(&self) -> Object {
        let kind = LinkKind::Vxlan { vni: self.vni, local: self.underlay, port: PORT, mac: self.mac };
        Object::Link(Link { device: Device::Tunnel, kind, mtu: MTU, up: true })
    }

    /// What the sandbox needs without containers and other nodes.
    pub fn base(&self) -> BTreeSet<Object> {
        let loopback = Link { device: Device::Loopback, kind: LinkKind::Loopback, mtu: 65536, up: true };
        let address = |device, text| Object::Address { device, address: net(text) };
        BTreeSet::from([
            Object::Link(loopback),
            self.tunnel(),
            address(Device::Loopback, "10.9.0.1/32"),
            address(Device::Loopback, "fd00:9::1/128"),
            address(Device::Tunnel, "fd00:ffff::1/64"),
            route("10.9.0.0/24", Target::Unreachable),
            route("fd00:9::/64", Target::Unreachable),
        ])
    }

    /// What the sandbox needs to reach another node's addresses.
    pub fn towards(&self, other: &Self, ranges: &[&str]) -> BTreeSet<Object> {
        let mut objects = BTreeSet::new();
        for range in ranges {
            let address = other.next_hop(net(range).is_ipv4());
            objects.insert(Object::Neighbour { device: Device::Tunnel, address, mac: other.mac });
            objects.insert(route(range, Target::Via(Device::Tunnel, address)));
        }
        objects.insert(Object::Fdb { mac: other.mac, remote: other.underlay, port: PORT });
        objects
    }

    pub fn observe(&mut self) -> BTreeSet<Object> {
        self.sandbox.observe().unwrap()
    }

    pub fn apply(&mut self, steps: &[Step]) -> Vec<(Step, Error)> {
        self.sandbox.apply(&mut self.host, steps)
    }

    /// Applies the difference between what is wanted and what is there, which must succeed.
    pub fn reconcile(&mut self, wanted: &BTreeSet<Object>) {
        let present = self.observe();
        // Adding replaces what has the same key, but for a device of another kind.
        let identity = |object: &Object| match object {
            Object::Link(link) => (object.key(), Some(link.kind)),
            _ => (object.key(), None),
        };
        let there: BTreeSet<_> = present.iter().map(identity).collect();
        let kept: BTreeSet<_> = wanted.iter().map(identity).collect();
        let surplus: Vec<&Object> =
            present.difference(wanted).filter(|object| !kept.contains(&identity(object))).collect();
        let remove = surplus.into_iter().rev().map(|object| Step::Remove(*object));
        let add = wanted.difference(&present).map(|object| match object {
            Object::Link(link) if there.contains(&identity(object)) => Step::Change(*link),
            object => Step::Add(*object),
        });
        let steps: Vec<Step> = remove.chain(add).collect();
        let failed = self.apply(&steps);
        assert!(failed.is_empty(), "{failed:?}");
    }

    pub fn plug(&mut self, plug: &Plug) -> Result<(), Error> {
        self.sandbox.plug_all(std::slice::from_ref(plug), &mut rand::rng()).remove(0)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        kernel::delete_sandbox(&self.sandbox_name()).unwrap();
    }
}

pub fn route(destination: &str, target: Target) -> Object {
    Object::Route(Route { destination: net(destination), target, mtu: None })
}

/// A container: a namespace and what it is plugged in with.
pub struct Container {
    pub space: Space,
    pub plug: Plug,
}

impl Container {
    /// A container with address 10.9.0.`host` and fd00:9::`host`.
    pub fn new(host: u8) -> Self {
        let space = Space::new("c");
        let mut rng = rand::rng();
        let plug = Plug {
            endpoint: EndpointId::random(&mut rng),
            netns: space.path(),
            inode: space.netns().inode(),
            interface: "eth0".parse().unwrap(),
            mac: MacAddr::random(&mut rng),
            mtu: MTU,
            addresses: vec![net(&format!("10.9.0.{host}/24")), net(&format!("fd00:9::{host}/64"))],
            gateways: vec![ip("10.9.0.1"), ip("fd00:9::1")],
            routes: vec![net("10.9.0.0/24"), net("fd00:9::/64")],
            shared_routes: vec![net("0.0.0.0/0"), net("::/0")],
        };
        Self { space, plug }
    }

    pub fn device(&self) -> Device {
        Device::Endpoint(self.plug.endpoint)
    }

    /// What the sandbox needs for it.
    pub fn objects(&self) -> BTreeSet<Object> {
        let device = self.device();
        let link = Link { device, kind: LinkKind::Veth, mtu: self.plug.mtu, up: true };
        let mut objects = BTreeSet::from([Object::Link(link)]);
        for address in self.plug.addresses.iter().map(IpNetwork::ip) {
            objects.insert(Object::Neighbour { device, address, mac: self.plug.mac });
            let destination = IpNetwork::from(address);
            objects.insert(Object::Route(Route {
                destination,
                target: Target::Device(device),
                mtu: None,
            }));
        }
        objects
    }

    pub fn reaches(&self, address: &str) -> bool {
        self.space.try_sh(&format!("ping -n -c 1 -W 2 {address}")).0
    }

    /// The devices, addresses and routes inside, without what every namespace has.
    pub fn inside(&self) -> String {
        let lines = ["ip -o link", "ip route", "ip -6 route"].map(|line| self.space.sh(line)).concat();
        lines.lines().filter(|line| !line.contains(" lo")).collect()
    }
}

/// Two nodes, each with one container, that know each other.
pub fn two_nodes(underlays: [&str; 2], prefix: u8) -> ([Node; 2], [Container; 2]) {
    let [mut a, mut b] = Node::pair(underlays, prefix);
    let containers = [Container::new(10), Container::new(130)];
    a.plug(&containers[0].plug).unwrap();
    b.plug(&containers[1].plug).unwrap();
    let to_b = a.towards(&b, &["10.9.0.128/25", "fd00:9::100/120"]);
    let to_a = b.towards(&a, &["10.9.0.0/25", "fd00:9::/120"]);
    let sets = [a.base(), to_b, containers[0].objects()];
    a.reconcile(&sets.into_iter().flatten().collect());
    let sets = [b.base(), to_a, containers[1].objects()];
    b.reconcile(&sets.into_iter().flatten().collect());
    ([a, b], containers)
}
