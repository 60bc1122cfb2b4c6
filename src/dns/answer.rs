//! What is answered to a query.

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::seq::SliceRandom as _;

use super::{DomainName, Entry, Found, Kind, Names};

/// The largest message over UDP that reaches everybody in one piece (what DNS flag day 2020 agreed
/// upon): more is neither sent nor asked for.
pub const MAX_UDP: u16 = 1232;
/// The largest message over UDP to who does not say what it takes (RFC 1035, 4.2.1).
const MIN_UDP: u16 = 512;
/// The bytes of the smallest record of an answer: a pointer to the name, type, class, time to live,
/// length, and an IPv4 address.
const MIN_RECORD: usize = 16;

/// How often, in seconds, another server would ask for the zone, how soon again, and when it would give up
/// (RFC 1035, 3.3.13). There are none.
pub(super) const REFRESH: u32 = 60;
pub(super) const RETRY: u32 = 10;
pub(super) const EXPIRE: u32 = 3600;

/// How a query came, which says how large the answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a stream.
    Tcp,
}

impl Transport {
    /// How many bytes an answer may have, for a client that says how many it takes, or does not.
    pub(super) fn max_size(self, said: Option<u16>) -> u16 {
        match (self, said) {
            (Self::Tcp, _) => u16::MAX,
            (Self::Udp, Some(size)) => size.clamp(MIN_UDP, MAX_UDP),
            (Self::Udp, None) => MIN_UDP,
        }
    }
}

/// What is to be done about a query.
#[derive(Debug, Clone)]
pub enum Reply {
    /// This is the answer.
    Ours(Message),
    /// Somebody else is to be asked.
    Elsewhere,
    /// It is no query: who sent it gets nothing.
    Nothing,
}

/// With what a client's queries are answered.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// What the client finds.
    pub names: Names<'a>,
    /// For how many seconds an answer may be kept.
    pub ttl: u32,
    /// The number of the state that is told: it grows.
    pub serial: u32,
}

