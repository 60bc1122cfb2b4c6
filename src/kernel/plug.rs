//! Connecting containers: the pair of devices, and the container's end of it.

use ipnetwork::IpNetwork;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use rand::Rng;

use super::message::{self, Dev, Hop, VethEnd};
use super::netlink::{Answer, Netlink, NetlinkError, Request};
use super::netns::Netns;
use super::sandbox::Sandbox;
use super::{Error, host, observe, ready, sysctl};
use crate::model::object::{Device, LinkKind, Plug};
use crate::model::{EndpointId, MacAddr};

/// How many containers are connected at a time: each needs an open descriptor meanwhile.
const AT_A_TIME: usize = 100;

/// A pair that leads to a container.
struct Pair {
    /// The sandbox's end.
    index: u32,
    mac: MacAddr,
    /// The container's end.
    inner: u32,
    /// Whether it was made just now.
    new: bool,
}

/// The kernel's answers to making a pair: whether it was made, and the sandbox's end if there is
/// one now.
struct Attempt {
    made: Result<(), NetlinkError>,
    found: Option<observe::Device>,
}

impl Attempt {
    /// Takes the next two answers.
    fn from(answers: &mut impl Iterator<Item = Answer>) -> Self {
        let made = answers.next().map_or_else(|| Err(lost()), |answer| answer.result);
        let found = answers.next().and_then(|answer| answer.replies.iter().find_map(observe::device_in));
        Self { made, found }
    }

    /// Whether something has the name of one of the ends.
    fn is_taken(&self) -> bool {
        self.made.as_ref().is_err_and(|error| error.errno == Errno::EEXIST)
    }
}

/// A container's end that is complete, but for the sandbox's end.
struct Configured<'a> {
    plug: &'a Plug,
    pair: Pair,
    /// In the container's namespace.
    netlink: Netlink,
}

/// What became of one plug so far.
type Progress<'a> = Result<(&'a Plug, Netns, Pair), Error>;

impl Sandbox {
    /// Connects containers. One that is connected already is completed.
    ///
    /// # Errors
    ///
    /// For each plug on its own. One that fails leaves nothing behind of what was made for it.
    pub fn plug_all(&mut self, plugs: &[Plug], rng: &mut impl Rng) -> Vec<Result<(), Error>> {
        plugs.chunks(AT_A_TIME).flat_map(|plugs| self.plug_some(plugs, rng)).collect()
    }

    fn plug_some(&mut self, plugs: &[Plug], rng: &mut impl Rng) -> Vec<Result<(), Error>> {
        let mut undo = Vec::new();
        let mut ends = Vec::with_capacity(plugs.len());
        let mut results = Vec::with_capacity(plugs.len());
        for progress in self.make_pairs(plugs, rng) {
            results.push(progress.and_then(|(plug, netns, pair)| {
                match netns.enter(|| configure(plug, &netns, &pair)).flatten() {
                    Ok(netlink) => ends.push(Configured { plug, pair, netlink }),
                    Err(error) => {
                        undo.extend(pair.new.then_some(plug.endpoint));
                        return Err(error);
                    }
                }
                Ok(())
            }));
        }
        self.set_up_ends(&ends);
        self.undo(&undo);
        self.wait_for_ends(&mut ends);
        results
    }

    /// Sets up the sandbox's ends. It comes last: an end that is up tells that the container's end
    /// is complete, also to an agent that is started after this one was killed.
    fn set_up_ends(&mut self, ends: &[Configured<'_>]) {
        let mut requests = Vec::with_capacity(2 * ends.len());
        for Configured { plug, pair, .. } in ends {
            self.learn_index(Device::Endpoint(plug.endpoint), pair.index);
            requests.push(Request::new(message::no_proxy_delay(pair.index)));
            requests.push(Request::new(message::end_up(pair.index, plug.mtu)));
        }
        for error in self.netlink.batch(&requests).into_iter().filter_map(Result::err) {
            // What is wrong with the device, the next reading of the sandbox shows.
            tracing::warn!(%error, sandbox = self.name, "a container's connection is not as it should be");
        }
    }

    /// Waits until nothing is lost any more of what containers send and what they are answered. Where the pair
    /// was there before, either end may be the one that came up first.
    fn wait_for_ends(&mut self, ends: &mut [Configured<'_>]) {
        let deadline = ready::deadline();
        for Configured { plug, pair, netlink } in ends {
            let mut done = ready::sends(netlink, pair.inner, deadline);
            if !pair.new {
                done = done.and_then(|()| ready::sends(&mut self.netlink, pair.index, deadline));
            }
            done = done.and_then(|()| ready::takes(netlink, &plug.addresses, deadline));
            ready::tell(done, "a container's interface", &plug.endpoint.to_string());
        }
    }

    fn undo(&mut self, endpoints: &[EndpointId]) {
        if let Err(error) = self.unplug_all(endpoints) {
            tracing::warn!(%error, sandbox = self.name, "half-made connections not removed");
        }
    }

    /// Makes the pairs of all plugs, or finds them.
    fn make_pairs<'a>(&mut self, plugs: &'a [Plug], rng: &mut impl Rng) -> Vec<Progress<'a>> {
        let mut opened = Vec::with_capacity(plugs.len());
        let mut requests = Vec::with_capacity(2 * plugs.len());
        for plug in plugs {
            let netns = open(plug);
            if let Ok(netns) = &netns {
                requests.extend(pair_requests(plug, netns, rng));
            }
            opened.push(netns);
        }
        let mut answers = self.netlink.exchange(&requests).into_iter();
        let mut progress = Vec::with_capacity(plugs.len());
        for (plug, netns) in plugs.iter().zip(opened) {
            progress.push(netns.and_then(|netns| {
                let attempt = Attempt::from(&mut answers);
                let pair = self.settle_pair(plug, &netns, attempt, rng)?;
                Ok((plug, netns, pair))
            }));
        }
        progress
    }

