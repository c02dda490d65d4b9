//! What happens to register accesses of a drive that is no longer there. The kernel may take the mapping of
//! BAR 0 away (a surprise removal, a slot that is powered off, memory decoding switched off); the next
//! access then raises SIGBUS, which would end the process. While registers are mapped, a handler puts a page
//! of ones in their place: the access is repeated, reads all ones as from a device that does not answer, and
//! the driver reports the drive as gone. Every other SIGBUS goes to whoever handled it before.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Drives that may be open at once.
const MOST: usize = 64;

/// One mapping of registers; the handler looks at it while `base` is not null.
struct Slot {
    taken: AtomicBool,
    base: AtomicPtr<u8>,
    len: AtomicUsize,
    /// As many bytes of ones; null once they have taken the registers' place.
    ones: AtomicPtr<u8>,
}

static SLOTS: [Slot; MOST] = [const {
    Slot {
        taken: AtomicBool::new(false),
        base: AtomicPtr::new(std::ptr::null_mut()),
        len: AtomicUsize::new(0),
        ones: AtomicPtr::new(std::ptr::null_mut()),
    }
}; MOST];

/// The handler before ours, or why ours could not be installed (an errno).
static EARLIER: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

/// Keeps a mapping covered; drop it before the mapping goes.
#[derive(Debug)]
pub(super) struct Covered(usize);

/// Covers `len` bytes of mapped registers at `base`, whole pages.
///
/// # Errors
/// If the handler, or the memory for the ones, cannot be had, or [`MOST`] drives are open.
///
/// # Safety
/// `base` and `len` are a mapping that this program made and owns, of registers: its contents may be
/// replaced by ones at any time.
pub(super) unsafe fn cover(base: *mut u8, len: usize) -> io::Result<Covered> {
    if let Err(errno) = EARLIER.get_or_init(install) {
        return Err(io::Error::from_raw_os_error(*errno));
    }
    let ones = ones(len)?;
    let Some(i) = SLOTS.iter().position(|s| !s.taken.swap(true, Ordering::AcqRel)) else {
        // SAFETY: mapped above, and handed to nobody.
        unsafe { libc::munmap(ones.cast(), len) };
        return Err(io::Error::other(format!("more than {MOST} drives are open")));
    };
    let slot = &SLOTS[i];
    slot.ones.store(ones, Ordering::Release);
    slot.len.store(len, Ordering::Release);
    slot.base.store(base, Ordering::Release);
    Ok(Covered(i))
}

impl Drop for Covered {
    fn drop(&mut self) {
        let slot = &SLOTS[self.0];
        slot.base.store(std::ptr::null_mut(), Ordering::Release);
        let ones = slot.ones.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !ones.is_null() {
            // SAFETY: mapped in `cover` with this length, and taken out of the handler's sight.
            unsafe { libc::munmap(ones.cast(), slot.len.load(Ordering::Acquire)) };
        }
        slot.taken.store(false, Ordering::Release);
    }
}

/// Fresh memory full of ones.
fn ones(len: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh anonymous mapping touches no memory of ours.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `len` bytes were mapped there for writing just now.
    unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0xff, len) };
    Ok(at.cast())
}

fn install() -> Result<libc::sigaction, i32> {
    let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    // SAFETY: sigaction is plain data for which zeros are valid: no flags, an empty mask.
    let (mut ours, mut earlier): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both point to valid structures, and the handler has the form that SA_SIGINFO asks for.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut earlier) } {
        0 => Ok(earlier),
        _ => Err(errno()),
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    if !replace(at) {
        pass_on(signal, info, context);
    }
}

/// Puts ones in place of the registers that byte `at` belongs to. Makes only one system call and takes no lock.
fn replace(at: usize) -> bool {
    for slot in &SLOTS {
        let base = slot.base.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Acquire);
        if base.is_null() || !(base as usize..base as usize + len).contains(&at) {
            continue;
        }
        let ones = slot.ones.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if ones.is_null() {
            return false;
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: `ones` is ours alone since the swap; the registers' mapping may be replaced (see `cover`).
        let moved = unsafe { libc::mremap(ones.cast(), len, len, flags, base.cast::<libc::c_void>()) };
        return moved != libc::MAP_FAILED;
    }
    false
}

/// Does what would have been done without our handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(Ok(earlier)) = EARLIER.get() else {
        // A signal between the handler's installation and its record: end as by default.
        // SAFETY: abort may be called in a handler.
        unsafe { libc::abort() };
    };
    match earlier.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: zeros are the default action; the access is repeated and ends the process.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            }
        }
        handler if earlier.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: installed by someone with this flag, so it has this form.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed by someone without SA_SIGINFO, so it takes the number alone.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// Two pages of a file that was cut off behind them: an access raises SIGBUS, as registers that are gone.
    fn lost_mapping() -> (*mut u8, usize) {
        let (file, len) = (tempfile::tempfile().unwrap(), 8192);
        file.set_len(len as u64).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of a file of our own.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        (at.cast(), len)
    }

    #[test]
    fn registers_that_are_gone_read_as_ones() {
        for _ in 0..MOST + 2 {
            let (base, len) = lost_mapping();
            // SAFETY: the mapping is this test's own, and outlives the cover.
            let covered = unsafe { cover(base, len) }.unwrap();
            // SAFETY: within the mapping; what is not there any more is replaced by ones.
            unsafe {
                assert_eq!(base.add(0x1c).cast::<u32>().read_volatile(), u32::MAX);
                base.add(0x1000).cast::<u32>().write_volatile(7);
                assert_eq!(base.add(0x1004).cast::<u32>().read_volatile(), u32::MAX);
                drop(covered);
                libc::munmap(base.cast(), len);
            }
        }
    }

    #[test]
    fn mappings_are_told_apart() {
        let (first, len) = lost_mapping();
        let (second, _) = lost_mapping();
        // SAFETY: as above.
        let covers = unsafe { [cover(first, len).unwrap(), cover(second, len).unwrap()] };
        // SAFETY: as above.
        unsafe {
            assert_eq!(second.cast::<u32>().read_volatile(), u32::MAX);
            assert_eq!(first.cast::<u32>().read_volatile(), u32::MAX);
            drop(covers);
            libc::munmap(first.cast(), len);
            libc::munmap(second.cast(), len);
        }
    }
}
