//! How activities that run at once share what they all use.

/// What an activity takes at full speed: bytes per second of RAM, and a share of the processors.
pub(super) type Demand = [f64; 2];

/// Speeds, each from 0 to 1, at which no resource gives more than its capacity. All grow alike; where a
/// resource is used up, those that use it stop growing.
pub(super) fn speeds<const N: usize>(demands: &[Option<Demand>; N], capacity: Demand) -> [f64; N] {
    let mut speeds = [0.0; N];
    let mut growing: [bool; N] = std::array::from_fn(|i| demands[i].is_some());
    let mut left = capacity;
    let mut level = 0.0;
    while growing.contains(&true) {
        let used = |r: usize| -> f64 {
            let of = demands.iter().zip(&growing).filter(|(_, g)| **g);
            of.map(|(d, _)| d.map_or(0.0, |d| d[r])).sum()
        };
        let step = |r: usize| if used(r) > 0.0 { (left[r] / used(r)).max(0.0) } else { f64::INFINITY };
        let grow = (0..2).map(step).fold(1.0 - level, f64::min);
        level += grow;
        let takes = [used(0), used(1)];
        for r in 0..2 {
            left[r] -= grow * takes[r];
        }
        let full = |r: usize| takes[r] > 0.0 && left[r] <= capacity[r] * 1e-9;
        let done = level >= 1.0 - 1e-9;
        for i in 0..N {
            let stops = demands[i].is_some_and(|d| (0..2).any(|r| d[r] > 0.0 && full(r)));
            if growing[i] && (stops || done) {
                growing[i] = false;
                speeds[i] = level;
            }
        }
    }
    speeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_run_at_full_speed_where_there_is_enough() {
        assert_eq!(speeds(&[Some([10.0, 0.0]), None, Some([5.0, 1.0])], [20.0, 1.0]), [1.0, 0.0, 1.0]);
        assert_eq!(speeds(&[Some([10.0, 0.0])], [f64::INFINITY, 1.0]), [1.0]);
    }

    #[test]
    fn a_resource_that_is_short_is_shared_and_no_more_is_given_than_there_is() {
        assert_eq!(speeds(&[Some([10.0, 0.0]), Some([30.0, 0.0])], [20.0, 1.0]), [0.5, 0.5]);
        // Two that each want all processors; the third is not bound by them and gets the rest of RAM.
        let s = speeds(&[Some([4.0, 1.0]), Some([4.0, 1.0]), Some([8.0, 0.0])], [10.0, 1.0]);
        assert_eq!(s, [0.5, 0.5, 0.75]);
    }
}
