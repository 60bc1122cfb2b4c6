//! IPVS, the kernel's balancer of connections, over generic netlink.
//!
//! It reads and changes the table of one network namespace: virtual services, by address or by
//! firewall mark, and their destinations, and reads the list of connections. What `ipvsadm` can do it can,
//! except for the synchronisation daemons. It knows nothing of networks and endpoints,
//! and decides nothing.
//!
//! The kernel takes each request by itself, in the order in which they are sent: there are no
//! transactions. Everything here needs `CAP_NET_ADMIN` in the first user namespace.
//!
//! Sources: include/uapi/linux/ip_vs.h, net/netfilter/ipvs/ip_vs_ctl.c,
//! Documentation/networking/ipvs-sysctl.rst.

mod change;
mod connections;
mod destination;
mod error;
mod scheduler;
mod service;
mod stats;
mod wire;

pub use change::Change;
pub use connections::{Connection, connections};
pub use destination::{
    Destination, DestinationKey, DestinationState, Forwarding, Tunnel, TunnelFlags, TunnelKind,
};
pub use error::{Error, Problem, Reason, Request};
pub use scheduler::Scheduler;
pub use service::{Family, Flags, Netmask, Protocol, Service, ServiceKey, ServiceState};
pub use stats::{Rates, Stats};

use netlink_packet_core::{DecodeError, DefaultNla};
use netlink_packet_generic::constants::{
    CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_CMD_GETFAMILY,
};
use nix::errno::Errno;

use super::netlink::{self, Netlink, NetlinkError};
use wire::{Command, Message, command};

/// A service with its destinations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The service.
    pub state: ServiceState,
    /// Its destinations, in the order in which the kernel goes through them.
    pub destinations: Vec<DestinationState>,
}

/// How long the kernel keeps a connection on which nothing passes, in seconds; by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, established.
    pub tcp: u32,
    /// TCP, after a FIN.
    pub tcp_fin: u32,
    /// UDP.
    pub udp: u32,
}

/// What the kernel tells of its IPVS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Its version: major, minor, patch.
    pub version: (u8, u8, u8),
    /// How many buckets its table of connections has.
    pub connection_table: u32,
}

/// The IPVS of one network namespace.
pub struct Ipvs {
    netlink: Netlink,
    /// Its number among the families of generic netlink.
    family: u16,
}

impl Ipvs {
    /// Opens the IPVS of the calling thread's network namespace, and stays there for good. The
    /// kernel loads the module where it can.
    ///
    /// # Errors
    ///
    /// [`Error::NoIpvs`] where the kernel has none.
    pub fn open() -> Result<Self, Error> {
        let mut netlink = Netlink::generic().map_err(Error::Socket)?;
        let family = find_family(&mut netlink)?;
        Ok(Self { netlink, family })
    }

