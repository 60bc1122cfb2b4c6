//! What carrying packets by the same places costs at the least: containers on two nodes, and programs
//! that check nothing and look nothing up (`floor/floor.c`), each where the kernel runs it soonest.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::Arc;

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use world::{Container, Node, Space, mac_of};

use crate::progress;

/// The name of this peer.
pub const NAME: &str = "floor";

const PROGRAMS: &str = include_str!("floor/floor.c");
/// 1500 less what VXLAN adds over IPv4.
const MTU: u32 = 1450;

/// Two nodes of this kind.
pub struct Floor {
    /// The containers.
    pub ends: [Container; 2],
    /// The second one's address.
    pub address: String,
    /// What must live as long as packets go: the sandboxes and the programs.
    _kept: Vec<(Container, Ebpf)>,
}

/// Containers on two nodes with these underlay addresses, at their devices `wire`; `None`: the kernel has
/// no TCX.
pub fn make_between(nodes: &[Arc<Node>; 2], underlay: [&str; 2]) -> Option<Floor> {
    let object = compile(&nodes[0].space);
    let macs = nodes.each_ref().map(|node| mac(&node.space, "wire"));
    let locals = underlay.map(|local| {
        let local: Ipv4Addr = local.parse().expect("it is an address");
        u32::from_ne_bytes(local.octets())
    });
    let mut kept = Vec::new();
    let ends = [0, 1].map(|me| {
        let (end, room) = join(&nodes[me], me + 1);
        let devices = [("NEAR", "near"), ("CROSSING", "crossing")]
            .map(|(name, device)| (name, index(&room.space, device)));
        let host = [("CROSSED", "crossed"), ("WIRE", "wire")]
            .map(|(name, device)| (name, index(&nodes[me].space, device)));
        let addresses = [("LOCAL", locals[me]), ("REMOTE", locals[1 - me])];
        let numbers: Vec<_> = [devices, host, addresses].concat();
        let mut loader = EbpfLoader::new();
        for (name, number) in &numbers {
            loader.override_global(name, number, true);
        }
        loader.override_global("LOCAL_MAC", &macs[me], true);
        loader.override_global("REMOTE_MAC", &macs[1 - me], true);
        let programs = loader.load(&object).expect("the programs can be read");
        kept.push((room, programs));
        end
    });
    for (node, (room, programs)) in nodes.iter().zip(&mut kept) {
        let places = [
            ("from_container", &room.space, "near"),
            ("to_container", &room.space, "crossing"),
            ("to_wire", &node.space, "crossed"),
            ("from_wire", &node.space, "wire"),
        ];
        for (name, space, device) in places {
            if !attach(programs, name, space, device) {
                progress("this kernel has no TCX: nothing to say of the least");
                return None;
            }
        }
    }
    assert!(ends[0].space.reaches(&address(2)), "the programs carry nothing");
    Some(Floor { ends, address: address(2), _kept: kept })
}

fn address(number: usize) -> String {
    format!("10.76.0.{number}")
}

/// A container, and the namespace by which it leads to the node.
fn join(node: &Node, me: usize) -> (Container, Container) {
    let (container, room) = (node.container("box"), node.container("room"));
    node.space.sh(&format!(
        "ip link add crossed mtu {MTU} type veth peer name crossing mtu {MTU} netns {}
         ip link set crossed up",
        room.space.net_path()
    ));
    room.space.sh(&format!(
        "ip link set crossing up
         ip link add near mtu {MTU} address 02:00:00:00:76:00 type veth peer name eth0 mtu {MTU} netns {}
         ip link set near up",
        container.space.net_path()
    ));
    container.space.sh(&format!(
        "ip link set eth0 up && ip address add {}/24 dev eth0
         ip neighbour add {} lladdr 02:00:00:00:76:00 dev eth0 nud permanent",
        address(me),
        address(3 - me)
    ));
    (container, room)
}

fn compile(space: &Space) -> Vec<u8> {
    let (source, object) = ("/run/floor.c", "/run/floor.o");
    space.enter(|| std::fs::write(source, PROGRAMS)).expect("/run can be written");
    space.sh(&format!(
        "$(command -v clang || command -v clang-14) -O2 -g -mcpu=v3 -target bpf \
         -I/usr/include/$(uname -m)-linux-gnu -c {source} -o {object}"
    ));
    space.enter(|| std::fs::read(object)).expect("it was compiled")
}

/// `false`: the kernel has no TCX.
fn attach(programs: &mut Ebpf, name: &str, space: &Space, device: &str) -> bool {
    let program = programs.program_mut(name).expect("it is there");
    let program: &mut SchedClassifier = program.try_into().expect("it is one of tc");
    program.load().expect("the kernel takes it");
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    match space.enter(|| program.attach_with_options(device, TcAttachType::Ingress, first)) {
        Err(ProgramError::SyscallError(error)) if error.io_error.kind() == ErrorKind::InvalidInput => {
            false
        }
        attached => {
            attached.expect("the program is attached");
            true
        }
    }
}

fn index(space: &Space, device: &str) -> u32 {
    let index = space.sh(&format!("ip -o link show {device} | cut -d: -f1"));
    index.trim().parse().expect("it is a number")
}

/// A device's Ethernet address, as the programs want it: six bytes in the order of the wire.
fn mac(space: &Space, device: &str) -> u64 {
    let mut mac = [0; 8];
    mac[..6].copy_from_slice(&mac_of(space, device));
    u64::from_ne_bytes(mac)
}
