//! What a transform's settings look like, written into the module as a JSON Schema, so that
//! Sluicebox can show it and refuse a misspelt key by its line.
//!
//! All of it is done while the transform is compiled: the custom section `sluicebox:settings` is a
//! constant, and reading settings costs the module nothing more.

/// The form of a setting. A tree of constants, because it becomes bytes of the module.
#[derive(Debug)]
pub enum Schema {
    /// JSON Schema of its own: an object that says something.
    Json(&'static str),
    /// One of some texts.
    OneOf(&'static [&'static str]),
    List(&'static Schema),
    /// Any keys, with values of this form.
    Map(&'static Schema),
    Table {
        /// Shown where this is all of the settings.
        docs: &'static [&'static str],
        settings: &'static [Setting],
    },
}

/// One key of a table.
#[derive(Debug)]
pub struct Setting {
    pub name: &'static str,
    pub docs: &'static [&'static str],
    pub schema: &'static Schema,
    /// As JSON text; nothing where the key must be there, or may be left out without one.
    pub default: Option<&'static str>,
    pub required: bool,
}

/// A type that settings may have. [`settings!`](crate::settings) makes tables and choices of your
/// own; for another form, write the JSON Schema by hand:
///
/// ```
/// use sluicebox_transform::schema::{Described, Schema};
///
/// struct Percent(u8);
///
/// impl Described for Percent {
///     const SCHEMA: &'static Schema =
///         &Schema::Json(r#"{"type":"integer","minimum":0,"maximum":100}"#);
/// }
/// ```
pub trait Described {
    const SCHEMA: &'static Schema;
    /// False for what may be left out.
    const REQUIRED: bool = true;
}

macro_rules! described {
    ($($json:literal: $($type:ty),+;)+) => {
        $($(impl Described for $type {
            const SCHEMA: &'static Schema = &Schema::Json($json);
        })+)+
    };
}

described! {
    r#"{"type":"boolean"}"#: bool;
    r#"{"type":"string"}"#: String;
    r#"{"type":"number"}"#: f32, f64;
    r#"{"type":"integer"}"#: i8, i16, i32, i64;
    r#"{"type":"integer","minimum":0}"#: u8, u16, u32, u64, usize;
    r#"{"type":["array","boolean","null","number","object","string"]}"#: serde_json::Value;
}

impl<T: Described> Described for Vec<T> {
    const SCHEMA: &'static Schema = &Schema::List(T::SCHEMA);
}

impl<T: Described> Described for Option<T> {
    const SCHEMA: &'static Schema = T::SCHEMA;
    const REQUIRED: bool = false;
}

impl<T: Described> Described for std::collections::BTreeMap<String, T> {
    const SCHEMA: &'static Schema = &Schema::Map(T::SCHEMA);
}

impl Described for crate::NoConfig {
    const SCHEMA: &'static Schema = &Schema::Table { docs: &[], settings: &[] };
}

/// Finds out whether a type is described: where it is, the constant of its own goes before the
/// trait's.
#[doc(hidden)]
#[derive(Debug)]
pub struct Probe<T>(std::marker::PhantomData<T>);

#[doc(hidden)]
pub trait Undescribed {
    const FOUND: Option<&'static Schema> = None;
}

impl<T> Undescribed for Probe<T> {}

impl<T: Described> Probe<T> {
    pub const FOUND: Option<&'static Schema> = Some(T::SCHEMA);
}

/// How many bytes the text has.
#[doc(hidden)]
#[must_use]
pub const fn length(schema: Option<&Schema>) -> usize {
    // The same walk as for writing, with nowhere to write to.
    match schema {
        Some(schema) => Writer { out: &mut [], at: 0 }.whole(schema).at,
        None => 0,
    }
}

/// The JSON text.
#[doc(hidden)]
#[must_use]
pub const fn bytes<const LENGTH: usize>(schema: Option<&Schema>) -> [u8; LENGTH] {
    let mut out = [0; LENGTH];
    if let Some(schema) = schema {
        Writer { out: &mut out, at: 0 }.whole(schema);
    }
    out
}

