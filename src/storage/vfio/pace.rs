//! How to wait for completions that raise no interrupt: look often for a moment, then nap for a part
//! of what such waits have lately taken, and look again. A pure state machine: it is told the time.

use std::time::Duration;

/// Looked at without a pause at the start, and after every nap.
const SPIN: Duration = Duration::from_micros(3);
/// A shorter nap costs more than it saves.
const LEAST: Duration = Duration::from_micros(12);
/// However slow the drive: errors and urgent reads wait no longer than this.
const MOST: Duration = Duration::from_millis(1);

/// The pace of one reader's waits.
#[derive(Debug, Default)]
pub struct Pace {
    /// Mean of the last waits, newer ones weighing more.
    mean: Duration,
    /// How much longer than asked for naps take: microseconds on a machine, much more in a virtual
    /// one, where they may not be worth it.
    late: Duration,
    spin_until: Duration,
    /// When the nap should have ended.
    wake: Option<Duration>,
}

impl Pace {
    /// A wait begins.
    pub fn begin(&mut self) {
        (self.spin_until, self.wake) = (SPIN, None);
    }

    /// Nothing has come after `waited`: `Some` to nap for that long, `None` to look again.
    pub fn next(&mut self, waited: Duration) -> Option<Duration> {
        self.woken(waited);
        if waited < self.spin_until {
            return None;
        }
        // Most of the usual time at first, then steps of an eighth, so that the end is met with
        // little delay.
        let nap = (self.mean * 3 / 4).saturating_sub(waited).max(self.mean / 8).saturating_sub(self.late).min(MOST);
        if nap < LEAST {
            return None;
        }
        self.wake = Some(waited + nap);
        Some(nap)
    }

    fn woken(&mut self, waited: Duration) {
        if let Some(wake) = self.wake.take() {
            self.late = (self.late * 3 + waited.saturating_sub(wake)) / 4;
            self.spin_until = waited + SPIN;
        }
    }

    /// The wait is over. Naps end before the usual time, so a mean that is too long shrinks; it
    /// shrinks fast and grows slowly, since waiting too long costs more than looking too early.
    pub fn end(&mut self, waited: Duration) {
        self.woken(waited);
        // Forgotten slowly, so that naps are tried again once in a while.
        self.late -= self.late / 256;
        self.mean = if waited < self.mean { (self.mean + waited) / 2 } else { (self.mean * 7 + waited) / 8 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    /// Waits for something that comes after `latency`, with naps that overshoot by `late` and looks
    /// that take 1 µs. The time it was noticed, and the time spent looking.
    fn wait(pace: &mut Pace, latency: Duration, late: Duration) -> (Duration, Duration) {
        let (mut now, mut looking) = (Duration::ZERO, Duration::ZERO);
        pace.begin();
        while now < latency {
            match pace.next(now) {
                Some(nap) => now += nap + late,
                None => (now, looking) = (now + MICROSECOND, looking + MICROSECOND),
            }
        }
        pace.end(now);
        (now, looking)
    }

    fn settled(latency: Duration) -> (Pace, Duration, Duration) {
        let mut pace = Pace::default();
        for _ in 0..100 {
            wait(&mut pace, latency, 5 * MICROSECOND);
        }
        let (noticed, looking) = wait(&mut pace, latency, 5 * MICROSECOND);
        (pace, noticed, looking)
    }

    #[test]
    fn long_waits_are_mostly_slept_and_ended_soon() {
        for micros in [100, 200, 1000, 8000] {
            let latency = Duration::from_micros(micros);
            let (_, noticed, looking) = settled(latency);
            assert!(looking < latency / 3, "{micros} µs: {looking:?}");
            assert!(noticed < latency * 5 / 4, "{micros} µs: {noticed:?}");
        }
    }

    #[test]
    fn short_waits_are_never_slept() {
        let (_, noticed, looking) = settled(Duration::from_micros(10));
        assert_eq!(noticed, looking);
    }

    #[test]
    fn a_drive_that_gets_faster_is_noticed() {
        let (mut pace, ..) = settled(Duration::from_millis(5));
        for _ in 0..100 {
            wait(&mut pace, 10 * MICROSECOND, 5 * MICROSECOND);
        }
        let (noticed, _) = wait(&mut pace, 10 * MICROSECOND, 5 * MICROSECOND);
        assert!(noticed < 30 * MICROSECOND, "{noticed:?}");
    }

    #[test]
    fn naps_that_end_late_are_given_up() {
        let mut pace = Pace::default();
        let latency = 120 * MICROSECOND;
        let total: Duration = (0..1000).map(|_| wait(&mut pace, latency, 300 * MICROSECOND).0).sum();
        assert!(total < latency * 1000 * 11 / 10, "{total:?}");
    }
}
