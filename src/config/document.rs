//! A TOML file read key by key, with every complaint tied to its line.
//!
//! The keys are asked for one at a time instead of through a derived `Deserialize`: that way each
//! problem has a line, a column, the whole key and a mend, all problems of a file are reported at
//! once, and the list of known keys that unknown ones are compared with is exactly the list of
//! keys that the code reads.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Spanned, de};

use super::expand::{self, Lookup, expand};

/// One thing that is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// `section.key`, or nothing where the file is not TOML.
    pub key: Option<String>,
    /// What is wrong; never holds a secret.
    pub text: String,
    /// What to do about it.
    pub mend: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.text)?;
        if !self.mend.is_empty() {
            write!(f, "; {}", self.mend)?;
        }
        Ok(())
    }
}

/// Why a value is not what its key takes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) text: String,
    pub(super) mend: String,
}

impl Complaint {
    pub(super) fn new(text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { text: text.into(), mend: mend.into() }
    }
}

/// A file while it is read.
pub(super) struct Document<'i> {
    text: &'i str,
    path: &'i Path,
    lookup: &'i Lookup<'i>,
    root: DeTable<'i>,
    /// Sections and keys that were asked for, in that order.
    known: BTreeMap<&'static str, Vec<&'static str>>,
    problems: Vec<Problem>,
}

impl<'i> Document<'i> {
    /// `path` is the file's own, for its folder.
    pub(super) fn parse(
        text: &'i str,
        path: &'i Path,
        lookup: &'i Lookup<'i>,
    ) -> Result<Self, Problem> {
        let root = DeTable::parse(text).map_err(|error| syntax_problem(text, &error))?;
        Ok(Self {
            text,
            path,
            lookup,
            root: root.into_inner(),
            known: BTreeMap::new(),
            problems: Vec::new(),
        })
    }

    pub(super) fn section(&mut self, name: &'static str) -> Section<'_, 'i> {
        self.known.entry(name).or_default();
        let problem = match self.root.get_key_value(name) {
            Some((key, value)) if !value.get_ref().is_table() => Some(key.span().start),
            Some(_) | None => None,
        };
        if let Some(offset) = problem {
            self.root.remove(name);
            let mend = format!("write a section [{name}] with its keys below it");
            self.complain(offset, name.to_owned(), Complaint::new("is not a section", mend));
        }
        Section { document: self, name }
    }

    /// All that is wrong with the sections that were asked for; with `whole`, also sections that
    /// nobody asked for.
    pub(super) fn finish(mut self, whole: bool) -> Vec<Problem> {
        let mut unknown = Vec::new();
        for (section, value) in &self.root {
            let name: &str = section.get_ref();
            let Some(known) = self.known.get(name) else {
                if whole {
                    let mend = self.unknown_section_mend(name);
                    unknown.push((section.span().start, name.to_owned(), mend));
                }
                continue;
            };
            for key in value.get_ref().as_table().into_iter().flat_map(|table| table.keys()) {
                let word: &str = key.get_ref();
                if !known.contains(&word) {
                    let mend = self.unknown_key_mend(name, known, word);
                    unknown.push((key.span().start, format!("{name}.{word}"), mend));
                }
            }
        }
        for (offset, key, mend) in unknown {
            self.complain(offset, key, Complaint::new("is not a known key", mend));
        }
        self.problems.sort_by_key(|problem| (problem.line, problem.column));
        self.problems
    }

    fn unknown_section_mend(&self, word: &str) -> String {
        if let Some(section) = self.home_of(word) {
            return format!("it belongs to the section [{section}]");
        }
        match nearest(word, self.known.keys().copied()) {
            Some(section) => format!("did you mean [{section}]?"),
            None => format!("the sections are {}", list(self.known.keys())),
        }
    }

