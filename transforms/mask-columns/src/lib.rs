//! Hides the values of columns. See `README.md`.

use serde::Deserialize;
use sluicebox_transform::{Algorithm, Change, Transform, Verdict, export};

/// The shortest key, in bytes: what is shorter can be guessed like the values.
const KEY_BYTES_MIN: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    columns: Vec<String>,
    #[serde(default)]
    method: Method,
    /// What stands in place of a value, with `redact`.
    text: Option<String>,
    /// With `hash`.
    key: Option<String>,
}

#[derive(Default, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Method {
    #[default]
    Redact,
    Hash,
}

enum Mask {
    Text(String),
    Hash(Vec<u8>),
}

struct MaskColumns {
    columns: Vec<String>,
    mask: Mask,
}

impl Transform for MaskColumns {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.columns.is_empty() {
            return Err("`config.columns` is empty: name at least one column".into());
        }
        let mask = match (config.method, config.text, config.key) {
            (Method::Redact, text, None) => Mask::Text(text.unwrap_or_else(|| "***".into())),
            (Method::Redact, _, Some(_)) => {
                return Err("`config.key` is for `method = \"hash\"`".into());
            }
            (Method::Hash, Some(_), _) => {
                return Err("`config.text` is for `method = \"redact\"`".into());
            }
            (Method::Hash, None, Some(key)) if key.len() >= KEY_BYTES_MIN => {
                Mask::Hash(key.into_bytes())
            }
            (Method::Hash, None, _) => {
                return Err(format!(
                    "`config.key` is missing or shorter than {KEY_BYTES_MIN} bytes: without it a \
                     hash can be undone by trying values"
                ));
            }
        };
        Ok(Self { columns: config.columns, mask })
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        for name in &self.columns {
            // Whether a value is NULL shows; an unchanged one is not in the message.
            if change.get(name)?.is_none_or(|json| json == "null") {
                // The value before the change may be none.
                if change.get_old(name)?.is_some() {
                    change.set_old(name, "null")?;
                }
                continue;
            }
            match &self.mask {
                Mask::Text(text) => change.set_text(name, text)?,
                Mask::Hash(key) => _ = change.hash(name, Algorithm::Sha256, Some(key))?,
            }
        }
        Ok(Verdict::Keep)
    }
}

export!(MaskColumns);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    fn masked(config: &str) -> Change {
        let change = Change::new(Action::Update, "public", "users")
            .with_key("id", "int4", "1")
            .with("email", "text", "\"new@example\"")
            .with_old("email", "\"old@example\"")
            .with("phone", "text", "null")
            .with_old("phone", "\"0123\"");
        make::<MaskColumns>(config).unwrap().transform(&change).unwrap();
        change
    }

    #[test]
    fn neither_the_new_value_nor_the_old_one_shows() {
        for config in [
            r#"{"columns": ["email", "phone", "missing"]}"#,
            r#"{"columns": ["email", "phone"], "method": "hash", "key": "0123456789abcdef"}"#,
        ] {
            let message = masked(config).message().unwrap();
            for value in ["new@example", "old@example", "0123\""] {
                assert!(!message.contains(value), "{value} in {message}");
            }
        }
    }

    #[test]
    fn texts_and_hashes_stand_in_place_of_values_and_null_stays() {
        let change = masked(r#"{"columns": ["email", "phone"], "text": "hidden"}"#);
        assert_eq!(change.get_text("email").unwrap().as_deref(), Some("hidden"));
        assert_eq!(change.get("phone").unwrap().as_deref(), Some("null"));
        let hashed = |key: &str| {
            let config = format!(r#"{{"columns": ["email"], "method": "hash", "key": "{key}"}}"#);
            masked(&config).get_text("email").unwrap().unwrap()
        };
        assert_eq!(hashed("0123456789abcdef").len(), 64);
        assert_eq!(hashed("0123456789abcdef"), hashed("0123456789abcdef"));
        assert_ne!(hashed("0123456789abcdef"), hashed("0123456789abcdeF"));
    }

    #[test]
    fn settings_that_would_not_hide_are_refused() {
        for config in [
            r#"{"columns": []}"#,
            r#"{"columns": ["a"], "key": "0123456789abcdef"}"#,
            r#"{"columns": ["a"], "method": "hash"}"#,
            r#"{"columns": ["a"], "method": "hash", "key": "short"}"#,
            r#"{"columns": ["a"], "method": "hash", "text": "x", "key": "0123456789abcdef"}"#,
        ] {
            assert!(make::<MaskColumns>(config).is_err(), "{config}");
        }
    }
}
