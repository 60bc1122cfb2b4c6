//! What the programs remember of flows (`ebpf/flow.h`). No agent reads or writes it: this is to look at it.

use bytemuck::{Pod, Zeroable};

use super::layout::{Address, Meaning, Way};

/// Whose flow it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey {
    /// The network's number in the upper 24 bits, and which share of the flows between two addresses.
    pub network: u32,
    /// The device that its packets come from; 0: the wire.
    pub interface: u32,
    /// From where.
    pub source: Address,
    /// To where.
    pub destination: Address,
}

/// By which way of the host's it leaves for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Exit {
    /// Until when that holds, in ticks of the kernel; 0: it is not known.
    pub until: u64,
    /// The device.
    pub interface: u32,
    /// The next hop's Ethernet address.
    pub destination: [u8; 6],
    /// The device's.
    pub source: [u8; 6],
}

/// A flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Flow {
    /// Whose it is.
    pub key: FlowKey,
    /// Until when what follows holds, in ticks of the kernel.
    pub until: u64,
    /// Of which generation of the maps it is.
    pub generation: u64,
    /// The container that it is for.
    pub to: Meaning,
    /// By which way it gets there, or came.
    pub way: Way,
    /// How it leaves the host.
    pub exit: Exit,
    /// The number of its next packet in the tunnel.
    pub number: u64,
}