    /// Decides what the kernel's answers to making a pair mean.
    fn settle_pair(
        &mut self,
        plug: &Plug,
        netns: &Netns,
        mut attempt: Attempt,
        rng: &mut impl Rng,
    ) -> Result<Pair, Error> {
        let name = Device::Endpoint(plug.endpoint).to_string();
        if let (true, Some(found)) = (attempt.is_taken(), &attempt.found) {
            if self.leads_to(found, plug, netns)?
                && let Some(pair) = pair(found, false)
            {
                return Ok(pair);
            }
            // It is ours by its name, and of an earlier container or shape.
            self.remove_links(std::slice::from_ref(&name))?;
            let answers = self.netlink.exchange(&pair_requests(plug, netns, rng));
            attempt = Attempt::from(&mut answers.into_iter());
        }
        if attempt.is_taken() && attempt.found.is_none() {
            let what = format!("an interface {}", plug.interface);
            return Err(Error::Conflict { what, netns: plug.netns.clone() });
        }
        let made = attempt
            .made
            .and_then(|()| attempt.found.and_then(|found| pair(&found, true)).ok_or_else(lost));
        made.map_err(Error::netlink(format!("make {name} to {}", plug.netns.display()), &*self.name))
    }

    /// Whether the other end of a device is the interface that the plug describes.
    fn leads_to(&mut self, found: &observe::Device, plug: &Plug, netns: &Netns) -> Result<bool, Error> {
        let id = host::nsid(&mut self.netlink, netns);
        let id = id.map_err(Error::netlink("identify a namespace", &*self.name))?;
        if found.kind != LinkKind::Veth || id.is_none() || found.peer_netns != id {
            return Ok(false);
        }
        let inner = netns.enter(|| {
            let mut netlink = Netlink::open().map_err(Error::system("open a netlink socket"))?;
            let found = observe::device_by_name(&mut netlink, plug.interface.as_str());
            let action = format!("read {}", plug.interface);
            found.map_err(Error::netlink(action, plug.netns.display().to_string()))
        });
        let inner = inner.flatten()?;
        Ok(inner.is_some_and(|inner| Some(inner.index) == found.peer && inner.mac == Some(plug.mac)))
    }
}

fn open(plug: &Plug) -> Result<Netns, Error> {
    let netns = Netns::open(&plug.netns)?;
    let (path, expected, found) = (plug.netns.clone(), plug.inode, netns.inode());
    if found == expected { Ok(netns) } else { Err(Error::Replaced { path, expected, found }) }
}

/// Makes the pair and asks for its near end.
fn pair_requests(plug: &Plug, netns: &Netns, rng: &mut impl Rng) -> [Request; 2] {
    let name = &*Device::Endpoint(plug.endpoint).to_string();
    let near = VethEnd { name, mac: Some(MacAddr::random(rng)) };
    let far = VethEnd { name: plug.interface.as_str(), mac: Some(plug.mac) };
    let make = Request::create_device(message::veth(&near, &far, netns, plug.mtu));
    [make, Request::new(message::link_get(Dev::Name(name)))]
}

fn pair(found: &observe::Device, new: bool) -> Option<Pair> {
    Some(Pair { index: found.index, mac: found.mac?, inner: found.peer?, new })
}

fn lost() -> NetlinkError {
    NetlinkError { errno: Errno::ENODEV, text: "the device has gone again".to_owned() }
}

/// One thing that the container's end needs, with what it is called in an error.
struct Part {
    request: Request,
    action: String,
    /// The route that it makes, where it makes one.
    route: Option<(IpNetwork, Hop)>,
}

