//! Who gets into which pass. Pure: no clock, no session.
//!
//! A pass has a token of each text that is being generated, and what room is left goes to prompts, the oldest first:
//! weights that are brought for one row serve all of them. A job is admitted when the pages that it may come to need are
//! free and promised to nobody, in the order in which jobs came, so that none is stopped by another later on.

use crate::backend::Class;

/// A job: one text that is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What a pass can carry.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows of all classes.
    pub rows: usize,
    /// The same of a pass for which others wait: a long prompt's would keep theirs up.
    pub shared: usize,
    /// Rows of class [`Class::Exact`].
    pub exact: usize,
    /// Sequences; where it is 1, each pass is of one sequence and one class.
    pub parts: usize,
}

/// A job's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub job: JobId,
    /// [`Class::Bulk`]: the next tokens of its prompt; [`Class::Exact`]: the token that was drawn last.
    pub class: Class,
    /// How many.
    pub rows: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    job: JobId,
    /// Tokens of the prompt that are left; then it generates.
    prompt: usize,
    /// Pages that it may take beyond those that it has.
    pages: usize,
    admitted: bool,
}

/// Plans passes.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// In the order in which they came.
    entries: Vec<Entry>,
    /// The job whose turn comes next where a pass cannot have all.
    turn: usize,
}

