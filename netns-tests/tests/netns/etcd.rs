//! An agent comes to its etcd: for the first time, with TLS, with a password.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use world::{Config, Etcd, Node, World, wait_for};

use crate::cluster::DUAL;

crate::tests![
    a_first_start_waits_for_an_etcd_that_is_down_and_says_so,
    agents_with_a_client_certificate_share_a_network,
    agents_with_a_password_share_a_network,
];

/// Two machines come by this configuration, and containers on them reach each other.
#[track_caller]
fn share_a_network(world: &World, config: impl Fn(&Node) -> Config) {
    let nodes = [world.node("n1"), world.node("n2")];
    let _agents = [nodes[0].agent(&config(&nodes[0])), nodes[1].agent(&config(&nodes[1]))];
    nodes[0].ok(&format!("network create shop {DUAL}"));
    let (a, _b) = (nodes[0].attach("shop", "a"), nodes[1].attach("shop", "b"));
    for address in nodes[1].addresses("shop", "b") {
        assert!(a.space.reaches(&address), "{address}");
    }
    nodes[1].ok("endpoint detach --network shop b");
    wait_for("the first one has seen it", || {
        nodes[0].ctl("endpoint inspect --network shop b").code == Some(4)
    });
}

/// An agent that etcd does not let in ends, and says what, where and why.
#[track_caller]
fn is_refused(node: &Node, config: &Config, words: &[&str]) {
    let kernel = node.kernel_state();
    let output = node.netctld(config, &[]);
    assert_eq!(output.code, Some(1), "{output}");
    for word in words {
        assert!(output.text().contains(word), "{word}: {output}");
    }
    assert_eq!(kernel.difference(&node.kernel_state()), "");
}

fn a_first_start_waits_for_an_etcd_that_is_down_and_says_so(world: &World) {
    let (n1, mut etcd) = (world.node("n1"), world.etcd());
    let endpoint = etcd.endpoint();
    etcd.stop();
    let mut agent = n1.agent_under(&Config::etcd(&etcd), &[]);
    wait_for("whoever asks is told of the store", || {
        let output = n1.ctl("network ls");
        output.code == Some(6) && output.stderr.contains(&endpoint)
    });
    wait_for("the log tells of the store", || agent.log_tail().contains(&endpoint));
    n1.ok("version");
    assert!(agent.runs());
    etcd.start();
    agent.wait_ready();
    n1.ok("network ls");
}

/// An authority, and what it has signed, as files in a folder.
struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// Makes one, with a certificate for an etcd and one for agents.
    fn new(folder: PathBuf, etcd: &Etcd) -> Self {
        std::fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let made = Self { folder };
        let write = |name: &str, text: String| std::fs::write(made.path(name), text).unwrap();
        write("ca.pem", ca.pem());
        for (name, subject) in [("server", etcd.ipv4()), ("client", "netctl")] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![subject.to_owned()]).unwrap();
            write(&format!("{name}.pem"), params.signed_by(&key, &ca).unwrap().pem());
            write(&format!("{name}-key.pem"), key.serialize_pem());
        }
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A configuration with a certificate of this authority.
    fn config(&self, url: &str, ca: &Authority) -> Config {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        Config::etcd_at(url)
            .store("ca", &text(ca.path("ca.pem")))
            .store("cert", &text(self.path("client.pem")))
            .store("key", &text(self.path("client-key.pem")))
    }
}

fn agents_with_a_client_certificate_share_a_network(world: &World) {
    let mut etcd = world.etcd();
    let folder = world.node("n3").dir().to_owned();
    let ours = Authority::new(folder.join("ours"), &etcd);
    let other = Authority::new(folder.join("other"), &etcd);
    let [ca, certificate, key] = ["ca.pem", "server.pem", "server-key.pem"].map(|name| ours.path(name));
    let url = etcd.start_tls(&ca, &certificate, &key);
    share_a_network(world, |_| ours.config(&url, &ours));
    is_refused(&world.node("n4"), &other.config(&url, &ours), &[&url, "TLS"]);
}

fn agents_with_a_password_share_a_network(world: &World) {
    let etcd = world.etcd();
    etcd.authenticate("agent", "secret");
    let config = |node: &Node, password: &str| {
        let file = node.dir().join("password");
        std::fs::write(&file, format!("{password}\n")).unwrap();
        Config::etcd(&etcd).store("user", "agent").store("password_file", file.to_str().unwrap())
    };
    share_a_network(world, |node| config(node, "secret"));
    let n4 = world.node("n4");
    let wrong = config(&n4, "wrong");
    is_refused(&n4, &wrong, &[&etcd.endpoint(), "refused access"]);
    is_refused(&n4, &Config::etcd(&etcd), &[&etcd.endpoint(), "refused access"]);
}