    fn unknown_key_mend(&self, section: &str, known: &[&'static str], word: &str) -> String {
        if let Some(near) = nearest(word, known.iter().copied()) {
            return format!("did you mean `{near}`?");
        }
        if let Some(home) = self.home_of(word) {
            return format!("it belongs to the section [{home}]");
        }
        format!("[{section}] takes {}", list(known.iter()))
    }

    /// The section in which a key of that name is known.
    fn home_of(&self, word: &str) -> Option<&'static str> {
        self.known.iter().find(|(_, keys)| keys.contains(&word)).map(|(section, _)| *section)
    }

    fn complain(&mut self, offset: usize, key: String, complaint: Complaint) {
        let (line, column) = line_and_column(self.text, offset);
        let Complaint { text, mend } = complaint;
        self.problems.push(Problem { line, column, key: Some(key), text, mend });
    }
}

/// A value with the place where it stands in the file.
pub(super) type Located<T> = (T, usize);

/// What stands behind a name that the user chose.
pub(super) enum Entry {
    Text(String),
    Texts(Vec<Located<String>>),
    /// Something else, by TOML's word for it.
    Other(&'static str),
}

/// One section of a [`Document`] while its keys are read. A method that answers nothing has either
/// not found the key or has recorded why its value will not do.
pub(super) struct Section<'d, 'i> {
    document: &'d mut Document<'i>,
    name: &'static str,
}

impl Section<'_, '_> {
    /// Records a complaint about a key of this section.
    pub(super) fn complain(&mut self, key: &str, offset: usize, complaint: Complaint) {
        let key = format!("{}.{key}", self.name);
        self.document.complain(offset, key, complaint);
    }

    /// As [`Self::complain`], at the key's value or, where there is none, at the section.
    pub(super) fn complain_at(&mut self, key: &str, complaint: Complaint) {
        let offset = self.value(key).map_or_else(|| self.header(), |value| value.span().start);
        self.complain(key, offset, complaint);
    }

    /// Records that a key which has no default is missing.
    pub(super) fn complain_missing(&mut self, key: &str, mend: &str) {
        self.complain(key, self.header(), Complaint::new("is missing", mend));
    }

    /// Whether the key is written in the file, good or bad.
    pub(super) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// A string, expanded.
    pub(super) fn string(&mut self, key: &'static str) -> Option<Located<String>> {
        self.know(key);
        let value = self.value(key)?;
        let (kind, offset) = (value.get_ref().type_str(), value.span().start);
        let Some(text) = value.get_ref().as_str().map(str::to_owned) else {
            let complaint = Complaint::new(format!("is a TOML {kind}"), "write a string in quotes");
            self.complain(key, offset, complaint);
            return None;
        };
        Some((self.expanded(key, &text, offset)?, offset))
    }

    /// A string that something is made of.
    pub(super) fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Complaint>,
    ) -> Option<T> {
        let (text, offset) = self.string(key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(complaint) => {
                self.complain(key, offset, complaint);
                None
            }
        }
    }

