//! A world: an underlay, and what stands on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::dump;
use crate::etcd::Etcd;
use crate::node::{Node, NodeOptions};
use crate::space::Space;

/// Where the worlds keep their files; every node sees it under the same path.
pub(crate) const FILES: &str = "/run/world";

/// An underlay of its own with machines on it: several worlds do not see each other.
///
/// Dropping it ends its programs and namespaces.
#[derive(Debug)]
pub struct World {
    dir: PathBuf,
    wire: Space,
    next: AtomicU8,
    nodes: Mutex<Vec<Arc<Node>>>,
}

/// A machine's place on the underlay.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Its IPv4 address in 192.168.50.0/24.
    pub ipv4: String,
    /// Its IPv6 address in `fd00:50::/64`.
    pub ipv6: String,
}

impl World {
    /// Makes a world.
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(1);
        // Short: the path of a unix socket has 107 bytes at most.
        let dir = Path::new(FILES).join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let wire = Space::new("wire", || ());
        wire.sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        wire.sh("ip link add name underlay type bridge && ip link set underlay up");
        Self { dir, wire, next: AtomicU8::new(1), nodes: Mutex::default() }
    }

    /// A machine that can run an agent.
    pub fn node(&self, name: &str) -> Arc<Node> {
        self.node_with(name, &NodeOptions::default())
    }

    /// A machine that can run an agent, on a special underlay.
    pub fn node_with(&self, name: &str, options: &NodeOptions) -> Arc<Node> {
        let place = self.place();
        let dir = self.dir.join(name);
        let node = Arc::new(Node::new(name, &dir, place.clone()));
        self.plug(&node.space, &place, options);
        self.nodes.lock().expect("no test thread panicked here").push(Arc::clone(&node));
        node
    }

    /// A machine on the underlay that is no member of the cluster.
    pub fn outside(&self, name: &str) -> Arc<Node> {
        self.node(name)
    }

    /// A real etcd on a machine of its own.
    pub fn etcd(&self) -> Etcd {
        let place = self.place();
        let space = Space::new("etcd", || ());
        self.plug(&space, &place, &NodeOptions::default());
        Etcd::new(space, &self.dir.join("etcd"), &place.ipv4, &place.ipv6)
    }

    /// Cuts a machine off the underlay, or joins it again.
    pub fn connect(&self, node: &Node, up: bool) {
        let state = if up { "up" } else { "down" };
        self.wire.sh(&format!("ip link set {} {state}", port(&node.place)));
    }

    /// Everything that helps to understand a failure: logs, and each node's kernel state.
    pub fn dump(&self) -> String {
        let mut text = dump::logs(&self.dir);
        for node in self.nodes.lock().expect("no test thread panicked here").iter() {
            text.push_str(&format!("======== kernel state of {}\n{}", node.name(), node.kernel_state()));
        }
        text
    }

    fn place(&self) -> Place {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Place { ipv4: format!("192.168.50.{number}"), ipv6: format!("fd00:50::{number:x}") }
    }

    /// Gives a machine its eth0.
    fn plug(&self, space: &Space, place: &Place, options: &NodeOptions) {
        let port = port(place);
        let mtu = options.mtu;
        space.sysctl("net/ipv6/conf/default/accept_dad", "0");
        self.wire.sh(&format!(
            "ip link add name {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}
             ip link set {port} master underlay up",
            space.net_path()
        ));
        space.sh("ip link set lo up && ip link set eth0 up");
        if options.ipv4 {
            space.sh(&format!("ip address add {}/24 dev eth0", place.ipv4));
        }
        if options.ipv6 {
            space.sh(&format!("ip address add {}/64 dev eth0 nodad", place.ipv6));
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The files are on a tmpfs that ends with the program; a leftover harms nobody.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The name of a machine's port on the underlay bridge.
fn port(place: &Place) -> String {
    format!("p{}", place.ipv4.rsplit('.').next().unwrap_or_default())
}
