//! The short way to an answer: from the bytes of a plain query to those of its answer.
//!
//! Nearly all queries ask for the addresses of one name, and nearly all names have some. These are
//! answered here without taking the messages apart; whatever is not as plain as that goes the long way
//! ([`super::answer`]), which would answer these the same.

use rand::RngExt as _;

use super::answer::{MAX_UDP, Terms, Transport};
use super::{Entry, Names};

/// The bytes of a header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
/// The most labels of a name: each takes two bytes at least.
const MAX_LABELS: usize = 127;
/// The most bytes of a name without the root's label.
const MAX_NAME: usize = 254;
/// The bytes of an OPT record without options (RFC 6891, 6.1.2).
const OPT: usize = 11;
/// The types and the class of addresses (RFC 1035, 3.2; RFC 3596, 2.1).
const A: [u8; 2] = [0, 1];
const AAAA: [u8; 2] = [0, 28];
const IN: [u8; 2] = [0, 1];
/// The type of an OPT record.
const OPT_TYPE: [u8; 2] = [0, 41];
/// The most records that are drawn from: more do not fit into a datagram.
const MAX_RECORDS: usize = 128;

/// A plain query.
struct Query<'a> {
    /// The question with all that is before it.
    head: &'a [u8],
    /// The name in lower case, without the root's label, in the first bytes.
    name: [u8; MAX_NAME],
    /// Where each label begins, and where the last one ends.
    starts: [u8; MAX_LABELS + 1],
    labels: usize,
    ipv4: bool,
    /// How many bytes the client takes, and whether it wants signatures; where it says so.
    edns: Option<(u16, bool)>,
}

impl Terms<'_> {
    /// Answers a query where it is a plain one; `None`: it has to go the long way.
    pub fn quick(
        &self,
        query: &[u8],
        transport: Transport,
        rng: &mut impl rand::Rng,
    ) -> Option<Vec<u8>> {
        let query = Query::read(query)?;
        let entry = find(&self.names, &query)?;
        let (count, size) = match query.ipv4 {
            true => (entry.v4.len(), 16),
            false => (entry.v6.len(), 28),
        };
        let opt = if query.edns.is_some() { OPT } else { 0 };
        let length = query.head.len() + count * size + opt;
        let most = transport.max_size(query.edns.map(|(size, _)| size));
        if count == 0 || count > MAX_RECORDS || length > usize::from(most) {
            return None;
        }
        let mut answer = Vec::with_capacity(length);
        answer.extend_from_slice(query.head);
        let recursion_desired = answer.get(2)? & 1;
        let more = u8::from(query.edns.is_some());
        // It is an answer, with authority, and recursion is available.
        let flags = [0x84 | recursion_desired, 0x80];
        let counts = [0, 1, 0, u8::try_from(count).ok()?, 0, 0, 0, more];
        answer.get_mut(2..4)?.copy_from_slice(&flags);
        answer.get_mut(4..HEADER)?.copy_from_slice(&counts);
        let mut order: [u8; MAX_RECORDS] = std::array::from_fn(|index| index as u8);
        let order = order.get_mut(..count)?;
        for index in (1..count).rev() {
            order.swap(index, rng.random_range(0..=index));
        }
        for index in order {
            let index = usize::from(*index);
            // The name is where the question has it (RFC 1035, 4.1.4).
            answer.extend([0xc0, HEADER as u8]);
            answer.extend(if query.ipv4 { A } else { AAAA });
            answer.extend(IN);
            answer.extend(self.ttl.to_be_bytes());
            match query.ipv4 {
                true => {
                    answer.extend([0, 4]);
                    answer.extend(entry.v4.get(index)?.octets());
                }
                false => {
                    answer.extend([0, 16]);
                    answer.extend(entry.v6.get(index)?.octets());
                }
            }
        }
        if let Some((_, signed)) = query.edns {
            let [high, low] = MAX_UDP.to_be_bytes();
            let flags = if signed { 0x80 } else { 0 };
            answer.extend([0, OPT_TYPE[0], OPT_TYPE[1], high, low, 0, 0, flags, 0, 0, 0]);
        }
        Some(answer)
    }
}

