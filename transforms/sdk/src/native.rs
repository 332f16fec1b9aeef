//! A change in memory, so that a transform's tests run where no Sluicebox and no WebAssembly is.
//!
//! It keeps to `wit/transform.wit` in what can be told from the outside, with three exceptions:
//! `compress` and `hash` put stand-ins in the place of what the host computes, and `size` counts
//! the body and the transform's own headers only.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::de::IgnoredAny;

use crate::{Action, Algorithm, Codec, Column, Level};

/// How large a record may be, in bytes.
const LIMIT: u64 = 1024 * 1024;

/// The most headers of one record.
const HEADERS_MAX: usize = 1000;

/// The members of `metadata` that Sluicebox writes itself.
const METADATA_KEYS: [&str; 13] = [
    "table_schema",
    "table_name",
    "commit_timestamp",
    "commit_lsn",
    "commit_idx",
    "idempotency_key",
    "record_pks",
    "unchanged_columns",
    "database_name",
    "transaction_annotations",
    "enrichment",
    "consumer",
    "database",
];

/// A change as the transform sees it, for tests.
///
/// ```
/// use sluicebox_transform::{Action, Change};
///
/// let change = Change::new(Action::Update, "public", "users")
///     .with_key("id", "int4", "1")
///     .with("email", "text", "\"a@b.example\"")
///     .with_old("email", "\"old@b.example\"");
/// change.set_text("email", "***").unwrap();
/// assert_eq!(change.get("email").unwrap().as_deref(), Some("\"***\""));
/// assert_eq!(change.get_old("email").unwrap(), None);
/// ```
#[derive(Debug)]
pub struct Change {
    action: Action,
    schema: String,
    table: String,
    limit: u64,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    columns: Vec<Stored>,
    annotations: Vec<(String, String)>,
    headers: Vec<(String, Vec<u8>)>,
    body: Option<String>,
    stream: Option<String>,
    /// Names and entries of `metadata.compressed_columns` and `metadata.truncated_columns`.
    compressed: Vec<(String, String)>,
    truncated: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
struct Stored {
    name: String,
    type_name: String,
    key: bool,
    /// JSON text; nothing where the update did not touch it.
    json: Option<String>,
    old: Option<String>,
}

type Answer<T> = Result<T, String>;

impl Change {
    /// A change of a table without columns.
    #[must_use]
    pub fn new(action: Action, schema: &str, table: &str) -> Self {
        let (schema, table) = (schema.to_owned(), table.to_owned());
        Self { action, schema, table, limit: LIMIT, state: RefCell::default() }
    }

    /// Adds a column with a value, as JSON text.
    ///
    /// # Panics
    ///
    /// Where the text is not JSON.
    #[must_use]
    pub fn with(self, column: &str, type_name: &str, json: &str) -> Self {
        check_json(column, json).unwrap_or_else(|error| panic!("{error}"));
        self.with_column(column, type_name, false, Some(json))
    }

    /// Adds a column of the primary key.
    ///
    /// # Panics
    ///
    /// Where the text is not JSON.
    #[must_use]
    pub fn with_key(self, column: &str, type_name: &str, json: &str) -> Self {
        check_json(column, json).unwrap_or_else(|error| panic!("{error}"));
        self.with_column(column, type_name, true, Some(json))
    }

    /// Adds a column that the update did not touch, and that Postgres did not send.
    #[must_use]
    pub fn with_unchanged(self, column: &str, type_name: &str) -> Self {
        self.with_column(column, type_name, false, None)
    }

    /// Gives a column a value in `changes`, as JSON text.
    ///
    /// # Panics
    ///
    /// Where there is no such column.
    #[must_use]
    pub fn with_old(self, column: &str, json: &str) -> Self {
        let mut state = self.state.borrow_mut();
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        found.unwrap_or_else(|| panic!("there is no column `{column}`")).old = Some(json.into());
        drop(state);
        self
    }

    /// Sets what [`Self::limit`] answers, so that small messages can be too large.
    #[must_use]
    pub fn with_limit(self, bytes: u64) -> Self {
        Self { limit: bytes, ..self }
    }

    /// The headers that the transform added.
    #[must_use]
    pub fn headers(&self) -> Vec<(String, Vec<u8>)> {
        self.state.borrow().headers.clone()
    }

