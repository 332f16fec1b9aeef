//! Compresses the values of columns. See `README.md`.

use sluicebox_transform::{Change, Codec, Transform, Verdict, export, settings};

settings! {
    /// Compresses the values of columns.
    struct Config {
        /// What to compress.
        columns: Vec<String>,
        codec: CodecName = "zstd",
        /// 1 to 19 for zstd, 1 to 9 for gzip; 0 is the codec's usual one.
        level: u32 = 0,
        /// Smaller values stay: base64 and the metadata would take more than is saved.
        min_bytes: u64 = 1024,
        /// Only in messages that S2 would not take.
        only_oversize: bool = false,
    }
}

settings! {
    enum CodecName {
        Zstd = "zstd",
        Gzip = "gzip",
    }
}

struct CompressColumns {
    config: Config,
    codec: Codec,
}

impl Transform for CompressColumns {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.columns.is_empty() {
            return Err("`config.columns` is empty: name at least one column".into());
        }
        let (codec, level_max) = match config.codec {
            CodecName::Zstd => (Codec::Zstd, 19),
            CodecName::Gzip => (Codec::Gzip, 9),
        };
        if config.level > level_max {
            return Err(format!("`config.level` is over {level_max}, the codec's highest"));
        }
        Ok(Self { config, codec })
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        if self.config.only_oversize && change.size()? <= change.limit() {
            return Ok(Verdict::Keep);
        }
        for name in &self.config.columns {
            if change.column(name).is_some_and(|column| column.size >= self.config.min_bytes) {
                change.compress(name, self.codec, self.config.level)?;
            }
        }
        Ok(Verdict::Keep)
    }
}

export!(CompressColumns);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    #[test]
    fn large_values_are_compressed_and_small_ones_stay() {
        let change = Change::new(Action::Insert, "public", "t")
            .with("large", "text", &format!("\"{}\"", "x".repeat(2000)))
            .with("small", "text", "\"x\"");
        let config = r#"{"columns": ["large", "small", "missing"], "codec": "gzip"}"#;
        make::<CompressColumns>(config).unwrap().transform(&change).unwrap();
        assert_eq!(change.get_text("small").unwrap().as_deref(), Some("x"));
        let how = change.annotation("compressed_columns").unwrap();
        assert!(how.contains("gzip") && how.contains("2000") && !how.contains("small"), "{how}");
    }

    #[test]
    fn settings_are_checked() {
        assert!(make::<CompressColumns>(r#"{"columns": []}"#).is_err());
        let level = r#"{"columns": ["a"], "codec": "gzip", "level": 12}"#;
        assert!(make::<CompressColumns>(level).is_err());
    }
}
