//! The classic overlay, made by hand: container, veth, Linux bridge, VXLAN device. This is what
//! Docker's overlay driver and flannel build. As in a well-kept one, nothing is flooded and nothing
//! learned: forwarding and neighbour entries are static, and the VXLAN device answers ARP.

use std::sync::Arc;

use world::{Container, Node, World};

/// The name of this peer.
pub const NAME: &str = "bridge";

const VNI: u32 = 77;
/// 1500 less what VXLAN adds over IPv4.
const MTU: u32 = 1450;

/// Containers on two nodes of this kind, and the second one's address.
pub fn make(world: &World) -> (Container, Container, String) {
    let nodes = [world.node("bridge1"), world.node("bridge2")];
    make_between(&nodes, nodes.each_ref().map(|node| node.ipv4()))
}

/// The same on two nodes with these underlay addresses.
pub fn make_between(nodes: &[Arc<Node>; 2], underlay: [&str; 2]) -> (Container, Container, String) {
    let [first, second] = [0, 1].map(|me| join(&nodes[me], underlay[me], underlay[1 - me], me + 1));
    (first, second, address(2))
}

/// Containers on one node of this kind, and the second one's address.
pub fn make_on_one(world: &World) -> (Container, Container, String) {
    let node = world.node("bridge");
    node.space.sh("ip link add br0 type bridge mcast_snooping 0 && ip link set br0 up");
    let join = |number: usize| {
        let container = node.container(&format!("box{number}"));
        node.space.sh(&format!(
            "ip link add vc{number} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {}
             ip link set vc{number} master br0 up",
            container.space.net_path()
        ));
        let address = address(number);
        container.space.sh(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
        container
    };
    (join(1), join(2), address(2))
}

fn address(number: usize) -> String {
    format!("10.77.0.{number}")
}

fn mac(number: usize) -> String {
    format!("02:00:00:00:77:{number:02x}")
}

fn join(node: &Node, local: &str, remote: &str, me: usize) -> Container {
    let container = node.container("box");
    let (mine, my_mac, its, its_mac) = (address(me), mac(me), address(3 - me), mac(3 - me));
    node.space.sh(&format!(
        "ip link add br0 type bridge mcast_snooping 0 && ip link set br0 up
         ip link add vx0 mtu {MTU} type vxlan id {VNI} local {local} dstport 4789 nolearning proxy
         ip link set vx0 master br0 up
         bridge link set dev vx0 learning off flood off
         ip link add vc0 mtu {MTU} type veth peer name eth0 mtu {MTU} address {my_mac} netns {}
         ip link set vc0 master br0 up
         bridge fdb append {its_mac} dev vx0 dst {remote} self static
         bridge fdb add {its_mac} dev vx0 master static
         ip neighbour add {its} lladdr {its_mac} dev vx0 nud permanent",
        container.space.net_path(),
    ));
    container.space.sh(&format!("ip address add {mine}/24 dev eth0 && ip link set eth0 up"));
    container
}
