//! Values of the command line that are read in a form of their own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::config::duration;
use crate::model::Vni;

/// A `KEY=VALUE` text; a key alone has an empty value.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err("give KEY=VALUE".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Pairs as a map; a later one replaces an earlier one with the same key.
pub(super) fn map(pairs: Vec<(String, String)>) -> BTreeMap<String, String> {
    pairs.into_iter().collect()
}

/// A reserved address: `ADDRESS`, or `NAME=ADDRESS` as Docker has it.
pub(super) fn reserved(text: &str) -> Result<IpAddr, String> {
    let address = text.rsplit_once('=').map_or(text, |(_, address)| address);
    address.parse().map_err(|_| format!("{address:?} is not an IP address"))
}

/// A subnet, or a part of one.
pub(super) fn cidr(text: &str) -> Result<IpNetwork, String> {
    // An address alone would be read as a subnet that holds nothing else.
    let read = text.contains('/').then(|| text.parse().ok()).flatten();
    read.ok_or_else(|| {
        "give an address and a prefix length, such as 10.9.0.0/24 or fd00:9::/64".to_owned()
    })
}

/// A VNI.
pub(super) fn vni(text: &str) -> Result<Vni, String> {
    let number = text.parse().ok().and_then(Vni::new);
    number.ok_or_else(|| format!("give a number from 1 to {}", Vni::MAX))
}

/// A duration such as `10s`.
pub(super) fn wait(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|error| error.to_string())
}

/// A duration of whole seconds.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    let time = wait(text)?;
    let whole = u32::try_from(time.as_secs()).ok().filter(|_| time.subsec_nanos() == 0);
    whole.ok_or_else(|| format!("{text:?} cannot be used: give whole seconds, at most a day"))
}

/// A duration in the form of the API.
pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The path of a network namespace as the agent can use it.
///
/// A relative path is taken from here. `/proc/self` would be the agent itself, so it is refused.
pub(super) fn netns(text: &str) -> Result<PathBuf, String> {
    let path = std::path::absolute(Path::new(text)).map_err(|error| error.to_string())?;
    let own = ["/proc/self", "/proc/thread-self"].iter().any(|own| path.starts_with(own));
    if own {
        return Err("the agent would take that for its own process: give /proc/PID/ns/net".to_owned());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_address_may_have_a_name() {
        for text in ["10.9.0.9", "router=10.9.0.9"] {
            assert_eq!(reserved(text).unwrap().to_string(), "10.9.0.9");
        }
        assert!(reserved("router").is_err());
    }

    #[test]
    fn a_namespace_is_named_as_the_agent_can_use_it() {
        assert_eq!(netns("/run/netns/a").unwrap(), PathBuf::from("/run/netns/a"));
        assert!(netns("a").unwrap().is_absolute());
        assert!(netns("/proc/self/ns/net").is_err());
        assert!(netns("/proc/1/ns/net").is_ok());
    }

    #[test]
    fn a_label_is_split_at_its_first_equals_sign() {
        assert_eq!(pair("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert_eq!(pair("a").unwrap().1, "");
        assert!(pair("=b").is_err());
    }
}