impl<'a> Query<'a> {
    /// Reads a query that is nothing but a question for addresses.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        let [_, _, kind, flags, counts @ ..] = header;
        // A query, whole; it may want recursion, and know of validation.
        let [0, 1, 0, 0, 0, 0, 0, more @ (0 | 1)] = counts else { return None };
        if kind & !1 != 0 || flags & !0x20 != 0 {
            return None;
        }
        let mut query = Self {
            head: bytes,
            name: [0; MAX_NAME],
            starts: [0; MAX_LABELS + 1],
            labels: 0,
            ipv4: true,
            edns: None,
        };
        let mut at = HEADER;
        loop {
            let length = usize::from(*bytes.get(at)?);
            let start = at - HEADER;
            *query.starts.get_mut(query.labels)? = u8::try_from(start).ok()?;
            match length {
                0 => break,
                // A pointer has nowhere to point to.
                1..64 => {}
                _ => return None,
            }
            let label = bytes.get(at..=at + length)?;
            let place = query.name.get_mut(start..start + label.len())?;
            place.copy_from_slice(label);
            // The length is no letter.
            place.make_ascii_lowercase();
            query.labels += 1;
            at += label.len();
        }
        let question = bytes.get(at + 1..at + 5)?;
        query.ipv4 = match [question[0], question[1]] {
            A => true,
            AAAA => false,
            _ => return None,
        };
        if question[2..] != IN || query.labels == 0 {
            return None;
        }
        let (head, rest) = bytes.split_at_checked(at + 5)?;
        query.head = head;
        query.edns = match (more, rest) {
            (0, []) => None,
            // Version 0, and no part of a code; whatever options there are.
            (1, [0, 0, 41, high, low, 0, 0, signed, 0, length @ ..]) => {
                let [a, b, options @ ..] = length else { return None };
                if options.len() != usize::from(u16::from_be_bytes([*a, *b])) || signed & 0x7f != 0 {
                    return None;
                }
                Some((u16::from_be_bytes([*high, *low]), signed & 0x80 != 0))
            }
            _ => return None,
        };
        Some(query)
    }

    /// The first labels of the name.
    fn first(&self, count: usize) -> &[u8] {
        let end = self.starts.get(count).copied().map_or(0, usize::from);
        self.name.get(..end).unwrap_or_default()
    }

    /// One label, without its length.
    fn label(&self, number: usize) -> &[u8] {
        let start = usize::from(self.starts[number]) + 1;
        self.first(number + 1).get(start..).unwrap_or_default()
    }

    /// How many labels stand before a name with which this one ends.
    fn before(&self, labels: usize, wire: &[u8]) -> Option<usize> {
        let count = self.labels.checked_sub(labels)?;
        let rest = self.first(self.labels).get(self.first(count).len()..)?;
        (rest == wire).then_some(count)
    }
}

/// What a name has, where it has anything: as [`Names::find`].
fn find<'a>(names: &Names<'a>, query: &Query<'_>) -> Option<&'a Entry> {
    let in_zone = |network: usize| {
        let label = query.label(network);
        let zone = names.zones.iter().find(|zone| zone.name.as_str().as_bytes() == label)?;
        zone.get(query.first(network))
    };
    if let Some(count) = query.before(names.domain.count(), names.domain.wire()) {
        return in_zone(count.checked_sub(1).filter(|network| *network > 0)?);
    }
    let last = query.labels.checked_sub(1)?;
    if query.label(last) == b"arpa" {
        return None;
    }
    if !names.short {
        return None;
    }
    let whole = query.first(query.labels);
    let short = names.zones.iter().find_map(|zone| zone.get(whole));
    short.or_else(|| if last > 0 { in_zone(last) } else { None })
}

#[cfg(test)]
mod tests;
