//! Names that are not ours: asked for elsewhere, and kept for as long as they may be.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::RData;
use lru::LruCache;
use tokio::sync::{OnceCell, Semaphore};
use tracing::debug;

use super::Asker;
use super::exchange::ask_server;
use super::share::Shares;
use super::upstreams::Upstreams;
use crate::api::NameSource;
use crate::dns::answer::{Transport, refusal, relayed};
use crate::dns::{DomainName, Packed, PlainQuery};

/// How many lists of servers are remembered.
const LISTS: usize = 64;
/// How many servers are asked for one name.
const SERVERS: usize = 2;
/// How many queries are under way at once, and how many of them for one client, and for one network.
const AT_ONCE: usize = 1024;
const OF_CLIENT: usize = 64;
const OF_NETWORK: usize = 256;
/// How many answers are kept, and how large each may be.
const KEPT: NonZeroUsize = NonZeroUsize::new(10_000).expect("it is not zero");
const KEPT_SIZE: usize = 2048;
/// The longest that an answer is kept, and that one is that there is nothing (RFC 2308, 5).
const LONGEST: u32 = 86_400;
const LONGEST_NOTHING: u32 = 900;
/// What is asked for, in bytes: the type, whether signatures are wanted, or wanted as they are, and the
/// name in lower case as the wire has it.
type Key = Vec<u8>;

/// An answer that is kept.
struct Kept {
    /// As the wire has it: taken apart it would take many times as much.
    answer: Box<[u8]>,
    /// The same for plain queries.
    packed: Option<Packed>,
    server: SocketAddr,
    since: Instant,
    seconds: u32,
}

/// What came of asking some servers.
#[derive(Clone)]
struct Asked {
    /// The answer and who gave it, where somebody did.
    answer: Option<(Arc<Message>, SocketAddr)>,
    /// Who was to be asked.
    servers: Vec<SocketAddr>,
}

/// What comes of asking, once for all who want to know the same at once.
type Shared = Arc<OnceCell<Asked>>;

/// What came of asking.
pub(super) struct Answered {
    /// What is told.
    pub(super) message: Message,
    /// Who said so; nobody gave an answer where there is none.
    pub(super) server: Option<SocketAddr>,
    /// Who was to be asked.
    pub(super) servers: Vec<SocketAddr>,
}

/// Asks other servers.
pub(super) struct Forwarder {
    upstreams: Upstreams,
    /// Below which all names are ours.
    domain: DomainName,
    cache: Mutex<LruCache<Key, Kept>>,
    /// What is being asked for.
    under_way: Mutex<HashMap<Key, Shared>>,
    places: Semaphore,
    of_clients: Arc<Shares>,
    of_networks: Arc<Shares>,
    /// By list of servers, with which of them to begin.
    first: Mutex<HashMap<Vec<SocketAddr>, SocketAddr>>,
}

impl Forwarder {
    pub(super) fn new(upstreams: Upstreams, domain: DomainName) -> Self {
        Self {
            upstreams,
            domain,
            cache: Mutex::new(LruCache::new(KEPT)),
            under_way: Mutex::default(),
            places: Semaphore::new(AT_ONCE),
            of_clients: Shares::new(OF_CLIENT),
            of_networks: Shares::new(OF_NETWORK),
            first: Mutex::default(),
        }
    }

