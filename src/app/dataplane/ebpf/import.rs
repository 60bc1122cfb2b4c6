//! From connections of IPVS to entries of the eBPF maps: what was open goes on when eBPF takes over. Nothing
//! here speaks with the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::table::{Table, number};
use crate::kernel::ebpf::{Address, Connection, FrontKey, STATE_ANSWERED, STATE_CLIENT_ENDED, Tuple};
use crate::kernel::ipvs;
use crate::model::Protocol;

/// What connections are in the maps.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Import {
    /// Of each the two entries: for what its client sends, and for what it gets.
    pub(super) taken: Vec<[(Tuple, Connection); 2]>,
    /// What cannot be carried on.
    pub(super) left: Vec<ipvs::Connection>,
}

impl Import {
    /// The entries of connections in the network of a table, in which these containers' devices have these
    /// numbers, at this time.
    pub(super) fn new(
        network: u32,
        table: &Table,
        devices: &BTreeMap<IpAddr, u32>,
        connections: &[ipvs::Connection],
        now: u32,
    ) -> Self {
        let numbers = table.numbers();
        let mut import = Self::default();
        for connection in connections {
            let found = Found::of(network, table, &numbers, devices, connection);
            match found {
                Some(found) => import.taken.push(found.entries(network, connection, now)),
                None => import.left.push(*connection),
            }
        }
        import
    }
}

/// What a connection belongs to.
struct Found {
    backend: u32,
    interface: u32,
    protocol: u8,
}

impl Found {
    /// `None`: it is of none of ours, or another translates it too, whose notes IPVS does not tell: what
    /// leads outside, and what comes back to its own sender.
    fn of(
        network: u32,
        table: &Table,
        numbers: &BTreeMap<(u32, SocketAddr), u32>,
        devices: &BTreeMap<IpAddr, u32>,
        connection: &ipvs::Connection,
    ) -> Option<Self> {
        let ipvs::Connection { client, service, destination, .. } = *connection;
        let protocol = number(match connection.protocol {
            ipvs::Protocol::Tcp => Protocol::Tcp,
            ipvs::Protocol::Udp => Protocol::Udp,
            ipvs::Protocol::Sctp => Protocol::Sctp,
            ipvs::Protocol::Other(_) => return None,
        });
        if client.ip() == destination.ip() {
            return None;
        }
        let address = Address::from(service.ip());
        let key =
            |port: u16, protocol| FrontKey { network, address, port: port.into(), protocol, zero: 0 };
        let backend = |(key, port): (FrontKey, u16)| {
            let front = table.fronts.get(&key)?;
            numbers.get(&(front.id, SocketAddr::new(destination.ip(), port))).copied()
        };
        let own = (key(service.port(), protocol), destination.port());
        let backend = [own, (key(0, 0), 0)].into_iter().find_map(backend)?;
        Some(Self { backend, interface: *devices.get(&client.ip())?, protocol })
    }

    fn entries(
        &self,
        network: u32,
        connection: &ipvs::Connection,
        now: u32,
    ) -> [(Tuple, Connection); 2] {
        let ipvs::Connection { client, service, destination, answered, ending, .. } = *connection;
        let answered = if answered { STATE_ANSWERED } else { 0 };
        let state = answered | if ending { STATE_CLIENT_ENDED } else { 0 };
        let way =
            |(from, to): (SocketAddr, SocketAddr), (as_from, as_to): (SocketAddr, SocketAddr), reply| {
                let tuple = Tuple {
                    network,
                    source: from.ip().into(),
                    destination: to.ip().into(),
                    source_port: from.port().into(),
                    destination_port: to.port().into(),
                    protocol: self.protocol,
                    reply,
                    zero: [0; 3],
                };
                let becomes = Connection {
                    source: as_from.ip().into(),
                    destination: as_to.ip().into(),
                    source_port: as_from.port().into(),
                    destination_port: as_to.port().into(),
                    backend: self.backend,
                    seen: now,
                    interface: self.interface,
                    state,
                    loops: 0,
                    zero: [0; 3],
                };
                (tuple, becomes)
            };
        [
            way((client, service), (client, destination), 0),
            way((destination, client), (service, client), 1),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Numbers;
    use super::*;
    use crate::lb::{Balancer, Front, Spread, Timeouts};
    use crate::model::Scheduler;

    const NETWORK: u32 = 4711;

    fn connection(client: &str, service: &str, destination: &str) -> ipvs::Connection {
        ipvs::Connection {
            protocol: ipvs::Protocol::Tcp,
            client: client.parse().unwrap(),
            service: service.parse().unwrap(),
            destination: destination.parse().unwrap(),
            answered: true,
            ending: false,
        }
    }

    #[test]
    fn what_is_known_is_carried_on_in_both_directions_and_the_rest_is_left() {
        let port = Front::Port { protocol: Protocol::Tcp, address: [10, 9, 0, 2].into(), port: 80 };
        let backends = [("10.9.0.6:8080".parse().unwrap(), 1), ("10.9.0.5:8080".parse().unwrap(), 1)];
        let spread = Spread {
            scheduler: Scheduler::Rr,
            affinity: None,
            backends: backends.into_iter().collect(),
        };
        let balancer = Balancer {
            addresses: [[10, 9, 0, 2].into()].into(),
            fronts: [(port, spread)].into(),
            timeouts: Timeouts::DEFAULT,
            ..Balancer::default()
        };
        let table = Table::wanted(NETWORK, &balancer, &Table::default(), &mut Numbers::default());
        let devices = [([10, 9, 0, 5].into(), 7)].into();
        let known = connection("10.9.0.5:4000", "10.9.0.2:80", "10.9.0.6:8080");
        let left = [
            // A port, a backend, and a client that are unknown, and one that meets itself.
            connection("10.9.0.5:4000", "10.9.0.2:81", "10.9.0.6:8080"),
            connection("10.9.0.5:4000", "10.9.0.2:80", "10.9.0.7:8080"),
            connection("10.9.0.8:4000", "10.9.0.2:80", "10.9.0.6:8080"),
            connection("10.9.0.5:4000", "10.9.0.2:80", "10.9.0.5:8080"),
        ];
        let all: Vec<_> = left.into_iter().chain([known]).collect();
        let import = Import::new(NETWORK, &table, &devices, &all, 100);
        assert_eq!(import.left, left);
        let [[(tuple, there), (other, back)]] = import.taken.as_slice() else { panic!("{import:?}") };
        let socket = |address: Address, port: crate::kernel::ebpf::Port| {
            SocketAddr::new(address.into(), port.into()).to_string()
        };
        assert_eq!(socket(tuple.source, tuple.source_port), "10.9.0.5:4000");
        assert_eq!(socket(tuple.destination, tuple.destination_port), "10.9.0.2:80");
        assert_eq!(socket(there.destination, there.destination_port), "10.9.0.6:8080");
        assert_eq!(socket(other.source, other.source_port), "10.9.0.6:8080");
        assert_eq!(socket(back.source, back.source_port), "10.9.0.2:80");
        assert_eq!(socket(back.destination, back.destination_port), "10.9.0.5:4000");
        assert_eq!((tuple.reply, other.reply, there.interface, there.seen), (0, 1, 7, 100));
        assert_eq!(
            (there.state, back.state, there.backend),
            (STATE_ANSWERED, STATE_ANSWERED, back.backend)
        );
    }
}
