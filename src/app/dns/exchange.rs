//! Asking one other name server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::dns::answer::MAX_UDP;

/// How long one server may take to answer by a datagram, and once more for all else. Clients ask again
/// after five seconds (`timeout` in resolv.conf(5)): by then both servers have had their turn, unless
/// their answers need a stream.
const PATIENCE: Duration = Duration::from_secs(2);
/// The largest datagram that is read: more than was asked for is no answer.
const LARGEST: usize = 4096;

/// Why a server gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error("it cannot be reached: {0}")]
    Io(#[from] std::io::Error),
    #[error("no answer in time")]
    Late,
    #[error("its answer is none: {0}")]
    Garbage(String),
}

/// Asks one server, and once more without EDNS where it cannot do that.
pub(super) async fn ask_server(
    server: SocketAddr,
    query: &Message,
    question: &Query,
) -> Result<Message, AskError> {
    timeout(2 * PATIENCE, ask_twice(server, query, question)).await.unwrap_or(Err(AskError::Late))
}

async fn ask_twice(server: SocketAddr, query: &Message, question: &Query) -> Result<Message, AskError> {
    let answer = ask(server, &outgoing(query, question, true)).await?;
    let is_lost = matches!(
        answer.metadata.response_code,
        ResponseCode::FormErr | ResponseCode::NotImp | ResponseCode::BADVERS
    );
    match is_lost {
        // It may be one that does not know what was added to DNS later (RFC 6891, 6.2.2).
        true => ask(server, &outgoing(query, question, false)).await,
        false => Ok(answer),
    }
}

/// Asks by a datagram, and once more by a stream where the answer did not fit into one.
async fn ask(server: SocketAddr, asked: &Message) -> Result<Message, AskError> {
    let bytes = asked.to_vec().map_err(|error| AskError::Garbage(error.to_string()))?;
    let answer = timeout(PATIENCE, by_datagram(server, asked, &bytes)).await;
    let answer = answer.map_err(|_| AskError::Late)??;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    match timeout(PATIENCE, by_stream(server, asked, &bytes)).await {
        Ok(Ok(answer)) => Ok(answer),
        // What there was of it is better than nothing, and says that it is not all.
        Ok(Err(_)) | Err(_) => Ok(answer),
    }
}

/// The query that is sent on: the same question under a number of its own.
fn outgoing(query: &Message, question: &Query, with_edns: bool) -> Message {
    let mut asked = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    asked.metadata.recursion_desired = true;
    asked.metadata.checking_disabled = query.metadata.checking_disabled;
    asked.queries = vec![question.clone()];
    if !with_edns {
        return asked;
    }
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
mod tests {
    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    fn query(text: &str) -> Message {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(text).unwrap(), RecordType::A));
        query
    }

    #[test]
    fn only_the_same_question_under_the_same_number_is_an_answer() {
        let asked = outgoing(&query("a.example."), &query("a.example.").queries[0], true);
        let answer = |change: fn(&mut Message)| {
            let mut answer = asked.clone();
            answer.metadata.message_type = MessageType::Response;
            change(&mut answer);
            is_answer(&asked, &answer)
        };
        assert!(answer(|_| {}));
        assert!(!answer(|answer| answer.metadata.id ^= 1));
        assert!(!answer(|answer| answer.metadata.message_type = MessageType::Query));
        assert!(!answer(|answer| answer.queries = query("b.example.").queries));
        assert!(!answer(|answer| answer.queries.clear()));
        assert!(!answer(|answer| {
            answer.queries[0].set_query_type(RecordType::AAAA);
        }));
    }
}
