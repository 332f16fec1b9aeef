//! `[delivery]` and `[dead_letters]`.

use std::time::Duration;

use super::document::{Complaint, Document, Entry, Located, Section};
use super::{DeadLetters, Delivery, LetterPlace, Sink, Source, SpillAfter, TableName, names};
use crate::group_by::{GroupBy, GroupBys};

pub(super) fn delivery(
    document: &mut Document<'_>,
    source: Option<&Source>,
    sink: Option<&Sink>,
) -> Option<Delivery> {
    const MAX: &str = "retry_max";
    let mut section = document.section("delivery");
    let retry_min = section.parsed_or("retry_min", Duration::from_secs(1), names::duration);
    let retry_max = section.parsed_or(MAX, Duration::from_secs(300), names::duration);
    let group_by = group_by(&mut section, source);
    let spill_after =
        section.parsed_or("spill_after", SpillAfter::Bytes(SPILL_AFTER_BYTES), spill_after);
    let spill_bytes_max = section.parsed_or("spill_max", SPILL_BYTES_MAX, names::bytes);
    let stuck_after = section.parsed_or("stuck_after", STUCK_AFTER, names::duration);
    let max_attempts = attempts_max(&mut section);
    let letters = dead_letters(document, sink, max_attempts);
    let (retry_min, retry_max, group_by) = (retry_min?, retry_max?, group_by?);
    let (spill_after, spill_bytes_max) = (spill_after?, spill_bytes_max?);
    let (stuck_after, dead_letters) = (stuck_after?, letters?);
    if retry_min > retry_max {
        let mend = "make retry_max the larger one";
        let mut section = document.section("delivery");
        section.complain_at(MAX, Complaint::new("is smaller than retry_min", mend));
        return None;
    }
    Some(Delivery {
        retry_min,
        retry_max,
        group_by,
        spill_after,
        spill_bytes_max,
        stuck_after,
        dead_letters,
    })
}

const MAX_ATTEMPTS: &str = "max_attempts";

/// `Some(None)`: for ever.
fn attempts_max(section: &mut Section<'_, '_>) -> Option<Option<u64>> {
    let attempts = section.integer(MAX_ATTEMPTS, 1..=1_000_000, 0)?;
    Some((attempts > 0).then_some(attempts))
}

/// `[dead_letters]`. Nothing after a complaint, `Some(None)` where messages are tried for ever.
fn dead_letters(
    document: &mut Document<'_>,
    sink: Option<&Sink>,
    max_attempts: Option<Option<u64>>,
) -> Option<Option<DeadLetters>> {
    const STREAM: &str = "stream";
    const FILE: &str = "file";
    let mut section = document.section("dead_letters");
    let stream = section.parsed_or(STREAM, None, |name| {
        if sink.is_some_and(|sink| sink.stream == name) {
            let mend = "name another stream: consumers of that one expect messages";
            return Err(Complaint::new("is the stream of [sink]", mend));
        }
        names::stream(name).map(Some)
    });
    let file = section.optional_path(FILE);
    let max_attempts = max_attempts?;
    let place = match (stream?, file?) {
        (Some(_), Some(_)) => {
            let mend = "keep one of them";
            section.complain_at(FILE, Complaint::new("is there beside stream", mend));
            return None;
        }
        (Some(stream), None) => Some(LetterPlace::Stream(stream.into())),
        (None, Some(file)) => Some(LetterPlace::File(file)),
        (None, None) => None,
    };
    match (max_attempts, place) {
        (Some(max_attempts), Some(place)) => Some(Some(DeadLetters { max_attempts, place })),
        (None, None) => Some(None),
        (Some(_), None) => {
            let mend = "add stream = \"NAME\" or file = \"PATH\" to [dead_letters], where messages \
                        go whose attempts are spent";
            let complaint = Complaint::new("would lose messages", mend);
            document.section("delivery").complain_at(MAX_ATTEMPTS, complaint);
            None
        }
        (None, Some(_)) => {
            let mend = "add max_attempts to [delivery], or take this section out";
            let key = if section.has(FILE) { FILE } else { STREAM };
            let text = "gets nothing: messages are tried for ever";
            section.complain_at(key, Complaint::new(text, mend));
            None
        }
    }
}

/// Four segments of WAL: what a database notices little of.
const SPILL_AFTER_BYTES: u64 = 64 * 1024 * 1024;
/// Longer than whatever a healthy part takes for one step, and short enough that little WAL piles up.
const STUCK_AFTER: Duration = Duration::from_secs(60);

const SPILL_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;

fn spill_after(text: &str) -> Result<SpillAfter, Complaint> {
    if let Ok(time) = names::duration(text) {
        return Ok(SpillAfter::Time(time));
    }
    names::bytes(text).map(SpillAfter::Bytes).map_err(|_| {
        let mend = "write a size such as \"64MiB\", or a time such as \"30s\"";
        Complaint::new(format!("`{text}` is neither a size nor a time"), mend)
    })
}

/// Nothing after a complaint.
fn group_by(section: &mut Section<'_, '_>, source: Option<&Source>) -> Option<GroupBys> {
    const KEY: &str = "group_by";
    let entries = section.entries(KEY);
    if entries.is_none() && section.has(KEY) {
        return None;
    }
    let mut group_bys = GroupBys::new();
    let mut good = true;
    for ((table, offset), entry) in entries.unwrap_or_default() {
        let name = match table.parse::<TableName>() {
            Ok(name) => name,
            Err(error) => {
                section.complain(KEY, offset, Complaint::new(error.to_string(), ""));
                good = false;
                continue;
            }
        };
        if source.is_some_and(|source| !source.tables.contains(&name)) {
            let complaint = Complaint::new(
                format!("names {name}, which is not read"),
                "name a table of source.tables, letter for letter",
            );
            section.complain(KEY, offset, complaint);
            good = false;
            continue;
        }
        match entry_group_by(entry) {
            Ok(group_by) => {
                if group_bys.insert(name.clone(), group_by).is_some() {
                    let text = format!("names {name} twice");
                    section.complain(KEY, offset, Complaint::new(text, "name each table once"));
                    good = false;
                }
            }
            Err((complaint, offset)) => {
                section.complain(KEY, offset, complaint);
                good = false;
            }
        }
    }
    good.then_some(group_bys)
}

fn entry_group_by((entry, offset): Located<Entry>) -> Result<GroupBy, Located<Complaint>> {
    let mend = "write an array of columns, or one of \"key\", \"table\" and \"none\"";
    match entry {
        Entry::Text(word) => match word.as_str() {
            "key" => Ok(GroupBy::Key),
            "table" => Ok(GroupBy::Table),
            "none" => Ok(GroupBy::None),
            _ => Err((Complaint::new(format!("has no word `{word}`"), mend), offset)),
        },
        Entry::Texts(columns) if columns.is_empty() => {
            Err((Complaint::new("has an array without columns", mend), offset))
        }
        Entry::Texts(columns) => {
            let mut names: Vec<String> = Vec::with_capacity(columns.len());
            for (column, offset) in columns {
                if names.contains(&column) {
                    let text = format!("names the column `{column}` twice");
                    return Err((Complaint::new(text, "name each column once"), offset));
                }
                names.push(column);
            }
            Ok(GroupBy::Columns(names))
        }
        Entry::Other(kind) => Err((Complaint::new(format!("has a TOML {kind}"), mend), offset)),
    }
}
