//! `${VAR}` and `${VAR:-default}` in the strings of the configuration.
//!
//! Expansion happens after TOML was parsed, so that a value from the environment stays one string
//! whatever quotes and line breaks it holds.

use std::env::VarError;

/// How a variable is looked up: [`std::env::var`], or a test's own list.
pub type Lookup<'a> = dyn Fn(&str) -> Result<String, VarError> + 'a;

/// Why a string could not be expanded. Names variables, never their values.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the environment variable `{0}` is not set")]
    Missing(String),
    #[error("the environment variable `{0}` is not valid UTF-8")]
    NotUnicode(String),
    #[error("`{0}` is no name of an environment variable (letters, digits and underscores)")]
    Name(String),
    #[error("`${{` has no closing `}}`")]
    Unclosed,
}

/// Replaces every `${VAR}` and `${VAR:-default}`; `$${` stands for a literal `${`.
///
/// As in a shell, the default also takes the place of a variable that is set but empty. Values and
/// defaults are not expanded again.
///
/// # Errors
///
/// When a variable without default is not set, or the text is not well formed.
pub fn expand(text: &str, lookup: &Lookup<'_>) -> Result<String, Error> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let (before, after) = (&rest[..start], &rest[start + 2..]);
        if let Some(literal) = before.strip_suffix('$') {
            expanded.push_str(literal);
            expanded.push_str("${");
            rest = after;
            continue;
        }
        expanded.push_str(before);
        let end = after.find('}').ok_or(Error::Unclosed)?;
        expanded.push_str(&variable(&after[..end], lookup)?);
        rest = &after[end + 1..];
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn variable(expression: &str, lookup: &Lookup<'_>) -> Result<String, Error> {
    let (name, default) = match expression.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (expression, None),
    };
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(Error::Name(name.to_owned()));
    }
    match (lookup(name), default) {
        (Ok(value), Some(default)) if value.is_empty() => Ok(default.to_owned()),
        (Ok(value), _) => Ok(value),
        (Err(VarError::NotPresent), Some(default)) => Ok(default.to_owned()),
        (Err(VarError::NotPresent), None) => Err(Error::Missing(name.to_owned())),
        (Err(VarError::NotUnicode(_)), _) => Err(Error::NotUnicode(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_defaults_and_escapes() {
        #[track_caller]
        fn check(input: &str, expected: Result<&str, &str>) {
            let lookup = |name: &str| match name {
                "A" => Ok("a".to_owned()),
                "EMPTY" => Ok(String::new()),
                "NESTED" => Ok("${A}".to_owned()),
                "BAD" => Err(VarError::NotUnicode("x".into())),
                _ => Err(VarError::NotPresent),
            };
            let actual = expand(input, &lookup).map_err(|error| error.to_string());
            assert_eq!(actual.as_deref().map_err(String::as_str), expected, "{input}");
        }
        check("", Ok(""));
        check("plain $5 and $A and $", Ok("plain $5 and $A and $"));
        check("${A}", Ok("a"));
        check("x${A}y${A}z", Ok("xayaz"));
        check("${EMPTY}", Ok(""));
        check("${EMPTY:-d}", Ok("d"));
        check("${NONE:-d}", Ok("d"));
        check("${NONE:-}", Ok(""));
        check("${NONE:-a:-b}", Ok("a:-b"));
        check("${A:-d}", Ok("a"));
        check("$${A}", Ok("${A}"));
        check("$$${A}", Ok("$${A}"));
        check("${NESTED}", Ok("${A}"));
        check("${NONE}", Err("the environment variable `NONE` is not set"));
        check("${BAD}", Err("the environment variable `BAD` is not valid UTF-8"));
        check("${A", Err("`${` has no closing `}`"));
        check(
            "${}",
            Err("`` is no name of an environment variable (letters, digits and underscores)"),
        );
        check(
            "${1A}",
            Err("`1A` is no name of an environment variable (letters, digits and underscores)"),
        );
        check(
            "${A B}",
            Err("`A B` is no name of an environment variable (letters, digits and underscores)"),
        );
    }
}