impl Scheduler {
    /// Nothing to do yet.
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler { limits, entries: Vec::new(), turn: 0 }
    }

    /// Adds a job with so many tokens of its prompt left, that may take so many pages beyond those that it has.
    pub fn add(&mut self, job: JobId, prompt: usize, pages: usize) {
        self.entries.push(Entry { job, prompt, pages, admitted: false });
    }

    /// Adds a job that takes part at once, whoever waits: its pages are free and promised to nobody.
    pub fn add_now(&mut self, job: JobId, prompt: usize, pages: usize) {
        self.entries.push(Entry { job, prompt, pages, admitted: true });
    }

    /// Pages that are promised to nobody, of those that are free.
    pub fn room(&self, free: usize) -> usize {
        free.saturating_sub(self.promised())
    }

    /// Forgets a job.
    pub fn remove(&mut self, job: JobId) {
        if let Some(at) = self.entries.iter().position(|e| e.job == job) {
            self.entries.remove(at);
            self.turn = self.turn.saturating_sub(usize::from(at < self.turn));
        }
    }

    /// Pages that a job may take still, now that it has taken some.
    pub fn needs(&mut self, job: JobId, pages: usize) {
        if let Some(e) = self.entries.iter_mut().find(|e| e.job == job) {
            e.pages = pages;
        }
    }

    /// Jobs that take part in passes.
    pub fn running(&self) -> usize {
        self.entries.iter().filter(|e| e.admitted).count()
    }

    /// Jobs that wait for room.
    pub fn waiting(&self) -> usize {
        self.entries.len() - self.running()
    }

    /// Pages that are free but promised to jobs that run.
    fn promised(&self) -> usize {
        self.entries.iter().filter(|e| e.admitted).map(|e| e.pages).sum()
    }

    /// The job that waits for room first, and the pages that it lacks, 0 for none; `free`: pages that nobody has.
    pub fn lacks(&self, free: usize) -> Option<(JobId, usize)> {
        let first = self.entries.iter().find(|e| !e.admitted)?;
        Some((first.job, (first.pages + self.promised()).saturating_sub(free)))
    }

    /// Plans the next pass; `free`: pages that nobody has. It has no shares if nobody can run. What is planned counts as
    /// computed.
    pub fn next(&mut self, free: usize, shares: &mut Vec<Share>) {
        shares.clear();
        while let Some((job, 0)) = self.lacks(free) {
            self.entries.iter_mut().filter(|e| e.job == job).for_each(|e| e.admitted = true);
        }
        let n = self.entries.len();
        self.turn = if n > 0 { self.turn % n } else { 0 };
        let rows = if self.running() > 1 { self.limits.shared.min(self.limits.rows) } else { self.limits.rows };
        if self.limits.parts == 1 {
            let in_turn = (0..n).map(|i| (self.turn + i) % n).find(|&i| self.entries[i].admitted);
            if let Some(i) = in_turn {
                let class = if self.entries[i].prompt > 0 { Class::Bulk } else { Class::Exact };
                self.share(i, class, rows, shares);
                self.turn = i + 1;
            }
            return;
        }
        let prompts = self.entries.iter().any(|e| e.admitted && e.prompt > 0);
        // Prompts get on too, however many texts are being generated.
        let most = self.limits.exact.min(rows).min(self.limits.parts - usize::from(prompts));
        let mut last = None;
        let turn = self.turn;
        for i in (0..n).map(|i| (turn + i) % n) {
            let e = self.entries[i];
            if e.admitted && e.prompt == 0 && shares.len() < most {
                self.share(i, Class::Exact, 1, shares);
                last = Some(i);
            }
        }
        if let Some(i) = last.filter(|_| shares.len() == most) {
            self.turn = i + 1;
        }
        let mut room = rows - shares.len();
        for i in 0..n {
            let e = self.entries[i];
            if e.admitted && e.prompt > 0 && room > 0 && shares.len() < self.limits.parts {
                let before = shares.len();
                self.share(i, Class::Bulk, room, shares);
                room -= shares[before..].iter().map(|s| s.rows).sum::<usize>();
            }
        }
    }

    /// Takes a pass back that was planned and has failed.
    pub fn undo(&mut self, shares: &[Share]) {
        for s in shares.iter().filter(|s| s.class == Class::Bulk) {
            self.entries.iter_mut().filter(|e| e.job == s.job).for_each(|e| e.prompt += s.rows);
        }
    }

    fn share(&mut self, i: usize, class: Class, room: usize, shares: &mut Vec<Share>) {
        let e = &mut self.entries[i];
        let rows = if class == Class::Exact { 1 } else { e.prompt.min(room) };
        e.prompt -= if class == Class::Exact { 0 } else { rows };
        shares.push(Share { job: e.job, class, rows });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::HashMap;

    /// Passes of any size, jobs that come and go: limits hold, pages suffice, nobody starves, prompts come before what
    /// follows them.
    #[test]
    fn every_job_gets_on_within_the_limits() {
        for seed in 1..=500u64 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut below = |n: usize| rng.random_range(0..n);
            let rows = 1 + below(40);
            let shared = 1 + below(rows);
            let limits = Limits { rows, shared, exact: 8.min(rows), parts: [1, 3, 9, 40][below(4)] };
            let all_pages = 4 + below(20);
            let mut scheduler = Scheduler::new(limits);
            // Of each job: tokens of the prompt and to generate, pages that it has and may take, and when it was last seen.
            let mut jobs: HashMap<JobId, (usize, usize, usize, usize, u64)> = HashMap::new();
            let (mut next, mut shares) = (0, Vec::new());
            for pass in 0..400u64 {
                if below(3) == 0 && jobs.len() < 30 {
                    let (prompt, n, pages) = (1 + below(60), 1 + below(12), 1 + below(all_pages));
                    jobs.insert(JobId(next), (prompt, n, 0, pages, pass));
                    scheduler.add(JobId(next), prompt, pages);
                    next += 1;
                }
                let used: usize = jobs.values().map(|j| j.2).sum();
                scheduler.next(all_pages - used, &mut shares);
                assert!(!shares.is_empty() || jobs.is_empty(), "seed {seed}: nobody runs, {jobs:?}");
                let most = if scheduler.running() > 1 { limits.shared } else { limits.rows };
                assert!(shares.iter().map(|s| s.rows).sum::<usize>() <= most && shares.len() <= limits.parts);
                assert!(shares.iter().filter(|s| s.class == Class::Exact).count() <= limits.exact);
                assert!(shares.is_sorted_by_key(|s| s.class == Class::Bulk), "generated tokens come first");
                // A pass that fails is planned again.
                if below(6) == 0 {
                    scheduler.undo(&shares);
                    scheduler.next(all_pages - used, &mut shares);
                }
                for s in &shares {
                    let j = jobs.get_mut(&s.job).unwrap();
                    j.4 = pass;
                    match s.class {
                        Class::Bulk => j.0 = j.0.checked_sub(s.rows).unwrap(),
                        Class::Exact => {
                            assert!(j.0 == 0 && s.rows == 1, "a token before its prompt");
                            j.1 -= 1;
                        }
                    }
                    if j.2 < j.3 && below(2) == 0 {
                        j.2 += 1;
                        scheduler.needs(s.job, j.3 - j.2);
                    }
                    if j.1 == 0 || below(60) == 0 {
                        jobs.remove(&s.job);
                        scheduler.remove(s.job);
                    }
                }
                assert_eq!(scheduler.running() + scheduler.waiting(), jobs.len());
                // All who run come to their turn.
                for e in scheduler.entries.iter().filter(|e| e.admitted && e.prompt == 0) {
                    assert!(pass - jobs[&e.job].4 <= 80, "seed {seed}: {e:?} starves");
                }
            }
        }
    }

    #[test]
    fn a_job_waits_until_its_pages_are_free() {
        let mut s = Scheduler::new(Limits { rows: 8, shared: 8, exact: 8, parts: 8 });
        let mut shares = Vec::new();
        s.add(JobId(1), 4, 3);
        s.add(JobId(2), 4, 3);
        s.next(5, &mut shares);
        assert_eq!(shares, [Share { job: JobId(1), class: Class::Bulk, rows: 4 }]);
        assert_eq!((s.running(), s.waiting(), s.lacks(5)), (1, 1, Some((JobId(2), 1))));
        s.remove(JobId(1));
        s.next(5, &mut shares);
        assert_eq!(shares[0].job, JobId(2));
        s.next(5, &mut shares);
        assert_eq!(shares, [Share { job: JobId(2), class: Class::Exact, rows: 1 }]);
    }
}