    /// The answer to a query that is kept.
    pub(super) fn kept(&self, query: &Message) -> Option<(Message, NameSource)> {
        let key = key(query)?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (kept, age) = fresh(&mut cache, &key)?;
        let mut answer = relayed(query, &Message::from_vec(&kept.answer).ok()?);
        for record in
            answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals)
        {
            record.ttl = record.ttl.saturating_sub(age);
        }
        let server = kept.server.to_string();
        Some((answer, NameSource::Kept { server, age, left: kept.seconds - age }))
    }

    /// Answers a plain query with what is kept: adds the answer's bytes to others. Tells whether it did.
    pub(super) fn quick(
        &self,
        query: &PlainQuery<'_>,
        transport: Transport,
        answer: &mut Vec<u8>,
    ) -> bool {
        let key = key_of(query.name(), query.kind(), query.is_signed(), false);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = fresh(&mut cache, &key).and_then(|(kept, age)| Some((kept.packed.as_ref()?, age)));
        kept.is_some_and(|(packed, age)| packed.write(query, age, transport, answer))
    }

    /// Asks for an answer; `ServFail` when nobody gives one, or too many ask already.
    pub(super) async fn ask(&self, asker: Option<Asker>, query: &Message) -> Answered {
        let refused = || Answered {
            message: refusal(query, ResponseCode::ServFail),
            server: None,
            servers: Vec::new(),
        };
        let everybody = |(network, _)| (network, Ipv4Addr::UNSPECIFIED.into());
        let turns =
            asker.map(|asker| (self.of_clients.take(asker), self.of_networks.take(everybody(asker))));
        if matches!(turns, Some((None, _) | (_, None))) {
            return refused();
        }
        let Some(key) = key(query) else { return refused() };
        let turn = Turn::new(self, key);
        let Some(shared) = &turn.shared else { return refused() };
        let Asked { answer, servers } = shared.get_or_init(|| self.ask_servers(query)).await;
        match answer {
            Some((answer, server)) => Answered {
                message: relayed(query, answer),
                server: Some(*server),
                servers: servers.clone(),
            },
            None => Answered { servers: servers.clone(), ..refused() },
        }
    }

    /// Asks the servers for a name, one after the other.
    async fn ask_servers(&self, query: &Message) -> Asked {
        let mut asked = Asked { answer: None, servers: Vec::new() };
        let (Ok(_place), [question]) = (self.places.try_acquire(), query.queries.as_slice()) else {
            return asked;
        };
        let name = DomainName::new(question.name().iter()).unwrap_or_default();
        let all = self.upstreams.of(&name);
        let mut servers = all.clone();
        servers.rotate_left(self.first_of(&all));
        servers.truncate(SERVERS);
        for server in &servers {
            match ask_server(*server, query, question).await {
                // Who was asked has asked this host, whose own listener tells of all networks.
                Ok(answer) if tells_of(&self.domain, &answer) => {
                    debug!(%server, "an answer tells of names that are ours");
                    asked.answer = None;
                    break;
                }
                Ok(answer) => {
                    let code = answer.metadata.response_code;
                    let answer = Arc::new(answer);
                    asked.answer = Some((answer.clone(), *server));
                    let is_whole = !answer.metadata.truncation;
                    if is_whole && matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
                        self.begin_with(&all, *server);
                        self.keep(query, &answer, *server);
                        break;
                    }
                }
                Err(error) => debug!(%server, %error, "a name was asked for in vain"),
            }
        }
        if asked.answer.is_none()
            && let Some(next) = all.iter().find(|server| !servers.contains(server))
        {
            // None of these: the next query tries others.
            self.begin_with(&all, *next);
        }
        asked.servers = servers;
        asked
    }

    /// The place of the server with which to begin.
    fn first_of(&self, all: &[SocketAddr]) -> usize {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.get(all);
        first.and_then(|first| all.iter().position(|server| server == first)).unwrap_or(0)
    }

    /// Begins with one of some servers from now on.
    fn begin_with(&self, all: &[SocketAddr], server: SocketAddr) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        // Lists change with the host's file: those of long ago are not asked for again.
        if first.len() >= LISTS {
            first.clear();
        }
        first.insert(all.to_vec(), server);
    }

    fn keep(&self, query: &Message, answer: &Message, server: SocketAddr) {
        let (Some(key), seconds) = (key(query), seconds(answer)) else { return };
        // A server that knows of no signatures has left them out.
        let signed =
            |message: &Message| message.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        let lacks = signed(query) && answer.edns.is_none();
        let Some(bytes) = answer.to_vec().ok().filter(|bytes| bytes.len() <= KEPT_SIZE) else { return };
        if seconds == 0 || answer.metadata.truncation || lacks {
            return;
        }
        let packed = Packed::new(&relayed(query, answer));
        let kept = Kept { answer: bytes.into(), packed, server, since: Instant::now(), seconds };
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(key, kept);
    }
}