    /// As [`Self::parsed`], and the key has no default.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        mend: &str,
        parse: impl FnOnce(&str) -> Result<T, Complaint>,
    ) -> Option<T> {
        self.know(key);
        if !self.has(key) {
            self.complain_missing(key, mend);
            return None;
        }
        self.parsed(key, parse)
    }

    /// As [`Self::parsed`], with a default for a missing key. Nothing only after a complaint.
    pub(super) fn parsed_or<T>(
        &mut self,
        key: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, Complaint>,
    ) -> Option<T> {
        if self.has(key) {
            return self.parsed(key, parse);
        }
        self.know(key);
        Some(default)
    }

    /// An array of strings, each expanded.
    pub(super) fn strings(&mut self, key: &'static str) -> Option<Vec<Located<String>>> {
        self.know(key);
        let value = self.value(key)?;
        let (kind, offset) = (value.get_ref().type_str(), value.span().start);
        let texts: Option<Vec<_>> = value.get_ref().as_array().and_then(|array| {
            array
                .iter()
                .map(|item| Some((item.get_ref().as_str()?.to_owned(), item.span().start)))
                .collect()
        });
        let Some(texts) = texts else {
            let text = format!("is a TOML {kind} that is not an array of strings");
            let mend = "write an array of strings, such as [\"public.documents\"]";
            self.complain(key, offset, Complaint::new(text, mend));
            return None;
        };
        texts
            .into_iter()
            .map(|(text, offset)| Some((self.expanded(key, &text, offset)?, offset)))
            .collect()
    }

    /// A table whose keys are the user's own, in the file's order: each key and its value, expanded.
    pub(super) fn entries(
        &mut self,
        key: &'static str,
    ) -> Option<Vec<(Located<String>, Located<Entry>)>> {
        self.know(key);
        let value = self.value(key)?;
        let (kind, offset) = (value.get_ref().type_str(), value.span().start);
        let Some(table) = value.get_ref().as_table() else {
            let mend = format!("write a section [{}.{key}] with a line for each name", self.name);
            self.complain(key, offset, Complaint::new(format!("is a TOML {kind}"), mend));
            return None;
        };
        let text = |item: &Spanned<DeValue<'_>>| {
            Some((item.get_ref().as_str()?.to_owned(), item.span().start))
        };
        let mut entries: Vec<_> = table
            .iter()
            .map(|(name, value)| {
                let entry = match value.get_ref() {
                    DeValue::String(text) => Entry::Text(text.clone().into_owned()),
                    DeValue::Array(array) => match array.iter().map(text).collect() {
                        Some(texts) => Entry::Texts(texts),
                        None => Entry::Other("array that is not of strings"),
                    },
                    // `public.t = …` without quotes around the name.
                    DeValue::Table(_) => Entry::Other("table (a name with a dot needs quotes)"),
                    other @ (DeValue::Integer(_)
                    | DeValue::Float(_)
                    | DeValue::Boolean(_)
                    | DeValue::Datetime(_)) => Entry::Other(other.type_str()),
                };
                let name: &str = name.get_ref();
                ((name.to_owned(), value.span().start), (entry, value.span().start))
            })
            .collect();
        entries.sort_by_key(|((_, offset), _)| *offset);
        let mut expanded = Vec::with_capacity(entries.len());
        for ((name, place), (entry, at)) in entries {
            let entry = match entry {
                Entry::Text(text) => Entry::Text(self.expanded(key, &text, at)?),
                Entry::Texts(texts) => Entry::Texts(
                    texts
                        .into_iter()
                        .map(|(text, at)| Some((self.expanded(key, &text, at)?, at)))
                        .collect::<Option<_>>()?,
                ),
                other @ Entry::Other(_) => other,
            };
            expanded.push(((name, place), (entry, at)));
        }
        Some(expanded)
    }

    /// A whole number within a range.
    pub(super) fn integer(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> Option<u64> {
        self.know(key);
        let Some(value) = self.value(key) else { return Some(default) };
        let number = value
            .get_ref()
            .as_integer()
            .and_then(|number| u64::from_str_radix(number.as_str(), number.radix()).ok());
        if let Some(number) = number.filter(|number| range.contains(number)) {
            return Some(number);
        }
        let (offset, kind) = (value.span().start, value.get_ref().type_str());
        let text = match value.get_ref() {
            DeValue::Integer(number) => format!("is {number}"),
            DeValue::String(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_)
            | DeValue::Table(_) => format!("is a TOML {kind}"),
        };
        let mend = format!("write a whole number from {} to {}", range.start(), range.end());
        self.complain(key, offset, Complaint::new(text, mend));
        None
    }

    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> Option<bool> {
        self.know(key);
        let Some(value) = self.value(key) else { return Some(default) };
        if let Some(flag) = value.get_ref().as_bool() {
            return Some(flag);
        }
        let (offset, kind) = (value.span().start, value.get_ref().type_str());
        let complaint =
            Complaint::new(format!("is a TOML {kind}"), "write true or false, without quotes");
        self.complain(key, offset, complaint);
        None
    }

    /// A path, taken from the file's folder when it is relative.
    pub(super) fn path(&mut self, key: &'static str, default: &str) -> Option<PathBuf> {
        let default = self.folder().join(default);
        Some(self.optional_path(key)?.unwrap_or(default))
    }

    /// As [`Self::path`] without a default: `Some(None)` where the key is missing.
    pub(super) fn optional_path(&mut self, key: &'static str) -> Option<Option<PathBuf>> {
        let folder = self.folder();
        self.parsed_or(key, None, |text| {
            if text.is_empty() || text.contains('\0') {
                return Err(Complaint::new("is not a path", "write a path that is not empty"));
            }
            Ok(Some(folder.join(text)))
        })
    }

    fn folder(&self) -> PathBuf {
        self.document.path.parent().unwrap_or(Path::new("")).to_owned()
    }

    /// Where the section begins in the file, or the file where it has no such section.
    fn header(&self) -> usize {
        self.document.root.get_key_value(self.name).map_or(0, |(key, _)| key.span().start)
    }

    fn know(&mut self, key: &'static str) {
        let known = self.document.known.entry(self.name).or_default();
        if !known.contains(&key) {
            known.push(key);
        }
    }

    fn value(&self, key: &str) -> Option<&Spanned<DeValue<'_>>> {
        self.document.root.get(self.name)?.get_ref().as_table()?.get(key)
    }

    fn expanded(&mut self, key: &str, text: &str, offset: usize) -> Option<String> {
        match expand(text, self.document.lookup) {
            Ok(expanded) => Some(expanded),
            Err(error) => {
                let mend = match &error {
                    expand::Error::Missing(name) => {
                        format!("set it, or give it a default: ${{{name}:-…}}")
                    }
                    expand::Error::NotUnicode(_) => "set it to text".to_owned(),
                    expand::Error::Name(_) | expand::Error::Unclosed => {
                        "write ${VAR} or ${VAR:-default}, and $${ for a literal ${".to_owned()
                    }
                };
                self.complain(key, offset, Complaint::new(error.to_string(), mend));
                None
            }
        }
    }
}

