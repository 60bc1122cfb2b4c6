//! Names that people give: of networks and endpoints, of nodes, of interfaces.

use std::fmt;
use std::str::FromStr;

use super::id::{text_schema, text_serde};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {shown:?} {problem}")]
pub struct NameError {
    what: &'static str,
    shown: String,
    problem: &'static str,
}

impl NameError {
    fn new(what: &'static str, text: &str, problem: &'static str) -> Self {
        let mut shown: String = text.chars().take(40).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        Self { what, shown, problem }
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:path, $pattern:literal, $description:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match $check(text) {
                    None => Ok(Self(text.into())),
                    Some(problem) => Err(NameError::new($what, text, problem)),
                }
            }
        }

        text_serde!($name);
        text_schema!($name, $pattern, $description);
    };
}

name_type!(
    /// The name of a network or an endpoint: one DNS label (RFC 1123), with `_` allowed inside
    /// because compose files make such names. 1 to 63 of `a-z 0-9 - _`, a letter or digit at both
    /// ends.
    Name,
    "name",
    label_problem,
    "^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$",
    "1 to 63 of a-z 0-9 - _, a letter or digit at both ends."
);
name_type!(
    /// The name of a node: a host name, that is labels with dots between, up to 253 bytes.
    NodeName,
    "node name",
    host_problem,
    r"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?)*$",
    "A host name: labels with dots between, at most 253 characters."
);
name_type!(
    /// The name of a network interface: 1 to 15 bytes that the kernel accepts
    /// (`dev_valid_name` in net/core/dev.c).
    IfName,
    "interface name",
    interface_problem,
    "^[!-$&-.0-9;-~]{1,15}$",
    "The name of a network interface: 1 to 15 bytes."
);

fn label_problem(text: &str) -> Option<&'static str> {
    let inner = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    let outer = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    if bytes.is_empty() {
        Some("is empty: give 1 to 63 characters")
    } else if bytes.len() > 63 {
        Some("is too long: give 1 to 63 characters")
    } else if !bytes.iter().all(|&b| inner(b)) {
        Some("has a character that is not allowed: use a-z, 0-9, '-' and '_'")
    } else if !outer(bytes.first()) || !outer(bytes.last()) {
        Some("must begin and end with a letter or a digit")
    } else {
        None
    }
}

fn host_problem(text: &str) -> Option<&'static str> {
    if text.len() > 253 {
        return Some("is too long: give at most 253 characters");
    }
    text.split('.').find_map(label_problem)
}

fn interface_problem(text: &str) -> Option<&'static str> {
    if text.is_empty() || text.len() > 15 {
        Some("must have 1 to 15 bytes")
    } else if text == "." || text == ".." || text == "lo" {
        Some("is reserved")
    } else if text.bytes().any(|b| b == b'/' || b == b':' || b == b'%' || !b.is_ascii_graphic()) {
        Some("has a character that is not allowed in an interface name")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_as_people_write_them_are_names() {
        for text in ["a", "web", "shop_db-1", "0", &"x".repeat(63)] {
            assert!(text.parse::<Name>().is_ok(), "{text}");
        }
    }

    #[test]
    fn a_name_that_dns_or_a_path_cannot_carry_is_refused() {
        for text in ["", "-a", "a-", "_a", "a/b", "a.b", "A", "ä", "a b", "..", &"x".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_does_not_repeat_300_characters() {
        let error = "x".repeat(300).parse::<Name>().unwrap_err().to_string();
        assert!(error.contains("too long") && error.len() < 120, "{error}");
    }

    #[test]
    fn node_names_may_have_dots() {
        assert!("db1.rack-2.example".parse::<NodeName>().is_ok());
        assert!("db1..example".parse::<NodeName>().is_err());
    }

    #[test]
    fn interface_names_follow_the_kernel() {
        assert!("eth0".parse::<IfName>().is_ok());
        for text in ["", "lo", "..", "a/b", "a b", "0123456789abcdef"] {
            assert!(text.parse::<IfName>().is_err(), "{text}");
        }
    }
}
