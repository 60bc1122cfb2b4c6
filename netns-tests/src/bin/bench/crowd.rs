//! Many containers of one node, and one client that attaches and detaches them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use netctl::api::AttachRequest;
use netctl::api::client::Client;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tokio::task::JoinSet;
use world::Node;

/// How many calls are outstanding at a time.
const CONCURRENCY: usize = 32;

/// Namespaces of a node; dropping it removes them.
pub struct Crowd {
    node: Arc<Node>,
    count: usize,
}

/// The path of a namespace on its node.
fn path(number: usize) -> String {
    format!("/run/netns/{}", name(number))
}

/// The name of a namespace on its node, which is also its endpoint's.
pub fn name(number: usize) -> String {
    format!("c{number}")
}

/// What attaches a namespace to a network, with the defaults of everything else.
pub fn request(network: &str, netns: &str) -> AttachRequest {
    AttachRequest {
        network: network.to_owned(),
        name: None,
        aliases: Vec::new(),
        netns: netns.into(),
        interface: None,
        addresses: Vec::new(),
        mac: None,
        service: None,
        weight: None,
        labels: BTreeMap::new(),
        wait_ms: None,
    }
}

impl Crowd {
    /// Makes that many empty network namespaces.
    pub fn new(node: &Arc<Node>, count: usize) -> Self {
        node.space.enter(|| {
            fs::create_dir_all("/run/netns").expect("a folder can be made in /run");
            for path in (0..count).map(path) {
                File::create(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made");
                let (own, none) = (Some("/proc/thread-self/ns/net"), None::<&str>);
                mount(own, path.as_str(), none, MsFlags::MS_BIND, none)
                    .unwrap_or_else(|error| panic!("{path}: {error}"));
            }
        });
        Self { node: Arc::clone(node), count }
    }

    /// Plugs all into a network and returns the time until the last answer.
    pub fn attach(&self, network: &str) -> Duration {
        let network = network.to_owned();
        self.each(move |client, number| {
            let request = AttachRequest {
                name: Some(name(number).parse().expect("it is a name")),
                ..request(&network, &path(number))
            };
            async move { client.attach(&request).await.map(drop) }
        })
    }

    /// Unplugs all and returns the time until the last answer.
    pub fn detach(&self, network: &str) -> Duration {
        let network = network.to_owned();
        self.each(move |client, number| {
            let network = network.clone();
            async move { client.detach(&name(number), Some(&network)).await.map(drop) }
        })
    }

    fn each<F>(&self, call: impl Fn(Client, usize) -> F + Clone + Send + 'static) -> Duration
    where
        F: Future<Output = Result<(), netctl::api::client::ClientError>> + Send,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let (client, count) = (Client::new(self.node.socket()), self.count);
        let next = Arc::<AtomicUsize>::default();
        let start = Instant::now();
        runtime.block_on(async {
            let mut workers = JoinSet::new();
            for _ in 0..CONCURRENCY {
                let (client, next, call) = (client.clone(), Arc::clone(&next), call.clone());
                workers.spawn(async move {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            break;
                        }
                        call(client.clone(), number).await.expect("the agent does it");
                    }
                });
            }
            workers.join_all().await;
        });
        start.elapsed()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.node.space.enter(|| {
            for path in (0..self.count).map(path) {
                // They end with the sealed room in any case.
                let _ = umount2(path.as_str(), MntFlags::MNT_DETACH);
                let _ = fs::remove_file(&path);
            }
        });
    }
}