/// Somebody's part in asking for something.
struct Turn<'a> {
    of: &'a Forwarder,
    key: Key,
    /// It is there until the turn is over.
    shared: Option<Shared>,
}

impl<'a> Turn<'a> {
    /// Joins those who ask for it already.
    fn new(of: &'a Forwarder, key: Key) -> Self {
        let mut under_way = of.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = under_way.entry(key.clone()).or_default().clone();
        Self { of, key, shared: Some(shared) }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut under_way = self.of.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(own) = self.shared.take() else { return };
        let is_same = under_way.get(&self.key).is_some_and(|shared| Arc::ptr_eq(shared, &own));
        let is_answered = own.initialized();
        drop(own);
        // The last one leaves nothing: what was answered may be kept, or is asked anew.
        let is_last = || under_way.get(&self.key).is_some_and(|shared| Arc::strong_count(shared) == 1);
        if is_same && (is_answered || is_last()) {
            under_way.remove(&self.key);
        }
    }
}

fn key(query: &Message) -> Option<Key> {
    let [question] = query.queries.as_slice() else { return None };
    let name = DomainName::new(question.name().iter())?;
    let signed = query.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
    let unchecked = query.metadata.checking_disabled;
    Some(key_of(name.wire(), question.query_type().into(), signed, unchecked))
}

fn key_of(name: &[u8], kind: u16, signed: bool, unchecked: bool) -> Key {
    let mut key = Vec::with_capacity(4 + name.len());
    key.extend(kind.to_be_bytes());
    key.extend([u8::from(signed), u8::from(unchecked)]);
    key.extend_from_slice(name);
    key
}

/// What is kept and how many seconds old it is; one that is too old goes.
fn fresh<'a>(cache: &'a mut LruCache<Key, Kept>, key: &Key) -> Option<(&'a Kept, u32)> {
    let kept = cache.peek(key)?;
    let age = u32::try_from(kept.since.elapsed().as_secs()).unwrap_or(u32::MAX);
    if age >= kept.seconds {
        cache.pop(key);
        return None;
    }
    cache.get(key).map(|kept| (kept, age))
}

/// Whether an answer of others has names below our domain: of networks on which the client is not.
fn tells_of(domain: &DomainName, answer: &Message) -> bool {
    let is_ours = |name: &hickory_proto::rr::Name| {
        DomainName::new(name.iter()).is_some_and(|name| name.before(domain).is_some())
    };
    answer.answers.iter().chain(&answer.authorities).chain(&answer.additionals).any(|record| {
        is_ours(&record.name)
            || match &record.data {
                RData::CNAME(name) => is_ours(name),
                RData::PTR(name) => is_ours(name),
                RData::SRV(srv) => is_ours(&srv.target),
                _ => false,
            }
    })
}

/// For how many seconds an answer may be kept.
fn seconds(answer: &Message) -> u32 {
    let shortest = answer.answers.iter().map(|record| record.ttl).min();
    let kind = answer.queries.first().map(Query::query_type);
    let is_found = answer.metadata.response_code == ResponseCode::NoError
        && answer.answers.iter().any(|record| Some(record.record_type()) == kind);
    if is_found {
        return shortest.unwrap_or(0).min(LONGEST);
    }
    // Nothing is there, perhaps under another name; for how long, the zone's record says.
    let nothing = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    nothing.unwrap_or(0).min(shortest.unwrap_or(u32::MAX)).min(LONGEST_NOTHING)
}

#[cfg(test)]
mod tests;
