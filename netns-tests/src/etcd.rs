//! A real etcd.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use netctl::store::etcd::{Etcd as Store, EtcdConfig};
use nix::sys::signal::Signal;

use crate::agent::append;
use crate::process::Process;
use crate::space::Space;
use crate::wait::{self, wait_for};

/// An etcd of one member; dropping it kills it.
#[derive(Debug)]
pub struct Etcd {
    space: Space,
    dir: PathBuf,
    ipv4: String,
    ipv6: String,
    /// What it is started with beside the usual.
    flags: Vec<String>,
    process: Option<Process>,
}

impl Etcd {
    pub(crate) fn new(space: Space, dir: &Path, ipv4: &str, ipv6: &str) -> Self {
        let (dir, ipv4, ipv6) = (dir.to_owned(), ipv4.to_owned(), ipv6.to_owned());
        let mut etcd = Self { space, dir, ipv4, ipv6, flags: Vec::new(), process: None };
        etcd.start();
        etcd
    }

    /// The URL at which nodes reach it over IPv4.
    pub fn endpoint(&self) -> String {
        format!("http://{}:2379", self.ipv4)
    }

    /// The store that an agent with this etcd has, as one that waits so long for each call.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn store(&self, timeout: Duration) -> Store {
        let config = EtcdConfig {
            endpoints: vec![self.endpoint()],
            prefix: "netctl/".into(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password: None,
            timeout,
        };
        Store::new(config).expect("the configuration is right")
    }

    /// The URL at which nodes reach it over IPv6.
    pub fn endpoint6(&self) -> String {
        format!("http://[{}]:2379", self.ipv6)
    }

    /// Starts it, and waits until it serves.
    pub fn start(&mut self) {
        fs::create_dir_all(&self.dir).unwrap_or_else(|error| panic!("{}: {error}", self.dir.display()));
        let urls = format!("http://127.0.0.1:2379,{},{}", self.endpoint(), self.endpoint6());
        let mut command = self.space.command("etcd");
        command.arg("--data-dir").arg(self.dir.join("data"));
        command.args(["--listen-client-urls", &urls, "--advertise-client-urls", &self.endpoint()]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "warn"]);
        command.args(["--logger", "zap"]).args(&self.flags);
        self.process = Some(Process::start(&mut command, &append(&self.dir.join("etcd.log"))));
        wait_for("etcd serves", || self.space.enter(healthy));
    }

    /// Has it listen with TLS, too, for clients with a certificate of the same authority; gives the URL.
    /// Nodes reach it there over IPv4.
    pub fn start_tls(&mut self, ca: &Path, certificate: &Path, key: &Path) -> String {
        let url = format!("https://{}:2378", self.ipv4);
        let file = |name: &str, path: &Path| format!("--{name}={}", path.display());
        self.stop();
        self.flags = vec![
            format!("--listen-client-urls=http://127.0.0.1:2379,{url}"),
            format!("--advertise-client-urls={url}"),
            file("trusted-ca-file", ca),
            file("cert-file", certificate),
            file("key-file", key),
            "--client-cert-auth".to_owned(),
        ];
        self.start();
        url
    }

    /// Has it ask who comes, from now on; only this user, with this password, may use all that agents do.
    pub fn authenticate(&self, user: &str, password: &str) {
        self.space.sh(&format!(
            "as_root() {{ {ETCDCTL} \"$@\" >/dev/null; }}
             as_root user add root:root
             as_root user grant-role root root
             as_root role add netctl
             as_root role grant-permission netctl --prefix=true readwrite netctl/
             as_root user add {user}:{password}
             as_root user grant-role {user} netctl
             as_root auth enable"
        ));
    }

    /// Its address on the underlay.
    pub fn ipv4(&self) -> &str {
        &self.ipv4
    }

    /// Stops it.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.stop(Signal::SIGTERM);
        }
    }

    /// Stops its threads where they are: connections stay, answers do not come.
    pub fn freeze(&mut self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    /// Stops it, removes all it knows, and starts it.
    pub fn wipe(&mut self) {
        self.stop();
        fs::remove_dir_all(self.dir.join("data")).expect("etcd's folder can be removed");
        self.start();
    }

    /// All keys and values.
    pub fn keys(&self) -> BTreeMap<String, String> {
        let output = self.space.sh(&format!("{ETCDCTL} get '' --prefix --write-out=json"));
        let answer: serde_json::Value = serde_json::from_str(&output).expect("etcdctl prints JSON");
        let text = |value: &serde_json::Value| decode(value.as_str().unwrap_or_default());
        let pairs = answer["kvs"].as_array().cloned().unwrap_or_default();
        pairs.iter().map(|pair| (text(&pair["key"]), text(&pair["value"]))).collect()
    }

    /// How often a key was written since it was made; 0: it is not there.
    pub fn writes(&self, key: &str) -> u64 {
        let output = self.space.sh(&format!("{ETCDCTL} get '{key}' --write-out=json"));
        let answer: serde_json::Value = serde_json::from_str(&output).expect("etcdctl prints JSON");
        answer["kvs"][0]["version"].as_u64().unwrap_or_default()
    }

    /// All keys but those of address blocks, which nodes keep for a while when nothing is left in
    /// them, and those that only say when something was taken last.
    pub fn lasting_keys(&self) -> Vec<String> {
        let lasts = |key: &String| !key.contains("/blocks/") && !key.ends_with("/usage");
        self.keys().into_keys().filter(lasts).collect()
    }

    /// Sets a key.
    pub fn put(&self, key: &str, value: &str) {
        self.space.sh(&format!("{ETCDCTL} put '{key}' '{value}'"));
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) {
        self.space.sh(&format!("{ETCDCTL} del '{key}'"));
    }

    fn signal(&mut self, signal: Signal) {
        self.process.as_mut().expect("etcd was started").signal(signal);
    }
}

const ETCDCTL: &str = "ETCDCTL_API=3 etcdctl --endpoints http://127.0.0.1:2379";

fn healthy() -> bool {
    let limit = wait::limit(Duration::from_millis(500));
    let address = SocketAddr::from(([127, 0, 0, 1], 2379));
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains("\"true\""))
}

/// Decodes base64 (RFC 4648, section 4); text that is not UTF-8 keeps replacement characters.
fn decode(text: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut count, mut bytes) = (0_u32, 0, Vec::new());
    for digit in text.bytes().filter_map(|byte| ALPHABET.iter().position(|&known| known == byte)) {
        bits = bits << 6 | u32::try_from(digit).unwrap_or_default();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_is_decoded_with_and_without_padding() {
        for (text, decoded) in [("", ""), ("YQ==", "a"), ("YWI=", "ab"), ("YWJj", "abc")] {
            assert_eq!(super::decode(text), decoded);
        }
    }
}
