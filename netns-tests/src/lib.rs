//! Machines for tests: network namespaces with a real agent, a real store and a real kernel.
//!
//! A test makes a [`World`], in it nodes, outside hosts, containers and an etcd, and looks at what
//! the containers can reach. Nothing leaves the process tree: [`seal`] puts the whole test program
//! into namespaces of its own before the first thread starts, and they end with it.
//!
//! Everything here panics when the ground itself fails: it is for tests only.

#![allow(clippy::expect_used, clippy::panic, clippy::missing_panics_doc, reason = "it is all for tests")]

mod agent;
mod client;
mod dump;
mod ebpf;
mod etcd;
mod load;
mod node;
mod packet;
mod probe;
mod process;
mod seal;
mod server;
mod space;
mod vm;
mod wait;
mod world;

pub use agent::{Agent, Config, Sockets, binary};
pub use client::{Client, Response};
pub use dump::KernelState;
pub use etcd::Etcd;
pub use load::{Failure, Load};
pub use node::{Container, Node, NodeOptions};
pub use packet::{
    Frames, ethernet, gateway_frame, icmpv6, ipv4_udp, ipv6_udp, mac_of, send_frame, send_frames, vxlan,
};
pub use probe::{Inbox, Stream, StreamReport, Transfer, connects, datagram, tcp_transfer};
pub use process::{Output, Process, as_nobody, become_nobody, output};
pub use seal::{group, seal};
pub use server::{Answer, Server, Session, Transport, ask, ask_udp, has_sctp};
pub use space::Space;
pub use vm::{WithoutModule, in_vm};
pub use wait::{DEADLINE, eventually, wait_for};
pub use world::World;
