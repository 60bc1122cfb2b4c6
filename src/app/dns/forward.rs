//! Names that are not ours: asked for elsewhere, and kept for as long as they may be.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::RData;
use lru::LruCache;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::debug;

use super::Asker;
use super::share::Shares;
use super::upstreams::Upstreams;
use crate::api::NameSource;
use crate::dns::answer::{MAX_UDP, Transport, refusal, relayed};
use crate::dns::{DomainName, Packed, PlainQuery};

/// How long one server may take to answer by a datagram, and once more by a stream. Clients ask again
/// after five seconds (`timeout` in resolv.conf(5)): by then both servers have had their turn, unless
/// their answers need a stream.
const PATIENCE: Duration = Duration::from_secs(2);
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
const KEPT_SIZE: usize = 4096;
/// The longest that an answer is kept, and that one is that there is nothing (RFC 2308, 5).
const LONGEST: u32 = 86_400;
const LONGEST_NOTHING: u32 = 900;
/// The largest datagram that is read: more than was asked for is no answer.
const LARGEST: usize = 4096;

/// What is asked for, in bytes: the type, whether signatures are wanted, or wanted as they are, and the
/// name in lower case as the wire has it.
type Key = Vec<u8>;

/// An answer that is kept.
struct Kept {
    answer: Arc<Message>,
    /// The same for plain queries.
    packed: Option<Packed>,
    server: SocketAddr,
    since: Instant,
    seconds: u32,
}

/// Why a server gave no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("it cannot be reached: {0}")]
    Io(#[from] std::io::Error),
    #[error("no answer in time")]
    Late,
    #[error("its answer is none: {0}")]
    Garbage(String),
}

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
    cache: Mutex<LruCache<Key, Kept>>,
    places: Semaphore,
    of_clients: Arc<Shares>,
    of_networks: Arc<Shares>,
    /// By list of servers, with which of them to begin.
    first: Mutex<HashMap<Vec<SocketAddr>, SocketAddr>>,
}

impl Forwarder {
    pub(super) fn new(upstreams: Upstreams) -> Self {
        Self {
            upstreams,
            cache: Mutex::new(LruCache::new(KEPT)),
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
        let mut answer = relayed(query, &kept.answer);
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
        let mut answered = Answered {
            message: refusal(query, ResponseCode::ServFail),
            server: None,
            servers: Vec::new(),
        };
        let everybody = |(network, _)| (network, Ipv4Addr::UNSPECIFIED.into());
        let turns =
            asker.map(|asker| (self.of_clients.take(asker), self.of_networks.take(everybody(asker))));
        let is_refused = matches!(turns, Some((None, _) | (_, None)));
        let (false, Ok(_place)) = (is_refused, self.places.try_acquire()) else {
            return answered;
        };
        let [question] = query.queries.as_slice() else { return answered };
        let name = DomainName::new(question.name().iter()).unwrap_or_default();
        let all = self.upstreams.of(&name);
        let mut servers = all.clone();
        servers.rotate_left(self.first_of(&all));
        servers.truncate(SERVERS);
        for server in &servers {
            match ask_server(*server, query, question).await {
                Ok(answer) => {
                    let code = answer.metadata.response_code;
                    (answered.message, answered.server) = (relayed(query, &answer), Some(*server));
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
        if answered.server.is_none()
            && let Some(next) = all.iter().find(|server| !servers.contains(server))
        {
            // None of these: the next query tries others.
            self.begin_with(&all, *next);
        }
        answered.servers = servers;
        answered
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
        let is_small = answer.to_vec().is_ok_and(|bytes| bytes.len() <= KEPT_SIZE);
        if seconds == 0 || answer.metadata.truncation || !is_small {
            return;
        }
        let answer = Arc::new(answer.clone());
        let packed = Packed::new(&relayed(query, &answer));
        let kept = Kept { answer, packed, server, since: Instant::now(), seconds };
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(key, kept);
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

/// Asks one server, and once more by a stream where its answer did not fit into a datagram.
async fn ask_server(server: SocketAddr, query: &Message, question: &Query) -> Result<Message, AskError> {
    let asked = outgoing(query, question);
    let bytes = asked.to_vec().map_err(|error| AskError::Garbage(error.to_string()))?;
    let answer = timeout(PATIENCE, by_datagram(server, &asked, &bytes)).await;
    let answer = answer.map_err(|_| AskError::Late)??;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    match timeout(PATIENCE, by_stream(server, &asked, &bytes)).await {
        Ok(Ok(answer)) => Ok(answer),
        // What there was of it is better than nothing, and says that it is not all.
        Ok(Err(_)) | Err(_) => Ok(answer),
    }
}

/// The query that is sent on: the same question under a number of its own.
fn outgoing(query: &Message, question: &Query) -> Message {
    let mut asked = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    asked.metadata.recursion_desired = true;
    asked.metadata.checking_disabled = query.metadata.checking_disabled;
    asked.queries = vec![question.clone()];
    let mut edns = Edns::new();
    let signed = query.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
    edns.set_max_payload(MAX_UDP).set_dnssec_ok(signed);
    asked.edns = Some(edns);
    asked
}

/// Whether a message answers what was asked.
fn is_answer(asked: &Message, message: &Message) -> bool {
    let same = |(ours, theirs): (&Query, &Query)| {
        ours.name() == theirs.name()
            && ours.query_type() == theirs.query_type()
            && ours.query_class() == theirs.query_class()
    };
    message.metadata.id == asked.metadata.id
        && message.metadata.message_type == MessageType::Response
        // Who cannot read it may not repeat it.
        && (message.queries.is_empty() && message.metadata.response_code == ResponseCode::FormErr
            || message.queries.len() == asked.queries.len()
                && asked.queries.iter().zip(&message.queries).all(same))
}

/// From a port of its own, which the kernel draws, and to which only the server can send.
async fn by_datagram(server: SocketAddr, asked: &Message, bytes: &[u8]) -> Result<Message, AskError> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = [0; LARGEST];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything else may be somebody who guesses: the right one may yet come.
        let received = buffer.get(..length).and_then(|bytes| Message::from_vec(bytes).ok());
        if let Some(message) = received.filter(|message| is_answer(asked, message)) {
            return Ok(message);
        }
    }
}

async fn by_stream(server: SocketAddr, asked: &Message, bytes: &[u8]) -> Result<Message, AskError> {
    let garbage = |text: &str| AskError::Garbage(text.to_owned());
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(|_| garbage("the query is too long"))?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    let message = Message::from_vec(&buffer).map_err(|error| AskError::Garbage(error.to_string()))?;
    match is_answer(asked, &message) {
        true => Ok(message),
        false => Err(garbage("it answers something else")),
    }
}

#[cfg(test)]
mod tests;
