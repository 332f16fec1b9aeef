//! What S2 takes for the name of a stream. Pure.

/// The longest name of a stream, in bytes.
///
/// Source: `common/src/types/stream.rs` of s2-streamstore/s2.
pub const STREAM_NAME_BYTES_MAX: usize = 512;

/// Why a text is no stream's name. It is never quoted: it may be made of a row's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStreamName {
    #[error("a stream's name must not be empty")]
    Empty,
    #[error("a stream's name has at most {STREAM_NAME_BYTES_MAX} bytes, and this one has {bytes}")]
    TooLong { bytes: usize },
    #[error("a stream must not be named `.` or `..`")]
    Dots,
    #[error("a stream's name must not have control characters")]
    Control,
}

/// S2's rule: 1 to 512 bytes, without NUL, not `.` or `..`. Other control characters are refused
/// too, since nobody means them.
///
/// # Errors
///
/// With the part of the rule that the name breaks.
pub fn check_stream_name(name: &str) -> Result<(), InvalidStreamName> {
    match name {
        "" => Err(InvalidStreamName::Empty),
        "." | ".." => Err(InvalidStreamName::Dots),
        name if name.len() > STREAM_NAME_BYTES_MAX => {
            Err(InvalidStreamName::TooLong { bytes: name.len() })
        }
        name if name.chars().any(char::is_control) => Err(InvalidStreamName::Control),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        let check = |name: &str, expected| assert_eq!(check_stream_name(name), expected, "{name}");
        for good in ["s", "a/b", "...", "\u{fc}", " ", &"a".repeat(512)] {
            check(good, Ok(()));
        }
        check("", Err(InvalidStreamName::Empty));
        check(".", Err(InvalidStreamName::Dots));
        check("..", Err(InvalidStreamName::Dots));
        check(&"a".repeat(513), Err(InvalidStreamName::TooLong { bytes: 513 }));
        check("a\0b", Err(InvalidStreamName::Control));
        check("a\nb", Err(InvalidStreamName::Control));
    }
}
