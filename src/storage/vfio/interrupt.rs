//! What the kernel tells about a bound drive through eventfds: its interrupt, and that it is wanted back.
//!
//! MSI-X vector 0 of a drive is waited for without looking: the kernel adds to an eventfd when the drive
//! raises it, and an edge-triggered epoll sleeps until then. Nothing has to be read back between two
//! waits, and no timer is set for one: a timer that goes on by itself bounds them all.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};

use crate::storage::Bell;

/// `linux/vfio.h`.
mod ioctl {
    // A `vfio_irq_set` as words.
    nix::ioctl_write_ptr_bad!(device_set_irqs, 0x3b6e, [u32; 6]);
}

/// The drive's interrupt. It stays on until the device is closed.
#[derive(Debug)]
pub(super) struct Interrupt {
    epoll: Epoll,
    /// What the drive's interrupt adds to.
    event: EventFd,
    /// Ends waits where there is something else to submit.
    bell: Arc<Bell>,
    /// What the bell adds to; each time is an edge, so it is never read.
    _rung: File,
    /// Ends waits once in a `period`. It stands still after that until it is read.
    timer: TimerFd,
    period: Duration,
    /// Completions in a row that were found without an interrupt.
    unheard: u8,
}

const RAISED: u64 = 0;
const TIMER: u64 = 1;
const RUNG: u64 = 2;
/// So many completions without an interrupt, and it is taken for broken.
const BROKEN: u8 = 16;

fn event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}

/// Leads the first interrupt of a kind to an eventfd.
fn lead(device: &impl AsRawFd, kind: u32, event: &EventFd) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    // `vfio_irq_set` of linux/vfio.h: length, flags, index, first, count, then one descriptor.
    let set = [24, flags, kind, 0, 1, event.as_fd().as_raw_fd() as u32];
    // SAFETY: the structure is as long as its first word says.
    unsafe { ioctl::device_set_irqs(device.as_raw_fd(), &set)? };
    Ok(())
}

/// The kernel's request to have the drive back: it is being taken out or unbound, and whoever asked for that
/// waits until this process closes the drive.
#[derive(Debug)]
pub(super) struct Wanted(EventFd);

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
        self.0.read().is_ok()
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
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (bell, rung) = Bell::with_event(true)?;
        for (file, what) in [(event.as_fd(), RAISED), (timer.as_fd(), TIMER), (rung.as_fd(), RUNG)] {
            epoll.add(file, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, what))?;
        }
        Ok(Self { epoll, event, bell, _rung: rung, timer, period: Duration::ZERO, unheard: 0 })
    }

    fn set_period(&mut self, period: Duration) -> io::Result<()> {
        if self.period == period {
            return Ok(());
        }
        self.timer.set(Expiration::Interval(period.into()), TimerSetTimeFlags::empty())?;
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
        let mut events = [EpollEvent::new(EpollFlags::empty(), RAISED)];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let [event] = events;
        if event.data() == TIMER {
            // How often it has ended is of no interest; reading sets it going again.
            let _ = self.timer.wait();
        }
        Ok(event.data() == RAISED)
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
    use super::*;

    #[test]
    fn each_signal_ends_one_wait_and_none_is_lost() {
        let mut interrupt = Interrupt::new().unwrap();
        let long = Duration::from_secs(600);
        for _ in 0..3 {
            interrupt.event.write(1).unwrap();
            assert!(interrupt.wait(long).unwrap());
        }
        let short = Duration::from_millis(20);
        for _ in 0..3 {
            assert!(!interrupt.wait(short).unwrap(), "the signals were taken, so only time ends it");
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
        wanted.0.write(1).unwrap();
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
