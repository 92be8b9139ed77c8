//! Making a ring: its queues, its receive buffers, what it may do at all, and what the kernel can.
//!
//! A ring is made disabled, restricted to the few operations the door uses, and enabled: code that got hold
//! of it could not open a file with it, whatever the kernel will learn to do in a ring. Everything that has
//! to be registered is registered before.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, register::Restriction, squeue};

use super::RingError;
use super::buffers::{Buffers, GROUP};

/// Entries of the submission queue; a batch with more of them enters more than once.
const SUBMISSIONS: u32 = 1024;
/// Entries of the completion queue. Beyond it the kernel keeps completions itself, at a cost.
const COMPLETIONS: u32 = 16 * 1024;

/// Everything the door submits.
const OPERATIONS: [u8; 8] = [
    opcode::AcceptMulti::CODE,
    opcode::Connect::CODE,
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::Close::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Read::CODE,
];

/// A ring ready for use, with its buffers registered.
pub fn make(buffer_count: u16, buffer_size: usize) -> Result<(IoUring, Buffers), RingError> {
    let uring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(COMPLETIONS)
        .setup_r_disabled()
        .build(SUBMISSIONS)
        .map_err(RingError::Setup)?;
    let buffers = Buffers::new(buffer_count, buffer_size).map_err(|source| RingError::Buffers {
        count: buffer_count,
        size: buffer_size,
        source,
    })?;
    let (address, entries) = buffers.ring();
    let submitter = uring.submitter();
    // SAFETY: the ring of buffers is mapped, as long as said, and lives until after `uring` is dropped.
    unsafe { submitter.register_buf_ring_with_flags(address, entries, GROUP, 0) }
        .map_err(RingError::Register)?;
    let flags = squeue::Flags::BUFFER_SELECT | squeue::Flags::SKIP_SUCCESS;
    let mut restrictions: Vec<Restriction> = OPERATIONS.into_iter().map(Restriction::sqe_op).collect();
    restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
    submitter.register_restrictions(&mut restrictions).map_err(RingError::Restrict)?;
    submitter.register_enable_rings().map_err(RingError::Restrict)?;
    Ok((uring, buffers))
}

/// What this kernel's receives can do beyond one buffer at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receives {
    /// One receive fills several buffers, and no more than it may (Linux 6.16). Without, bulk flows receive a
    /// buffer at a time.
    pub bundles: bool,
    /// A multishot receive ends by itself after a given number of bytes (Linux 6.17), so it may fill several
    /// buffers at a time and still not take all there are. Without, it fills one at a time.
    pub capped: bool,
    /// A multishot receive lets others have their turn after 32 buffers (Linux 6.8). Without, one peer that sends fast
    /// enough has all the buffers, so each receive is for one, which costs a tenth to a fifth more for a request
    /// on a kept connection.
    pub fair: bool,
}

impl Receives {
    /// Finds out by trying, with the bytes compared: earlier kernels have bundles (6.10), but fill one buffer
    /// only, or more than they were asked to, or leave gaps.
    pub fn probe(uring: &mut IoUring, buffers: &mut Buffers) -> Self {
        let size = buffers.size() as u32;
        let bundles = hears_two_buffers(uring, buffers, |fd| recv_bundle(fd, 2, size));
        let capped = bundles && hears_two_buffers(uring, buffers, |fd| recv_capped(fd, 2 * size));
        // A feature of Linux 6.10, the first after 6.8 that can be asked for.
        let fair = uring.params().is_feature_recvsend_bundle();
        Self { bundles, capped, fair }
    }
}

fn hears_two_buffers(
    uring: &mut IoUring,
    buffers: &mut Buffers,
    entry: impl FnOnce(RawFd) -> squeue::Entry,
) -> bool {
    // What fails is not there; what every kernel can do will do.
    try_two_buffers(uring, buffers, entry).unwrap_or(false)
}

/// Whether a receive fills two buffers, of somewhat more that was sent, as it was sent.
fn try_two_buffers(
    uring: &mut IoUring,
    buffers: &mut Buffers,
    entry: impl FnOnce(RawFd) -> squeue::Entry,
) -> io::Result<bool> {
    let len = 2 * buffers.size();
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let said: Vec<u8> = (0..len + len / 4).map(|at| (at % 251) as u8).collect();
    let _some = ours.write(&said)?;
    let entry = entry(theirs.as_raw_fd());
    // SAFETY: the entry refers to no memory of its own, and to a descriptor that is open.
    unsafe { uring.submission().push(&entry) }.map_err(io::Error::other)?;
    let mut heard = Vec::new();
    loop {
        uring.submit_and_wait(1)?;
        let mut over = false;
        for completion in uring.completion() {
            let filled = completion.result().max(0) as usize;
            if let Some(first) = cqueue::buffer_select(completion.flags()) {
                buffers.lend(first, filled, |chunk| heard.extend_from_slice(&chunk));
            }
            over |= !cqueue::more(completion.flags());
        }
        buffers.give_back();
        if over {
            return Ok(heard == said[..len]);
        }
    }
}

