//! Removing devices, without waiting for the kernel's grace period.
//!
//! Deleting a veth takes about 25 ms, nearly all of which the kernel waits (`rcu_barrier` in
//! `netdev_run_todo`) after the device has gone from every table and its removal was announced. So
//! a thread of its own asks for it and waits, and the caller only listens for the announcement.
//! Devices that go together are marked with a group and deleted by one request: one wait for all.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netlink_packet_core::NetlinkDeserializable;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netlink::{self, Netlink, NetlinkError, Request};
use super::sandbox::Sandbox;
use super::{Error, message};
use crate::model::EndpointId;
use crate::model::object::Device;

/// How many removals of a sandbox may wait for the kernel at a time.
const WAITING: usize = 64;
/// When devices that are still there are an error.
const DEADLINE: Duration = Duration::from_secs(15);
/// How often it is looked whether the request has already returned: this matters only where its
/// announcements were lost.
const LOOK: Duration = Duration::from_millis(20);
/// About 2 KiB for each announcement of the largest removal at a time.
const QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// The threads that wait for the kernel to be done with devices that have gone.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    threads: Vec<JoinHandle<Result<(), NetlinkError>>>,
}

impl Reaper {
    fn start(&mut self, mut netlink: Netlink) -> Result<(), Error> {
        self.threads.retain(|thread| !thread.is_finished());
        if self.threads.len() >= WAITING {
            // Its devices have gone; what it still waits for concerns nobody.
            let _ = self.threads.remove(0).join();
        }
        let delete = move || netlink.request(Request::new(message::delete_group())).map(drop);
        let thread = std::thread::Builder::new().name("reaper".to_owned()).spawn(delete);
        self.threads.push(thread.map_err(Error::system("start a thread"))?);
        Ok(())
    }

    /// The outcome of the last removal, once it has one.
    fn outcome(&mut self) -> Option<Result<(), NetlinkError>> {
        let thread = self.threads.pop_if(|thread| thread.is_finished())?;
        let died = NetlinkError { errno: Errno::EIO, text: "the thread ended".to_owned() };
        Some(thread.join().unwrap_or(Err(died)))
    }
}

impl Sandbox {
    /// Takes containers off the network: when it returns, their interfaces have gone. That they
    /// are gone already is success.
    pub fn unplug_all(&mut self, endpoints: &[EndpointId]) -> Result<(), Error> {
        let names = endpoints.iter().map(|id| Device::Endpoint(*id).to_string());
        self.remove_links(&names.collect::<Vec<_>>())
    }

    /// Removes devices by name, all together.
    pub(super) fn remove_links(&mut self, names: &[String]) -> Result<(), Error> {
        let marks: Vec<Request> =
            names.iter().map(|name| Request::new(message::link_group(name))).collect();
        let mut present = BTreeSet::new();
        for (name, result) in names.iter().zip(self.netlink.batch(&marks)) {
            match result {
                Ok(()) => present.insert(name.as_str()),
                Err(error) if error.errno == Errno::ENODEV => false,
                Err(error) => return Err(Error::netlink(format!("remove {name}"), &*self.name)(error)),
            };
        }
        if present.is_empty() {
            return Ok(());
        }
        let sockets = self.netns.enter(|| {
            let groups = [libc::RTNLGRP_LINK];
            std::io::Result::Ok((
                netlink::subscribe(NETLINK_ROUTE, &groups, QUEUE_BYTES)?,
                Netlink::open()?,
            ))
        })?;
        let (news, deleter) = sockets.map_err(Error::system("open a netlink socket"))?;
        self.reaper.start(deleter)?;
        self.await_removal(&news, present)
    }

    fn await_removal(&mut self, news: &Socket, mut present: BTreeSet<&str>) -> Result<(), Error> {
        let start = Instant::now();
        let mut buffer = Vec::new();
        while !present.is_empty() {
            match self.reaper.outcome() {
                Some(Ok(())) => return Ok(()),
                // Somebody else was faster.
                Some(Err(error)) if error.errno == Errno::ENODEV => return Ok(()),
                Some(Err(error)) => return Err(Error::netlink("remove devices", &*self.name)(error)),
                None => {}
            }
            if start.elapsed() > DEADLINE {
                let (sandbox, seconds) = (self.name.clone(), DEADLINE.as_secs());
                return Err(Error::StillThere { sandbox, count: present.len(), seconds });
            }
            let descriptor = netlink::borrow(news);
            let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            match poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(Errno::EINTR) => continue,
                result => drop(result.map_err(Error::system("wait for devices to go"))?),
            }
            // What is lost for want of room, the outcome will tell.
            while netlink::receive(news, &mut buffer).is_ok() {
                for (header, payload) in netlink::messages(&buffer) {
                    let Ok(RouteNetlinkMessage::DelLink(link)) =
                        RouteNetlinkMessage::deserialize(&header, payload)
                    else {
                        continue;
                    };
                    for attribute in &link.attributes {
                        if let LinkAttribute::IfName(name) = attribute {
                            present.remove(name.as_str());
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
