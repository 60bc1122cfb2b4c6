//! The short way to an answer: from the bytes of a plain query to those of its answer.
//!
//! Nearly all queries ask for the addresses of one name, and nearly all names have some. These are
//! answered here without taking the messages apart; whatever is not as plain as that goes the long way
//! ([`super::answer`]), which would answer these the same.

use rand::RngExt as _;

use super::answer::{Terms, Transport};
use super::plain::{Counts, HEADER, IN, PlainQuery};
use super::{Entry, Names};

/// The types of addresses (RFC 1035, 3.2.2; RFC 3596, 2.1).
const A: [u8; 2] = [0, 1];
const AAAA: [u8; 2] = [0, 28];
/// The most records that are drawn from: more do not fit into a datagram.
const MAX_RECORDS: usize = 128;

/// Where the short way leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quick {
    /// To the answer, which is written.
    Answered,
    /// Elsewhere: the name is not one of ours.
    Foreign,
    /// It has to be the long one.
    No,
}

/// What a name is for a client.
enum Looked<'a> {
    Entry(&'a Entry),
    Foreign,
    /// There is more to say of it.
    Other,
}

impl Terms<'_> {
    /// Answers a plain query where that is quickly done: adds the answer's bytes to others.
    pub fn quick(
        &self,
        query: &PlainQuery<'_>,
        transport: Transport,
        rng: &mut impl rand::Rng,
        answer: &mut Vec<u8>,
    ) -> Quick {
        let entry = match look_up(&self.names, query) {
            Looked::Entry(entry) => entry,
            Looked::Foreign => return Quick::Foreign,
            Looked::Other => return Quick::No,
        };
        let (count, size) = match query.kind {
            A => (entry.v4.len(), 16),
            AAAA => (entry.v6.len(), 28),
            _ => return Quick::No,
        };
        if count == 0 || count > MAX_RECORDS || !query.fits(count * size, transport) {
            return Quick::No;
        }
        // With authority.
        let counts = Counts { answers: count as u16, authorities: 0, additionals: 0 };
        query.begin([0x04, 0], counts, answer);
        let mut order: [u8; MAX_RECORDS] = std::array::from_fn(|index| index as u8);
        let order = order.get_mut(..count).unwrap_or_default();
        for index in (1..count).rev() {
            order.swap(index, rng.random_range(0..=index));
        }
        for index in order {
            // The name is where the question has it (RFC 1035, 4.1.4).
            answer.extend([0xc0, HEADER as u8]);
            answer.extend(query.kind);
            answer.extend(IN);
            answer.extend(self.ttl.to_be_bytes());
            let index = usize::from(*index);
            match (query.kind, entry.v4.get(index), entry.v6.get(index)) {
                (A, Some(address), _) => {
                    answer.extend([0, 4]);
                    answer.extend(address.octets());
                }
                (_, _, Some(address)) => {
                    answer.extend([0, 16]);
                    answer.extend(address.octets());
                }
                _ => {}
            }
        }
        query.end(answer);
        Quick::Answered
    }
}

/// What a name is: as [`Names::find`].
fn look_up<'a>(names: &Names<'a>, query: &PlainQuery<'_>) -> Looked<'a> {
    let in_zone = |network: usize| {
        let label = query.label(network);
        let zone = names.zones.iter().find(|zone| zone.name.as_str().as_bytes() == label)?;
        zone.get(query.first(network))
    };
    if let Some(count) = query.before(names.domain.count(), names.domain.wire()) {
        let network = count.checked_sub(1).filter(|network| *network > 0);
        return network.and_then(in_zone).map_or(Looked::Other, Looked::Entry);
    }
    let Some(last) = query.count().checked_sub(1) else { return Looked::Other };
    if query.label(last) == b"arpa" {
        return Looked::Other;
    }
    if !names.short {
        return Looked::Foreign;
    }
    let short = names.zones.iter().find_map(|zone| zone.get(query.name()));
    let found = short.or_else(|| if last > 0 { in_zone(last) } else { None });
    found.map_or(Looked::Foreign, Looked::Entry)
}

#[cfg(test)]
mod tests;
