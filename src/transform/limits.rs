//! What a module may use: what it gets without settings, and the most that settings may give it.
//! Pure.
//!
//! The most is the server's own and cannot be set: whoever may write into the transforms folder
//! must not be able to take the whole machine.

use std::time::Duration;

use serde::Deserialize;

use super::settings::Error;

const MIB: usize = 1024 * 1024;

/// The runtimes of JavaScript and Python begin at 10 to 40 MiB and hold a value several times over;
/// a guest in Rust asks for what its values need.
const MEMORY_MIB: Range = Range::new("limits.memory_mib", 128, 1024);

/// One change takes microseconds; a second is long enough for a very large one, and short enough
/// that a module that loops does not stop the pipeline for long.
const TIME_MS: Range = Range::new("limits.time_ms", 1000, 60_000);

/// A record holds 1 MiB; a guest that hands over a whole message before it is cut needs several
/// times that.
const CALL_MIB: Range = Range::new("limits.call_mib", 16, 128);

/// Many times what a record may hold, and little beside the largest rows.
const EDITS_MIB: Range = Range::new("limits.edits_mib", 64, 512);

/// An instance is given one handle at a time; those of WASI come on top.
const HANDLES: Range = Range::new("limits.handles", 1000, 100_000);

/// A component built by componentize-py has about thirty core instances; fifty is what Spin allows.
const INSTANCES: Range = Range::new("limits.instances", 64, 256);

/// A JavaScript engine fills tens of thousands; Spin allows as many.
const TABLE_ELEMENTS: Range = Range::new("limits.table_elements", 100_000, 1_000_000);

/// Enough to see what a module is about. With lines of 2,000 bytes, the most that is kept of one, a log
/// that nobody rotates may grow by 17 GB a day at the default.
const LOG_LINES: Range = Range::new("limits.log_lines_per_second", 100, 10_000);

/// A setting with its default and the most that it may be.
struct Range {
    key: &'static str,
    default: u32,
    max: u32,
}

impl Range {
    const fn new(key: &'static str, default: u32, max: u32) -> Self {
        Self { key, default, max }
    }

    fn of(&self, value: Option<u32>) -> Result<u32, Error> {
        let value = value.unwrap_or(self.default);
        if (1..=self.max).contains(&value) {
            return Ok(value);
        }
        let reason = format!("{value} is not between 1 and {}", self.max);
        Err(Error::Value { key: self.key, reason })
    }
}

/// The table `limits` of a settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    memory_mib: Option<u32>,
    time_ms: Option<u32>,
    call_mib: Option<u32>,
    edits_mib: Option<u32>,
    handles: Option<u32>,
    instances: Option<u32>,
    table_elements: Option<u32>,
    log_lines_per_second: Option<u32>,
}

/// What one instance of a module may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of all its memories together.
    pub(crate) memory_bytes_max: usize,
    /// Of one call of `transform`, on the wall clock.
    pub(crate) time_max: Duration,
    /// What one call into the host may bring along.
    pub(crate) call_bytes_max: usize,
    /// What the edits of one message may hold in the host's memory.
    pub(crate) edits_bytes_max: usize,
    pub(crate) handles_max: usize,
    /// Core instances, memories and tables, of each.
    pub(crate) instances_max: usize,
    /// Of all tables together.
    pub(crate) table_elements_max: usize,
    pub(crate) log_lines_per_second_max: u32,
}

impl Raw {
    pub(super) fn check(&self) -> Result<Limits, Error> {
        Ok(Limits {
            memory_bytes_max: MEMORY_MIB.of(self.memory_mib)? as usize * MIB,
            time_max: Duration::from_millis(TIME_MS.of(self.time_ms)?.into()),
            call_bytes_max: CALL_MIB.of(self.call_mib)? as usize * MIB,
            edits_bytes_max: EDITS_MIB.of(self.edits_mib)? as usize * MIB,
            handles_max: HANDLES.of(self.handles)? as usize,
            instances_max: INSTANCES.of(self.instances)? as usize,
            table_elements_max: TABLE_ELEMENTS.of(self.table_elements)? as usize,
            log_lines_per_second_max: LOG_LINES.of(self.log_lines_per_second)?,
        })
    }
}

impl Default for Limits {
    fn default() -> Self {
        Raw::default().check().expect("every default is within its range")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_documents_each_limit() {
        let wit = include_str!("../../wit/transform.wit");
        let ranges = [
            MEMORY_MIB,
            TIME_MS,
            CALL_MIB,
            EDITS_MIB,
            HANDLES,
            INSTANCES,
            TABLE_ELEMENTS,
            LOG_LINES,
        ];
        for Range { key, default, max } in ranges {
            let name = key.strip_prefix("limits.").unwrap();
            let row = format!("/// | `{name}` | {default} | {max} | ");
            assert!(wit.contains(&row), "{row}");
        }
        assert_eq!(wit.matches("/// | `").count(), 8 + 1, "no other rows but the head");
    }

    #[test]
    fn each_limit_has_a_default_and_a_server_maximum() {
        let ranges: [(&str, u32, u32); 8] = [
            ("memory_mib", 128, 1024),
            ("time_ms", 1000, 60_000),
            ("call_mib", 16, 128),
            ("edits_mib", 64, 512),
            ("handles", 1000, 100_000),
            ("instances", 64, 256),
            ("table_elements", 100_000, 1_000_000),
            ("log_lines_per_second", 100, 10_000),
        ];
        let parse = |text: &str| toml::from_str::<Raw>(text).unwrap().check();
        for (key, default, max) in ranges {
            assert_eq!(parse(&format!("{key} = {default}")), Ok(Limits::default()), "{key}");
            assert!(parse(&format!("{key} = {max}")).is_ok(), "{key}");
            for value in [0, max + 1] {
                let error = parse(&format!("{key} = {value}")).unwrap_err();
                assert_eq!(
                    error.to_string(),
                    format!("`limits.{key}`: {value} is not between 1 and {max}")
                );
            }
        }
    }
}
