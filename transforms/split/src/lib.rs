//! Cuts messages that are too large for one record into numbered parts. See `README.md`.

use sluicebox_transform::{Change, Transform, Verdict, export, settings};

/// The smallest part that Sluicebox makes, in bytes.
const PART_BYTES_MIN: u64 = 1024;

settings! {
    /// Cuts messages that are too large for one record into numbered parts.
    struct Config {
        /// How large a part may be; 0: as large as a record.
        part_bytes: u64 = 0,
    }
}

struct Split(Config);

impl Transform for Split {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if (1..PART_BYTES_MIN).contains(&config.part_bytes) {
            return Err(format!(
                "`config.part_bytes` is less than {PART_BYTES_MIN}; leave it out for parts as \
                 large as they may be"
            ));
        }
        Ok(Self(config))
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        if change.size()? <= change.limit() {
            return Ok(Verdict::Keep);
        }
        Ok(Verdict::Parts(self.0.part_bytes))
    }
}

export!(Split);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    #[test]
    fn only_what_is_too_large_is_cut() {
        let verdict = |config: &str, limit| {
            let change = Change::new(Action::Insert, "public", "t")
                .with("body", "text", "\"0123456789\"")
                .with_limit(limit);
            make::<Split>(config).unwrap().transform(&change).unwrap()
        };
        assert!(matches!(verdict("{}", 1000), Verdict::Keep));
        assert!(matches!(verdict("{}", 20), Verdict::Parts(0)));
        assert!(matches!(verdict(r#"{"part_bytes": 2000}"#, 20), Verdict::Parts(2000)));
        assert!(make::<Split>(r#"{"part_bytes": 10}"#).is_err());
    }
}
