//! Whether the host encrypts: what its IPsec policies are for must not leave past them.

use std::io;

use bytemuck::{Pod, Zeroable};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_XFRM;

/// `XFRM_MSG_GETSPDINFO` and its answer (include/uapi/linux/xfrm.h).
const GET_COUNTS: u16 = 0x25;
const COUNTS: u16 = 0x24;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;

/// A question: `struct nlmsghdr`, and flags that nobody reads.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Question {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    unused: u32,
}

/// Its answer: the same, then `XFRMA_SPD_INFO` with `struct xfrmu_spdinfo`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Answer {
    head: Question,
    attribute: [u16; 2],
    /// How many policies there are for what comes in, goes out and is forwarded, then those of sockets.
    counts: [u32; 6],
}

/// Whether the thread's namespace has policies of IPsec.
///
/// # Errors
/// When the kernel does not say.
pub(super) fn has_policies() -> io::Result<bool> {
    let socket = match Socket::new(NETLINK_XFRM) {
        // A kernel without IPsec has no policies.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        socket => socket?,
    };
    let length = size_of::<Question>() as u32;
    let question = Question { length, kind: GET_COUNTS, flags: REQUEST, ..Question::zeroed() };
    socket.send(bytemuck::bytes_of(&question), 0)?;
    let mut answer = Answer::zeroed();
    socket.recv(&mut bytemuck::bytes_of_mut(&mut answer), 0)?;
    if answer.head.kind != COUNTS {
        return Err(io::Error::other("the kernel does not tell how many IPsec policies there are"));
    }
    Ok(answer.counts.iter().take(3).any(|count| *count > 0))
}