    /// Makes the changes in order, as many as fit in one send, and returns a result for each. One
    /// that fails does not stop those after it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for what was not sent, [`Error::Refused`] for what the kernel refused.
    pub fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), Error>> {
        let results = self.apply_once(changes);
        let lost = |result: &Result<(), Error>| matches!(result, Err(Error::Refused { source, .. }) if source.errno == Errno::ENOENT);
        if !results.iter().any(lost) {
            return results;
        }
        match self.renew() {
            Ok(true) => self.apply_once(changes),
            Err(Error::NoIpvs) => changes.iter().map(|_| Err(Error::NoIpvs)).collect(),
            _ => results,
        }
    }

    fn apply_once(&mut self, changes: &[Change]) -> Vec<Result<(), Error>> {
        let encoded: Vec<_> = changes.iter().map(|change| change.encode(self.family)).collect();
        let sent: Vec<_> = encoded.iter().flatten().cloned().map(netlink::Request::new).collect();
        let mut answers = self.netlink.batch(&sent).into_iter();
        let results = changes.iter().zip(encoded).map(|(change, encoded)| {
            let request = || Request::from(change.clone());
            encoded.map_err(|problem| Error::Invalid { request: request(), problem })?;
            let lost = || Err(NetlinkError { errno: Errno::EIO, text: "no answer".to_owned() });
            answers.next().unwrap_or_else(lost).map_err(|error| Error::refused(request())(error))
        });
        results.collect()
    }

    /// Reads all services with their destinations, in the kernel's order: as
    /// [`Self::services`] and [`Self::destinations`] do, one request for each service. A service that
    /// somebody removes meanwhile has no destinations.
    pub fn table(&mut self) -> Result<Vec<Entry>, Error> {
        let services = self.services()?;
        let entries = services.into_iter().map(|state| {
            let destinations = self.dump_destinations(&state.service.key)?;
            Ok(Entry { state, destinations })
        });
        entries.collect()
    }

    /// Reads all services, in the kernel's order. The kernel counts on in its list between two parts
    /// of a long answer: while somebody else adds and removes services, one may be missing or come
    /// twice.
    pub fn services(&mut self) -> Result<Vec<ServiceState>, Error> {
        let replies = self.dump(Command::GetService, &[], Request::Services)?;
        let services = replies.into_iter().map(|reply| decode_service(&attributes(reply)));
        services.collect::<Result<_, _>>().map_err(Error::malformed(Request::Services))
    }

    /// Reads one service; `None` where there is no such service.
    pub fn service(&mut self, key: &ServiceKey) -> Result<Option<ServiceState>, Error> {
        let request = Request::Service(*key);
        let named = wire::put_nested(command::SERVICE, &key.encode());
        let reply = match self.ask(Command::GetService, &[named], request.clone()) {
            Err(error) if error.reason() == Some(Reason::NoService) => return Ok(None),
            reply => reply?,
        };
        decode_service(&reply).map(Some).map_err(Error::malformed(request))
    }

    /// Reads the destinations of a service, in the kernel's order.
    ///
    /// # Errors
    ///
    /// [`Reason::NoService`] where there is no such service.
    pub fn destinations(&mut self, key: &ServiceKey) -> Result<Vec<DestinationState>, Error> {
        let destinations = self.dump_destinations(key)?;
        // To a service that does not exist the kernel answers as to one without destinations.
        if destinations.is_empty() && self.service(key)?.is_none() {
            let missing = NetlinkError { errno: Errno::ESRCH, text: String::new() };
            return Err(Error::refused(Request::Destinations(*key))(missing));
        }
        Ok(destinations)
    }

    fn dump_destinations(&mut self, key: &ServiceKey) -> Result<Vec<DestinationState>, Error> {
        let named = wire::put_nested(command::SERVICE, &key.encode());
        let request = Request::Destinations(*key);
        let replies = self.dump(Command::GetDestination, &[named], request.clone())?;
        let decode = |reply| {
            let reply = attributes(reply);
            let destination = wire::find(&reply, command::DESTINATION, "destination")?;
            DestinationState::decode(key.family(), destination)
        };
        let destinations = replies.into_iter().map(decode);
        destinations.collect::<Result<_, _>>().map_err(Error::malformed(request))
    }

    /// Reads the timeouts. One of a protocol that the kernel does not balance is 0.
    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        let reply = self.ask(Command::GetConfig, &[], Request::Timeouts)?;
        decode_timeouts(&reply).map_err(Error::malformed(Request::Timeouts))
    }

    /// Sets the timeouts of connections that begin or pass something from now on. One that is 0 stays
    /// as it is.
    ///
    /// # Errors
    ///
    /// [`Reason::TimeoutNotAccepted`]: one is above 2^31 − 1 ticks, of which the kernel has 100 to
    /// 1000 a second. Then all stay as they are.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        let attributes = [
            wire::put_u32(command::TIMEOUT_TCP, timeouts.tcp),
            wire::put_u32(command::TIMEOUT_TCP_FIN, timeouts.tcp_fin),
            wire::put_u32(command::TIMEOUT_UDP, timeouts.udp),
        ];
        self.request(Command::SetConfig, &attributes, Request::SetTimeouts).map(|_| ())
    }

    /// Reads the version and the size of the connection table.
    pub fn info(&mut self) -> Result<Info, Error> {
        let reply = self.ask(Command::GetInfo, &[], Request::Info)?;
        decode_info(&reply).map_err(Error::malformed(Request::Info))
    }

    /// Sends a request that has one reply.
    fn ask(
        &mut self,
        command: Command,
        attributes: &[DefaultNla],
        request: Request,
    ) -> Result<Vec<u8>, Error> {
        let replies = self.request(command, attributes, request.clone())?;
        only(replies).map_err(Error::malformed(request))
    }

    fn request(
        &mut self,
        command: Command,
        attributes: &[DefaultNla],
        request: Request,
    ) -> Result<Vec<Message>, Error> {
        self.send(request, |netlink, family| {
            netlink.request(netlink::Request::new(wire::message(family, command, attributes)))
        })
    }

    fn dump(
        &mut self,
        command: Command,
        attributes: &[DefaultNla],
        request: Request,
    ) -> Result<Vec<Message>, Error> {
        self.send(request, |netlink, family| netlink.dump(&wire::message(family, command, attributes)))
    }

    /// Sends a request that is no change of the table, and once more if IPVS was not there under its
    /// number.
    fn send(
        &mut self,
        request: Request,
        send: impl Fn(&mut Netlink, u16) -> Result<Vec<Message>, NetlinkError>,
    ) -> Result<Vec<Message>, Error> {
        match send(&mut self.netlink, self.family) {
            Err(error) if error.errno == Errno::ENOENT && self.renew()? => {
                send(&mut self.netlink, self.family)
            }
            result => result,
        }
        .map_err(Error::refused(request))
    }

    /// Looks whether IPVS has another number by now, as after its module was unloaded and is loaded
    /// again. While there is a service it cannot be unloaded, so nothing was lost.
    fn renew(&mut self) -> Result<bool, Error> {
        let family = find_family(&mut self.netlink)?;
        Ok(std::mem::replace(&mut self.family, family) != family)
    }
}

