//! The sockets of one address, and what comes in through them.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::share::Shares;
use super::{Asker, NameServer, Outcome, Side};
use crate::app::handover::Handover;
use crate::dns::PORT;
use crate::dns::answer::Transport;
use crate::kernel::{Datagrams, Listening, Netns, listen_at};
use crate::model::object::sandbox_name;

/// The largest query that is read from a datagram, and how many are read at once.
const LARGEST: usize = 4096;
const AT_ONCE: usize = 64;
/// How many queries of an address wait for others' answers at once, and how many connections it has.
const WAITING: usize = 1024;
const CONNECTIONS: usize = 256;
/// How many of these connections one client has.
const OF_CLIENT: usize = 32;
/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(10);
/// How long the first query of a connection may take yet when the server stops.
const LAST: Duration = Duration::from_secs(1);
/// How soon it is read again after an error.
const AFTER_ERROR: Duration = Duration::from_millis(1);
/// How soon it is tried again to listen.
const AGAIN: Duration = Duration::from_secs(1);

/// Where somebody listens: an address of a network or of the host, in the namespace of that inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) side: Side,
    pub(super) inode: u64,
    pub(super) address: IpAddr,
}

/// Answers at one address until the task is ended, or the server stops.
pub(super) async fn serve(server: Arc<NameServer>, place: Place) {
    let mut said = String::new();
    let (udp, tcp) = loop {
        match open(&server.handover, place).await {
            Ok(sockets) => break sockets,
            Err(error) => {
                let (side, address, text) = (place.side, place.address, error.to_string());
                // It may be so for as long as somebody else has the port.
                if text != said {
                    warn!(%side, %address, error = text, "names are not answered yet");
                }
                said = text;
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    server.note(place, true);
    tokio::join!(datagrams(&server, place, udp), streams(&server, place.side, tcp));
    server.note(place, false);
}

impl Place {
    /// Under which names the sockets are kept for the next agent: for datagrams, and for streams. They
    /// are short: all together are one variable of its environment.
    pub(super) fn kept_as(&self) -> [String; 2] {
        let Self { side, inode, address } = self;
        let address = match address {
            IpAddr::V4(address) => format!("{:x}", address.to_bits()),
            IpAddr::V6(address) => format!("{:x}", address.to_bits()),
        };
        ["u", "t"].map(|kind| format!("{kind}-{side}-{inode:x}-{address}"))
    }
}

/// The sockets that an earlier agent left, else new ones.
async fn open(handover: &Handover, place: Place) -> anyhow::Result<(UdpSocket, TcpListener)> {
    let at = SocketAddr::new(place.address, PORT);
    let [udp_name, tcp_name] = place.kept_as();
    if let (Some(udp), Some(tcp)) = (handover.take(&udp_name), handover.take(&tcp_name)) {
        let (udp, tcp) = (std::net::UdpSocket::from(udp), std::net::TcpListener::from(tcp));
        if udp.local_addr()? == at && tcp.local_addr()? == at {
            return Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?));
        }
    }
    let opened = tokio::task::spawn_blocking(move || {
        let netns = match place.side {
            Side::Network(network) => Netns::open_named(&sandbox_name(network))?,
            Side::Host => Netns::current()?,
        };
        anyhow::ensure!(netns.inode() == place.inode, "the sandbox is another one by now");
        Ok(listen_at(&netns, at)?)
    });
    let Listening { udp, tcp } = match opened.await? {
        Ok(listening) => listening,
        Err(error) => {
            // One that is kept without the other would have the port for ever.
            handover.forget(vec![udp_name, tcp_name]);
            return Err(error);
        }
    };
    let kept = vec![(udp_name, udp.try_clone()?.into()), (tcp_name, tcp.try_clone()?.into())];
    handover.keep(kept);
    Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
}

async fn datagrams(server: &Arc<NameServer>, place: Place, socket: UdpSocket) {
    let side = place.side;
    let socket = Arc::new(socket);
    let mut waiting = JoinSet::new();
    let mut stopped = pin!(server.stopped());
    loop {
        let read = socket.async_io(Interest::READABLE, || answer_all(server, place, &socket));
        let done = tokio::select! {
            done = read => done,
            () = &mut stopped => break,
        };
        let Answered { later, unsent } = match done {
            Ok(answered) => answered,
            // Errors of what was sent before, such as that a client's port is closed.
            Err(error) => {
                debug!(%side, %error, "no query was read");
                tokio::time::sleep(AFTER_ERROR).await;
                continue;
            }
        };
        while waiting.try_join_next().is_some() {}
        for (answer, client) in unsent {
            // As with queries: who gets nothing may ask again.
            if waiting.len() >= WAITING {
                break;
            }
            let socket = socket.clone();
            waiting.spawn(async move { send(&socket, &answer, client).await });
        }
        for (query, client) in later {
            // Who asks again later may find a place.
            if waiting.len() >= WAITING {
                break;
            }
            let (server, socket) = (server.clone(), socket.clone());
            waiting.spawn(async move {
                let asker = (side, client.ip());
                if let Some(answer) = server.answer(asker, &query, Transport::Udp).await {
                    send(&socket, &answer, client).await;
                }
            });
        }
    }
    while waiting.join_next().await.is_some() {}
}

/// What is left to do of some datagrams.
struct Answered {
    /// What takes a while to answer.
    later: Vec<(Box<Message>, SocketAddr)>,
    /// What could not be sent at once.
    unsent: Vec<(Vec<u8>, SocketAddr)>,
}

/// Reads what has arrived, and answers what can be answered at once.
fn answer_all(server: &NameServer, place: Place, socket: &UdpSocket) -> io::Result<Answered> {
    thread_local! {
        static DATAGRAMS: RefCell<Datagrams> = RefCell::new(Datagrams::new(AT_ONCE, LARGEST));
    }
    DATAGRAMS.with_borrow_mut(|datagrams| {
        datagrams.receive(socket, place.address.is_ipv4())?;
        let mut later = Vec::new();
        let knowledge = server.knowledge.borrow();
        datagrams.answer(|query, client, answer| {
            let asker = (place.side, client.ip());
            match server.take(&knowledge, asker, query, Transport::Udp, answer) {
                Outcome::Done => {}
                Outcome::Later(query) => later.push((query, client)),
            }
        });
        drop(knowledge);
        Ok(Answered { later, unsent: datagrams.send(socket) })
    })
}

async fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(answer, client).await {
        debug!(%client, %error, "answer not sent");
    }
}

