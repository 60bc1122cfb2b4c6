//! The configuration as a file.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::Path;

use toml::{Table, Value};

use super::duration::Shown;
use super::{Config, DnsConfig, LogFormat, StoreConfig};
use crate::dns::DomainName;

/// Writes the whole configuration as TOML that gives the same again.
pub(super) fn print(config: &Config) -> String {
    let mut table = Table::new();
    let mut set = |key: &str, value: Value| drop(table.insert(key.to_owned(), value));
    set("node", text(&config.node));
    set("state_dir", path(&config.state_dir));
    set("run_dir", path(&config.run_dir));
    set("socket", path(&config.socket));
    if let Some(group) = &config.socket_group {
        set("socket_group", text(&group.name));
    }
    if let Some(metrics) = &config.metrics {
        set("metrics", text(metrics));
    }
    if let Some(underlay) = &config.underlay {
        set("underlay", text(underlay));
    }
    set("tunnel_port", i64::from(config.tunnel_port).into());
    set("pools", list(&config.pools));
    set("pool_prefix", i64::from(config.pool_prefix).into());
    set("pools6", list(&config.pools6));
    set("pool6_prefix", i64::from(config.pool6_prefix).into());
    set("vni_first", i64::from(config.vni_first.number()).into());
    set("vni_last", i64::from(config.vni_last.number()).into());
    set("lease", text(Shown(config.lease)));
    set("rest", text(Shown(config.rest)));
    set("address_warning", i64::from(config.address_warning).into());
    set("address_alarm", i64::from(config.address_alarm).into());
    set("resync", text(Shown(config.resync)));
    set("lb", text(config.lb.engine));
    set("lb_connections", i64::from(config.lb.connections).into());
    set("fast_path", config.lb.fast_path.into());
    set("socket_lb", config.lb.sockets.into());
    if let Some(cgroup) = &config.lb.cgroup {
        set("cgroup", path(cgroup));
    }
    set("health_user", text(&config.health_user.name));
    set("log", text(&config.log));
    set("log_format", text(format_name(config.log_format)));
    let labels: Table = config.labels.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    set("labels", labels.into());
    set("dns", dns(&config.dns).into());
    set("store", store(&config.store).into());
    table.to_string()
}

fn dns(dns: &DnsConfig) -> Table {
    let forward =
        |(domain, servers): (&DomainName, &Vec<SocketAddr>)| (domain.to_string(), list(servers));
    let mut table = Table::new();
    let mut set = |key: &str, value: Value| drop(table.insert(key.to_owned(), value));
    set("domain", text(&dns.domain));
    set("ttl", text(Shown(dns.ttl)));
    set("address", dns.address.map_or_else(|| text("none"), text));
    set("host", dns.host.map_or_else(|| text("none"), text));
    set("rate", i64::from(dns.rate).into());
    set("upstreams", list(&dns.upstreams));
    set("forward", dns.forward.iter().map(forward).collect::<Table>().into());
    table
}

fn store(store: &StoreConfig) -> Table {
    let mut table = Table::new();
    let mut set = |key: &str, value: Value| drop(table.insert(key.to_owned(), value));
    match store {
        StoreConfig::Embedded { path: file } => {
            set("kind", text("embedded"));
            set("path", path(file));
        }
        StoreConfig::Etcd(etcd) => {
            set("kind", text("etcd"));
            set("endpoints", list(&etcd.endpoints));
            set("prefix", text(&etcd.prefix));
            set("timeout", text(Shown(etcd.timeout)));
            if let Some(ca) = &etcd.ca {
                set("ca", path(ca));
            }
            if let Some(identity) = &etcd.identity {
                set("cert", path(&identity.cert));
                set("key", path(&identity.key));
            }
            if let Some(login) = &etcd.login {
                set("user", text(&login.user));
                set("password_file", path(&login.password_file));
            }
        }
    }
    table
}

fn format_name(format: LogFormat) -> &'static str {
    match format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    }
}

fn text(value: impl Display) -> Value {
    Value::String(value.to_string())
}

fn list<T: Display>(values: &[T]) -> Value {
    Value::Array(values.iter().map(text).collect())
}

/// Paths come from text, so nothing is lost.
fn path(path: &Path) -> Value {
    text(path.display())
}