impl Terms<'_> {
    /// Answers a query, where that is ours to do. Which of many addresses comes first is drawn.
    pub fn reply(&self, query: &Message, transport: Transport, rng: &mut impl rand::Rng) -> Reply {
        let question = match acceptable(query) {
            Ok(question) => question,
            Err(None) => return Reply::Nothing,
            Err(Some(code)) => return Reply::Ours(refusal(query, code)),
        };
        // The other classes have nothing to do with networks.
        let name = match question.query_class() {
            DNSClass::IN => DomainName::new(question.name().iter()),
            _ => return Reply::Ours(refusal(query, ResponseCode::Refused)),
        };
        let name = name.unwrap_or_default();
        let found = self.names.find(&name);
        if found == Found::Foreign {
            return Reply::Elsewhere;
        }
        let mut message = response(query);
        message.metadata.authoritative = true;
        let most = usize::from(max_size(query, transport)) / MIN_RECORD + 1;
        let mut data = self.data(&found, &name, question.query_type());
        data.shuffle(rng);
        data.truncate(most);
        let record = |data| Record::from_rdata(question.name().clone(), self.ttl, data);
        message.additionals =
            data.iter().flat_map(|data| self.addresses_of(&found, data)).take(most).collect();
        message.answers = data.into_iter().map(record).collect();
        if found == Found::Missing {
            message.metadata.response_code = ResponseCode::NXDomain;
        }
        if message.answers.is_empty() {
            message.authorities.extend(self.authority(&name, question.name(), &found));
        }
        Reply::Ours(message)
    }

    /// The answer to who can ask nobody else: there is no outside.
    pub fn inside(&self, query: &Message) -> Message {
        let mut message = refusal(query, ResponseCode::NXDomain);
        if let [question] = query.queries.as_slice() {
            let name = DomainName::new(question.name().iter()).unwrap_or_default();
            message.authorities.extend(self.authority(&name, question.name(), &Found::Missing));
        }
        message
    }

    /// What a name has of a type.
    fn data(&self, found: &Found<'_>, name: &DomainName, kind: RecordType) -> Vec<RData> {
        match (found, kind) {
            (Found::Entry(_, entry), RecordType::A) => v4(entry),
            (Found::Entry(_, entry), RecordType::AAAA) => v6(entry),
            (Found::Entry(zone, entry), RecordType::SRV) => self.ports(*zone, entry),
            (Found::Address(full), RecordType::PTR) => {
                wire_name(full).map(|name| RData::PTR(PTR(name))).into_iter().collect()
            }
            (Found::Branch, RecordType::SOA) if name == self.names.domain => {
                self.soa().into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Where what a name stands for is reached: every target as likely as the others.
    fn ports(&self, zone: usize, entry: &Entry) -> Vec<RData> {
        let Some(zone) = self.names.zones.get(zone) else { return Vec::new() };
        let target = |(name, port): &(DomainName, u16)| {
            let target = wire_name(&self.names.full(zone, name)?)?;
            Some(RData::SRV(SRV::new(0, 0, *port, target)))
        };
        entry.ports.iter().filter_map(target).collect()
    }

    /// The addresses of who is named by data that was found: so nobody has to ask for them.
    fn addresses_of(&self, found: &Found<'_>, data: &RData) -> Vec<Record> {
        let (Found::Entry(zone, _), RData::SRV(srv)) = (found, data) else { return Vec::new() };
        let target = DomainName::new(srv.target.iter());
        let Some(target) = target else { return Vec::new() };
        let Found::Entry(of, entry) = self.names.find(&target) else { return Vec::new() };
        let data = if of == *zone { [v4(entry), v6(entry)].concat() } else { Vec::new() };
        let record = |data| Record::from_rdata(srv.target.clone(), self.ttl, data);
        data.into_iter().map(record).collect()
    }

    /// The record that says for how long nothing is there (RFC 2308): that of our domain, or for
    /// names that are not below it, of a zone that has no more than what was asked for.
    fn authority(&self, name: &DomainName, asked: &Name, found: &Found<'_>) -> Option<Record> {
        let zone = match name.before(self.names.domain) {
            Some(before) => asked.trim_to(asked.iter().len() - before),
            None if *found == Found::Missing => asked.base_name(),
            None => asked.clone(),
        };
        Some(Record::from_rdata(zone, self.ttl, self.soa()?))
    }

    fn soa(&self) -> Option<RData> {
        let [server, person] = authorities(self.names.domain)?.map(|name| wire_name(&name));
        let (refresh, retry, expire) = (REFRESH as i32, RETRY as i32, EXPIRE as i32);
        let soa = SOA::new(server?, person?, self.serial, refresh, retry, expire, self.ttl);
        Some(RData::SOA(soa))
    }
}

/// The question of a query that can be answered, or with which code it is refused. Who sent no query
/// gets nothing.
fn acceptable(query: &Message) -> Result<&Query, Option<ResponseCode>> {
    if query.metadata.message_type != MessageType::Query {
        return Err(None);
    }
    if query.metadata.op_code != OpCode::Query {
        return Err(Some(ResponseCode::NotImp));
    }
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Err(Some(ResponseCode::BADVERS));
    }
    let [question] = query.queries.as_slice() else { return Err(Some(ResponseCode::FormErr)) };
    match question.query_type() {
        // All of a name, or of a zone, is what floods are made of (RFC 8482).
        RecordType::ANY | RecordType::AXFR | RecordType::IXFR => Err(Some(ResponseCode::Refused)),
        _ => Ok(question),
    }
}

/// The beginning of an answer.
fn response(query: &Message) -> Message {
    let mut message = Message::new(0, MessageType::Response, query.metadata.op_code);
    message.metadata = Metadata::response_from_request(&query.metadata);
    message.metadata.recursion_available = true;
    message.queries = query.queries.clone();
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP).set_dnssec_ok(asked.flags().dnssec_ok);
        message.edns = Some(edns);
    }
    message
}

