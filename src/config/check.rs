//! The checks: text becomes values, and values must fit each other.
//!
//! A value that is wrong is reported and replaced by its default for the rest of the checks, so
//! that one run finds everything.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::unistd::{Gid, Group, Uid, User};
use tracing_subscriber::EnvFilter;

use super::source::{Settings, Text};
use super::{Config, EngineChoice, HealthUser, LbConfig, LogFormat, Problem, SocketGroup, duration};
use crate::model::subnet::overlap;
use crate::model::{NodeName, Subnet, Vni};

/// The longest path of a unix socket (`sun_path` in unix(7), less the final zero).
const MAX_SOCKET_PATH: usize = 107;

/// How many connections eBPF balances at once, and how many may be asked for: each takes some 300 bytes.
const LB_CONNECTIONS: u32 = 131_072;
const LB_CONNECTIONS_RANGE: std::ops::RangeInclusive<u32> = 1024..=16_777_216;

/// Checks the settings. `None`, or anything added to `problems`: they cannot be used.
pub(super) fn check(settings: Settings, problems: &mut Vec<Problem>) -> Option<Config> {
    let mut check = Check { settings, problems };
    let node = check.node();
    let state_dir = check.value("state_dir", "/var/lib/netctl".into(), absolute);
    let run_dir = check.value("run_dir", "/run/netctl".into(), absolute);
    let socket = check.value("socket", run_dir.join("netctl.sock"), absolute);
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        let path = socket.display();
        check.report("socket", format!("{path} is longer than {MAX_SOCKET_PATH} bytes"));
    }
    let (pools, pool_prefix) = check.pools("pools", "10.128.0.0/9", "pool_prefix", 24);
    let (pools6, pool6_prefix) = check.pools("pools6", "fd6e:6574:7063::/48", "pool6_prefix", 64);
    let (vni_first, vni_last) = check.vnis()?;
    let lease = check.duration("lease", "10s", "2s", "5m");
    if lease.subsec_nanos() != 0 {
        check.report("lease", "give whole seconds".to_owned());
    }
    let rest = check.duration("rest", "1m", "0s", "1h");
    let (address_warning, address_alarm) = check.address_levels();
    let resync = check.duration("resync", "10s", "1s", "10m");
    let lb = check.balancing();
    let health_user = check.value("health_user", nobody(), user);
    let socket_group = check.value("socket_group", None, |text| group(text).map(Some));
    let metrics = check.value("metrics", None, |text| listen(text).map(Some));
    let underlay = check.value("underlay", None, |text| parse(text).map(Some));
    let tunnel_port = check.value("tunnel_port", 4789, port);
    let log = check.value("log", "info".to_owned(), filter);
    let log_format = check.value("log_format", LogFormat::Text, log_format);
    let labels = check.labels();
    let dns = super::dns::check(&mut check);
    let store = super::store::check(&mut check, &state_dir);
    Some(Config {
        node: node?,
        state_dir,
        run_dir,
        socket,
        socket_group,
        metrics,
        underlay,
        tunnel_port,
        pools,
        pool_prefix,
        pools6,
        pool6_prefix,
        vni_first,
        vni_last,
        lease,
        rest,
        address_warning,
        address_alarm,
        resync,
        lb,
        health_user,
        log,
        log_format,
        labels,
        dns,
        store,
    })
}

/// A number of per cent.
fn percent(text: &str) -> Result<u8, String> {
    let number = text.parse().ok().filter(|number| (1..=100).contains(number));
    number.ok_or_else(|| format!("{text:?} is not a number from 1 to 100"))
}

