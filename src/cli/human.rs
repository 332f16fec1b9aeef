//! Numbers as people read them.

use jiff::Timestamp;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// `532 B`, `1.5 KiB`, `2.9 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    // Tenths of the unit, rounded down: what is under a limit must not look as if it reached it.
    let in_unit = |unit: u64, name: &str| {
        let tenths = u128::from(bytes) * 10 / u128::from(unit);
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    };
    match bytes {
        0..KIB => format!("{bytes} B"),
        KIB..MIB => in_unit(KIB, "KiB"),
        MIB..GIB => in_unit(MIB, "MiB"),
        GIB.. => in_unit(GIB, "GiB"),
    }
}

/// `2.9 MiB (limit 1.0 MiB)`, to the byte where the rounded numbers would be the same.
pub(super) fn bytes_of_limit(size: u64, limit: u64) -> String {
    let (short, short_limit) = (bytes(size), bytes(limit));
    if size > limit && short == short_limit {
        return format!("{size} B (limit {limit} B)");
    }
    format!("{short} (limit {short_limit})")
}

/// A record's timestamp in RFC 3339, milliseconds and UTC.
pub(super) fn timestamp(timestamp_ms: u64) -> String {
    i64::try_from(timestamp_ms)
        .ok()
        .and_then(|timestamp_ms| Timestamp::from_millisecond(timestamp_ms).ok())
        .map_or_else(
            || format!("{timestamp_ms} ms"),
            |timestamp| timestamp.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
        )
}

/// `1 message`, `2 messages`.
pub(super) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        #[track_caller]
        fn check(input: u64, expected: &str) {
            assert_eq!(bytes(input), expected);
        }
        check(0, "0 B");
        check(1023, "1023 B");
        check(1024, "1.0 KiB");
        check(1_048_575, "1023.9 KiB");
        check(1_048_576, "1.0 MiB");
        check(3_000_000, "2.8 MiB");
        check(5 * GIB + GIB / 2, "5.5 GiB");
        check(u64::MAX, "17179869183.9 GiB");
    }

    #[test]
    fn a_size_just_over_the_limit_is_given_to_the_byte() {
        assert_eq!(bytes_of_limit(3_000_000, MIB), "2.8 MiB (limit 1.0 MiB)");
        assert_eq!(bytes_of_limit(MIB + 1, MIB), "1048577 B (limit 1048576 B)");
        assert_eq!(bytes_of_limit(MIB, MIB), "1.0 MiB (limit 1.0 MiB)");
        assert_eq!(bytes_of_limit(100, MIB), "100 B (limit 1.0 MiB)");
    }

    #[test]
    fn timestamps() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(1_767_225_600_123), "2026-01-01T00:00:00.123Z");
        assert_eq!(timestamp(u64::MAX), "18446744073709551615 ms");
    }
}
