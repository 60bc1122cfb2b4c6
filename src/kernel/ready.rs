//! Waiting for what the kernel does only after it has answered, from work queues and under its lock for
//! devices: on a busy machine that is milliseconds later, and packets are lost until then.
//!
//! - The end of a pair that came up first has no carrier. Once its peer is up, the link watch activates it.
//!   Until then all that is sent by it is dropped, and the sender hears nothing (net/sched/sch_generic.c,
//!   `noop_enqueue`). What comes up last is active at once.
//! - An IPv6 address can be sent from at once where nobody is asked whether it is a duplicate. But its local
//!   route, by which answers are taken, is made by the work queue in which others are asked
//!   (net/ipv6/addrconf.c, `addrconf_dad_completed`).

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteType;
use nix::errno::Errno;

use super::message::{self, Dev};
use super::netlink::{Netlink, NetlinkError, Request};
use super::observe;

/// How long to wait for all that is waited for together.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long between two looks. Newer kernels activate a device when they are asked for it.
const PAUSE: Duration = Duration::from_micros(200);

/// Whether what was waited for is there.
pub(super) type Ready = Result<(), Unready>;

/// Why it is not.
pub(super) enum Unready {
    /// It takes longer.
    Late,
    /// The kernel does not say.
    Unread(NetlinkError),
}

/// Until when is waited for what is done now.
pub(super) fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits until a device of the socket's namespace sends what it is given.
pub(super) fn sends(netlink: &mut Netlink, index: u32, deadline: Instant) -> Ready {
    let sends = |replies: &[_]| replies.iter().find_map(observe::device_in).is_some_and(|d| d.sends);
    until(netlink, &message::link_get(Dev::Index(index)), deadline, sends)
}

/// Waits until the socket's namespace takes what is sent to addresses that it has.
pub(super) fn takes<'a>(
    netlink: &mut Netlink,
    addresses: impl IntoIterator<Item = &'a IpNetwork>,
    deadline: Instant,
) -> Ready {
    let is_local = |reply: &_| matches!(reply, RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local);
    for address in addresses.into_iter().map(IpNetwork::ip).filter(IpAddr::is_ipv6) {
        let request = message::route_get(None, address);
        until(netlink, &request, deadline, |replies| replies.iter().any(is_local))?;
    }
    Ok(())
}

/// Says that packets may be lost, where something was not ready in time: the next check finds what is wrong.
pub(super) fn tell(ready: Ready, what: &str, of: &str) {
    match ready {
        Ok(()) => {}
        Err(Unready::Late) => tracing::warn!(of, "{what} is not active yet: packets may be lost"),
        Err(Unready::Unread(error)) => tracing::warn!(of, %error, "{what} cannot be looked at"),
    }
}

fn until(
    netlink: &mut Netlink,
    request: &RouteNetlinkMessage,
    deadline: Instant,
    is_so: impl Fn(&[RouteNetlinkMessage]) -> bool,
) -> Ready {
    loop {
        match netlink.request(Request::new(request.clone())) {
            Ok(replies) if is_so(&replies) => return Ok(()),
            // Until an address has its route, that of a subnet may refuse it.
            Err(error) if error.errno != Errno::EHOSTUNREACH => return Err(Unready::Unread(error)),
            Ok(_) | Err(_) => {}
        }
        if Instant::now() >= deadline {
            return Err(Unready::Late);
        }
        thread::sleep(PAUSE);
    }
}