/// Asks for the number of IPVS, on which the kernel loads the module.
fn find_family(netlink: &mut Netlink) -> Result<u16, Error> {
    let name = wire::put_name(CTRL_ATTR_FAMILY_NAME, wire::FAMILY);
    let request = wire::control(CTRL_CMD_GETFAMILY, &[name]);
    let replies = netlink.request(netlink::Request::new(request)).map_err(|error| {
        let missing = error.errno == Errno::ENOENT;
        if missing { Error::NoIpvs } else { Error::refused(Request::Family)(error) }
    })?;
    only(replies)
        .and_then(|reply| wire::get_u16(wire::find(&reply, CTRL_ATTR_FAMILY_ID, "family number")?))
        .map_err(Error::malformed(Request::Family))
}

fn attributes(reply: Message) -> Vec<u8> {
    reply.into_parts().1.attributes
}

fn only(replies: Vec<Message>) -> Result<Vec<u8>, DecodeError> {
    replies.into_iter().next().map(attributes).ok_or_else(|| DecodeError::from("it is empty"))
}

fn decode_service(reply: &[u8]) -> Result<ServiceState, DecodeError> {
    ServiceState::decode(wire::find(reply, command::SERVICE, "service")?)
}

fn decode_timeouts(reply: &[u8]) -> Result<Timeouts, DecodeError> {
    let mut timeouts = Timeouts::default();
    for attribute in wire::attributes(reply) {
        match attribute? {
            (command::TIMEOUT_TCP, value) => timeouts.tcp = wire::get_u32(value)?,
            (command::TIMEOUT_TCP_FIN, value) => timeouts.tcp_fin = wire::get_u32(value)?,
            (command::TIMEOUT_UDP, value) => timeouts.udp = wire::get_u32(value)?,
            _ => {}
        }
    }
    Ok(timeouts)
}

/// The attributes of this answer alone have numbers of their own (`IPVS_INFO_ATTR_*`).
fn decode_info(reply: &[u8]) -> Result<Info, DecodeError> {
    let version = wire::get_u32(wire::find(reply, 1, "version")?)?;
    let [_, major, minor, patch] = version.to_be_bytes();
    let connection_table = wire::get_u32(wire::find(reply, 2, "size of the connection table")?)?;
    Ok(Info { version: (major, minor, patch), connection_table })
}
