//! What the kernel tells about a bound drive through eventfds: its interrupt, and that it is wanted back.
//!
//! MSI-X vector 0 of a drive is waited for without looking: the kernel adds to an eventfd when the drive
//! raises it, and an edge-triggered epoll sleeps until then. Nothing has to be read back between two
//! waits, and no timer is set for one: a timer that goes on by itself bounds them all.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};

use crate::storage::Bell;

const VFIO_DEVICE_SET_IRQS: libc::c_ulong = 0x3b6e;

/// The drive's interrupt. It stays on until the device is closed.
#[derive(Debug)]
pub(super) struct Interrupt {
    epoll: File,
    /// What the drive's interrupt adds to.
    event: File,
    /// Ends waits where there is something else to submit.
    bell: Arc<Bell>,
    /// What the bell adds to; each time is an edge, so it is never read.
    _rung: File,
    /// Ends waits once in a `period`. It stands still after that until it is read.
    timer: File,
    period: Duration,
    /// Completions in a row that were found without an interrupt.
    unheard: u8,
}

const RAISED: u64 = 0;
const TIMER: u64 = 1;
const RUNG: u64 = 2;
/// So many completions without an interrupt, and it is taken for broken.
const BROKEN: u8 = 16;

/// Owns a descriptor that a system call has returned, or reports its failure.
fn own(fd: RawFd) -> io::Result<File> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else has.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn event() -> io::Result<File> {
    // SAFETY: takes numbers only.
    own(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

/// Leads the first interrupt of a kind to an eventfd.
fn lead(device: &impl AsRawFd, kind: u32, event: &File) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    // `vfio_irq_set` of linux/vfio.h: length, flags, index, first, count, then one descriptor.
    let set = [24, flags, kind, 0, 1, event.as_raw_fd() as u32];
    // SAFETY: the structure is as long as its first word says.
    match unsafe { libc::ioctl(device.as_raw_fd(), VFIO_DEVICE_SET_IRQS, set.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kernel's wish to have the drive back: it is being taken out or unbound, and whoever asked for that
/// waits until this process closes the drive.
#[derive(Debug)]
pub(super) struct Wanted(File);

impl Wanted {
    /// Registers an eventfd for the kernel's device request.
    ///
    /// # Errors
    /// If it cannot.
    pub(super) fn watch(device: &impl AsRawFd) -> io::Result<Self> {
        let event = event()?;
        lead(device, VFIO_PCI_REQ_IRQ_INDEX, &event)?;
        Ok(Self(event))
    }

    /// True once the kernel has asked since the last call.
    pub(super) fn asked(&self) -> bool {
        (&self.0).read(&mut [0; 8]).is_ok()
    }
}

impl Interrupt {
    /// Switches vector 0 of a VFIO device on.
    ///
    /// # Errors
    /// If the device has no MSI-X, or the system no vector for it.
    pub(super) fn on(device: &impl AsRawFd) -> io::Result<Self> {
        let interrupt = Self::new()?;
        lead(device, VFIO_PCI_MSIX_IRQ_INDEX, &interrupt.event)?;
        Ok(interrupt)
    }

    fn new() -> io::Result<Self> {
        let event = event()?;
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: takes numbers only.
        let timer = own(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        // SAFETY: takes numbers only.
        let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let (bell, rung) = Bell::with_event(true)?;
        for (file, what) in [(&event, RAISED), (&timer, TIMER), (&rung, RUNG)] {
            let mut wish = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: what };
            let (epoll, file) = (epoll.as_raw_fd(), file.as_raw_fd());
            // SAFETY: the wish is only read, during the call.
            if unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, file, &raw mut wish) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { epoll, event, bell, _rung: rung, timer, period: Duration::ZERO, unheard: 0 })
    }

    fn set_period(&mut self, period: Duration) -> io::Result<()> {
        if self.period == period {
            return Ok(());
        }
        let time = libc::timespec { tv_sec: period.as_secs() as _, tv_nsec: period.subsec_nanos().into() };
        let wish = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the wish is only read, and the old setting is not asked for.
        if unsafe { libc::timerfd_settime(self.timer.as_raw_fd(), 0, &raw const wish, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.period = period;
        Ok(())
    }

    /// Sleeps until the interrupt is raised, but not longer than `most`, which should be the same in most
    /// calls. Returns at once if it was raised since the last call, and may return for nothing. False if it
    /// was not raised.
    ///
    /// # Errors
    /// If the system refuses; nothing was waited for.
    pub(super) fn wait(&mut self, most: Duration) -> io::Result<bool> {
        self.set_period(most.max(Duration::from_millis(1)))?;
        let mut event = libc::epoll_event { events: 0, u64: RAISED };
        // SAFETY: room for the one event that is asked for.
        let found = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), &raw mut event, 1, -1) };
        if found < 0 {
            let why = io::Error::last_os_error();
            return if why.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(why) };
        }
        if event.u64 == TIMER {
            // How often it has ended is of no interest; reading sets it going again.
            let _ = self.timer.read(&mut [0; 8]);
        }
        Ok(event.u64 == RAISED)
    }

    /// Ends waits.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Notes that a wait has ended with a completion, and whether the interrupt said so. True if it seems
    /// never to be raised: then every wait would last as long as it may.
    pub(super) fn broken(&mut self, raised: bool) -> bool {
        self.unheard = if raised { 0 } else { self.unheard + 1 };
        self.unheard >= BROKEN
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use super::*;

    #[test]
    fn each_signal_ends_one_wait_and_none_is_lost() {
        let mut interrupt = Interrupt::new().unwrap();
        let long = Duration::from_secs(600);
        for _ in 0..3 {
            interrupt.event.write_all(&1u64.to_ne_bytes()).unwrap();
            assert!(interrupt.wait(long).unwrap());
        }
        let short = Duration::from_millis(20);
        for _ in 0..3 {
            let began = Instant::now();
            assert!(!interrupt.wait(short).unwrap(), "the signals were taken");
            assert!(began.elapsed() >= short / 2, "so only time ends it");
        }
    }

    /// Guards against a request that waits until the drive has answered an earlier one, 2 ms or longer.
    #[test]
    fn the_bell_ends_a_wait_and_is_no_interrupt() {
        let mut interrupt = Interrupt::new().unwrap();
        let long = Duration::from_secs(600);
        for _ in 0..3 {
            interrupt.bell().ring();
            assert!(!interrupt.wait(long).unwrap() && interrupt.bell().heard());
        }
        let bell = Arc::clone(interrupt.bell());
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            bell.ring();
        });
        assert!(!interrupt.wait(long).unwrap() && interrupt.bell().heard());
        later.join().unwrap();
    }

    #[test]
    fn an_interrupt_that_never_comes_is_given_up() {
        let mut interrupt = Interrupt::new().unwrap();
        assert!((1..BROKEN).all(|_| !interrupt.broken(false)));
        assert!(!interrupt.broken(true));
        assert_eq!((1..=BROKEN).position(|_| interrupt.broken(false)), Some(usize::from(BROKEN) - 1));
    }

    #[test]
    fn a_wish_is_heard() {
        let wanted = Wanted(event().unwrap());
        assert!(!wanted.asked());
        (&wanted.0).write_all(&1u64.to_ne_bytes()).unwrap();
        assert!(wanted.asked() && !wanted.asked());
    }

    #[test]
    fn after_a_long_pause_waits_still_end() {
        let mut interrupt = Interrupt::new().unwrap();
        let short = Duration::from_millis(2);
        for _ in 0..3 {
            interrupt.wait(short).unwrap();
            std::thread::sleep(10 * short);
        }
    }
}
