//! Intervals, as `intervalstyle = postgres` writes them.

use super::out::Out;

/// What Postgres stores: three numbers that do not convert into each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Interval {
    months: i64,
    days: i64,
    microseconds: i64,
}

impl Interval {
    /// Reads `1 year 2 mons -3 days +04:05:06.789`, in which each part may be missing. Anything
    /// else, such as `infinity`, is nothing.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut interval = Self::default();
        let mut words = text.split(' ');
        let mut empty = true;
        while let Some(word) = words.next() {
            empty = false;
            if word.contains(':') {
                interval.microseconds = time(word)?;
                // The time comes last.
                return words.next().is_none().then_some(interval);
            }
            let number: i64 = word.strip_prefix('+').unwrap_or(word).parse().ok()?;
            let (field, unit) = match words.next()? {
                "year" | "years" => (&mut interval.months, 12),
                "mon" | "mons" => (&mut interval.months, 1),
                "day" | "days" => (&mut interval.days, 1),
                _ => return None,
            };
            *field = number.checked_mul(unit)?.checked_add(*field)?;
        }
        (!empty).then_some(interval)
    }

    pub(super) fn write(self, out: &mut impl Out) {
        let mut number = itoa::Buffer::new();
        out.put(b"{\"months\":");
        out.put(number.format(self.months).as_bytes());
        out.put(b",\"days\":");
        out.put(number.format(self.days).as_bytes());
        out.put(b",\"microseconds\":");
        out.put(number.format(self.microseconds).as_bytes());
        out.put(b"}");
    }
}

/// Another interval as Postgres writes it, of as many months, days and microseconds in digits, so that it
/// takes as many bytes in a message. Nothing where the text is no interval of numbers.
#[must_use]
pub fn of_same_size(text: &str) -> Option<String> {
    let Interval { months, days, microseconds } = Interval::parse(text.as_bytes())?;
    let ones = |number: i64| -> String {
        let digits = |character: char| if character == '-' { '-' } else { '1' };
        number.to_string().chars().map(digits).collect()
    };
    let mut words = Vec::new();
    for (number, unit) in [(months, "mons"), (days, "days")] {
        if number != 0 {
            words.push(format!("{} {unit}", ones(number)));
        }
    }
    if microseconds != 0 || words.is_empty() {
        // The lowest number of so many digits: ones may be too many seconds for a minute, not for
        // the hours.
        let lowest = microseconds.unsigned_abs().checked_ilog10().map_or(0, |ten| 10_u64.pow(ten));
        let (seconds, fraction) = (lowest / 1_000_000, lowest % 1_000_000);
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let sign = if microseconds < 0 { "-" } else { "" };
        words.push(format!("{sign}{hours:02}:{minutes:02}:{seconds:02}.{fraction:06}"));
    }
    Some(words.join(" "))
}

/// `[+-]H…H:MM:SS[.ffffff]` in microseconds.
fn time(text: &str) -> Option<i64> {
    let (negative, unsigned) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let mut parts = unsigned.split(':');
    let hours = whole(parts.next()?)?;
    let minutes = whole(parts.next()?)?;
    let seconds = parts.next()?;
    if parts.next().is_some() {
        return None;
    }
    let (seconds, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let scale = 10_i128.checked_pow(6_u32.checked_sub(u32::try_from(fraction.len()).ok()?)?)?;
    let fraction = whole(fraction)? * scale;
    // The most negative value has no positive twin in 64 bits.
    let total = ((hours * 60 + minutes) * 60 + whole(seconds)?) * 1_000_000 + fraction;
    i64::try_from(if negative { -total } else { total }).ok()
}

/// A number without a sign, of so few digits that sums and products of it cannot overflow.
fn whole(digits: &str) -> Option<i128> {
    let valid =
        (1..=18).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    if valid { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<(i64, i64, i64)>) {
        let expected =
            expected.map(|(months, days, microseconds)| Interval { months, days, microseconds });
        assert_eq!(Interval::parse(text.as_bytes()), expected, "{text}");
    }

    #[test]
    fn reads_what_postgres_writes() {
        check("00:00:00", Some((0, 0, 0)));
        check("1 year 2 mons 3 days 04:05:06.789", Some((14, 3, 14_706_789_000)));
        check("1 year", Some((12, 0, 0)));
        check("-1 years -2 mons +3 days -04:05:06", Some((-14, 3, -14_706_000_000)));
        check("-1 days", Some((0, -1, 0)));
        check("1 mon -1 days +00:00:00.000001", Some((1, -1, 1)));
        check("-00:00:00.5", Some((0, 0, -500_000)));
        check("178000000 years", Some((2_136_000_000, 0, 0)));
        check("2562047788:00:54.775807", Some((0, 0, i64::MAX)));
        check("-2562047788:00:54.775808", Some((0, 0, i64::MIN)));
    }

    #[test]
    fn leaves_everything_else_alone() {
        for text in [
            "",
            " ",
            "infinity",
            "-infinity",
            "1",
            "1 week",
            "P1Y2M",
            "@ 1 year",
            "1 year ago",
            "01:02",
            "01:02:03:04",
            "01:02:03 1 day",
            "01:02:03.1234567",
            "01::03",
            "--01:02:03",
            "2562047788:00:54.775808",
            "9999999999999999999 days",
            "1 day ",
            "\u{0661} days",
        ] {
            check(text, None);
        }
    }
}
