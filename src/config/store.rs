//! The checks of the `[store]` section.

use std::path::Path;

use super::check::{Check, absolute, readable};
use super::{EtcdConfig, Identity, Login, StoreConfig};

/// The settings that mean something for etcd only.
const ETCD_ONLY: [&str; 8] = [
    "store.endpoints",
    "store.prefix",
    "store.ca",
    "store.cert",
    "store.key",
    "store.user",
    "store.password_file",
    "store.timeout",
];

/// Checks the store's settings.
pub(super) fn check(check: &mut Check<'_>, state_dir: &Path) -> StoreConfig {
    let etcd = check.value("store.kind", false, |text| match text {
        "embedded" => Ok(false),
        "etcd" => Ok(true),
        other => Err(format!("{other:?} is not a kind of store: give embedded or etcd")),
    });
    if etcd {
        if check.given("store.path") {
            check.report("store.path", "the kind of store is etcd, which has no path".to_owned());
        }
        return StoreConfig::Etcd(self::etcd(check));
    }
    for key in ETCD_ONLY {
        if check.given(key) {
            let message = "the kind of store is embedded: give the kind etcd too, or leave this out";
            check.report(key, message.to_owned());
        }
    }
    StoreConfig::Embedded { path: check.value("store.path", state_dir.join("store.redb"), absolute) }
}

fn etcd(check: &mut Check<'_>) -> EtcdConfig {
    let endpoints = endpoints(check);
    let prefix = check.value("store.prefix", "netctl/".to_owned(), prefix);
    let file = |check: &mut Check<'_>, key| check.value(key, None, |text| readable(text).map(Some));
    let ca = file(check, "store.ca");
    let pair = (file(check, "store.cert"), file(check, "store.key"));
    let user = check.value("store.user", None, |text| Ok(Some(text.to_owned())));
    let password_file = file(check, "store.password_file");
    together(check, "store.cert", "store.key");
    together(check, "store.user", "store.password_file");
    if endpoints.iter().any(|url| url.starts_with("http://")) {
        for key in ["store.ca", "store.cert", "store.key"] {
            if check.given(key) {
                let message = "an endpoint is http, which uses no certificate: give https everywhere";
                check.report(key, message.to_owned());
            }
        }
    }
    let identity = match pair {
        (Some(cert), Some(key)) => Some(Identity { cert, key }),
        _ => None,
    };
    let login = match (user, password_file) {
        (Some(user), Some(password_file)) => Some(Login { user, password_file }),
        _ => None,
    };
    let timeout = check.duration("store.timeout", "1500ms", "100ms", "2s");
    EtcdConfig { endpoints, prefix, ca, identity, login, timeout }
}

fn endpoints(check: &mut Check<'_>) -> Vec<String> {
    let endpoints = check.list("store.endpoints").unwrap_or_default();
    if endpoints.is_empty() {
        let key = if check.given("store.endpoints") { "store.endpoints" } else { "store.kind" };
        let message = "etcd needs store.endpoints, such as https://10.0.0.1:2379";
        check.report(key, message.to_owned());
    }
    for url in endpoints.iter().filter(|url| !is_url(url)) {
        let message = format!("{url:?} is not http://HOST:PORT or https://HOST:PORT");
        check.report("store.endpoints", message);
    }
    let secure = endpoints.iter().filter(|url| url.starts_with("https://")).count();
    if secure != 0 && secure != endpoints.len() {
        let message = "some are http and some https: what https protects would go over http too";
        check.report("store.endpoints", message.to_owned());
    }
    endpoints
}

fn is_url(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let Some((host, port)) = rest.and_then(|rest| rest.rsplit_once(':')) else { return false };
    let host_byte = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let named = !host.is_empty() && host.bytes().all(host_byte);
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let ipv6 = bracketed.is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok());
    (named || ipv6) && port.parse::<u16>().is_ok_and(|port| port != 0)
}

fn prefix(text: &str) -> Result<String, String> {
    let valid = text.len() > 1 && text.ends_with('/') && text.bytes().all(|b| b.is_ascii_graphic());
    if valid { Ok(text.to_owned()) } else { Err(format!("{text:?} must be a name that ends with '/'")) }
}

/// Reports one of a pair that comes without the other.
fn together(check: &mut Check<'_>, a: &str, b: &str) {
    for (here, missing) in [(a, b), (b, a)] {
        if check.given(here) && !check.given(missing) {
            check.report(here, format!("{missing} is needed too"));
        }
    }
}
