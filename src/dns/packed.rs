//! Answers of others, kept as the bytes that are sent.

use hickory_proto::op::Message;

use super::answer::Transport;
use super::plain::{Counts, HEADER, PlainQuery};

/// An answer without what differs from one query to the next: its number, the question as the client
/// has written it, the time that is left, and what is said about the transport.
#[derive(Debug)]
pub struct Packed {
    /// The bits of the second byte of flags: whether it is authentic, and the code.
    flags: u8,
    counts: Counts,
    /// What comes after the question.
    records: Vec<u8>,
    /// Where among that the records' times to live are.
    ttls: Vec<u16>,
}

impl Packed {
    /// Packs an answer that is whole; `None`: it is too large for that.
    pub fn new(answer: &Message) -> Option<Self> {
        let mut answer = answer.clone();
        answer.edns = None;
        let bytes = answer.to_vec().ok()?;
        let [_, _, _, flags, 0, 1, a, b, c, d, e, f, ..] = *bytes.as_slice() else { return None };
        let number = |high, low| u16::from_be_bytes([high, low]);
        let counts =
            Counts { answers: number(a, b), authorities: number(c, d), additionals: number(e, f) };
        let question = skip_name(&bytes, HEADER)? + 4;
        let (mut at, mut ttls) = (question, Vec::new());
        let all = [counts.answers, counts.authorities, counts.additionals];
        for _ in 0..all.iter().map(|count| usize::from(*count)).sum() {
            // Type, class, time to live, length, data (RFC 1035, 4.1.3).
            at = skip_name(&bytes, at)? + 4;
            ttls.push(u16::try_from(at - question).ok()?);
            let length: [u8; 2] = bytes.get(at + 4..at + 6)?.try_into().ok()?;
            at += 6 + usize::from(u16::from_be_bytes(length));
        }
        let records = bytes.get(question..at)?.to_vec();
        Some(Self { flags: flags & 0x2f, counts, records, ttls })
    }

    /// Answers the same question once more, after so many seconds: adds the answer's bytes to others.
    /// Tells whether it fits.
    pub fn write(
        &self,
        query: &PlainQuery<'_>,
        age: u32,
        transport: Transport,
        answer: &mut Vec<u8>,
    ) -> bool {
        if !query.fits(self.records.len(), transport) {
            return false;
        }
        query.begin([0, self.flags], self.counts, answer);
        let start = answer.len();
        answer.extend_from_slice(&self.records);
        let written = answer.get_mut(start..).unwrap_or_default();
        for at in &self.ttls {
            let ttl = written.get_mut(usize::from(*at)..).and_then(|rest| rest.first_chunk_mut::<4>());
            if let Some(ttl) = ttl {
                *ttl = u32::from_be_bytes(*ttl).saturating_sub(age).to_be_bytes();
            }
        }
        query.end(answer);
        true
    }
}

/// Where a name ends that begins there.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length @ 1..64 => at += 1 + usize::from(length),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Edns, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::{A, CNAME, MX, SOA};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;

    use super::*;
    use crate::dns::answer::tests::anything;
    use crate::dns::answer::{encode, max_size, relayed};

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn query(text: &str, kind: RecordType, edns: Option<(u16, bool)>) -> Message {
        let mut query = Message::new(0x1234, MessageType::Query, OpCode::Query);
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name(text), kind));
        query.edns = edns.map(|(size, signed)| {
            let mut edns = Edns::new();
            edns.set_max_payload(size).set_dnssec_ok(signed);
            edns
        });
        query
    }

    /// An answer of another server.
    fn answer(addresses: u8) -> Message {
        let mut answer = query("www.example.org.", RecordType::A, None);
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.authentic_data = true;
        let (www, host) = (name("www.example.org."), name("host.example.org."));
        let add = |owner: &Name, ttl, data| Record::from_rdata(owner.clone(), ttl, data);
        answer.answers.push(add(&www, 300, RData::CNAME(CNAME(host.clone()))));
        for last in 0..addresses {
            answer.answers.push(add(&host, 40 + u32::from(last), RData::A(A::new(192, 0, 2, last))));
        }
        let soa = SOA::new(host.clone(), www, 1, 2, 3, 4, 5);
        answer.authorities.push(add(&name("example.org."), 7, RData::SOA(soa)));
        answer.additionals.push(add(&host, 9, RData::MX(MX::new(1, name("mx.example.org.")))));
        answer
    }

    /// What is told of an answer that is kept: packed, and as it would be told without that.
    fn both(answer: &Message, query: &Message, age: u32) -> (Option<Message>, Message) {
        let bytes = query.to_vec().unwrap();
        let plain = PlainQuery::read(&bytes).unwrap();
        // It follows others.
        let mut written = vec![1, 2, 3];
        let packed = Packed::new(&relayed(query, answer)).unwrap();
        let fits = packed.write(&plain, age, Transport::Udp, &mut written);
        let mut long = relayed(query, answer);
        for record in long.answers.iter_mut().chain(&mut long.authorities).chain(&mut long.additionals) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        let long = encode(long, max_size(query, Transport::Udp)).unwrap();
        let read = |bytes: &[u8]| Message::from_vec(bytes).unwrap();
        (fits.then(|| read(&written[3..])), read(&long))
    }

    #[test]
    fn what_is_packed_is_told_like_any_other_answer() {
        for (asked, edns, age) in [
            ("www.example.org.", None, 0),
            ("WWW.Example.ORG.", Some((4096, true)), 8),
            ("www.example.org.", Some((512, false)), 1_000_000),
        ] {
            let (packed, long) = both(&answer(3), &query(asked, RecordType::A, edns), age);
            assert_eq!(packed.as_ref(), Some(&long), "{asked} {edns:?} {age}");
            let told = packed.unwrap();
            assert_eq!(told.queries[0].name().to_string(), asked, "as it was written");
            assert_eq!(told.answers[0].ttl, 300_u32.saturating_sub(age));
            assert!(told.metadata.authentic_data && told.metadata.recursion_available);
        }
    }

    #[test]
    fn nothing_is_told_too() {
        let mut none = query("www.example.org.", RecordType::AAAA, None);
        none.metadata.message_type = MessageType::Response;
        none.metadata.response_code = ResponseCode::NXDomain;
        let (packed, long) = both(&none, &query("www.example.org.", RecordType::AAAA, None), 1);
        assert_eq!(packed.unwrap(), long);
    }

    #[test]
    fn what_does_not_fit_goes_the_long_way() {
        let asked = |edns| query("www.example.org.", RecordType::A, edns);
        assert!(both(&answer(40), &asked(None), 0).0.is_none());
        let (packed, long) = both(&answer(40), &asked(Some((1232, false))), 0);
        assert_eq!(packed.unwrap(), long);
    }

    proptest! {
        #[test]
        fn any_plain_query_is_answered_readably(bytes in anything(), age: u32) {
            let packed = Packed::new(&answer(3)).unwrap();
            let mut written = Vec::new();
            if let Some(query) = PlainQuery::read(&bytes)
                && packed.write(&query, age, Transport::Udp, &mut written)
            {
                prop_assert_eq!(&written[..2], &bytes[..2]);
                prop_assert_eq!(written[2] & 0x80, 0x80);
            }
        }
    }
}
