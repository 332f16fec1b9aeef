//! What names and addresses may look like, with the mend for those that may not.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use super::document::Complaint;
use sluicebox_edits::{InvalidStreamName, check_stream_name};

/// The most bytes of a Postgres identifier (`NAMEDATALEN` − 1).
const IDENTIFIER_BYTES_MAX: usize = 63;

/// Where the console and its API listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// An IP address without brackets, or a host name.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

impl Listen {
    /// Whether only this machine can reach it.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Listen {
    /// `host:port`, with brackets around an IPv6 address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            return write!(f, "[{}]:{}", self.host, self.port);
        }
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The text is no address to listen on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address; write HOST:PORT, such as 127.0.0.1:7070 or [::1]:7070")]
pub struct InvalidListen(String);

impl FromStr for Listen {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        let invalid = || InvalidListen(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().map_err(|_| invalid())?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => {
                address.parse::<std::net::Ipv6Addr>().map_err(|_| invalid())?;
                address
            }
            None if is_host_name(host) => host,
            None => return Err(invalid()),
        };
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

/// Letters, digits, dashes and dots: a host name or an IPv4 address.
pub(super) fn is_host_name(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.split('.').all(|label| {
            !label.is_empty()
                && label.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        })
}

/// S2's rule: 8 to 48 of `[a-z0-9-]`, no dash at either end.
pub(super) fn basin(text: &str) -> Result<String, Complaint> {
    let mend = "a basin name has 8 to 48 lower-case letters, digits and dashes, \
                and no dash at either end";
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let text = text.to_owned();
    if let Some(bad) = text.chars().find(|c| !good(*c)) {
        return Err(Complaint::new(format!("`{text}` contains {bad:?}"), mend));
    }
    if !(8..=48).contains(&text.len()) {
        return Err(Complaint::new(format!("`{text}` has a length of {}", text.len()), mend));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(Complaint::new(format!("`{text}` has a dash at an end"), mend));
    }
    Ok(text)
}

/// What the sink says of stream names.
pub(super) fn stream(text: &str) -> Result<String, Complaint> {
    let mend = "a stream name has 1 to 512 bytes without control characters, and is not . or ..";
    match check_stream_name(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(InvalidStreamName::Empty) => Err(Complaint::new("has 0 bytes", mend)),
        Err(InvalidStreamName::TooLong { bytes }) => {
            Err(Complaint::new(format!("has {bytes} bytes"), mend))
        }
        Err(InvalidStreamName::Dots | InvalidStreamName::Control) => {
            Err(Complaint::new("is no stream name", mend))
        }
    }
}

/// Postgres's rule: 1 to 63 of `[a-z0-9_]`.
pub(super) fn slot(text: &str) -> Result<String, Complaint> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if (1..=IDENTIFIER_BYTES_MAX).contains(&text.len()) && text.chars().all(good) {
        return Ok(text.to_owned());
    }
    let mend = "a slot name has 1 to 63 lower-case letters, digits and underscores";
    Err(Complaint::new(format!("`{text}` is no slot name"), mend))
}

pub(super) fn publication(text: &str) -> Result<String, Complaint> {
    if (1..=IDENTIFIER_BYTES_MAX).contains(&text.len()) && !text.contains('\0') {
        return Ok(text.to_owned());
    }
    Err(Complaint::new("is no publication name", "a publication name has 1 to 63 bytes"))
}

/// A duration such as `500ms`, `1s` or `5m`, from a millisecond to a day.
pub(super) fn duration(text: &str) -> Result<Duration, Complaint> {
    let range = Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| range.contains(duration))
        .ok_or_else(|| {
            let mend = "write a number with its unit, from \"1ms\" to \"24h\", such as \"5m\"";
            Complaint::new(format!("`{text}` is no such duration"), mend)
        })
}

/// A number of bytes such as `64MiB`, `4GiB` or `1000`.
pub(super) fn bytes(text: &str) -> Result<u64, Complaint> {
    let units =
        [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1_u64 << 40), ("", 1)];
    units
        .into_iter()
        .find_map(|(unit, bytes)| {
            let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
            number.checked_mul(bytes)
        })
        .ok_or_else(|| {
            let mend = "write a number with its unit, such as \"64MiB\" or \"4GiB\"";
            Complaint::new(format!("`{text}` is no such size"), mend)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses() {
        #[track_caller]
        fn check(input: &str, expected: Option<&str>) {
            let actual = input.parse::<Listen>().ok().map(|listen| listen.to_string());
            assert_eq!(actual.as_deref(), expected, "{input}");
        }
        check("127.0.0.1:7070", Some("127.0.0.1:7070"));
        check("LocalHost:0", Some("localhost:0"));
        check("[::1]:7070", Some("[::1]:7070"));
        check("0.0.0.0:80", Some("0.0.0.0:80"));
        check("", None);
        check("7070", None);
        check(":7070", None);
        check("localhost", None);
        check("localhost:70700", None);
        check("::1:7070", None);
        check("[x]:1", None);
        check("http://localhost:1", None);
    }

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("64MiB", Some(64 << 20)),
            ("4 GiB", Some(4 << 30)),
            ("1000", Some(1000)),
            ("0", Some(0)),
            ("", None),
            ("MiB", None),
            ("1.5GiB", None),
            ("64MB", None),
            ("99999999999TiB", None),
        ] {
            assert_eq!(bytes(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn basins_streams_slots_durations() {
        #[track_caller]
        fn check<T>(parse: fn(&str) -> Result<T, Complaint>, input: &str, expected: bool) {
            assert_eq!(parse(input).is_ok(), expected, "{input}");
        }
        for good in ["my-basin", "12345678", &"a".repeat(48)] {
            check(basin, good, true);
        }
        for bad in ["", "short", "My-basin", "my_basin1", "-my-basin", "my-basin-", &"a".repeat(49)]
        {
            check(basin, bad, false);
        }
        for good in ["s", "a/b", "ü", &"a".repeat(512)] {
            check(stream, good, true);
        }
        for bad in ["", ".", "..", "a\0b", "a\nb", &"a".repeat(513)] {
            check(stream, bad, false);
        }
        for good in ["sluicebox", "a_1", &"a".repeat(63)] {
            check(slot, good, true);
        }
        for bad in ["", "Slot", "a-b", "a b", &"a".repeat(64)] {
            check(slot, bad, false);
        }
        for good in ["1ms", "1s", "5m", "1h 30m", "24h"] {
            check(duration, good, true);
        }
        for bad in ["", "5", "-1s", "0s", "25h", "soon"] {
            check(duration, bad, false);
        }
    }
}