    fn with_column(self, name: &str, type_name: &str, key: bool, json: Option<&str>) -> Self {
        self.state.borrow_mut().columns.push(Stored {
            name: name.to_owned(),
            type_name: type_name.to_owned(),
            key,
            json: json.map(str::to_owned),
            old: None,
        });
        self
    }
}

/// What the interface has.
#[allow(missing_docs, reason = "wit/transform.wit describes each of them")]
impl Change {
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    #[must_use]
    pub fn table_schema(&self) -> String {
        self.schema.clone()
    }

    #[must_use]
    pub fn table_name(&self) -> String {
        self.table.clone()
    }

    #[must_use]
    pub fn commit_lsn(&self) -> u64 {
        1
    }

    #[must_use]
    pub fn commit_index(&self) -> u64 {
        0
    }

    #[must_use]
    pub fn commit_timestamp(&self) -> i64 {
        1_750_000_000_000_000
    }

    #[must_use]
    pub fn columns(&self) -> Vec<Column> {
        self.state.borrow().columns.iter().map(Stored::info).collect()
    }

    #[must_use]
    pub fn column_names(&self) -> Vec<String> {
        self.state.borrow().columns.iter().map(|stored| stored.name.clone()).collect()
    }

    #[must_use]
    pub fn column(&self, name: &str) -> Option<Column> {
        self.state.borrow().find(name).map(Stored::info)
    }

    pub fn get(&self, column: &str) -> Answer<Option<String>> {
        Ok(self.state.borrow().find(column).and_then(|stored| stored.json.clone()))
    }

    pub fn get_text(&self, column: &str) -> Answer<Option<String>> {
        let json = self.get(column)?.filter(|json| json != "null");
        Ok(json.map(|json| serde_json::from_str(&json).unwrap_or(json)))
    }

    pub fn get_old(&self, column: &str) -> Answer<Option<String>> {
        Ok(self.state.borrow().find(column).and_then(|stored| stored.old.clone()))
    }

    pub fn set(&self, column: &str, json: &str) -> Answer<()> {
        if column.is_empty() {
            return Err("a column's name must not be empty".into());
        }
        check_json(column, json)?;
        let mut state = self.editable()?;
        state.forget(column);
        match state.columns.iter_mut().find(|stored| stored.name == column) {
            Some(stored) => {
                stored.json = Some(json.trim().to_owned());
                stored.old = None;
            }
            None => state.columns.push(Stored {
                name: column.to_owned(),
                type_name: "json".into(),
                key: false,
                json: Some(json.trim().to_owned()),
                old: None,
            }),
        }
        Ok(())
    }

    pub fn set_text(&self, column: &str, text: &str) -> Answer<()> {
        self.set(column, &json_string(text))
    }

    pub fn set_old(&self, column: &str, json: &str) -> Answer<()> {
        if self.action != Action::Update {
            return Err(format!(
                "the message has no value from before the change for `{column}`: only updates have"
            ));
        }
        check_json(column, json)?;
        let mut state = self.editable()?;
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        found.ok_or_else(|| no_column(column))?.old = Some(json.trim().to_owned());
        Ok(())
    }

    pub fn remove(&self, column: &str) -> Answer<bool> {
        let mut state = self.editable()?;
        state.forget(column);
        let before = state.columns.len();
        state.columns.retain(|stored| stored.name != column);
        Ok(state.columns.len() < before)
    }

    pub fn rename(&self, column: &str, to: &str) -> Answer<()> {
        let mut state = self.editable()?;
        if to.is_empty() {
            return Err("a column's name must not be empty".into());
        }
        if column != to && state.find(to).is_some() {
            return Err(format!("there is a column `{to}` already"));
        }
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        found.ok_or_else(|| no_column(column))?.name = to.to_owned();
        let State { compressed, truncated, .. } = &mut *state;
        for (name, _) in compressed.iter_mut().chain(truncated) {
            if name == column {
                *name = to.to_owned();
            }
        }
        Ok(())
    }

    pub fn annotate(&self, key: &str, json: &str) -> Answer<()> {
        if key.is_empty() {
            return Err("a key of the metadata must not be empty".into());
        }
        if METADATA_KEYS.contains(&key) {
            return Err(format!("`metadata.{key}` is Sluicebox's own; choose another key"));
        }
        check_json(key, json)?;
        let mut state = self.editable()?;
        state.annotations.retain(|(known, _)| known != key);
        state.annotations.push((key.to_owned(), json.trim().to_owned()));
        Ok(())
    }

