//! How a table is named in the configuration, in SQL and in messages.

use std::fmt;
use std::str::FromStr;

/// The most bytes of a Postgres identifier (`NAMEDATALEN` − 1).
const IDENTIFIER_BYTES_MAX: usize = 63;

/// A table as the configuration or an operator names it.
///
/// Names are taken letter for letter, as the catalogue has them: nothing is folded to lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    pub schema: String,
    pub name: String,
}

impl TableName {
    /// As SQL takes it, both parts quoted.
    #[must_use]
    pub fn quoted(&self) -> String {
        let quote = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
        format!("{}.{}", quote(&self.schema), quote(&self.name))
    }
}

impl fmt::Display for TableName {
    /// `schema.name`, as messages, headers and errors name a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// The text is no table's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no table name; write `schema.table`, or a part in quotes such as public.\"My.Table\""
)]
pub struct InvalidTableName(String);

impl FromStr for TableName {
    type Err = InvalidTableName;

    /// Reads `table` (in the schema `public`), `schema.table`, and either part in double quotes.
    fn from_str(text: &str) -> Result<Self, InvalidTableName> {
        let invalid = || InvalidTableName(text.to_owned());
        let (first, rest) = identifier(text).ok_or_else(invalid)?;
        let (schema, name, rest) = match rest.strip_prefix('.') {
            Some(rest) => {
                let (second, rest) = identifier(rest).ok_or_else(invalid)?;
                (first, second, rest)
            }
            None => ("public".to_owned(), first, rest),
        };
        if !rest.is_empty() {
            return Err(invalid());
        }
        Ok(Self { schema, name })
    }
}

/// An identifier at the start of the text, plain or quoted, and what follows it.
fn identifier(text: &str) -> Option<(String, &str)> {
    let (name, rest) = match text.strip_prefix('"') {
        Some(quoted) => {
            let mut name = String::new();
            let mut chars = quoted.char_indices();
            loop {
                match chars.next()? {
                    (at, '"') if quoted[at + 1..].starts_with('"') => {
                        name.push('"');
                        chars.next();
                    }
                    (at, '"') => break (name, &quoted[at + 1..]),
                    (_, '\0') => return None,
                    (_, other) => name.push(other),
                }
            }
        }
        None => {
            let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '$' | '-');
            let end = text.find(|c| !plain(c)).unwrap_or(text.len());
            (text[..end].to_owned(), &text[end..])
        }
    };
    ((1..=IDENTIFIER_BYTES_MAX).contains(&name.len())).then_some((name, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names() {
        #[track_caller]
        fn check(input: &str, expected: Option<(&str, &str)>) {
            let actual = input.parse::<TableName>().ok();
            let actual = actual.as_ref().map(|table| (table.schema.as_str(), table.name.as_str()));
            assert_eq!(actual, expected, "{input}");
        }
        check("t", Some(("public", "t")));
        check("public.t", Some(("public", "t")));
        check("My.Table", Some(("My", "Table")));
        check("public.\"My.Table\"", Some(("public", "My.Table")));
        check("\"a \"\"b\"\"\".\"c\"", Some(("a \"b\"", "c")));
        check("täble", Some(("public", "täble")));
        check("", None);
        check(".", None);
        check("a.", None);
        check(".a", None);
        check("a.b.c", None);
        check("a b", None);
        check("\"a", None);
        check("\"\"", None);
        check("\"a\"b", None);
        check("a;drop", None);
        check(&"x".repeat(63), Some(("public", &"x".repeat(63))));
        check(&"x".repeat(64), None);
    }

    #[test]
    fn quoted_for_sql() {
        let name = TableName { schema: "a".into(), name: "B\"c".into() };
        assert_eq!((name.quoted(), name.to_string()), ("\"a\".\"B\"\"c\"".into(), "a.B\"c".into()));
    }
}
