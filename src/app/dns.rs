//! The name server of this node: it listens in every sandbox, at the gateways' addresses, and where it
//! is configured on the host.
//!
//! A client is known by its network and its address, so it finds the names of all networks that it is
//! on, and of no other. Names of ours are answered from what the view shows, all others by those whom
//! the host asks.

mod exchange;
mod explain;
mod forward;
mod in_kernel;
mod knowledge;
mod listen;
mod share;
mod upstreams;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::warn;

use self::forward::Forwarder;
pub(super) use self::in_kernel::InKernel;
use self::knowledge::{Client, Knowledge, Zones};
use self::listen::Place;
use self::upstreams::Upstreams;
use super::agent::Agent;
use super::dataplane::Sandboxes;
use super::handover::Handover;
use crate::api::ResolverView;
use crate::config::DnsConfig;
use crate::dns::answer::{Reply, Terms, Transport, encode, max_size, refusal, unreadable};
use crate::dns::{PlainQuery, Quick, Zone};
use crate::kernel::Netns;
use crate::model::{Name, Network, NetworkId, Snapshot};
use crate::overlay::NameService;

/// How long an endpoint's attachment waits for the network's names to be answered.
const BECOMES_HEARD: Duration = Duration::from_secs(1);
/// How long a container that is not known yet waits to be known: it was attached just now, and the view
/// is about to show it.
const BECOMES_KNOWN: Duration = Duration::from_secs(1);

/// How long the end of an agent waits for the queries that it has taken.
const BECOMES_SILENT: Duration = Duration::from_secs(5);
/// How long after its start an agent has surely taken over what an earlier one left.
const ALL_TAKEN: Duration = Duration::from_secs(60);

/// Where somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Side {
    /// On a network.
    Network(NetworkId),
    /// On this host itself.
    Host,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(id) => id.fmt(f),
            Self::Host => f.write_str("host"),
        }
    }
}

/// Who asks: where, and from which address.
type Asker = (Side, IpAddr);

/// What is done about a query.
enum Outcome {
    /// All: the answer is written, or there is none.
    Done,
    /// It takes a while to answer it.
    Later(Box<Message>),
}

/// This node's name server.
pub(super) struct NameServer {
    config: DnsConfig,
    /// For how many seconds an answer of ours may be kept.
    ttl: u32,
    knowledge: watch::Sender<Knowledge>,
    forwarder: Forwarder,
    handover: Arc<Handover>,
    /// Where names are answered by now.
    heard: watch::Sender<BTreeSet<Place>>,
    /// Whether nothing new is to be taken.
    stopping: watch::Sender<bool>,
}

impl NameServer {
    pub(super) fn new(config: DnsConfig, handover: Arc<Handover>) -> Self {
        Self {
            handover,
            ttl: seconds(config.ttl),
            knowledge: watch::Sender::default(),
            forwarder: Forwarder::new(Upstreams::new(&config), config.domain.clone()),
            heard: watch::Sender::default(),
            stopping: watch::Sender::default(),
            config,
        }
    }

    /// Where names are answered, and how much of one client is taken.
    pub(super) fn service(&self) -> NameService {
        NameService { address: self.config.address, rate: self.config.rate }
    }

    /// Where the host's own queries are answered.
    fn host_place(&self) -> Option<Place> {
        let address = self.config.host?;
        let netns = Netns::current();
        let netns = netns.inspect_err(|error| warn!(%error, "names are not answered for this host"));
        Some(Place { side: Side::Host, inode: netns.ok()?.inode(), address })
    }

    /// What all names are below of, without a dot at its end.
    pub(super) fn domain(&self) -> String {
        self.config.domain.to_string().trim_end_matches('.').to_owned()
    }

    /// Where the host's own queries are answered, if anywhere.
    pub(super) fn host(&self) -> Option<IpAddr> {
        self.config.host
    }

    /// How a container of a network asks for names, which has these gateways.
    pub(super) fn resolver(&self, network: &Name, gateways: &[IpAddr]) -> ResolverView {
        ResolverView {
            servers: gateways.to_vec(),
            search: vec![format!("{network}.{}", self.domain())],
            options: vec!["ndots:0".to_owned()],
        }
    }

