//! The packets that our nftables rules drop in a namespace, as the kernel logs them (NFLOG).

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkPayload};
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigFlags, ConfigMode, PacketNla, Timeout, ULogMessage, config_request,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::Socket;

use super::netlink::{self, Netlink, NetlinkError, Request};
use super::{Error, Netns};
use crate::model::object::DROP_GROUP;

/// How much of a packet is shown: headers of IPv6 with extensions, and the ports.
const SHOWN_BYTES: u32 = 256;
/// How long the kernel may gather packets.
const GATHERED: std::time::Duration = std::time::Duration::from_millis(50);
/// Datagrams that are read at once.
const AT_A_TIME: usize = 64;

/// A packet that was dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// The reason, as the rule has it.
    pub reason: String,
    /// The beginning of the packet, without its frame.
    pub packet: Vec<u8>,
    /// By which device it came, by its number, and by which it was to go on, where that was known.
    pub devices: [Option<u32>; 2],
}

/// Listens for what is dropped in one namespace.
pub struct Drops {
    socket: Socket,
    buffer: Vec<u8>,
    /// The number of the last packet that the kernel has logged.
    last: Option<u32>,
}

impl Drops {
    /// Listens in a namespace from now on. A namespace has one listener.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or somebody else listens there.
    pub fn listen(netns: &Netns) -> Result<Self, Error> {
        let opened = netns.enter(Netlink::netfilter)?;
        let mut netlink = opened.map_err(Error::system("open a netlink socket for packets"))?;
        let settings = vec![
            ConfigCmd::Bind.into(),
            ConfigMode::new_packet(SHOWN_BYTES).into(),
            Timeout::from(GATHERED).into(),
            ConfigFlags::SEQ.into(),
        ];
        let request = config_request(NetfilterProtoFamily::Unspec, DROP_GROUP, settings);
        let NetlinkPayload::InnerMessage(request) = request.payload else {
            return Err(Error::system("listen for dropped packets")(nix::errno::Errno::EINVAL));
        };
        let bound: Result<Vec<NetfilterMessage>, NetlinkError> = netlink.request(Request::new(request));
        bound.map_err(Error::netlink("listen for dropped packets", netns.label()))?;
        let socket = netlink.into_socket().map_err(Error::system("listen for dropped packets"))?;
        Ok(Self { socket, buffer: Vec::new(), last: None })
    }

    /// What was dropped since the last time, and how many more were before it that had no room.
    ///
    /// # Errors
    /// `WouldBlock`: nothing was.
    pub fn read(&mut self) -> io::Result<(Vec<Dropped>, u64)> {
        let (mut dropped, mut lost) = (Vec::new(), 0);
        for _ in 0..AT_A_TIME {
            match netlink::receive(&self.socket, &mut self.buffer) {
                Ok(()) => {}
                // The numbers of those that follow say how many were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(_) if !dropped.is_empty() => break,
                Err(error) => return Err(error),
            }
            for (header, payload) in netlink::messages(&self.buffer) {
                let message = NetfilterMessage::deserialize(&header, payload);
                let Some((one, number)) = message.ok().and_then(as_dropped) else { continue };
                if let Some(number) = number {
                    let expected = self.last.replace(number).map(|last| last.wrapping_add(1));
                    lost += u64::from(expected.map_or(0, |expected| number.wrapping_sub(expected)));
                }
                dropped.push(one);
            }
        }
        Ok((dropped, lost))
    }
}

/// A packet that was logged, and its number.
fn as_dropped(message: NetfilterMessage) -> Option<(Dropped, Option<u32>)> {
    let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner else {
        return None;
    };
    let mut dropped = Dropped { reason: String::new(), packet: Vec::new(), devices: [None; 2] };
    let mut number = None;
    for attribute in attributes {
        match attribute {
            PacketNla::Prefix(prefix) => dropped.reason = prefix.to_string_lossy().into_owned(),
            PacketNla::Payload(payload) => dropped.packet = payload,
            PacketNla::IfIndexInDev(index) => dropped.devices[0] = Some(index),
            PacketNla::IfIndexOutDev(index) => dropped.devices[1] = Some(index),
            PacketNla::Seq(seq) => number = Some(seq),
            _ => {}
        }
    }
    Some((dropped, number))
}

impl AsRawFd for Drops {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl std::fmt::Debug for Drops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drops").finish_non_exhaustive()
    }
}