/// A receive into one buffer.
pub fn recv_once(fd: RawFd, len: u32) -> squeue::Entry {
    let entry = opcode::Recv::new(Fd(fd), std::ptr::null_mut(), len).buf_group(GROUP).build();
    entry.flags(squeue::Flags::BUFFER_SELECT)
}

/// A receive into at most so many buffers; it ends with what has come. One byte more is asked for than they
/// hold: having filled all it may fill, the kernel would otherwise go on with what else the socket has.
pub fn recv_bundle(fd: RawFd, buffers: u32, size: u32) -> squeue::Entry {
    let mut entry = opcode::RecvBundle::new(Fd(fd), GROUP).build();
    set_field(&mut entry, LEN_OFFSET, buffers.saturating_mul(size).saturating_add(1));
    entry
}

/// A multishot receive that ends by itself after `len` bytes.
pub fn recv_capped(fd: RawFd, len: u32) -> squeue::Entry {
    let mut entry = opcode::RecvMultiBundle::new(Fd(fd), GROUP).build();
    set_field(&mut entry, OPTLEN_OFFSET, len);
    entry
}

/// Has a receive wait before it tries.
pub fn poll_first(entry: &mut squeue::Entry) {
    // SAFETY: as below; the flags of a receive are in its `ioprio`, 16 bits wide.
    unsafe { *(&raw mut *entry).cast::<u8>().add(IOPRIO_OFFSET).cast::<u16>() |= RECVSEND_POLL_FIRST };
}

/// From linux/io_uring.h.
const RECVSEND_POLL_FIRST: u16 = 1 << 0;

/// Places of fields in the kernel's `struct io_uring_sqe` (linux/io_uring.h), which is what an entry is, that
/// the crate cannot set for these operations.
const IOPRIO_OFFSET: usize = 2;
const LEN_OFFSET: usize = 24;
const OPTLEN_OFFSET: usize = 44;
const _: () = assert!(size_of::<squeue::Entry>() == 64);

fn set_field(entry: &mut squeue::Entry, offset: usize, value: u32) {
    assert!(offset + 4 <= size_of::<squeue::Entry>());
    // SAFETY: an entry is 64 plain bytes of which any value is one, and the offset was just checked.
    unsafe { (&raw mut *entry).cast::<u8>().add(offset).cast::<u32>().write(value) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_receives_can_do_is_known_for_this_kernel() {
        let (mut uring, mut buffers) = make(8, 4096).expect("a ring");
        let receives = Receives::probe(&mut uring, &mut buffers);
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
        let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let expected =
            Receives { bundles: version >= (6, 16), capped: version >= (6, 17), fair: version >= (6, 10) };
        assert_eq!(receives, expected, "on {release}");
    }

    /// Submits an entry to a fresh ring, and returns what became of it.
    fn result_of(entry: &squeue::Entry) -> i32 {
        let (mut uring, _buffers) = make(2, 4096).expect("a ring");
        // SAFETY: the entries of these tests refer to no memory.
        unsafe { uring.submission().push(entry) }.expect("room for it");
        uring.submit_and_wait(1).expect("it is submitted");
        uring.completion().next().expect("its completion").result()
    }

    #[test]
    fn a_ring_refuses_what_the_door_does_not_use() {
        let path = c"/etc/hostname";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        for entry in [opcode::Nop::new().build(), open, opcode::Socket::new(1, 1, 0).build()] {
            assert_eq!(result_of(&entry), -libc::EACCES);
        }
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let close = opcode::Close::new(Fd(std::os::fd::IntoRawFd::into_raw_fd(ours))).build();
        assert_eq!(result_of(&close), 0);
    }

    #[test]
    fn an_enabled_ring_registers_nothing_more() {
        let (uring, _buffers) = make(2, 4096).expect("a ring");
        let refused = uring.submitter().register_files(&[0]).expect_err("a restricted ring");
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    }
}