    /// Waits until a network's names are answered at some address of its, but not for ever.
    pub(super) async fn wait(&self, network: NetworkId) {
        let mut places = self.heard.subscribe();
        let side = Side::Network(network);
        let heard = places.wait_for(|places| places.iter().any(|place| place.side == side));
        if timeout(BECOMES_HEARD, heard).await.is_err() {
            warn!(%network, "names are not answered there yet");
        }
    }

    /// Answers what was taken, and takes nothing more: it waits for the next agent.
    pub(super) async fn stop(&self) {
        self.stopping.send_replace(true);
        let mut places = self.heard.subscribe();
        if timeout(BECOMES_SILENT, places.wait_for(BTreeSet::is_empty)).await.is_err() {
            warn!("some queries for names were not answered before the end");
        }
    }

    /// Completes when nothing new is to be taken.
    async fn stopped(&self) {
        // A sender that is gone means the same.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Notes whether names are answered somewhere.
    fn note(&self, place: Place, is_heard: bool) {
        self.heard.send_modify(|heard| {
            match is_heard {
                true => heard.insert(place),
                false => heard.remove(&place),
            };
        });
    }

    /// Takes a query, and answers it where that takes no time: adds the answer's bytes to others.
    fn take(
        &self,
        knowledge: &Knowledge,
        asker: Asker,
        bytes: &[u8],
        transport: Transport,
        answer: &mut Vec<u8>,
    ) -> Outcome {
        // Where a host routes packets of others to its loopback addresses.
        if asker.0 == Side::Host && !asker.1.is_loopback() {
            return Outcome::Done;
        }
        let client = knowledge.client(asker);
        if let (Some(client), Some(query)) = (client, PlainQuery::read(bytes)) {
            let terms = self.terms(knowledge, client);
            let is_answered = match terms.quick(&query, transport, &mut rand::rng(), answer) {
                Quick::Answered => true,
                Quick::Foreign => client.forwards() && self.forwarder.quick(&query, transport, answer),
                Quick::No => false,
            };
            if is_answered {
                return Outcome::Done;
            }
        }
        let Ok(query) = Message::from_vec(bytes) else {
            answer.extend(unreadable(bytes).unwrap_or_default());
            return Outcome::Done;
        };
        match client.map(|client| self.reply(knowledge, client, &query, transport)) {
            Some(Reply::Ours(message)) => {
                answer.extend(encode(message, max_size(&query, transport)).unwrap_or_default());
                Outcome::Done
            }
            Some(Reply::Nothing) => Outcome::Done,
            Some(Reply::Elsewhere) | None => Outcome::Later(Box::new(query)),
        }
    }

    /// Answers a query for which something must be waited for: that it is known who asks, or that
    /// somebody else answers.
    async fn answer(&self, asker: Asker, query: &Message, transport: Transport) -> Option<Vec<u8>> {
        let mut known = self.knowledge.subscribe();
        let is_known = known.wait_for(|knowledge| knowledge.client(asker).is_some());
        // Should it not be, it is somebody of the network at least.
        let _ = timeout(BECOMES_KNOWN, is_known).await.is_ok();
        let reply = {
            let knowledge = self.knowledge.borrow();
            let client = knowledge.client(asker).or_else(|| knowledge.stranger(asker.0));
            client.map(|client| self.reply(&knowledge, client, query, transport))
        };
        let message = match reply {
            Some(Reply::Ours(message)) => message,
            Some(Reply::Nothing) => return None,
            Some(Reply::Elsewhere) => self.forwarder.ask(Some(asker), query).await.message,
            // The network is being removed.
            None => refusal(query, ResponseCode::ServFail),
        };
        encode(message, max_size(query, transport))
    }

    /// With what a client's queries are answered.
    fn terms<'a>(&'a self, knowledge: &Knowledge, client: &'a Client) -> Terms<'a> {
        let names = client.names(&self.config.domain);
        Terms { names, ttl: self.ttl, serial: knowledge.serial }
    }

    /// What the kernel is to answer, by the networks' numbers.
    fn told(&self, zones: &Zones) -> BTreeMap<u32, in_kernel::Network> {
        let network = |(network, zone): (&Network, &Arc<Zone>)| {
            let servers = self.service().servers(network).collect();
            (network.vni.number(), in_kernel::Network { zone: zone.clone(), servers })
        };
        zones.networks().map(network).collect()
    }

    /// What is answered without asking anybody.
    fn reply(
        &self,
        knowledge: &Knowledge,
        client: &Client,
        query: &Message,
        transport: Transport,
    ) -> Reply {
        match self.terms(knowledge, client).reply(query, transport, &mut rand::rng()) {
            // Who asks there knows others to ask.
            Reply::Elsewhere if client.is_host => Reply::Ours(refusal(query, ResponseCode::Refused)),
            // There is no outside for who is on internal networks only.
            Reply::Elsewhere if !client.forwards() => {
                Reply::Ours(self.terms(knowledge, client).inside(query))
            }
            Reply::Elsewhere => match self.forwarder.kept(query) {
                Some((message, _)) => Reply::Ours(message),
                None => Reply::Elsewhere,
            },
            reply => reply,
        }
    }
}

/// Answers names on all networks of this node, for ever, and has the kernel answer what it can.
pub(super) async fn serve(agent: Arc<Agent>, mut in_kernel: Option<InKernel>) {
    tokio::spawn(forget_rest(agent.names.handover.clone()));
    let (server, mut zones) = (agent.names.clone(), Zones::new(agent.me.clone()));
    let (mut view, mut sandboxes) = (agent.view.subscribe(), agent.dataplane.sandboxes());
    let host = server.host_place();
    let mut serving: BTreeMap<Place, JoinHandle<()>> = BTreeMap::new();
    loop {
        let published = view.borrow_and_update().clone();
        let open = sandboxes.borrow_and_update().clone();
        // Before that, a name that is not shown may well exist.
        if published.complete {
            let mut places = places(&published.snapshot, &open, server.service());
            places.extend(host);
            let knowledge = zones.follow(published.snapshot);
            if let Some(in_kernel) = &mut in_kernel {
                in_kernel.tell(knowledge.serial, server.told(&zones));
            }
            server.knowledge.send_replace(knowledge);
            let ended: Vec<_> = serving.extract_if(.., |place, _| !places.contains(place)).collect();
            for (place, task) in ended {
                task.abort();
                // Only then it opens nothing more.
                let _ = task.await;
                server.note(place, false);
                server.handover.forget(place.kept_as().into());
            }
            for place in places {
                let start = || tokio::spawn(listen::serve(server.clone(), place));
                serving.entry(place).or_insert_with(start);
            }
        }
        loop {
            let changed = tokio::select! {
                changed = view.changed() => changed,
                changed = sandboxes.changed() => changed,
                () = look_again(&mut in_kernel) => continue,
            };
            match changed {
                Ok(()) => break,
                Err(_) => return,
            }
        }
    }
}

/// Waits until it is time, and looks at what the kernel answers.
async fn look_again(in_kernel: &mut Option<InKernel>) {
    match in_kernel {
        Some(in_kernel) => {
            tokio::time::sleep_until(in_kernel.due()).await;
            in_kernel.look();
        }
        None => std::future::pending().await,
    }
}

/// Whole seconds, as messages have them.
fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

/// Lets go of the sockets of sandboxes that are not there any more.
async fn forget_rest(handover: Arc<Handover>) {
    tokio::time::sleep(ALL_TAKEN).await;
    handover.forget_rest();
}

/// Where names are to be answered.
fn places(snapshot: &Snapshot, sandboxes: &Sandboxes, service: NameService) -> BTreeSet<Place> {
    let of_network = |(id, inode): (&_, &u64)| {
        let network = snapshot.networks.get(id)?;
        let place = |address| Place { side: Side::Network(*id), inode: *inode, address };
        Some(service.servers(network).map(place).collect::<Vec<_>>())
    };
    sandboxes.iter().filter_map(of_network).flatten().collect()
}