/// The settings under check and what is wrong with them.
pub(super) struct Check<'a> {
    settings: Settings,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    /// Whether a setting was given.
    pub(super) fn given(&self, key: &str) -> bool {
        self.settings.contains_key(key)
    }

    /// Reports that something is wrong with a setting.
    pub(super) fn report(&mut self, key: &str, message: String) {
        let source = match self.settings.get(key) {
            Some(setting) => setting.source.clone(),
            None => format!("default of {key}"),
        };
        self.problems.push(Problem { source, message });
    }

    fn balancing(&mut self) -> LbConfig {
        let engine = self.value("lb", EngineChoice::Auto, engine);
        let sockets = self.value("socket_lb", false, boolean);
        if sockets && !matches!(engine, EngineChoice::Auto | EngineChoice::Ebpf) {
            self.report(
                "socket_lb",
                "only ebpf asks sockets: give lb = \"ebpf\" or \"auto\"".to_owned(),
            );
        }
        LbConfig {
            engine,
            connections: self.value("lb_connections", LB_CONNECTIONS, connections),
            fast_path: self.value("fast_path", true, boolean),
            sockets,
            cgroup: self.value("cgroup", None, |text| absolute(text).map(Some)),
        }
    }

    fn address_levels(&mut self) -> (u8, u8) {
        let warning = self.value("address_warning", 80, percent);
        let alarm = self.value("address_alarm", 95, percent);
        if warning > alarm {
            self.report("address_warning", format!("{warning} is above address_alarm, {alarm}"));
        }
        (warning, alarm)
    }

    /// One value, or its default.
    pub(super) fn value<T>(
        &mut self,
        key: &str,
        default: T,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        let Some(Text::One(text)) = self.settings.get(key).map(|setting| &setting.text) else {
            return default;
        };
        match parse(text) {
            Ok(value) => value,
            Err(message) => {
                self.report(key, message);
                default
            }
        }
    }

    /// The texts of a list, or `None` where it is not given.
    pub(super) fn list(&self, key: &str) -> Option<Vec<String>> {
        match self.settings.get(key).map(|setting| &setting.text) {
            Some(Text::Many(texts)) => Some(texts.clone()),
            Some(Text::One(_)) | None => None,
        }
    }

    /// A duration within bounds.
    pub(super) fn duration(
        &mut self,
        key: &str,
        default: &str,
        shortest: &str,
        longest: &str,
    ) -> Duration {
        let known = |text: &str| duration::parse(text).unwrap_or_default();
        self.value(key, known(default), |text| match duration::parse(text) {
            Ok(value) if (known(shortest)..=known(longest)).contains(&value) => Ok(value),
            Ok(_) => Err(format!("{text} is out of bounds: give {shortest} to {longest}")),
            Err(error) => Err(error.to_string()),
        })
    }

    fn node(&mut self) -> Option<NodeName> {
        if self.given("node") {
            return self.value("node", None, |text| parse(text).map(Some));
        }
        let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let parsed = name.unwrap_or_default().to_lowercase().parse();
        match parsed {
            Ok(name) => Some(name),
            Err(error) => {
                self.report("node", format!("the host name cannot be used: {error}: give --node"));
                None
            }
        }
    }

    fn vnis(&mut self) -> Option<(Vni, Vni)> {
        let first = self.value("vni_first", Vni::new(4097)?, vni);
        let last = self.value("vni_last", Vni::new(Vni::MAX)?, vni);
        if first > last {
            let key = if self.given("vni_last") { "vni_last" } else { "vni_first" };
            self.report(key, format!("there is no VNI from {first} to {last}: give a higher last one"));
        }
        Some((first, last))
    }

    /// The pools of one family and the prefix length of what they give.
    fn pools(
        &mut self,
        key: &str,
        default: &str,
        prefix_key: &str,
        default_prefix: u8,
    ) -> (Vec<IpNetwork>, u8) {
        let texts = self.list(key).unwrap_or_else(|| vec![default.to_owned()]);
        let ipv4 = key == "pools";
        let mut pools: Vec<IpNetwork> = Vec::new();
        for text in texts {
            match pool(&text, ipv4) {
                Ok(pool) => match pools.iter().find(|other| overlap(**other, pool)) {
                    Some(other) => self.report(key, format!("{pool} and {other} overlap")),
                    None => pools.push(pool),
                },
                Err(message) => self.report(key, message),
            }
        }
        let longest = if ipv4 { 30 } else { 126 };
        let prefix = self.value(prefix_key, default_prefix, |text| match text.parse() {
            Ok(prefix) if (1..=longest).contains(&prefix) => Ok(prefix),
            Ok(_) | Err(_) => Err(format!("{text} is not a prefix length: give 1 to {longest}")),
        });
        for pool in pools.iter().filter(|pool| pool.prefix() > prefix) {
            let key = if self.given(prefix_key) { prefix_key } else { key };
            let message =
                format!("pool {pool} holds no /{prefix}: give {prefix_key} {} or more", pool.prefix());
            self.report(key, message);
        }
        (pools, prefix)
    }

    fn labels(&mut self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        for text in self.list("labels").unwrap_or_default() {
            let valid = |key: &str| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
            match text.split_once('=').filter(|(key, _)| valid(key)) {
                Some((key, value)) => {
                    labels.insert(key.to_owned(), value.to_owned());
                }
                None => self.report("labels", format!("{text:?} is not KEY=VALUE")),
            }
        }
        labels
    }
}

