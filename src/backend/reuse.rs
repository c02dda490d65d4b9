//! How soon experts are chosen again, of which a row's choices tell: as many of them as are among the last that were chosen would be
//! in as many slots.

/// Counts by how many other experts of a layer were chosen since.
#[derive(Clone, Debug, Default)]
pub struct Reuse {
    /// By layer, experts in the order of their last use, the newest first.
    lists: Vec<Vec<u16>>,
    /// By how many others were used since, choices of experts.
    counts: Vec<u64>,
    /// Choices of experts that were chosen before: the first one of each says nothing of slots that are warm.
    uses: u64,
    rows: u64,
}

impl Reuse {
    /// Makes room for a layer of so many experts.
    pub fn add_layer(&mut self, layer: usize, experts: usize) {
        self.lists.resize_with(self.lists.len().max(layer + 1), Vec::new);
        self.lists[layer].reserve(experts + 1);
        self.counts.resize(self.counts.len().max(experts), 0);
    }

    /// A row has chosen these experts of a layer, no two the same.
    pub fn chosen(&mut self, layer: usize, ids: &[u32]) {
        let Some(list) = self.lists.get_mut(layer) else { return };
        self.rows += 1;
        for &id in ids {
            if let Some(at) = list.iter().position(|held| u32::from(*held) == id)
                && let Some(count) = self.counts.get_mut(at)
            {
                *count += 1;
                self.uses += 1;
            }
        }
        for &id in ids {
            match list.iter().position(|held| u32::from(*held) == id) {
                Some(at) => list[..=at].rotate_right(1),
                None => list.insert(0, id as u16),
            }
        }
    }

    /// Rows of layers that were counted.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The share of the choices, but the first of each expert, that were among the `slots` experts of their layer that were chosen last; 0 before any.
    pub fn hits(&self, slots: usize) -> f64 {
        let hits: u64 = self.counts.iter().take(slots).sum();
        if self.uses == 0 { 0.0 } else { hits as f64 / self.uses as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::Slots;
    use super::*;

    /// Slots of every number hit as often as is told, of a row's choices that are wanted together.
    #[test]
    fn slots_hit_as_often() {
        let (experts, used) = (32, 4);
        let mut reuse = Reuse::default();
        reuse.add_layer(0, experts);
        let mut all: Vec<(Slots, u64)> = (used..experts).map(|n| (Slots::new(n, experts), 0)).collect();
        let mut x = 7u64;
        let mut uses = 0;
        for row in 0..3000u64 {
            let mut ids = Vec::new();
            while ids.len() < used {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let id = (((x >> 33) % 12 + row / 20) % experts as u64) as u32;
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
            uses += used as u64;
            reuse.chosen(0, &ids);
            for (slots, hits) in &mut all {
                *hits += slots.chosen(ids.iter().copied()) as u64;
                for &id in &ids {
                    if !slots.has(id) {
                        slots.give(id).unwrap();
                    }
                }
            }
        }
        for (slots, (n, hits)) in (used..).zip(all.iter().map(|(_, hits)| hits)).map(|(n, h)| (n, (n, *h))) {
            let (want, is) = (hits as f64 / uses as f64, reuse.hits(slots));
            // Choices of one row are used at once, of which either order may evict another one.
            assert!((want - is).abs() < 0.02, "{n} slots: {want} of them, {is} told");
        }
        assert_eq!((reuse.rows(), Reuse::default().hits(8)), (3000, 0.0));
    }
}
