//! Takes all columns out of messages but some. See `README.md`.

use sluicebox_transform::{Change, Transform, Verdict, export, settings};

settings! {
    /// Takes all columns out of messages but the key and some.
    struct Config {
        /// What to keep beside the key.
        columns: Vec<String>,
        /// Only out of messages that S2 would not take.
        only_oversize: bool = false,
    }
}

struct KeepColumns(Config);

impl Transform for KeepColumns {
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
        for name in change.column_names() {
            // Without its key nobody knows which row a message is about.
            if config.columns.contains(&name) || change.column(&name).is_some_and(|c| c.key) {
                continue;
            }
            change.remove(&name)?;
            let json = serde_json::to_string(&name).map_err(|error| error.to_string())?;
            change.append("stripped_columns", &json)?;
        }
        Ok(Verdict::Keep)
    }
}

export!(KeepColumns);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    fn change() -> Change {
        Change::new(Action::Update, "public", "users")
            .with_key("id", "int4", "1")
            .with("name", "text", "\"n\"")
            .with("password", "text", "\"p\"")
            .with_old("password", "\"old\"")
            .with_unchanged("photo", "bytea")
    }

    #[test]
    fn the_key_and_what_is_named_stay() {
        let change = change();
        make::<KeepColumns>(r#"{"columns": ["name"]}"#).unwrap().transform(&change).unwrap();
        assert_eq!(change.column_names(), ["id", "name"]);
        let stripped = change.annotation("stripped_columns");
        assert_eq!(stripped.as_deref(), Some(r#"["password","photo"]"#));
        assert!(!change.message().unwrap().contains("old"));
    }

    #[test]
    fn small_messages_stay_whole_where_settings_say_so() {
        let config = r#"{"columns": ["name"], "only_oversize": true}"#;
        for (limit, columns) in [(1024, 4), (10, 2)] {
            let change = change().with_limit(limit);
            make::<KeepColumns>(config).unwrap().transform(&change).unwrap();
            assert_eq!(change.column_names().len(), columns);
        }
    }

    #[test]
    fn no_columns_are_a_mistake() {
        assert!(make::<KeepColumns>(r#"{"columns": []}"#).is_err());
    }
}
