//! The reference CNI plugins `bridge` and `host-local`, run as a container runtime runs them: one
//! process for each operation, parameters in the environment, the configuration on its input.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use world::{Container, Node};

/// The name of this peer.
pub const NAME: &str = "cni_bridge";

/// Where Debian's containernetworking-plugins has them.
const PLUGINS: &str = "/usr/lib/cni";

/// The plugin that only gives out addresses.
pub const HOST_LOCAL: &str = "host_local";

/// The plugins on one node.
pub struct Cni {
    node: Arc<Node>,
    plugin: &'static str,
    config: String,
}

impl Cni {
    /// A network of one bridge, a gateway on it, without masquerading; addresses are kept on the
    /// node's disk.
    pub fn new(node: Arc<Node>) -> Self {
        let config = json!({
            "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0",
            "isGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local", "dataDir": node.dir().join("cni"),
                "ranges": [[{ "subnet": "10.88.0.0/16" }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        });
        Self::plugin(node, "bridge", config.to_string())
    }

    /// Addresses of a subnet alone, as another plugin has them from host-local.
    pub fn host_local(node: Arc<Node>, subnet: &str) -> Self {
        let config = json!({
            "cniVersion": "1.0.0", "name": "bench", "type": "bridge",
            "ipam": {
                "type": "host-local", "dataDir": node.dir().join("cni"),
                "ranges": [[{ "subnet": subnet }]],
            },
        });
        Self::plugin(node, "host-local", config.to_string())
    }

    fn plugin(node: Arc<Node>, plugin: &'static str, config: String) -> Self {
        let program = Path::new(PLUGINS).join(plugin);
        assert!(program.exists(), "no {}: run scripts/setup", program.display());
        Self { node, plugin, config }
    }

    /// Runs one operation and returns its time.
    pub fn run(&self, operation: &str, id: &str, container: &Container) -> Duration {
        let mut command = Command::new(Path::new(PLUGINS).join(self.plugin));
        command.env("CNI_COMMAND", operation).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", &container.path).env("CNI_PATH", PLUGINS);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (output, time) = self.node.space.enter(|| {
            let start = Instant::now();
            let mut child = command.spawn().expect("the plugin starts");
            let mut input = child.stdin.take().expect("its input is a pipe");
            input.write_all(self.config.as_bytes()).expect("the plugin reads its configuration");
            drop(input);
            let output = child.wait_with_output().expect("the plugin ends");
            (output, start.elapsed())
        });
        assert!(output.status.success(), "CNI {operation}: {output:?}");
        time
    }
}
