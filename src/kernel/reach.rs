//! How large the packets are that the host's routes carry whole to other nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteType};

use super::Error;
use super::host::Host;
use super::message;
use super::netlink::Request;

impl Host {
    /// The largest packet that the host's routes carry whole from an address of its own to each of others, as
    /// far as it is known by now (a smaller MTU of the path included). 0: none, or not without the kernel:
    /// the route leads into a tunnel of its own, or there is none.
    ///
    /// # Errors
    /// When the devices cannot be read.
    pub fn reach(&mut self, from: IpAddr, to: &[IpAddr]) -> Result<Vec<u32>, Error> {
        let devices = self.devices()?;
        let mtus: BTreeMap<u32, u32> = devices.iter().map(|device| (device.index, device.mtu)).collect();
        let requests: Vec<Request> =
            to.iter().map(|to| Request::new(message::route_get(Some(from), *to))).collect();
        let answers = self.netlink.exchange(&requests);
        let reach = |replies: &[RouteNetlinkMessage]| match replies {
            [RouteNetlinkMessage::NewRoute(route)] => whole(route, &mtus),
            _ => None,
        };
        Ok(answers.iter().map(|answer| reach(&answer.replies).unwrap_or(0)).collect())
    }
}

/// The largest packet that a route carries whole; `None`: it is not one of plain packets.
fn whole(route: &RouteMessage, mtus: &BTreeMap<u32, u32>) -> Option<u32> {
    let (mut device, mut mtu) = (None, u32::MAX);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = mtus.get(index).copied(),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    // 0 is none of its own.
                    if let RouteMetric::Mtu(own @ 1..) = metric {
                        mtu = *own;
                    }
                }
            }
            RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => return None,
            _ => {}
        }
    }
    (route.header.kind == RouteType::Unicast).then_some(device?.min(mtu))
}