struct Writer<'a> {
    /// What does not fit is only counted.
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    const fn byte(mut self, byte: u8) -> Self {
        if self.at < self.out.len() {
            self.out[self.at] = byte;
        }
        self.at += 1;
        self
    }

    const fn json(mut self, text: &str) -> Self {
        let mut index = 0;
        while index < text.len() {
            self = self.byte(text.as_bytes()[index]);
            index += 1;
        }
        self
    }

    /// The inside of a JSON string.
    const fn escaped(mut self, text: &str) -> Self {
        let mut index = 0;
        while index < text.len() {
            self = match text.as_bytes()[index] {
                b'"' => self.json("\\\""),
                b'\\' => self.json("\\\\"),
                // No other control characters in names and comments.
                byte if byte < b' ' => self.byte(b' '),
                byte => self.byte(byte),
            };
            index += 1;
        }
        self
    }

    const fn string(self, text: &str) -> Self {
        self.byte(b'"').escaped(text).byte(b'"')
    }

    /// Lines of a comment as one text.
    const fn docs(mut self, docs: &[&str]) -> Self {
        self = self.json("\"description\":\"");
        let mut index = 0;
        while index < docs.len() {
            let (line, is_first) = (docs[index], index == 0);
            // A line begins with the space behind `///`, which separates it from the one before.
            self = match line.as_bytes() {
                [b' ', ..] if is_first => self.escaped(line.split_at(1).1),
                _ => self.escaped(line),
            };
            index += 1;
        }
        self.byte(b'"')
    }

    const fn whole(self, schema: &Schema) -> Self {
        match schema {
            Schema::Table { docs, .. } if !docs.is_empty() => {
                self.byte(b'{').docs(docs).continued(schema)
            }
            _ => self.schema(schema),
        }
    }

    /// The schema behind members of the same object.
    const fn continued(mut self, schema: &Schema) -> Self {
        let brace = self.at;
        self = self.schema(schema);
        if brace < self.out.len() {
            self.out[brace] = b',';
        }
        self
    }

    const fn schema(self, schema: &Schema) -> Self {
        match schema {
            Schema::Json(json) => {
                assert!(json.len() > 2 && json.as_bytes()[0] == b'{', "an object is needed");
                self.json(json)
            }
            Schema::OneOf(texts) => {
                let mut writer = self.json("{\"enum\":[");
                let mut index = 0;
                while index < texts.len() {
                    if index > 0 {
                        writer = writer.byte(b',');
                    }
                    writer = writer.string(texts[index]);
                    index += 1;
                }
                writer.json("]}")
            }
            Schema::List(of) => self.json("{\"type\":\"array\",\"items\":").schema(of).byte(b'}'),
            Schema::Map(of) => {
                self.json("{\"type\":\"object\",\"additionalProperties\":").schema(of).byte(b'}')
            }
            Schema::Table { settings, .. } => self.table(settings),
        }
    }

    const fn table(mut self, settings: &[Setting]) -> Self {
        self = self.json("{\"type\":\"object\",\"properties\":{");
        let mut index = 0;
        while index < settings.len() {
            if index > 0 {
                self = self.byte(b',');
            }
            self = self.string(settings[index].name).byte(b':').setting(&settings[index]);
            index += 1;
        }
        self = self.json("},\"required\":[");
        let (mut index, mut count) = (0, 0);
        while index < settings.len() {
            if settings[index].required {
                if count > 0 {
                    self = self.byte(b',');
                }
                self = self.string(settings[index].name);
                count += 1;
            }
            index += 1;
        }
        self.json("],\"additionalProperties\":false}")
    }

    const fn setting(mut self, setting: &Setting) -> Self {
        let Setting { docs, schema, default, .. } = setting;
        self = match (docs.is_empty(), default) {
            (true, None) => return self.schema(schema),
            (true, Some(default)) => self.json("{\"default\":").json(default),
            (false, None) => self.byte(b'{').docs(docs),
            (false, Some(default)) => {
                self.byte(b'{').docs(docs).json(",\"default\":").json(default)
            }
        };
        self.continued(schema)
    }
}