/// The answer to a query that cannot be read; `None`: it is none, or has not even a number.
pub fn unreadable(query: &[u8]) -> Option<Vec<u8>> {
    let header: &[u8; 12] = query.first_chunk()?;
    let [high, low, kind, ..] = *header;
    // With the kind and whether recursion is wanted as they came.
    let answer = [high, low, 0x80 | kind & 0x79, 0x80 | 1, 0, 0, 0, 0, 0, 0, 0, 0];
    (kind & 0x80 == 0).then(|| answer.to_vec())
}

/// An answer that has nothing but a code.
pub fn refusal(query: &Message, code: ResponseCode) -> Message {
    let mut message = response(query);
    message.metadata.response_code = code;
    message
}

/// The answer to a query that somebody else has given.
pub fn relayed(query: &Message, answer: &Message) -> Message {
    let mut message = response(query);
    message.metadata.response_code = answer.metadata.response_code;
    message.metadata.authentic_data = answer.metadata.authentic_data;
    message.metadata.truncation = answer.metadata.truncation;
    message.answers.clone_from(&answer.answers);
    message.authorities.clone_from(&answer.authorities);
    message.additionals.clone_from(&answer.additionals);
    message
}

/// How many bytes the answer to a query may have.
pub fn max_size(query: &Message, transport: Transport) -> u16 {
    transport.max_size(query.edns.as_ref().map(Edns::max_payload))
}

/// Encodes an answer. One that is too large loses records from its end, and says so: who asked by a
/// datagram may ask again by a stream. `None`: it cannot be encoded at all.
pub fn encode(mut message: Message, max: u16) -> Option<Vec<u8>> {
    let max = usize::from(max);
    loop {
        let bytes = message.to_vec().ok()?;
        // Of what is longer than any message can be the end is cut off already.
        let is_cut = !message.metadata.truncation && bytes.get(2).is_some_and(|flags| flags & 2 != 0);
        if bytes.len() <= max && !is_cut {
            return Some(bytes);
        }
        // What only comes with an answer goes first, and is not missed (RFC 2181, 9).
        if !message.additionals.is_empty() {
            message.additionals.clear();
            continue;
        }
        message.metadata.truncation = true;
        if !message.authorities.is_empty() {
            message.authorities.clear();
        } else {
            let count = message.answers.len();
            let fits = if is_cut { count - count / 16 } else { count * max / bytes.len() };
            message.answers.truncate(fits.min(count.checked_sub(1)?));
        }
    }
}

/// The server of a domain, and who is responsible for it, by their names.
pub(super) fn authorities(domain: &DomainName) -> Option<[DomainName; 2]> {
    let below = |label: &str| DomainName::parse(label)?.under(domain);
    Some([below("ns")?, below("hostmaster")?])
}

fn v4(entry: &Entry) -> Vec<RData> {
    entry.v4.iter().map(|address| RData::A(A(*address))).collect()
}

fn v6(entry: &Entry) -> Vec<RData> {
    entry.v6.iter().map(|address| RData::AAAA(AAAA(*address))).collect()
}

fn wire_name(name: &DomainName) -> Option<Name> {
    let mut name = Name::from_labels(name.labels()).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// What was found, in a few words.
pub fn describe(found: &Found<'_>) -> &'static str {
    match found {
        Found::Entry(_, entry) => match entry.kind {
            Kind::Endpoint => "an endpoint",
            Kind::Service => "a service",
            Kind::Tasks => "the ready endpoints of a service, and its targets outside",
            Kind::Port => "a port of a service",
            Kind::Gateway => "the gateway",
            Kind::Branch => "nothing but names below it",
        },
        Found::Address(_) => "an address",
        Found::Branch => "nothing but names below it",
        Found::Missing => "there is no such name",
        Found::Foreign => "it is not one of ours",
    }
}

#[cfg(test)]
pub(super) mod tests;