async fn streams(server: &Arc<NameServer>, side: Side, listener: TcpListener) {
    let (mut connections, of_clients) = (JoinSet::new(), Shares::new(OF_CLIENT));
    let mut stopped = pin!(server.stopped());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stopped => break,
        };
        match accepted {
            Ok((stream, client)) => {
                while connections.try_join_next().is_some() {}
                let asker = (side, client.ip());
                // One too many is closed at once.
                if connections.len() < CONNECTIONS
                    && let Some(share) = of_clients.take(asker)
                {
                    let server = server.clone();
                    connections.spawn(async move {
                        converse(server, asker, stream).await;
                        drop(share);
                    });
                }
            }
            Err(error) => {
                warn!(%side, %error, "connection for queries not accepted");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Answers what comes through one connection, in order. Of one that was accepted as the server stops the
/// first query is answered yet.
async fn converse(server: Arc<NameServer>, asker: Asker, mut stream: TcpStream) {
    let mut is_first = true;
    let mut stopped = pin!(server.stopped());
    loop {
        let read = timeout(IDLE, read(&mut stream));
        let query = tokio::select! {
            biased;
            query = read => query,
            () = async {
                stopped.as_mut().await;
                tokio::time::sleep(if is_first { LAST } else { Duration::ZERO }).await;
            } => return,
        };
        is_first = false;
        let Ok(Ok(query)) = query else { return };
        let mut answer = Vec::new();
        let outcome = {
            let knowledge = server.knowledge.borrow();
            server.take(&knowledge, asker, &query, Transport::Tcp, &mut answer)
        };
        if let Outcome::Later(query) = outcome {
            answer = server.answer(asker, &query, Transport::Tcp).await.unwrap_or_default();
        }
        if answer.is_empty() {
            return;
        }
        let Ok(length) = u16::try_from(answer.len()) else { return };
        let message = [&length.to_be_bytes(), answer.as_slice()].concat();
        match timeout(IDLE, stream.write_all(&message)).await {
            Ok(Ok(())) => {}
            _ => return,
        }
    }
}

async fn read(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut query = vec![0; usize::from(length)];
    stream.read_exact(&mut query).await?;
    Ok(query)
}
