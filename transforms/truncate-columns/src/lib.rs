//! Cuts the texts of columns. See `README.md`.

use sluicebox_transform::{Change, Transform, Verdict, export, settings};

settings! {
    /// Cuts the texts of columns.
    struct Config {
        /// What to cut.
        columns: Vec<String>,
        /// To how many bytes at most, between characters.
        max_bytes: u64,
        /// Only in messages that S2 would not take.
        only_oversize: bool = false,
    }
}

struct TruncateColumns(Config);

impl Transform for TruncateColumns {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.columns.is_empty() {
            return Err("`config.columns` is empty: name at least one column".into());
        }
        Ok(Self(config))
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        let Self(config) = self;
        if config.only_oversize && change.size()? <= change.limit() {
            return Ok(Verdict::Keep);
        }
        for name in &config.columns {
            change.truncate(name, config.max_bytes)?;
        }
        Ok(Verdict::Keep)
    }
}

export!(TruncateColumns);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    fn run(config: &str, change: Change) -> Result<Change, String> {
        make::<TruncateColumns>(config)?.transform(&change)?;
        Ok(change)
    }

    #[test]
    fn long_texts_are_cut_between_characters_and_the_rest_stays() {
        let change = Change::new(Action::Insert, "public", "t")
            .with_key("id", "int4", "1")
            .with("a", "text", "\"ääää\"")
            .with("b", "text", "\"ab\"")
            .with("c", "text", "null");
        let config = r#"{"columns": ["a", "b", "c", "missing"], "max_bytes": 5}"#;
        let change = run(config, change).unwrap();
        assert_eq!(change.get_text("a").unwrap().as_deref(), Some("ää"));
        assert_eq!(change.get_text("b").unwrap().as_deref(), Some("ab"));
        assert_eq!(change.get("c").unwrap().as_deref(), Some("null"));
        assert_eq!(change.annotation("truncated_columns").as_deref(), Some(r#"{"a":8}"#));
    }

    #[test]
    fn what_is_no_text_fails_the_message_by_name() {
        let change = Change::new(Action::Insert, "public", "t").with("a", "jsonb", "{\"b\": 1}");
        let error = run(r#"{"columns": ["a"], "max_bytes": 5}"#, change).unwrap_err();
        assert!(error.contains("column `a` is not a string"), "{error}");
    }

    #[test]
    fn settings_are_checked() {
        assert!(make::<TruncateColumns>(r#"{"columns": ["a"]}"#).is_err());
        assert!(make::<TruncateColumns>(r#"{"columns": [], "max_bytes": 1}"#).is_err());
    }
}
