//! bpf(2) itself, for what the library that loads programs does not do.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;

// `enum bpf_cmd` in include/uapi/linux/bpf.h.
pub(super) const MAP_LOOKUP_ELEM: u32 = 1;
pub(super) const MAP_UPDATE_ELEM: u32 = 2;
pub(super) const MAP_DELETE_ELEM: u32 = 3;
pub(super) const MAP_GET_NEXT_KEY: u32 = 4;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_ATTACH: u32 = 8;
const PROG_DETACH: u32 = 9;
const PROG_TEST_RUN: u32 = 10;
const PROG_GET_FD_BY_ID: u32 = 13;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const PROG_QUERY: u32 = 16;
pub(super) const MAP_LOOKUP_BATCH: u32 = 24;
pub(super) const MAP_UPDATE_BATCH: u32 = 26;
pub(super) const MAP_DELETE_BATCH: u32 = 27;
pub(super) const LINK_CREATE: u32 = 28;
pub(super) const LINK_UPDATE: u32 = 29;

/// `BPF_F_REPLACE`: take the place of another program.
const REPLACE: u32 = 1 << 2;

/// Calls bpf(2).
///
/// # Safety
/// Every pointer in the attributes is valid for what the command reads and writes.
pub(super) unsafe fn call<A: Pod>(command: u32, attributes: &mut A) -> Result<i32, Errno> {
    // SAFETY: the attributes are as large as is said; what they point to the caller answers for.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) };
    Errno::result(result).map(|result| result as i32)
}

/// In which direction of a device a program sees packets (`BPF_TCX_INGRESS` and `BPF_TCX_EGRESS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    /// What comes in by it.
    In = 46,
    /// What goes out by it.
    Out = 47,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Attach {
    interface: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
    relative: u32,
    revision: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Query {
    interface: u32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    zero: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// `BPF_PROG_GET_FD_BY_ID`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
}

/// A descriptor that a call has made.
pub(super) fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it for us, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A descriptor as the attributes of a call have it.
pub(super) fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Pin {
    path: u64,
    object: u32,
    flags: u32,
}

/// Gives a map a name in the kernel's file system for them.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = Pin { path: path.as_ptr() as u64, object: number(object), flags: 0 };
    // SAFETY: the path ends with a zero, and lives until it returns.
    unsafe { call(OBJ_PIN, &mut pin) }?;
    Ok(())
}

/// Opens what has a name there.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = Pin { path: path.as_ptr() as u64, ..Pin::zeroed() };
    // SAFETY: the path ends with a zero, and lives until it returns.
    Ok(unsafe { call(OBJ_GET, &mut pin) }.map(owned)?)
}

/// Attaches a program to a device of the thread's namespace, in place of another or behind those that
/// are there. It stays until it is detached, or the device goes.
pub(super) fn attach(
    direction: Direction,
    interface: u32,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut attach = Attach { interface, program: number(program), ..Attach::zeroed() };
    attach.kind = direction as u32;
    if let Some(replaced) = replaced {
        (attach.flags, attach.replaced) = (REPLACE, number(replaced));
    }
    // SAFETY: there are no pointers in it.
    unsafe { call(PROG_ATTACH, &mut attach) }.map(drop)
}

/// Detaches a program.
pub(super) fn detach(
    direction: Direction,
    interface: u32,
    program: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let mut attach = Attach { interface, program: number(program), ..Attach::zeroed() };
    attach.kind = direction as u32;
    // SAFETY: there are no pointers in it.
    unsafe { call(PROG_DETACH, &mut attach) }.map(drop)
}

/// The numbers of the programs that are attached to a device of the thread's namespace, in their order.
pub(super) fn attached(direction: Direction, interface: u32) -> Result<Vec<u32>, Errno> {
    // `BPF_MPROG_MAX` of the kernel's: there are never more.
    let mut programs = vec![0_u32; 64];
    let mut query = Query { interface, kind: direction as u32, ..Query::zeroed() };
    query.programs = programs.as_mut_ptr() as u64;
    query.count = programs.len() as u32;
    // SAFETY: there is room for as many numbers as it says.
    unsafe { call(PROG_QUERY, &mut query) }?;
    programs.truncate(query.count as usize);
    Ok(programs)
}

/// The program of a number.
pub(super) fn program(id: u32) -> io::Result<OwnedFd> {
    let mut by_id = ById { id, next: 0, flags: 0 };
    // SAFETY: there are no pointers in it.
    Ok(unsafe { call(PROG_GET_FD_BY_ID, &mut by_id) }.map(owned)?)
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct InfoOf {
    object: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_prog_info`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    code: [u64; 2],
    loaded: u64,
    user: u32,
    map_count: u32,
    maps: u64,
    name: [u8; 16],
}

/// The beginning of what the kernel tells about a program, a map or a link.
pub(super) fn info<I: Pod>(object: BorrowedFd<'_>) -> Result<I, Errno> {
    let mut info = I::zeroed();
    let pointer = std::ptr::from_mut(&mut info) as u64;
    let mut of = InfoOf { object: number(object), length: size_of::<I>() as u32, info: pointer };
    // SAFETY: there is room for as many bytes as it says.
    unsafe { call(OBJ_GET_INFO_BY_FD, &mut of) }?;
    Ok(info)
}

/// The number and the name of a program; names are cut to 15 bytes.
pub(super) fn describe(program: BorrowedFd<'_>) -> Result<(u32, String), Errno> {
    let info: Info = info(program)?;
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((info.id, String::from_utf8_lossy(name).into_owned()))
}

/// `BPF_PROG_TEST_RUN`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Run {
    program: u32,
    verdict: u32,
    input_size: u32,
    output_size: u32,
    input: u64,
    output: u64,
    repeat: u32,
    duration: u32,
    context_size: u32,
    context_output_size: u32,
    context: u64,
    context_output: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    zero: u32,
}

/// The fields of `struct __sk_buff` up to the last that is set; all others must be 0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Context {
    before: [u32; 10],
    interface: u32,
    after: [u32; 37],
}

/// Runs a program on a frame as if it had come by a device of the thread's namespace.
pub(super) fn run(
    program: BorrowedFd<'_>,
    interface: u32,
    packet: &[u8],
) -> Result<(i32, Vec<u8>), Errno> {
    let mut output = vec![0_u8; packet.len() + 256];
    let context = Context { interface, ..Context::zeroed() };
    let mut run = Run { program: number(program), ..Run::zeroed() };
    (run.input, run.input_size) = (packet.as_ptr() as u64, packet.len() as u32);
    (run.output, run.output_size) = (output.as_mut_ptr() as u64, output.len() as u32);
    (run.context, run.context_size) = (&raw const context as u64, size_of::<Context>() as u32);
    // SAFETY: the packet, the context and the room for the output have the sizes that it says.
    unsafe { call(PROG_TEST_RUN, &mut run) }?;
    output.truncate(run.output_size as usize);
    Ok((run.verdict as i32, output))
}
