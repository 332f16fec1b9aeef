//! Takes columns out of messages. See `README.md`.

use sluicebox_transform::{Change, Transform, Verdict, export, settings};

settings! {
    /// Takes columns out of messages.
    struct Config {
        /// What to take out.
        columns: Vec<String>,
        /// Only out of messages that S2 would not take.
        only_oversize: bool = false,
    }
}

struct StripColumns {
    /// Each with its name as JSON.
    columns: Vec<(String, String)>,
    only_oversize: bool,
}

impl Transform for StripColumns {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.columns.is_empty() {
            return Err("`config.columns` is empty: name at least one column".into());
        }
        let json = |column: String| {
            let json = serde_json::to_string(&column).map_err(|error| error.to_string())?;
            Ok((column, json))
        };
        let columns = config.columns.into_iter().map(json).collect::<Result<_, String>>()?;
        Ok(Self { columns, only_oversize: config.only_oversize })
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        if self.only_oversize && change.size()? <= change.limit() {
            return Ok(Verdict::Keep);
        }
        for (column, json) in &self.columns {
            if change.remove(column)? {
                change.append("stripped_columns", json)?;
            }
        }
        Ok(Verdict::Keep)
    }
}

export!(StripColumns);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    #[test]
    fn columns_are_taken_out_and_named() {
        for (config, limit, columns) in [
            (r#"{"columns": ["body", "missing"]}"#, 1000, 1),
            (r#"{"columns": ["body"], "only_oversize": true}"#, 1000, 2),
            (r#"{"columns": ["body"], "only_oversize": true}"#, 10, 1),
        ] {
            let change = Change::new(Action::Insert, "public", "t")
                .with_key("id", "int4", "1")
                .with("body", "text", "\"b\"")
                .with_limit(limit);
            make::<StripColumns>(config).unwrap().transform(&change).unwrap();
            assert_eq!(change.column_names().len(), columns, "{config}");
            let named = (columns == 1).then(|| r#"["body"]"#.to_owned());
            assert_eq!(change.annotation("stripped_columns"), named, "{config}");
        }
        assert!(make::<StripColumns>(r#"{"columns": []}"#).is_err());
    }
}
