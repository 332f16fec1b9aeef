//! Hides the values of columns. See `README.md`.

use sluicebox_transform::{Algorithm, Change, Transform, Verdict, export, settings};

/// The shortest key, in bytes: what is shorter can be guessed like the values.
const KEY_BYTES_MIN: usize = 16;

settings! {
    /// Hides the values of columns.
    struct Config {
        /// What to hide.
        columns: Vec<String>,
        /// By a text, or by a keyed hash (HMAC-SHA-256).
        method: Method = "redact",
        /// What stands in place of a value, with `redact`; `***` without it.
        text: Option<String>,
        /// With `hash`, at least 16 bytes.
        key: Option<String>,
    }
}

settings! {
    enum Method {
        Redact = "redact",
        Hash = "hash",
    }
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
        // HMAC-SHA-256, as `openssl dgst -sha256 -hmac` has it: what consumers may compare with.
        assert_eq!(
            hashed("0123456789abcdef"),
            "5a0116cb506d4465efd68f683c92c55ae7330493cda6fdfe2dc7fedfb2dff0b1"
        );
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
