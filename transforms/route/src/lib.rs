//! Sends messages to streams whose names are made from a template. See `README.md`.

use sluicebox_transform::{Action, Change, Transform, Verdict, export, settings};

settings! {
    /// Sends messages to streams whose names are made from a template.
    struct Config {
        /// The template, of `{schema}`, `{table}`, `{action}`, `{column:NAME}` and text.
        stream: String,
        /// The stream for messages of which the template has no value; without it they fail.
        fallback: Option<String>,
    }
}

#[derive(Debug, PartialEq)]
enum Piece {
    Text(String),
    Schema,
    Table,
    Action,
    Column(String),
}

struct Route {
    pieces: Vec<Piece>,
    fallback: Option<String>,
}

impl Transform for Route {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        let pieces = parse(&config.stream)
            .map_err(|reason| format!("`config.stream` is no template: {reason}"))?;
        Ok(Self { pieces, fallback: config.fallback })
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        let mut name = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Schema => name.push_str(&change.table_schema()),
                Piece::Table => name.push_str(&change.table_name()),
                Piece::Action => name.push_str(word(change.action())),
                Piece::Column(column) => match (change.get_text(column)?, &self.fallback) {
                    (Some(text), _) if !text.is_empty() => name.push_str(&text),
                    (_, Some(fallback)) => {
                        change.route_to(Some(fallback))?;
                        return Ok(Verdict::Keep);
                    }
                    (_, None) => {
                        return Err(format!(
                            "column `{column}` has no value here, so that the stream has no name; \
                             `config.fallback` names one for such messages"
                        ));
                    }
                },
            }
        }
        change.route_to(Some(&name))?;
        Ok(Verdict::Keep)
    }
}

fn word(action: Action) -> &'static str {
    match action {
        Action::Insert => "insert",
        Action::Update => "update",
        Action::Delete => "delete",
        Action::Read => "read",
        Action::Truncate => "truncate",
    }
}

fn parse(template: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some(start) = rest.find(['{', '}']) {
        let (text, from) = rest.split_at(start);
        if !text.is_empty() {
            pieces.push(Piece::Text(text.to_owned()));
        }
        if let Some(after) = from.strip_prefix("{{").or_else(|| from.strip_prefix("}}")) {
            pieces.push(Piece::Text(from[..1].to_owned()));
            rest = after;
            continue;
        }
        let Some((name, after)) = from.strip_prefix('{').and_then(|from| from.split_once('}'))
        else {
            return Err("a brace has no partner; `{{` and `}}` are braces themselves".into());
        };
        pieces.push(match (name, name.strip_prefix("column:")) {
            ("schema", _) => Piece::Schema,
            ("table", _) => Piece::Table,
            ("action", _) => Piece::Action,
            (_, Some(column)) if !column.is_empty() => Piece::Column(column.to_owned()),
            _ => {
                return Err(format!(
                    "there is no {{{name}}}; there are {{schema}}, {{table}}, {{action}} and \
                     {{column:NAME}}"
                ));
            }
        });
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    if pieces.is_empty() { Err("it is empty".into()) } else { Ok(pieces) }
}

export!(Route);

#[cfg(test)]
mod tests {
    use super::*;
    use sluicebox_transform::make;

    fn routed(config: &str) -> Result<Option<String>, String> {
        let change = Change::new(Action::Update, "public", "orders")
            .with_key("id", "int4", "7")
            .with("region", "text", "\"eu\"")
            .with("empty", "text", "\"\"")
            .with("none", "text", "null");
        make::<Route>(config)?.transform(&change)?;
        Ok(change.routed_to())
    }

    #[test]
    fn names_are_made_from_the_template() {
        let check = |template: &str, expected: &str| {
            let config = format!(r#"{{"stream": "{template}"}}"#);
            assert_eq!(routed(&config), Ok(Some(expected.to_owned())), "{template}");
        };
        check("all", "all");
        check("cdc/{schema}.{table}", "cdc/public.orders");
        check("{action}-{column:region}-{column:id}", "update-eu-7");
        check("{{{table}}}", "{orders}");
    }

    #[test]
    fn a_message_without_the_value_goes_to_the_fallback_or_fails() {
        for column in ["none", "empty", "missing"] {
            let with = |fallback: &str| {
                routed(&format!(r#"{{"stream": "{{column:{column}}}"{fallback}}}"#))
            };
            assert!(with("").unwrap_err().contains(column));
            assert_eq!(with(r#", "fallback": "rest""#), Ok(Some("rest".into())));
        }
    }

    #[test]
    fn templates_are_checked() {
        for template in ["", "{", "}", "{tabel}", "{column:}", "a{b"] {
            let error = routed(&format!(r#"{{"stream": "{template}"}}"#)).unwrap_err();
            assert!(error.starts_with("`config.stream` is no template: "), "{error}");
        }
        assert!(routed(r#"{"stream": "."}"#).is_err());
    }
}