/// Parses with the type's own words for what is wrong.
fn parse<T: FromStr<Err: Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn pool(text: &str, ipv4: bool) -> Result<IpNetwork, String> {
    let family = if ipv4 { "IPv4" } else { "IPv6" };
    let range: IpNetwork =
        text.parse().map_err(|_| format!("{text:?} is not an {family} range (CIDR)"))?;
    if range.is_ipv4() != ipv4 {
        return Err(format!("{range} is not an {family} range"));
    }
    Subnet::new(range, None, None, std::collections::BTreeSet::default())
        .map_err(|error| error.to_string())?;
    Ok(range)
}

fn vni(text: &str) -> Result<Vni, String> {
    let number = text.parse().ok().and_then(Vni::new);
    number.ok_or_else(|| format!("{text} is not a VNI: give 1 to {}", Vni::MAX))
}

fn port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| format!("{text} is not a port: give 1 to 65535"))
}

/// An address and a port to listen on.
fn listen(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse().ok().filter(|address: &SocketAddr| address.port() != 0);
    address.ok_or_else(|| {
        format!("{text:?} is not ADDRESS:PORT: give such as 127.0.0.1:9980 or [::1]:9980")
    })
}

/// An absolute path, for files and directories.
pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is not an absolute path")) }
}

/// An absolute path of a file that can be read.
pub(super) fn readable(text: &str) -> Result<PathBuf, String> {
    let path = absolute(text)?;
    File::open(&path).map_err(|error| format!("{text} cannot be read: {error}"))?;
    Ok(path)
}

fn group(text: &str) -> Result<SocketGroup, String> {
    let named = |gid| SocketGroup { name: text.to_owned(), gid };
    if let Ok(number) = text.parse() {
        return Ok(named(Gid::from_raw(number)));
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(named(group.gid)),
        Ok(None) => Err(format!("there is no group {text:?}: groupadd --system {text}")),
        Err(error) => Err(format!("group {text:?} cannot be looked up: {error}")),
    }
}

/// The user who owns nothing; the kernel has a number for it where the machine has no name
/// (user_namespaces(7), overflow user).
fn nobody() -> HealthUser {
    const NUMBER: u32 = 65534;
    user("nobody").unwrap_or_else(|_| HealthUser {
        name: NUMBER.to_string(),
        uid: Uid::from_raw(NUMBER),
        gid: Gid::from_raw(NUMBER),
    })
}

fn user(text: &str) -> Result<HealthUser, String> {
    let named = |uid, gid| HealthUser { name: text.to_owned(), uid, gid };
    let failed = |error| format!("user {text:?} cannot be looked up: {error}");
    if let Ok(number) = text.parse() {
        let found = User::from_uid(Uid::from_raw(number)).map_err(failed)?;
        let gid = found.map_or(Gid::from_raw(number), |user| user.gid);
        return Ok(named(Uid::from_raw(number), gid));
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(named(user.uid, user.gid)),
        Ok(None) => Err(format!("there is no user {text:?}: useradd --system {text}")),
        Err(error) => Err(failed(error)),
    }
}

fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| format!("{text:?}: {error}"))
}

fn engine(text: &str) -> Result<EngineChoice, String> {
    match text {
        "auto" => Ok(EngineChoice::Auto),
        "ipvs" => Ok(EngineChoice::Ipvs),
        "none" => Ok(EngineChoice::None),
        "ebpf" => Ok(EngineChoice::Ebpf),
        other => Err(format!("{other:?} is not a balancer: give auto, ipvs, ebpf or none")),
    }
}

fn connections(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| LB_CONNECTIONS_RANGE.contains(number));
    let (least, most) = (LB_CONNECTIONS_RANGE.start(), LB_CONNECTIONS_RANGE.end());
    number.ok_or_else(|| format!("{text:?} is not a number from {least} to {most}"))
}

fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("{other:?} is not a log format: give text or json")),
    }
}
