//! Sizes, as the command line writes them (`14GiB`, `500MB`, plain bytes), and rates.

/// Parses a size in bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_bytes: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("{text:?} is no size; write for example 14GiB, 500MB or a number of bytes")),
    };
    let bad = || format!("{text:?} is no size; write for example 14GiB, 500MB or a number of bytes");
    let bytes = match number.parse::<u64>() {
        Ok(n) => n.checked_mul(unit_bytes).ok_or_else(bad)?,
        Err(_) => {
            let f = number.parse::<f64>().map_err(|_| bad())? * unit_bytes as f64;
            if !(0.0..9e18).contains(&f) {
                return Err(bad());
            }
            f as u64
        }
    };
    Ok(bytes)
}

/// Whether something in a machine may carry so many bytes per second: with what may not, predictions are no numbers.
pub fn is_rate(bytes_per_s: f64) -> bool {
    (1e5..=1e15).contains(&bytes_per_s)
}

/// A size for people: `1.50 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(n, _)| bytes >= *n) {
        Some((n, unit)) => format!("{:.2} {unit}", bytes as f64 / *n as f64),
        None => format!("{bytes} B"),
    }
}

/// A size that [`parse_size`] reads, no smaller than `bytes` and larger by less than a 16th: `451MiB`.
pub fn format_at_least(bytes: u64) -> String {
    match bytes {
        0..0x400_0000 => format!("{}KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{}MiB", bytes.div_ceil(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_the_contract_writes_them() {
        assert_eq!(parse_size("14GiB"), Ok(14 << 30));
        assert_eq!(parse_size("500MB"), Ok(500_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1.5 g"), Ok(3 << 29));
        for bad in ["", "GiB", "-1", "5 parsecs", "99999999999TiB", "1e9"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_those_of_machines() {
        assert!([1e5, 7e9, 1e15].iter().all(|r| is_rate(*r)));
        assert!([0.0, -1.0, 9e4, 2e15, f64::NAN, f64::INFINITY].iter().all(|r| !is_rate(*r)));
    }

    /// Guards against advice that is rounded to less than what is needed.
    #[test]
    fn advice_is_rounded_up_and_can_be_parsed() {
        for bytes in [1, 1023, 1024, 70_000, (1 << 26) + 1, 5_555_555_555, 1 << 50] {
            let given = parse_size(&format_at_least(bytes)).unwrap();
            assert!(given >= bytes && given < bytes + (1 << 20), "{bytes}: {given}");
        }
    }
}
