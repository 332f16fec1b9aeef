//! Lets messages go on, or drops them, by the values of columns. See `README.md`.

use serde::Deserialize;
use sluicebox_transform::schema::{Described, Schema};
use sluicebox_transform::{Change, Transform, Verdict, export, settings};

settings! {
    /// Lets messages go on, or drops them, by the values of columns.
    struct Config {
        /// All of them must hold for a message to go on.
        keep: Vec<Condition> = [],
        /// Any of them drops a message.
        drop: Vec<Condition> = [],
        /// What to do where a column is not in the message, so that nobody can tell.
        unknown: Unknown = "keep",
    }
}

settings! {
    enum Unknown {
        Keep = "keep",
        Drop = "drop",
        Fail = "fail",
    }
}

settings! {
    /// A column and what its value is held against: exactly one of the rest.
    struct Condition {
        column: String,
        is: Option<OneOrMore>,
        is_not: Option<OneOrMore>,
        is_null: Option<bool>,
        contains: Option<String>,
        starts_with: Option<String>,
        less_than: Option<f64>,
        greater_than: Option<f64>,
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(Scalar),
    More(Vec<Scalar>),
}

impl Described for OneOrMore {
    const SCHEMA: &'static Schema =
        &Schema::Json(r#"{"type":["array","boolean","number","string"]}"#);
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
}

impl Scalar {
    /// Compared as Postgres writes values, so that `10` is the integer and the text.
    fn equals(&self, text: &str) -> bool {
        match self {
            Self::Text(own) => own == text,
            Self::Integer(own) => text.parse() == Ok(*own),
            Self::Float(own) => text.parse() == Ok(*own),
            Self::Bool(own) => match text {
                "t" | "true" => *own,
                "f" | "false" => !*own,
                _ => false,
            },
        }
    }
}

impl OneOrMore {
    fn has(&self, text: &str) -> bool {
        match self {
            Self::One(one) => one.equals(text),
            Self::More(more) => more.iter().any(|one| one.equals(text)),
        }
    }
}

impl Condition {
    fn check(&self) -> Result<(), String> {
        let given = [
            self.is.is_some(),
            self.is_not.is_some(),
            self.is_null.is_some(),
            self.contains.is_some(),
            self.starts_with.is_some(),
            self.less_than.is_some(),
            self.greater_than.is_some(),
        ];
        if given.iter().filter(|given| **given).count() == 1 {
            return Ok(());
        }
        Err(format!(
            "a condition on `{}` needs exactly one of `is`, `is_not`, `is_null`, `contains`, \
             `starts_with`, `less_than`, `greater_than`",
            self.column
        ))
    }

    /// Whether it holds; nothing where the message does not have the column's value. NULL is only
    /// ever NULL, as in SQL: nothing else holds for it.
    fn holds(&self, change: &Change) -> Result<Option<bool>, String> {
        if change.get(&self.column)?.is_none() {
            return Ok(None);
        }
        let text = change.get_text(&self.column)?;
        if let Some(is_null) = self.is_null {
            return Ok(Some(text.is_none() == is_null));
        }
        let Some(text) = text else { return Ok(Some(false)) };
        let number = |holds: &dyn Fn(f64) -> bool| match text.parse::<f64>() {
            Ok(number) => Ok(holds(number)),
            Err(_) => {
                Err(format!("column `{}` is not a number, and is compared with one", self.column))
            }
        };
        let holds = if let Some(values) = &self.is {
            values.has(&text)
        } else if let Some(values) = &self.is_not {
            !values.has(&text)
        } else if let Some(part) = &self.contains {
            text.contains(part)
        } else if let Some(start) = &self.starts_with {
            text.starts_with(start)
        } else if let Some(bound) = self.less_than {
            number(&|number| number < bound)?
        } else if let Some(bound) = self.greater_than {
            number(&|number| number > bound)?
        } else {
            false
        };
        Ok(Some(holds))
    }
}

struct Filter(Config);

impl Transform for Filter {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.keep.is_empty() && config.drop.is_empty() {
            return Err("there is no condition: `config.keep` and `config.drop` are empty".into());
        }
        config.keep.iter().chain(&config.drop).try_for_each(Condition::check)?;
        Ok(Self(config))
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        let Self(config) = self;
        let mut verdict = Verdict::Keep;
        let conditions = config.keep.iter().map(|condition| (condition, true));
        for (condition, wanted) in conditions.chain(config.drop.iter().map(|c| (c, false))) {
            match (condition.holds(change)?, config.unknown) {
                (Some(holds), _) if holds == wanted => {}
                (Some(_), _) => return Ok(Verdict::Drop),
                (None, Unknown::Keep) => {}
                // Another condition may still fail the message.
                (None, Unknown::Drop) => verdict = Verdict::Drop,
                (None, Unknown::Fail) => {
                    return Err(format!(
                        "column `{}` is not in the message: there is no such column, the update did \
                         not touch it, or the delete names the key alone",
                        condition.column
                    ));
                }
            }
        }
        Ok(verdict)
    }
}

export!(Filter);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::{Action, make};

    fn verdict(config: &str) -> Result<&'static str, String> {
        let change = Change::new(Action::Update, "public", "orders")
            .with_key("id", "int4", "7")
            .with("status", "text", "\"active\"")
            .with("total", "numeric", "\"12.50\"")
            .with("hidden", "bool", "false")
            .with("note", "text", "null")
            .with_unchanged("body", "text");
        Ok(match make::<Filter>(config)?.transform(&change)? {
            Verdict::Keep => "keep",
            Verdict::Drop => "drop",
            Verdict::Split(_) | Verdict::Parts(_) => unreachable!("a filter never splits"),
        })
    }

    #[test]
    fn conditions_decide() {
        let check = |condition: &str, holds: bool| {
            let [kept, dropped] = if holds { ["keep", "drop"] } else { ["drop", "keep"] };
            let config = |list: &str| format!(r#"{{"{list}": [{{{condition}}}]}}"#);
            assert_eq!(verdict(&config("keep")), Ok(kept), "{condition}");
            assert_eq!(verdict(&config("drop")), Ok(dropped), "{condition}");
        };
        check(r#""column": "status", "is": "active""#, true);
        check(r#""column": "status", "is": ["new", "active"]"#, true);
        check(r#""column": "status", "is": "new""#, false);
        check(r#""column": "status", "is_not": "new""#, true);
        check(r#""column": "status", "contains": "ctiv""#, true);
        check(r#""column": "status", "starts_with": "ctiv""#, false);
        check(r#""column": "id", "is": 7"#, true);
        check(r#""column": "hidden", "is": false"#, true);
        check(r#""column": "total", "is": 12.5"#, true);
        check(r#""column": "total", "less_than": 12.5"#, false);
        check(r#""column": "total", "greater_than": 12"#, true);
        check(r#""column": "note", "is_null": true"#, true);
        check(r#""column": "id", "is_null": true"#, false);
        check(r#""column": "note", "is": "x""#, false);
        check(r#""column": "note", "is_not": "x""#, false);
    }

    #[test]
    fn all_of_keep_and_none_of_drop_must_hold() {
        let active = r#"{"column": "status", "is": "active"}"#;
        let large = r#"{"column": "total", "greater_than": 100}"#;
        let config = format!(r#"{{"keep": [{active}, {large}]}}"#);
        assert_eq!(verdict(&config), Ok("drop"));
        let config = format!(r#"{{"keep": [{active}], "drop": [{large}]}}"#);
        assert_eq!(verdict(&config), Ok("keep"));
    }

    #[test]
    fn what_is_not_in_the_message_is_decided_by_the_settings() {
        for column in ["body", "missing"] {
            let with = |unknown: &str| {
                verdict(&format!(r#"{{"keep": [{{"column": "{column}", "is": "x"}}]{unknown}}}"#))
            };
            assert_eq!(with(""), Ok("keep"));
            assert_eq!(with(r#", "unknown": "drop""#), Ok("drop"));
            assert!(with(r#", "unknown": "fail""#).unwrap_err().contains(column));
        }
    }

    #[test]
    fn settings_are_checked() {
        for config in [
            "{}",
            r#"{"keep": [{"column": "a"}]}"#,
            r#"{"keep": [{"column": "a", "is": 1, "is_not": 2}]}"#,
            r#"{"keep": [{"column": "a", "equals": 1}]}"#,
        ] {
            assert!(verdict(config).is_err(), "{config}");
        }
        let text = r#"{"keep": [{"column": "status", "less_than": 1}]}"#;
        assert!(verdict(text).unwrap_err().contains("is not a number"));
    }
}
