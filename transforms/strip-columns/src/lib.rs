//! Takes columns out of messages.
//!
//! ```toml
//! [config]
//! columns = ["body"]        # what to take out
//! only_oversize = false     # true: only out of messages that S2 would not take
//! ```
//!
//! `metadata.stripped_columns` names what was taken out, so that a consumer can tell a stripped
//! column from one that is not there.

use serde::Deserialize;
use sluicebox_transform::{Change, Transform, Verdict, export};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    columns: Vec<String>,
    #[serde(default)]
    only_oversize: bool,
}

struct StripColumns(Config);

impl Transform for StripColumns {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.columns.is_empty() {
            return Err("`config.columns` is empty: name at least one column".into());
        }
        Ok(Self(config))
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        if self.0.only_oversize && change.size()? <= change.limit() {
            return Ok(Verdict::Keep);
        }
        let mut stripped = Vec::new();
        for column in &self.0.columns {
            if change.remove(column)? {
                stripped.push(column.clone());
            }
        }
        if !stripped.is_empty() {
            // An earlier transform of this kind may have taken out others.
            let mut all: Vec<String> = change
                .annotation("stripped_columns")
                .and_then(|json| serde_json::from_str(&json).ok())
                .unwrap_or_default();
            all.append(&mut stripped);
            let json = serde_json::to_string(&all).map_err(|error| error.to_string())?;
            change.annotate("stripped_columns", &json)?;
        }
        Ok(Verdict::Keep)
    }
}

export!(StripColumns);
