//! What a name is answered with, and why: for people.

use std::net::IpAddr;
use std::time::Instant;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name as DnsName, Record, RecordType};

use super::super::agent::Agent;
use super::forward::Answered;
use super::knowledge::Client;
use super::{NameServer, Side};
use crate::api::{ApiError, ErrorCode, NameQuery, NameSource, NameView, RecordView};
use crate::dns::answer::{MAX_UDP, Reply, Transport, describe};
use crate::dns::{DomainName, Found};
use crate::model::NetworkId;

/// As whom somebody asks who is no container.
const NOBODY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

impl Agent {
    /// Answers a question as the name server does, and says why so.
    pub(in crate::app) async fn look_up(&self, query: &NameQuery) -> Result<NameView, ApiError> {
        let (network, address) = match (&query.from, &query.network) {
            (Some(endpoint), network) => {
                let network = network.as_ref().map(|network| network.as_str());
                let endpoint = self.endpoint(endpoint.as_str(), network).await?.endpoint;
                if endpoint.node != self.me.name {
                    let text = format!(
                        "endpoint {} is on node {}: names are answered there",
                        endpoint.name, endpoint.node
                    );
                    return Err(ApiError::new(ErrorCode::Conflict, text));
                }
                (Some(endpoint.network), endpoint.addresses.first().copied().unwrap_or(NOBODY))
            }
            (None, Some(network)) => (Some(self.cluster.network(network.as_str()).await?.id), NOBODY),
            (None, None) => (None, NOBODY),
        };
        let client = self.names.client(network, address).ok_or_else(|| {
            let text = "this node has no endpoint on that network, so it does not answer its names";
            ApiError::new(ErrorCode::Conflict, text)
        })?;
        let asked = message(query)?;
        Ok(self.names.explain(&client, (network, address), query, &asked).await)
    }
}

impl NameServer {
    /// What somebody finds; on no certain network, that of all.
    fn client(&self, network: Option<NetworkId>, address: IpAddr) -> Option<Client> {
        let knowledge = self.knowledge.borrow();
        match network {
            Some(network) => {
                let container = knowledge.client((Side::Network(network), address));
                container.or_else(|| knowledge.stranger(Side::Network(network))).cloned()
            }
            None => Some(knowledge.everything()),
        }
    }

    async fn explain(
        &self,
        client: &Client,
        (network, address): (Option<NetworkId>, IpAddr),
        query: &NameQuery,
        asked: &Message,
    ) -> NameView {
        let (reply, source) = {
            let knowledge = self.knowledge.borrow();
            let names = client.names(&self.config.domain);
            let labels = asked.queries.iter().flat_map(|question| question.name().iter());
            let found = names.find(&DomainName::new(labels).unwrap_or_default());
            let reply = self.reply(&knowledge, client, asked, Transport::Tcp);
            (reply, own(client, &found))
        };
        let (message, source) = match (reply, source) {
            (Reply::Ours(message), Some(source)) => (message, source),
            (Reply::Ours(message), None) if client.zones.is_empty() => {
                (message, NameSource::Own { network: None, what: "no network is used here".to_owned() })
            }
            (Reply::Ours(message), None) if !client.forwards() => (message, NameSource::Inside),
            (Reply::Ours(message), None) => match self.forwarder.kept(asked) {
                Some((message, kept)) => (message, kept),
                // It is refused whatever the name.
                None => {
                    let what = "nobody is asked for that".to_owned();
                    (message, NameSource::Own { network: None, what })
                }
            },
            (Reply::Elsewhere | Reply::Nothing, _) => {
                let start = Instant::now();
                let asker = network.map(|network| (Side::Network(network), address));
                let Answered { message, server, servers } = self.forwarder.ask(asker, asked).await;
                let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                let text = |server: &std::net::SocketAddr| server.to_string();
                let source = match server {
                    Some(server) => NameSource::Forwarded { server: text(&server), milliseconds },
                    None => NameSource::Unanswered { servers: servers.iter().map(text).collect() },
                };
                (message, source)
            }
        };
        NameView {
            name: query.name.clone(),
            kind: asked.queries.first().map(|q| q.query_type().to_string()).unwrap_or_default(),
            code: code(message.metadata.response_code),
            records: message.answers.iter().map(record).collect(),
            networks: client.zones.iter().map(|zone| zone.name.clone()).collect(),
            source,
        }
    }
}

/// Where a name of ours was found.
fn own(client: &Client, found: &Found<'_>) -> Option<NameSource> {
    let network = match found {
        Found::Foreign => return None,
        Found::Entry(number, _) => client.zones.get(*number).map(|zone| zone.name.clone()),
        Found::Address(_) | Found::Branch | Found::Missing => None,
    };
    Some(NameSource::Own { network, what: describe(found).to_owned() })
}

fn message(query: &NameQuery) -> Result<Message, ApiError> {
    let invalid = |text: String| ApiError::new(ErrorCode::Invalid, text);
    let mut name = DnsName::from_ascii(&query.name)
        .map_err(|error| invalid(format!("{:?} is no name: {error}", query.name)))?;
    name.set_fqdn(true);
    let kind = query.kind.as_deref().unwrap_or("A");
    let kind: RecordType = kind
        .to_uppercase()
        .parse()
        .map_err(|_| invalid(format!("{kind:?} is no type of records: give such as A, AAAA or SRV")))?;
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_UDP);
    message.edns = Some(edns);
    Ok(message)
}

fn record(record: &Record) -> RecordView {
    RecordView {
        name: record.name.to_string(),
        ttl: record.ttl,
        kind: record.record_type().to_string(),
        data: record.data.to_string(),
    }
}

/// A code as `dig` writes it.
fn code(code: ResponseCode) -> String {
    match code {
        ResponseCode::NoError => "NOERROR".to_owned(),
        ResponseCode::FormErr => "FORMERR".to_owned(),
        ResponseCode::ServFail => "SERVFAIL".to_owned(),
        ResponseCode::NXDomain => "NXDOMAIN".to_owned(),
        ResponseCode::NotImp => "NOTIMP".to_owned(),
        ResponseCode::Refused => "REFUSED".to_owned(),
        other => other.to_string(),
    }
}