/// Declares a table of settings, or a choice between texts: the type, how it is read, and what the
/// module says about it. Keys that are not declared are refused.
///
/// ```
/// use sluicebox_transform::settings;
///
/// settings! {
///     /// What `config` holds.
///     struct Config {
///         /// What to take out.
///         columns: Vec<String>,
///         /// How.
///         method: Method = "redact",
///         /// May be left out.
///         text: Option<String>,
///     }
/// }
///
/// settings! {
///     enum Method {
///         Redact = "redact",
///         Hash = "hash",
///     }
/// }
///
/// let config: Config = serde_json::from_str(r#"{"columns": ["email"]}"#).unwrap();
/// assert!(matches!(config.method, Method::Redact));
/// assert!(config.text.is_none());
/// assert!(serde_json::from_str::<Config>(r#"{"columns": [], "colums": []}"#).is_err());
/// ```
///
/// A setting without a default must be there, unless it is an `Option`. Defaults are written as in
/// JSON. The types of settings are those that are [`Described`].
#[macro_export]
macro_rules! settings {
    ($(#[doc = $doc:literal])* $vis:vis struct $name:ident {
        $($(#[doc = $field_doc:literal])* $field:ident: $type:ty $(= $default:expr)?),* $(,)?
    }) => {
        $(#[doc = $doc])*
        #[derive(Debug)]
        $vis struct $name {
            $($(#[doc = $field_doc])* $field: $type,)*
        }

        const _: () = {
            #[derive($crate::serde::Deserialize)]
            #[serde(crate = "sluicebox_transform::serde", deny_unknown_fields)]
            struct Read {
                $($field: $crate::settings!(@read $type $(= $default)?),)*
            }

            impl<'de> $crate::serde::Deserialize<'de> for $name {
                fn deserialize<D: $crate::serde::Deserializer<'de>>(
                    deserializer: D,
                ) -> ::core::result::Result<Self, D::Error> {
                    let read = <Read as $crate::serde::Deserialize>::deserialize(deserializer)?;
                    ::core::result::Result::Ok(Self {
                        $($field: $crate::settings!(@value read.$field, D, $($default)?),)*
                    })
                }
            }

            impl $crate::schema::Described for $name {
                const SCHEMA: &'static $crate::schema::Schema = &$crate::schema::Schema::Table {
                    docs: &[$($doc),*],
                    settings: &[$($crate::schema::Setting {
                        name: stringify!($field),
                        docs: &[$($field_doc),*],
                        schema: <$type as $crate::schema::Described>::SCHEMA,
                        default: $crate::settings!(@default $($default)?),
                        required: $crate::settings!(@required $type $(= $default)?),
                    }),*],
                };
            }
        };
    };
    ($(#[doc = $doc:literal])* $vis:vis enum $name:ident {
        $($(#[doc = $choice_doc:literal])* $choice:ident = $text:literal),+ $(,)?
    }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, $crate::serde::Deserialize)]
        #[serde(crate = "sluicebox_transform::serde")]
        $vis enum $name {
            $($(#[doc = $choice_doc])* #[serde(rename = $text)] $choice,)+
        }

        impl $crate::schema::Described for $name {
            const SCHEMA: &'static $crate::schema::Schema =
                &$crate::schema::Schema::OneOf(&[$($text),+]);
        }
    };
    (@read $type:ty = $default:expr) => { ::core::option::Option<$type> };
    (@read $type:ty) => { $type };
    (@value $read:expr, $error:ident, $default:expr) => {
        match $read {
            ::core::option::Option::Some(value) => value,
            ::core::option::Option::None => $crate::serde_json::from_str(stringify!($default))
                .map_err(<$error::Error as $crate::serde::de::Error>::custom)?,
        }
    };
    (@value $read:expr, $error:ident,) => { $read };
    (@default $default:expr) => { ::core::option::Option::Some(stringify!($default)) };
    (@default) => { ::core::option::Option::None };
    (@required $type:ty = $default:expr) => { false };
    (@required $type:ty) => { <$type as $crate::schema::Described>::REQUIRED };
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::settings! {
        /// What `config` holds,
        /// in "two" lines.
        struct Config {
            /// What to take out.
            columns: Vec<String>,
            level: u32 = 3,
            method: Method = "redact",
            text: Option<String>,
            rules: Vec<Rule> = [],
        }
    }

    crate::settings! {
        enum Method {
            Redact = "redact",
            Hash = "hash",
        }
    }

    crate::settings! {
        struct Rule {
            is: bool,
        }
    }

    fn read(json: &str) -> Result<Config, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn settings_are_read_and_checked() {
        let config = read(r#"{"columns": ["a"], "rules": [{"is": true}]}"#).unwrap();
        assert_eq!((config.columns, config.level), (vec!["a".to_owned()], 3));
        assert_eq!((config.method, config.text), (Method::Redact, None));
        assert!(config.rules[0].is);
        let config = read(r#"{"columns": [], "level": 4, "method": "hash", "text": ""}"#).unwrap();
        assert_eq!((config.level, config.method), (4, Method::Hash));
        assert!(config.rules.is_empty() && config.text.is_some());
        for (json, part) in [
            ("{}", "missing field `columns`"),
            (r#"{"columns": [], "colum": 1}"#, "unknown field `colum`"),
            (r#"{"columns": [], "method": "x"}"#, "unknown variant `x`"),
            (r#"{"columns": [], "rules": [{"is": true, "not": 1}]}"#, "unknown field `not`"),
            (r#"{"columns": [], "level": "x"}"#, "invalid type"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(part), "{json}: {error}");
        }
    }

    #[test]
    fn the_section_is_a_json_schema() {
        const FOUND: Option<&Schema> = Probe::<Config>::FOUND;
        const LENGTH: usize = length(FOUND);
        let bytes: [u8; LENGTH] = bytes(FOUND);
        let schema: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            schema,
            serde_json::json!({
                "type": "object",
                "description": "What `config` holds, in \"two\" lines.",
                "properties": {
                    "columns": {
                        "description": "What to take out.",
                        "type": "array",
                        "items": {"type": "string"},
                    },
                    "level": {"default": 3, "type": "integer", "minimum": 0},
                    "method": {"default": "redact", "enum": ["redact", "hash"]},
                    "text": {"type": "string"},
                    "rules": {"default": [], "type": "array", "items": {
                        "type": "object",
                        "properties": {"is": {"type": "boolean"}},
                        "required": ["is"],
                        "additionalProperties": false,
                    }},
                },
                "required": ["columns"],
                "additionalProperties": false,
            })
        );
    }

    #[test]
    fn what_is_not_described_says_nothing() {
        struct Plain;
        assert!(Probe::<Plain>::FOUND.is_none());
        assert_eq!(length(Probe::<Plain>::FOUND), 0);
        _ = Plain;
    }
}
