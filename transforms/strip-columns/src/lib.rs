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
