//! Domain names as keys.

use std::fmt;

/// The most bytes of a name in the wire's form, with the root's label (RFC 1035, 2.3.4).
const MAX_NAME: usize = 255;
/// The most bytes of a label (RFC 1035, 2.3.4).
const MAX_LABEL: usize = 63;

/// A domain name in lower case, as names are compared (RFC 4343).
///
/// It is kept as the wire has it, each label after its length, without the root's empty one: so the
/// first labels of a name are a part of its bytes.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainName {
    wire: Vec<u8>,
    /// Where each label's length is.
    starts: Vec<u8>,
}

impl DomainName {
    /// The name of these labels; `None`: one is empty or too long, or all together are.
    pub fn new<'a>(labels: impl IntoIterator<Item = &'a [u8]>) -> Option<Self> {
        let mut name = Self::default();
        for label in labels {
            if label.is_empty() || label.len() > MAX_LABEL {
                return None;
            }
            name.starts.push(u8::try_from(name.wire.len()).ok()?);
            name.wire.push(label.len() as u8);
            name.wire.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        // The root's label is one byte.
        (name.wire.len() < MAX_NAME).then_some(name)
    }

    /// Reads a name with dots between its labels, and with or without one at its end.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        Self::new(text.split('.').map(str::as_bytes))
    }

    /// How many labels it has.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// The labels, from the left.
    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &[u8]> + ExactSizeIterator {
        self.starts.iter().map(|start| {
            let start = usize::from(*start);
            let length = self.wire.get(start).copied().map_or(0, usize::from);
            self.wire.get(start + 1..start + 1 + length).unwrap_or_default()
        })
    }

    /// The first labels, as the wire has them.
    pub fn first(&self, count: usize) -> &[u8] {
        let end = self.starts.get(count).map_or(self.wire.len(), |start| usize::from(*start));
        self.wire.get(..end).unwrap_or_default()
    }

    /// All labels, as the wire has them.
    pub fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// How many labels stand before a name with which this one ends.
    pub fn before(&self, suffix: &Self) -> Option<usize> {
        let count = self.count().checked_sub(suffix.count())?;
        (self.wire.get(self.first(count).len()..)? == suffix.wire).then_some(count)
    }

    /// The name without its first label; `None`: that would be the root.
    pub fn parent(&self) -> Option<Self> {
        (self.count() > 1).then(|| Self::new(self.labels().skip(1))).flatten()
    }

    /// This name with another one's labels after its own.
    pub fn under(&self, parent: &Self) -> Option<Self> {
        Self::new(self.labels().chain(parent.labels()))
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for label in self.labels() {
            write!(f, "{}.", label.escape_ascii())?;
        }
        if self.starts.is_empty() { f.write_str(".") } else { Ok(()) }
    }
}

impl fmt::Debug for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap()
    }

    #[test]
    fn names_are_compared_in_lower_case_and_with_or_without_the_last_dot() {
        assert_eq!(name("Web.SHOP.netctl.internal."), name("web.shop.netctl.internal"));
        assert_eq!(name("a.b").to_string(), "a.b.");
        assert_eq!(name("a.b").wire(), b"\x01a\x01b");
        assert_eq!(name("_http._tcp.web").labels().next().unwrap(), b"_http");
        assert_eq!(DomainName::default().to_string(), ".");
    }

    #[test]
    fn the_first_labels_are_what_stands_before_a_suffix() {
        let (all, domain) = (name("tasks.web.shop.netctl.internal"), name("netctl.internal"));
        assert_eq!(all.before(&domain), Some(3));
        assert_eq!(all.first(2), name("tasks.web").wire());
        assert_eq!(all.first(9), all.wire());
        assert_eq!(domain.before(&domain), Some(0));
        assert_eq!(domain.before(&all), None);
        // A label that only ends so is another one.
        assert_eq!(name("xnetctl.internal").before(&domain), None);
        assert_eq!(name("a.b").under(&name("c")), Some(name("a.b.c")));
    }

    #[test]
    fn what_is_too_long_or_empty_is_no_name() {
        let label = "a".repeat(63);
        assert!(DomainName::parse(&label).is_some());
        assert!(DomainName::parse(&format!("{label}a")).is_none());
        // 3 × 64 + 62 and the root's are 255.
        let longest = format!("{label}.{label}.{label}.{}", "a".repeat(61));
        assert!(DomainName::parse(&longest).is_some());
        assert!(DomainName::parse(&format!("{longest}a")).is_none());
        for text in ["", ".", "a..b", ".a"] {
            assert!(DomainName::parse(text).is_none(), "{text:?}");
        }
        assert!(DomainName::new(std::iter::repeat_n(&b"a"[..], 300)).is_none());
    }
}
