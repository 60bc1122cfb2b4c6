//! Changes to the table, and the messages that ask for them.

use std::fmt;

use netlink_packet_core::DefaultNla;

use super::destination::{Destination, DestinationKey};
use super::error::Problem;
use super::service::{Flags, Service, ServiceKey};
use super::wire::{self, Command, Message, command};

/// One change to the table of a network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Makes a service, without destinations.
    AddService(Service),
    /// Gives a service all these properties in place of those that it has; its key, destinations,
    /// connections and counters stay.
    EditService {
        /// The service.
        service: Service,
        /// Which of its flags are meant; the others stay as they are. [`Flags::all`] for all.
        mask: Flags,
    },
    /// Removes a service with its destinations.
    DeleteService(ServiceKey),
    /// Makes a destination of a service.
    AddDestination {
        /// The service.
        service: ServiceKey,
        /// The destination.
        destination: Destination,
    },
    /// Gives a destination all these properties in place of those that it has; its key, connections
    /// and counters stay.
    EditDestination {
        /// The service.
        service: ServiceKey,
        /// The destination.
        destination: Destination,
    },
    /// Removes a destination. What becomes of its connections is up to the sysctl
    /// `net.ipv4.vs.expire_nodest_conn`.
    DeleteDestination {
        /// The service.
        service: ServiceKey,
        /// The destination.
        destination: DestinationKey,
    },
    /// Sets the counters of a service and of its destinations to zero.
    Zero(ServiceKey),
    /// Sets all counters to zero, also those of the namespace itself (`/proc/net/ip_vs_stats`).
    ZeroAll,
    /// Removes all services.
    Flush,
}

impl Change {
    /// The request; `family` is the number of IPVS in this kernel.
    pub(super) fn encode(&self, family: u16) -> Result<Message, Problem> {
        let service = |attributes: &[DefaultNla]| wire::put_nested(command::SERVICE, attributes);
        let destination = |attributes: &[DefaultNla]| wire::put_nested(command::DESTINATION, attributes);
        let (command, attributes) = match self {
            Self::AddService(added) => {
                (Command::NewService, vec![service(&added.encode(Flags::all())?)])
            }
            Self::EditService { service: edited, mask } => {
                (Command::SetService, vec![service(&edited.encode(*mask)?)])
            }
            Self::DeleteService(key) => (Command::DelService, vec![service(&key.encode())]),
            Self::AddDestination { service: key, destination: added } => {
                (Command::NewDestination, vec![service(&key.encode()), destination(&added.encode()?)])
            }
            Self::EditDestination { service: key, destination: edited } => {
                (Command::SetDestination, vec![service(&key.encode()), destination(&edited.encode()?)])
            }
            Self::DeleteDestination { service: key, destination: deleted } => {
                (Command::DelDestination, vec![service(&key.encode()), destination(&deleted.encode())])
            }
            Self::Zero(key) => (Command::Zero, vec![service(&key.encode())]),
            Self::ZeroAll => (Command::Zero, Vec::new()),
            Self::Flush => (Command::Flush, Vec::new()),
        };
        Ok(wire::message(family, command, &attributes))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddService(service) => {
                write!(f, "add the service {} ({})", service.key, service.scheduler)
            }
            Self::EditService { service, .. } => {
                write!(f, "change the service {} ({})", service.key, service.scheduler)
            }
            Self::DeleteService(key) => write!(f, "delete the service {key}"),
            Self::AddDestination { service, destination } => {
                write!(f, "add the destination {} to the service {service}", destination.key)
            }
            Self::EditDestination { service, destination } => {
                write!(f, "change the destination {} of the service {service}", destination.key)
            }
            Self::DeleteDestination { service, destination } => {
                write!(f, "delete the destination {destination} of the service {service}")
            }
            Self::Zero(key) => write!(f, "set the counters of the service {key} to zero"),
            Self::ZeroAll => f.write_str("set all counters to zero"),
            Self::Flush => f.write_str("delete all services"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Family, Forwarding, Protocol, Scheduler};
    use super::*;

    const FAMILY: u16 = 0x1c;

    fn key() -> ServiceKey {
        ServiceKey::Mark { family: Family::V6, mark: 7.try_into().unwrap() }
    }

    fn kinds(change: &Change) -> Vec<u16> {
        let (_, payload) = change.encode(FAMILY).unwrap().into_parts();
        wire::attributes(&payload.attributes).map(|attribute| attribute.unwrap().0).collect()
    }

    #[test]
    fn a_change_of_a_destination_names_its_service_too() {
        let destination =
            Destination::new(DestinationKey { address: [1; 16].into(), port: 8 }, Forwarding::Route, 1);
        for change in [
            Change::AddDestination { service: key(), destination },
            Change::EditDestination { service: key(), destination },
            Change::DeleteDestination { service: key(), destination: destination.key },
        ] {
            assert_eq!(kinds(&change), [command::SERVICE, command::DESTINATION]);
            assert!(change.to_string().contains("[101:101:"), "{change}");
            assert!(change.to_string().contains("the service fwmark 7 (IPv6)"), "{change}");
        }
    }

    #[test]
    fn what_concerns_all_services_names_none() {
        assert_eq!(kinds(&Change::ZeroAll), Vec::<u16>::new());
        assert_eq!(kinds(&Change::Flush), Vec::<u16>::new());
        assert_eq!(kinds(&Change::Zero(key())), [command::SERVICE]);
    }

    #[test]
    fn a_port_of_zero_needs_persistence() {
        let address = [10, 0, 0, 1].into();
        let every_port = ServiceKey::Address { protocol: Protocol::Tcp, address, port: 0 };
        let service = Service::new(every_port, Scheduler::RoundRobin);
        let error = Change::AddService(service.clone()).encode(FAMILY).unwrap_err();
        assert_eq!(error, Problem::PortZero);
        assert!(Change::AddService(service.clone().persistent(60)).encode(FAMILY).is_ok());
        // What is not meant by the mask may be there already.
        assert!(Change::EditService { service, mask: Flags::empty() }.encode(FAMILY).is_ok());
    }
}