    pub fn append(&self, key: &str, json: &str) -> Answer<()> {
        check_json(key, json)?;
        let list = match self.annotation(key).as_deref().map(|list| (list, list.strip_suffix(']')))
        {
            None | Some((_, Some("["))) => format!("[{json}]"),
            Some((_, Some(start))) => format!("{start},{json}]"),
            Some((_, None)) => {
                return Err(format!(
                    "`metadata.{key}` is not a list, so that nothing can be appended to it"
                ));
            }
        };
        self.annotate(key, &list)
    }

    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<String> {
        let state = self.state.borrow();
        state.annotations.iter().find(|(known, _)| known == key).map(|(_, json)| json.clone())
    }

    pub fn add_header(&self, name: &str, value: &[u8]) -> Answer<()> {
        let mut state = self.state.borrow_mut();
        if name.is_empty() {
            return Err(
                "a header's name must not be empty: S2 takes such a record for a command".into()
            );
        }
        if name.as_bytes().get(..3).is_some_and(|start| start.eq_ignore_ascii_case(b"sb-")) {
            return Err(format!(
                "the header `{name}` starts with `sb-`, which is kept for Sluicebox's own headers"
            ));
        }
        if state.headers.len() >= HEADERS_MAX {
            return Err(format!("the record has {HEADERS_MAX} headers from transforms already"));
        }
        state.headers.push((name.to_owned(), value.to_owned()));
        Ok(())
    }

    pub fn route_to(&self, stream: Option<&str>) -> Answer<()> {
        match stream {
            Some("") => return Err("a stream's name must not be empty".into()),
            Some("." | "..") => return Err("a stream must not be named `.` or `..`".into()),
            Some(name) if name.len() > 512 => {
                return Err(format!(
                    "a stream's name has at most 512 bytes, and this one has {}",
                    name.len()
                ));
            }
            Some(name) if name.chars().any(char::is_control) => {
                return Err("a stream's name must not have control characters".into());
            }
            stream => self.state.borrow_mut().stream = stream.map(str::to_owned),
        }
        Ok(())
    }

    #[must_use]
    pub fn routed_to(&self) -> Option<String> {
        self.state.borrow().stream.clone()
    }

    pub fn size(&self) -> Answer<u64> {
        let body = self.message()?.len();
        let state = self.state.borrow();
        let headers = state.headers.iter().map(|(name, value)| 2 + name.len() + value.len());
        Ok((8 + body + headers.sum::<usize>()) as u64)
    }

    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn message(&self) -> Answer<String> {
        let state = self.state.borrow();
        if let Some(body) = &state.body {
            return Ok(body.clone());
        }
        let object = |members: Vec<(&str, &str)>| {
            let member = |(key, json): (&str, &str)| format!("{}:{json}", json_string(key));
            format!("{{{}}}", members.into_iter().map(member).collect::<Vec<_>>().join(","))
        };
        let columns = state.columns.iter();
        let record = columns.clone().filter_map(|c| Some((&*c.name, c.json.as_deref()?)));
        let old = columns.clone().filter_map(|c| Some((&*c.name, c.old.as_deref()?)));
        let unchanged = columns.filter(|c| c.json.is_none()).map(|c| json_string(&c.name));
        let unchanged = format!("[{}]", unchanged.collect::<Vec<_>>().join(","));
        let changes = match self.action {
            Action::Update => object(old.collect()),
            _ => "null".to_owned(),
        };
        let (schema, table) = (json_string(&self.schema), json_string(&self.table));
        let mut metadata = vec![("table_schema", &*schema), ("table_name", &*table)];
        if unchanged != "[]" {
            metadata.push(("unchanged_columns", &unchanged));
        }
        metadata.extend(state.annotations.iter().map(|(key, json)| (&**key, &**json)));
        let action = json_string(match self.action {
            Action::Insert => "insert",
            Action::Update => "update",
            Action::Delete => "delete",
            Action::Read => "read",
            Action::Truncate => "truncate",
        });
        Ok(object(vec![
            ("record", &object(record.collect())),
            ("changes", &changes),
            ("action", &action),
            ("metadata", &object(metadata)),
        ]))
    }

    pub fn set_message(&self, json: &str) -> Answer<()> {
        check_json("the whole message", json)?;
        self.state.borrow_mut().body = Some(json.to_owned());
        Ok(())
    }

    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.state.borrow().body.is_some()
    }