/// Sets up the container's end. The calling thread is in the container's namespace; gives a socket that
/// stays there.
fn configure(plug: &Plug, netns: &Netns, pair: &Pair) -> Result<Netlink, Error> {
    if plug.addresses.iter().any(IpNetwork::is_ipv6) && sysctl::has_ipv6() {
        // Engines switch IPv6 off where they give no such address themselves.
        sysctl::write(&format!("ipv6/conf/{}/disable_ipv6", plug.interface), "0")?;
    }
    let mut netlink = Netlink::open().map_err(Error::system("open a netlink socket"))?;
    let parts = parts(plug, pair);
    let requests: Vec<Request> = parts.iter().map(|part| part.request.clone()).collect();
    let mut taken = Vec::new();
    for (part, result) in parts.iter().zip(netlink.batch(&requests)) {
        match (result, part.route) {
            (Ok(()), _) => {}
            // The container is on another network already: the first one's way out stays.
            (Err(error), Some((range, _)))
                if error.errno == Errno::EEXIST && plug.shared_routes.contains(&range) => {}
            (Err(error), Some(route)) if error.errno == Errno::EEXIST => taken.push(route),
            (Err(error), _) => {
                return Err(Error::netlink(&*part.action, netns.label())(error));
            }
        }
    }
    if taken.is_empty() && pair.new {
        return Ok(netlink);
    }
    let present = our_routes(&mut netlink, netns)?;
    are_ours(&present, netns, &taken)?;
    let wanted: Vec<_> = parts.iter().filter_map(|part| part.route).collect();
    remove_others(&mut netlink, netns, pair, &present, &wanted)?;
    Ok(netlink)
}

fn parts(plug: &Plug, pair: &Pair) -> Vec<Part> {
    use RouteNetlinkMessage as M;
    let interface = &plug.interface;
    let part = |request, action| Part { request, action, route: None };
    let index = Dev::Index(pair.inner);
    let mut parts = vec![
        part(Request::new(message::link_up(Dev::Name("lo"), None)), "set up lo".to_owned()),
        part(Request::new(message::link_up(index, Some(plug.mtu))), format!("set up {interface}")),
    ];
    for address in &plug.addresses {
        let request = Request::replace(M::NewAddress(message::address(pair.inner, *address, true)));
        parts.push(part(request, format!("add address {address} to {interface}")));
    }
    let mut route = |destination: IpNetwork, hop: Hop| {
        let request = Request::create(M::NewRoute(message::route(destination, hop, None)));
        let action = format!("add route {destination} to {interface}");
        parts.push(Part { request, action, route: Some((destination, hop)) });
    };
    for gateway in &plug.gateways {
        route(IpNetwork::from(*gateway), Hop::Device(pair.inner));
    }
    for gateway in &plug.gateways {
        let all = plug.routes.iter().chain(&plug.shared_routes);
        for destination in all.filter(|range| range.is_ipv4() == gateway.is_ipv4()) {
            route(*destination, Hop::Via(pair.inner, *gateway));
        }
    }
    for gateway in &plug.gateways {
        let request =
            Request::replace(M::NewNeighbour(message::neighbour(pair.inner, *gateway, pair.mac)));
        parts.push(part(request, format!("add neighbour {gateway} to {interface}")));
    }
    parts
}

/// The routes of ours in the container.
fn our_routes(netlink: &mut Netlink, netns: &Netns) -> Result<Vec<observe::Route>, Error> {
    let mut present = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let found = netlink.dump(&message::route_dump(family, true));
        let found = found.map_err(Error::netlink("read routes", netns.label()))?;
        present.extend(found.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(message) => observe::route(message).filter(|route| route.ours),
            _ => None,
        }));
    }
    Ok(present)
}

/// Whether routes that were there already are those that we would have made.
fn are_ours(
    present: &[observe::Route],
    netns: &Netns,
    routes: &[(IpNetwork, Hop)],
) -> Result<(), Error> {
    for (destination, hop) in routes {
        let same = |route: &observe::Route| route.destination == *destination && route.hop == *hop;
        if !present.iter().any(same) {
            let what = format!("a route {destination}");
            return Err(Error::Conflict { what, netns: netns.path().to_owned() });
        }
    }
    Ok(())
}

/// Removes routes of ours through this pair that are not wanted any more: those of subnets that
/// the network had.
fn remove_others(
    netlink: &mut Netlink,
    netns: &Netns,
    pair: &Pair,
    present: &[observe::Route],
    wanted: &[(IpNetwork, Hop)],
) -> Result<(), Error> {
    let through = |route: &&observe::Route| route.hop.device() == Some(pair.inner);
    let unwanted = |route: &&observe::Route| {
        !wanted.iter().any(|(destination, hop)| (*destination, *hop) == (route.destination, route.hop))
    };
    for route in present.iter().filter(through).filter(unwanted) {
        let message = message::route(route.destination, route.hop, None);
        match netlink.request(Request::new(RouteNetlinkMessage::DelRoute(message))) {
            Err(error) if error.errno != Errno::ESRCH => {
                let action = format!("remove route {}", route.destination);
                return Err(Error::netlink(action, netns.label())(error));
            }
            _ => {}
        }
    }
    Ok(())
}
