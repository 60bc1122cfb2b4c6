//! Queries that are read without taking a message apart.

use super::answer::{MAX_UDP, Transport};

/// The bytes of a header (RFC 1035, 4.1.1).
pub(super) const HEADER: usize = 12;
/// The most labels of a name: each takes two bytes at least.
const MAX_LABELS: usize = 127;
/// The most bytes of a name without the root's label.
const MAX_NAME: usize = 254;
/// The bytes of an OPT record without options (RFC 6891, 6.1.2).
const OPT: usize = 11;
/// The type of an OPT record.
const OPT_TYPE: [u8; 2] = [0, 41];
/// The class of the Internet (RFC 1035, 3.2.4).
pub(super) const IN: [u8; 2] = [0, 1];

/// A query that is nothing but a question: nearly all are.
#[derive(Debug)]
pub struct PlainQuery<'a> {
    /// The question with all that is before it.
    head: &'a [u8],
    /// The name in lower case, without the root's label, in the first bytes.
    name: [u8; MAX_NAME],
    /// Where each label begins, and where the last one ends.
    starts: [u8; MAX_LABELS + 1],
    labels: usize,
    /// The type that is asked for.
    pub(super) kind: [u8; 2],
    /// How many bytes the client takes, and whether it wants signatures; where it says so.
    edns: Option<(u16, bool)>,
}

/// How many records the sections of an answer have that come after the question.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) answers: u16,
    pub(super) authorities: u16,
    pub(super) additionals: u16,
}

impl<'a> PlainQuery<'a> {
    /// Reads a query; `None`: it is not as plain as that, or cannot be read at all.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
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
            kind: [0; 2],
            edns: None,
        };
        let end = query.read_name(bytes)?;
        let (head, rest) = bytes.split_at_checked(end + 4)?;
        let (_, [a, b, class @ ..]) = head.split_last_chunk::<4>()?;
        if *class != IN || query.labels == 0 {
            return None;
        }
        query.kind = [*a, *b];
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

    /// Reads the name of the question; gives where it ends.
    fn read_name(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = HEADER;
        loop {
            let length = usize::from(*bytes.get(at)?);
            let start = at - HEADER;
            *self.starts.get_mut(self.labels)? = u8::try_from(start).ok()?;
            match length {
                0 => return Some(at + 1),
                // A pointer has nowhere to point to.
                1..64 => {}
                _ => return None,
            }
            let label = bytes.get(at..=at + length)?;
            let place = self.name.get_mut(start..start + label.len())?;
            place.copy_from_slice(label);
            // The length is no letter.
            place.make_ascii_lowercase();
            self.labels += 1;
            at += label.len();
        }
    }

    /// The whole name in lower case, as the wire has it, without the root's label.
    pub fn name(&self) -> &[u8] {
        self.first(self.labels)
    }

    /// The type that is asked for.
    pub fn kind(&self) -> u16 {
        u16::from_be_bytes(self.kind)
    }

    /// Whether signatures are wanted.
    pub fn is_signed(&self) -> bool {
        self.edns.is_some_and(|(_, signed)| signed)
    }

    /// How many labels the name has.
    pub(super) fn count(&self) -> usize {
        self.labels
    }

    /// The first labels of the name.
    pub(super) fn first(&self, count: usize) -> &[u8] {
        let end = self.starts.get(count).copied().map_or(0, usize::from);
        self.name.get(..end).unwrap_or_default()
    }

    /// One label, without its length.
    pub(super) fn label(&self, number: usize) -> &[u8] {
        let start = self.starts.get(number).map_or(0, |start| usize::from(*start) + 1);
        self.first(number + 1).get(start..).unwrap_or_default()
    }

    /// How many labels stand before a name with which this one ends.
    pub(super) fn before(&self, labels: usize, wire: &[u8]) -> Option<usize> {
        let count = self.labels.checked_sub(labels)?;
        let rest = self.name().get(self.first(count).len()..)?;
        (rest == wire).then_some(count)
    }

    /// Whether an answer may have so many bytes after the question.
    pub(super) fn fits(&self, bytes: usize, transport: Transport) -> bool {
        let opt = if self.edns.is_some() { OPT } else { 0 };
        let most = transport.max_size(self.edns.map(|(size, _)| size));
        self.head.len() + bytes + opt <= usize::from(most)
    }

    /// Begins an answer, with the question: `flags` are added to those that every answer has.
    pub(super) fn begin(&self, flags: [u8; 2], counts: Counts, answer: &mut Vec<u8>) {
        let [id_high, id_low, kind, ..] = *self.head else { return };
        // It is an answer, and recursion is available.
        let flags = [0x80 | flags[0] | kind & 1, 0x80 | flags[1]];
        answer.extend([id_high, id_low, flags[0], flags[1], 0, 1]);
        let more = u16::from(self.edns.is_some());
        for count in [counts.answers, counts.authorities, counts.additionals + more] {
            answer.extend(count.to_be_bytes());
        }
        answer.extend_from_slice(self.head.get(HEADER..).unwrap_or_default());
    }

    /// Ends an answer.
    pub(super) fn end(&self, answer: &mut Vec<u8>) {
        if let Some((_, signed)) = self.edns {
            let [high, low] = MAX_UDP.to_be_bytes();
            let flags = if signed { 0x80 } else { 0 };
            answer.extend([0, OPT_TYPE[0], OPT_TYPE[1], high, low, 0, 0, flags, 0, 0, 0]);
        }
    }
}