fn syntax_problem(text: &str, error: &de::Error) -> Problem {
    let offset = error.span().map_or(text.len(), |span| span.start);
    let (line, column) = line_and_column(text, offset);
    let text = format!("not valid TOML: {}", error.message().trim().replace('\n', ", "));
    Problem { line, column, key: None, text, mend: String::new() }
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// `a`, `b` and `c`.
fn list<'a>(words: impl Iterator<Item = &'a &'static str>) -> String {
    let mut words: Vec<_> = words.map(|word| format!("`{word}`")).collect();
    match words.pop() {
        Some(last) if words.is_empty() => last,
        Some(last) => format!("{} and {last}", words.join(", ")),
        None => "nothing".to_owned(),
    }
}

/// The known word that a mistyped one was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A third of the letters may differ: `lisen` is `listen`, `url` is not `slot`.
    let distance_max = (word.chars().count() / 3).max(1);
    known
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance: letters to insert, delete or replace.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, from_char) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to_char) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(from_char != *to_char);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_counts_letters() {
        #[track_caller]
        fn check(from: &str, to: &str, expected: usize) {
            assert_eq!(edit_distance(from, to), expected, "{from} {to}");
        }
        check("", "", 0);
        check("abc", "", 3);
        check("", "abc", 3);
        check("listen", "listen", 0);
        check("lisen", "listen", 1);
        check("kitten", "sitting", 3);
    }

    #[test]
    fn places_are_counted_in_characters() {
        #[track_caller]
        fn check(text: &str, offset: usize, expected: (usize, usize)) {
            assert_eq!(line_and_column(text, offset), expected, "{text:?} {offset}");
        }
        check("", 0, (1, 1));
        check("ab\ncd", 4, (2, 2));
        check("é = 1", 3, (1, 3));
        check("ab", 99, (1, 3));
    }
}
