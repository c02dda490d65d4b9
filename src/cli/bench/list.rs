//! Counts between commas, with ranges as llama-bench has them: `512,1024`, `128-1024*2`, `100-400+100`.

use std::str::FromStr;

/// Most counts of one list.
const COUNTS_MAX: usize = 1000;
const COUNT_MAX: usize = 1 << 24;

/// The counts, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List(pub Vec<usize>);

impl FromStr for List {
    type Err = String;

    fn from_str(text: &str) -> Result<List, String> {
        let mut counts = Vec::new();
        for part in text.split(',') {
            range(part.trim(), &mut counts).ok_or_else(|| {
                format!("{part:?} is no count: a number up to {COUNT_MAX} was expected, or a range from less to more as 128-1024*2")
            })?;
            if counts.len() > COUNTS_MAX {
                return Err(format!("{text:?} names more than {COUNTS_MAX} counts"));
            }
        }
        Ok(List(counts))
    }
}

/// Adds a count, or those of `FIRST-LAST`, `FIRST-LAST+STEP` or `FIRST-LAST*FACTOR`; `None` if it is neither.
fn range(text: &str, counts: &mut Vec<usize>) -> Option<()> {
    let number = |s: &str| s.parse::<usize>().ok().filter(|n| *n <= COUNT_MAX);
    let Some((first, rest)) = text.split_once('-') else {
        counts.push(number(text)?);
        return Some(());
    };
    let (last, step, factor) = if let Some((last, factor)) = rest.split_once('*') {
        (last, 0, number(factor).filter(|f| *f > 1)?)
    } else if let Some((last, step)) = rest.split_once('+') {
        (last, number(step).filter(|s| *s > 0)?, 1)
    } else {
        (rest, 1, 1)
    };
    let (mut next, last) = (number(first)?, number(last)?);
    if factor > 1 && next == 0 || next > last {
        return None;
    }
    while next <= last && counts.len() <= COUNTS_MAX {
        counts.push(next);
        next = next * factor + step;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges_are_those_of_llama_bench() {
        for (text, counts) in [
            ("512", &[512][..]),
            ("0,128, 256", &[0, 128, 256]),
            ("128-1024*2", &[128, 256, 512, 1024]),
            ("100-400+100,7", &[100, 200, 300, 400, 7]),
            ("3-5", &[3, 4, 5]),
        ] {
            assert_eq!(text.parse(), Ok(List(counts.to_vec())), "{text}");
        }
        for bad in [
            "",
            "x",
            "1,",
            "-1",
            "5-",
            "1-9*1",
            "1-9*0",
            "1-9+0",
            "0-8*2",
            "16-8*2",
            "9-8",
            "1-2-3",
            "99999999999",
            "0-16777216",
        ] {
            assert!(bad.parse::<List>().is_err(), "{bad}");
        }
    }
}
