//! A transaction's commit time in ISO 8601, as every message carries it.

/// `2025-06-11T01:19:22.402358Z` takes 27 bytes; a year outside 0 to 9999 takes more.
const LENGTH_MAX: usize = 32;

const DAY_US: i64 = 86_400_000_000;

/// A moment as text, without an allocation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timestamp {
    bytes: [u8; LENGTH_MAX],
    length: usize,
}

impl Timestamp {
    /// Microseconds since the Unix epoch, in UTC. A year outside 0 to 9999 gets a sign and six
    /// digits, which is ISO 8601's expanded form.
    pub(super) fn new(timestamp_us: i64) -> Self {
        let (year, month, day) = civil(timestamp_us.div_euclid(DAY_US));
        let microseconds = timestamp_us.rem_euclid(DAY_US).unsigned_abs();
        let seconds = microseconds / 1_000_000;
        let mut text = Self { bytes: [0; LENGTH_MAX], length: 0 };
        if (0..=9999).contains(&year) {
            text.number(year.unsigned_abs(), 4);
        } else {
            text.byte(if year < 0 { b'-' } else { b'+' });
            text.number(year.unsigned_abs(), 6);
        }
        text.byte(b'-');
        text.number(month, 2);
        text.byte(b'-');
        text.number(day, 2);
        text.byte(b'T');
        text.number(seconds / 3600, 2);
        text.byte(b':');
        text.number(seconds / 60 % 60, 2);
        text.byte(b':');
        text.number(seconds % 60, 2);
        text.byte(b'.');
        text.number(microseconds % 1_000_000, 6);
        text.byte(b'Z');
        text
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn byte(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
    }

    /// The number's last digits, padded with zeros.
    fn number(&mut self, mut number: u64, digits: usize) {
        for place in (self.length..self.length + digits).rev() {
            self.bytes[place] = b"0123456789"[(number % 10) as usize];
            number /= 10;
        }
        self.length += digits;
    }
}

/// Days since the Unix epoch as year, month and day of the Gregorian calendar: Howard Hinnant's
/// `civil_from_days` (<https://howardhinnant.github.io/date_algorithms.html>), in which a year
/// starts in March so that a leap day is its last.
fn civil(days: i64) -> (i64, u64, u64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097).unsigned_abs();
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era.cast_signed() + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(timestamp_us: i64) -> String {
        String::from_utf8(Timestamp::new(timestamp_us).as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn writes_iso_8601_in_utc() {
        assert_eq!(text(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(text(-1), "1969-12-31T23:59:59.999999Z");
        assert_eq!(text(1_749_604_762_402_358), "2025-06-11T01:19:22.402358Z");
        assert_eq!(text(951_782_400_000_000), "2000-02-29T00:00:00.000000Z");
        assert_eq!(text(253_402_300_800_000_000), "+010000-01-01T00:00:00.000000Z");
        assert_eq!(text(i64::MAX), "+294247-01-10T04:00:54.775807Z");
        assert_eq!(text(i64::MIN), "-290308-12-21T19:59:05.224192Z");
    }

    proptest! {
        #[test]
        fn agrees_with_jiff(timestamp_us in -62_167_219_200_000_000..253_402_207_200_000_000_i64) {
            let expected = jiff::Timestamp::from_microsecond(timestamp_us).unwrap();
            prop_assert_eq!(text(timestamp_us), format!("{expected:.6}"));
        }
    }
}
