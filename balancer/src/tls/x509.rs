//! When a certificate is valid. The rest of it is webpki's affair, which keeps these two dates to itself.
//!
//! ```text
//! Certificate ::= SEQUENCE { tbsCertificate SEQUENCE {
//!     [0] version OPTIONAL, serialNumber INTEGER, signature SEQUENCE, issuer SEQUENCE,
//!     validity SEQUENCE { notBefore Time, notAfter Time }, ... }, ... }         (RFC 5280 §4.1)
//! ```

use std::fmt;

const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: UnixSeconds,
    pub not_after: UnixSeconds,
}

/// Seconds since 1970 began, in UTC; shown as RFC 3339 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixSeconds(pub i64);

/// The dates of a certificate, if it is one.
pub fn validity(certificate: &[u8]) -> Option<Validity> {
    let (certificate, _) = take(certificate, SEQUENCE)?;
    let (tbs, _) = take(certificate, SEQUENCE)?;
    let rest = take(tbs, VERSION).map_or(tbs, |(_, rest)| rest);
    let (_, rest) = take(rest, INTEGER)?;
    let (_, rest) = take(rest, SEQUENCE)?;
    let (_, rest) = take(rest, SEQUENCE)?;
    let (dates, _) = take(rest, SEQUENCE)?;
    let (not_before, rest) = time(dates)?;
    let (not_after, _) = time(rest)?;
    Some(Validity { not_before, not_after })
}

/// The contents of the element that comes first, if it has this tag, and what follows it (X.690 §8.1.3).
fn take(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match *length {
        short @ 0..0x80 => (usize::from(short), rest),
        long => {
            let (digits, rest) = rest.split_at_checked(usize::from(long & 0x7f)).filter(|_| long <= 0x84)?;
            (digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit)), rest)
        }
    };
    (*first == tag).then(|| rest.split_at_checked(length))?
}

/// RFC 5280 §4.1.2.5: `YYMMDDHHMMSSZ` up to 2049, `YYYYMMDDHHMMSSZ` from then on.
fn time(bytes: &[u8]) -> Option<(UnixSeconds, &[u8])> {
    let short = take(bytes, UTC_TIME);
    let (digits, rest) = short.or_else(|| take(bytes, GENERALIZED_TIME))?;
    let year_digits = if short.is_some() { 2 } else { 4 };
    let digits = digits.strip_suffix(b"Z").filter(|digits| digits.len() == year_digits + 10)?;
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
    let (year, others) = text.split_at(year_digits);
    let part = |at: usize| others.get(2 * at..2 * at + 2)?.parse::<i64>().ok();
    let year = match year.parse::<i64>().ok()? {
        old @ 50..100 if short.is_some() => 1900 + old,
        new if short.is_some() => 2000 + new,
        full => full,
    };
    let (month, day) = (part(0)?, part(1)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let seconds = (part(2)? * 60 + part(3)?) * 60 + part(4)?;
    Some((UnixSeconds(days(year, month, day) * 86_400 + seconds), rest))
}

/// Days since 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms"): years are taken to
/// begin in March, so that the leap day is a year's last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

impl fmt::Display for UnixSeconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0.div_euclid(86_400) + 719_468, self.0.rem_euclid(86_400));
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * from_march + 2) / 5 + 1;
        let month = (from_march + 2) % 12 + 1;
        let year = year + era * 400 + i64::from(month <= 2);
        let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(from: (i32, u8, u8), to: (i32, u8, u8)) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(from.0, from.1, from.2);
        params.not_after = rcgen::date_time_ymd(to.0, to.1, to.2);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_dates_of_a_certificate_are_read() {
        for (from, to) in [((1999, 12, 31), (2024, 2, 29)), ((2026, 3, 1), (2100, 1, 1))] {
            let validity = validity(&made(from, to)).expect("dates");
            let shown = |(year, month, day)| format!("{year:04}-{month:02}-{day:02}T00:00:00Z");
            assert_eq!(validity.not_before.to_string(), shown(from));
            assert_eq!(validity.not_after.to_string(), shown(to));
        }
        assert_eq!(UnixSeconds(1_000_000_000).to_string(), "2001-09-09T01:46:40Z");
    }

    #[test]
    fn what_is_no_certificate_has_no_dates() {
        let whole = made((2020, 1, 1), (2030, 1, 1));
        for len in 0..whole.len().min(200) {
            // Cut anywhere, and with any byte changed, it gives dates or none, and never panics.
            let _ = validity(&whole[..len]);
            let mut changed = whole.clone();
            changed[len] ^= 0xff;
            let _ = validity(&changed);
        }
        assert_eq!(validity(b""), None);
        assert_eq!(validity(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
