//! Durations, sizes and shares of a processor, as people write them.
//!
//! Exactly one number and one unit: `1h30m` or `1.5G` would be read differently by two people.

/// Milliseconds of `500ms`, `10s`, `5m`, `1h`.
pub fn duration_ms(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// Bytes of `512K`, `256M`, `1G`, `2T`, `1048576`; the units are powers of 1024.
pub(super) fn size_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// `50` of `50%`.
pub(super) fn percent(text: &str) -> Option<u64> {
    match split(text)? {
        (number, "%") => Some(number),
        _ => None,
    }
}

/// A size as [`size_bytes`] reads it, in the largest unit that leaves no rest.
pub(super) fn show_size(bytes: u64) -> String {
    let (shift, unit) = [(40, "T"), (30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|&(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift))
        .unwrap_or((0, ""));
    format!("{}{unit}", bytes >> shift)
}

/// A duration as [`duration_ms`] reads it, in the largest unit that leaves no rest.
pub(super) fn show_duration(ms: u64) -> String {
    let (factor, unit) = [(3_600_000, "h"), (60_000, "m"), (1_000, "s")]
        .into_iter()
        .find(|&(factor, _)| ms > 0 && ms.is_multiple_of(factor))
        .unwrap_or((1, "ms"));
    format!("{}{unit}", ms / factor)
}

fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_what_is_read() {
        for bytes in [0, 1, 1023, 1024, 4 << 20, 512 << 20, 1 << 30, (1 << 30) + 1, 3 << 40] {
            assert_eq!(size_bytes(&show_size(bytes)), Some(bytes));
        }
        for ms in [0, 1, 999, 1_000, 90_000, 60_000, 600_000, 3_600_000] {
            assert_eq!(duration_ms(&show_duration(ms)), Some(ms));
        }
        assert_eq!(show_size(512 << 20), "512M");
        assert_eq!(show_duration(600_000), "10m");
    }

    #[test]
    fn nothing_else_is_read() {
        for text in
            ["", "M", "256X", "256MB", "256m", "-1M", "1.5G", " 1G", "1 G", "1G ", "99999999999T", "０M"]
        {
            assert_eq!(size_bytes(text), None, "{text:?}");
        }
        for text in ["", "10", "s", "10sec", "1h30m", "-1s", "10 s", "9999999999999999h"] {
            assert_eq!(duration_ms(text), None, "{text:?}");
        }
        for text in ["", "50", "%", "50 %", "0.5%", "50%%"] {
            assert_eq!(percent(text), None, "{text:?}");
        }
    }
}
