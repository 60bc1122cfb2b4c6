//! Programs at a control group, each by a link that keeps it there ("BPF_LINK_CREATE" in bpf(2)).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;

use super::sys::{self, number, owned};

/// What a program is asked about (`enum bpf_attach_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    TcpState = 3,
    Connect4 = 10,
    Connect6 = 11,
    Send4 = 14,
    Send6 = 15,
    Receive4 = 19,
    Receive6 = 20,
    Peer4 = 29,
    Peer6 = 30,
}

/// `BPF_LINK_CREATE`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Create {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
}

/// `BPF_LINK_UPDATE`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    replaced: u32,
}

/// The beginning of `struct bpf_link_info`, of a link to a control group.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    zero: u32,
    cgroup: u64,
    call: u32,
    padding: u32,
}

/// Has a control group, and all below it, ask a program; beside others that are there.
pub(super) fn create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    call: Call,
) -> Result<OwnedFd, Errno> {
    let kind = call as u32;
    let mut create =
        Create { program: number(program), target: number(cgroup), kind, ..Create::zeroed() };
    // SAFETY: there are no pointers in it.
    unsafe { sys::call(sys::LINK_CREATE, &mut create) }.map(owned)
}

/// Has a link keep another program than before.
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut update = Update { link: number(link), program: number(program), ..Update::zeroed() };
    // SAFETY: there are no pointers in it.
    unsafe { sys::call(sys::LINK_UPDATE, &mut update) }.map(drop)
}

/// The number of the control group that a link is at; 0: that is gone, or somebody has detached it.
pub(super) fn cgroup_of(link: BorrowedFd<'_>) -> Result<u64, Errno> {
    let info: Info = sys::info(link)?;
    Ok(info.cgroup)
}

/// The number of a control group.
pub(super) fn number_of(cgroup: BorrowedFd<'_>) -> Result<u64, Errno> {
    // kernfs gives it as the inode, where that has 64 bits.
    Ok(nix::sys::stat::fstat(cgroup.as_fd())?.st_ino)
}
