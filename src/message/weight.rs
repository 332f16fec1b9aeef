//! What makes a message large, and which transform made it so: for the operator of one that S2 does
//! not take.

use std::collections::HashMap;
use std::sync::Arc;

use super::columns::Column;
use super::draft::Draft;
use super::out::{Counter, Out as _};
use crate::sink::record::{RECORD_BYTES_MAX, header_metered_bytes};

/// A name is shown as far as this, in bytes: a guest may choose one of megabytes.
const NAME_BYTES_MAX: usize = 100;

/// What an edit of a message is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A column's value, by its name.
    Column(String),
    /// What `changes` shows for a column.
    Old(String),
    /// A key of the metadata.
    Metadata(String),
    Header(String),
    Stream,
    /// The message as a whole.
    Message,
}

/// Which transform made what, oldest first. Nothing for what has the name of something that a
/// transform had made before, and is not that.
pub(super) type Makers = Vec<(Subject, Option<Arc<str>>)>;

/// The same, to look up.
type Known<'a> = HashMap<&'a Subject, Option<&'a Arc<str>>>;

/// A piece of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// As a sentence names it, such as ``column `body` ``.
    pub what: String,
    pub bytes: u64,
    /// The transform that made it; nothing where Postgres did.
    pub transform: Option<Arc<str>>,
}

impl Draft {
    /// Notes that this transform made that. Only what can make a message larger is worth it.
    pub fn made_by(&mut self, subject: Subject, transform: &Arc<str>) {
        self.extras.makers.push((subject, Some(Arc::clone(transform))));
    }

    /// Carries over to a column's new name who made it.
    pub(super) fn rename_maker(&mut self, from: &str, to: &str) {
        if self.extras.makers.is_empty() {
            return;
        }
        for subject in [Subject::Column, Subject::Old] {
            let before = subject(from.to_owned());
            let made = self.extras.makers.iter().rev().find(|(known, _)| *known == before);
            let maker = made.and_then(|(_, maker)| maker.clone());
            self.extras.makers.push((subject(to.to_owned()), maker));
        }
    }

    /// The pieces that take most of the record, largest first.
    #[must_use]
    pub fn heaviest(&self, count: usize) -> Vec<Weight> {
        // The last one to make a thing is its maker.
        let makers = self.extras.makers.iter();
        let makers = makers.map(|(subject, maker)| (subject, maker.as_ref())).collect();
        let mut weights = self.header_weights(&makers);
        match &self.extras.body {
            Some(body) => weights.push(Weight {
                what: "its body".to_owned(),
                bytes: body.len() as u64,
                transform: self.replaced_by().map(Into::into),
            }),
            None => self.body_weights(&makers, &mut weights),
        }
        weights.sort_by_key(|weight| std::cmp::Reverse(weight.bytes));
        weights.truncate(count);
        weights
    }

    /// The transform to blame where the record is too large: the maker of its largest piece, unless
    /// the row as Postgres sent it would have been too large already.
    #[must_use]
    pub fn enlarged_by(&self) -> Option<Arc<str>> {
        let made = |weight: &Weight| weight.transform.clone();
        if self.is_replaced() {
            return self.heaviest(1).first().and_then(made);
        }
        if self.extras.makers.is_empty() {
            return None;
        }
        let untouched = Self::new(self.change.clone(), Arc::clone(&self.envelope));
        if untouched.metered_bytes().is_ok_and(|bytes| bytes > RECORD_BYTES_MAX) {
            return None;
        }
        self.heaviest(usize::MAX).iter().find_map(made)
    }

    fn body_weights(&self, makers: &Known<'_>, weights: &mut Vec<Weight>) {
        // A name that a transform chose may be what is large.
        let name_bytes = |column: &Column<'_>| column.name.map_or(0, str::len) as u64;
        for column in self.columns() {
            let name = self.name(&column);
            let of = |subject: fn(String) -> Subject, what, bytes| Weight {
                what,
                bytes,
                transform: maker(makers, &subject(name.to_owned())),
            };
            let shown = shown(name);
            let bytes = name_bytes(&column) + self.bytes(&column);
            weights.push(of(Subject::Column, format!("column `{shown}`"), bytes));
            if let Ok(Some(old)) = self.old(&column) {
                let mut counter = Counter::default();
                let written = self.write(&mut counter, &column, old);
                if written.is_ok() {
                    let bytes = name_bytes(&column) + counter.written();
                    weights.push(of(Subject::Old, format!("`changes.{shown}`"), bytes));
                }
            }
        }
        for (key, json) in &self.extras.annotations {
            weights.push(Weight {
                what: format!("`metadata.{}`", shown(key)),
                bytes: (key.len() + json.len()) as u64,
                transform: maker(makers, &Subject::Metadata(key.clone())),
            });
        }
    }

    /// What transforms added: a header alone, or all of one transform together, of which each may be
    /// small.
    fn header_weights(&self, makers: &Known<'_>) -> Vec<Weight> {
        let mut weights: Vec<(Weight, usize)> = Vec::new();
        for header in &self.extras.headers {
            let name = String::from_utf8_lossy(&header.name);
            let transform = maker(makers, &Subject::Header(name.to_string()));
            let bytes = header_metered_bytes(header.name.len(), header.value.len());
            match weights.iter_mut().find(|(known, _)| known.transform == transform) {
                Some((weight, count)) => {
                    *count += 1;
                    weight.bytes += bytes;
                    weight.what = format!("{count} headers");
                }
                None => {
                    let what = format!("header `{}`", shown(&name));
                    weights.push((Weight { what, bytes, transform }, 1));
                }
            }
        }
        weights.into_iter().map(|(weight, _)| weight).collect()
    }
}

fn maker(makers: &Known<'_>, subject: &Subject) -> Option<Arc<str>> {
    makers.get(subject).copied().flatten().cloned()
}

/// As much of a name as is worth showing.
#[must_use]
pub fn shown(name: &str) -> String {
    if name.len() <= NAME_BYTES_MAX {
        return name.to_owned();
    }
    format!("{}…", &name[..name.floor_char_boundary(NAME_BYTES_MAX)])
}