    pub fn compress(&self, column: &str, codec: Codec, level: u32) -> Answer<bool> {
        let (name, max) = match codec {
            Codec::Zstd => ("zstd", 19),
            Codec::Gzip => ("gzip", 9),
        };
        if level > max {
            return Err(format!(
                "level {level} is not one of {name}'s: 1 to {max}, or 0 for the usual one"
            ));
        }
        let Some(json) = self.get(column)?.filter(|json| json != "null") else { return Ok(false) };
        if self.state.borrow().compressed.iter().any(|(known, _)| known == column) {
            return Ok(false);
        }
        let text = serde_json::from_str::<String>(&json).ok();
        let content = if text.is_some() { "text" } else { "json" };
        let bytes = text.unwrap_or(json).len();
        self.set_text(column, &format!("<{bytes} bytes, {name}>"))?;
        let entry = format!(
            "{{\"codec\":\"{name}\",\"encoding\":\"base64\",\"content\":\"{content}\",\
             \"bytes\":{bytes}}}"
        );
        self.state.borrow_mut().compressed.push((column.to_owned(), entry));
        self.note("compressed_columns")?;
        Ok(true)
    }

    pub fn hash(&self, column: &str, algorithm: Algorithm, key: Option<&[u8]>) -> Answer<bool> {
        let Algorithm::Sha256 = algorithm;
        let Some(text) = self.get_text(column)? else { return Ok(false) };
        let mut digest = String::new();
        for part in 0..4_u8 {
            let mut hasher = DefaultHasher::new();
            (part, key, &text).hash(&mut hasher);
            digest += &format!("{:016x}", hasher.finish());
        }
        self.set_text(column, &digest)?;
        Ok(true)
    }

    pub fn truncate(&self, column: &str, max_bytes: u64) -> Answer<bool> {
        let Some(json) = self.get(column)?.filter(|json| json != "null") else { return Ok(false) };
        let text: String = serde_json::from_str(&json).map_err(|_| {
            format!("column `{column}` is not a string, and only strings can be truncated")
        })?;
        let max = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        if text.len() <= max {
            return Ok(false);
        }
        let bytes = text.len();
        self.set_text(column, &text[..text.floor_char_boundary(max)])?;
        self.state.borrow_mut().truncated.push((column.to_owned(), bytes.to_string()));
        self.note("truncated_columns")?;
        Ok(true)
    }

    fn note(&self, key: &str) -> Answer<()> {
        let state = self.state.borrow();
        let list = if key == "compressed_columns" { &state.compressed } else { &state.truncated };
        let member = |(name, json): &(String, String)| format!("{}:{json}", json_string(name));
        let json = format!("{{{}}}", list.iter().map(member).collect::<Vec<_>>().join(","));
        drop(state);
        self.annotate(key, &json)
    }

    fn editable(&self) -> Answer<std::cell::RefMut<'_, State>> {
        let state = self.state.borrow_mut();
        if state.body.is_some() {
            return Err(
                "the whole message was replaced, so that its columns cannot be changed any more"
                    .into(),
            );
        }
        Ok(state)
    }
}

impl State {
    fn find(&self, column: &str) -> Option<&Stored> {
        self.columns.iter().find(|stored| stored.name == column)
    }

    fn forget(&mut self, column: &str) {
        self.compressed.retain(|(name, _)| name != column);
        self.truncated.retain(|(name, _)| name != column);
    }
}

impl Stored {
    fn info(&self) -> Column {
        Column {
            name: self.name.clone(),
            type_name: self.type_name.clone(),
            key: self.key,
            unchanged: self.json.is_none(),
            size: self.json.as_ref().map_or(0, |json| json.len() as u64),
        }
    }
}

thread_local! {
    static LOGS: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

/// Writes a line to Sluicebox's log; in a test, to where [`take_logs`] finds it.
pub fn log(level: Level, message: &str) {
    LOGS.with(|logs| logs.borrow_mut().push((level, message.to_owned())));
}

/// The lines that this thread's transforms have logged since the last time.
#[must_use]
pub fn take_logs() -> Vec<(Level, String)> {
    LOGS.with(|logs| logs.take())
}

fn no_column(column: &str) -> String {
    format!("there is no column `{column}`")
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("a text is JSON")
}

fn check_json(name: &str, json: &str) -> Answer<()> {
    match serde_json::from_str::<IgnoredAny>(json) {
        Ok(IgnoredAny) => Ok(()),
        Err(error) => Err(format!("what was given for `{name}` is not JSON: {error}")),
    }
}
