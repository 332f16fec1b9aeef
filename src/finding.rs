//! What a check found: plain data that every part's own check answers with and `sluicebox check`
//! prints.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It works, and an operator should know.
    Warn,
    /// `run` would wait or refuse.
    Fail,
}

impl Level {
    /// The word that people and programs read.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `source`, `sink`, `transforms`, `state` or `console`.
    pub part: &'static str,
    /// What was looked at, such as `wal_level`, unique within the part for each thing.
    pub name: String,
    pub level: Level,
    /// One sentence; never holds a secret or a row's value.
    pub text: String,
    /// The command, SQL statement or setting that mends it, one or more lines.
    pub mend: Option<String>,
}

impl Finding {
    #[must_use]
    pub fn ok(part: &'static str, name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { part, name: name.into(), level: Level::Ok, text: text.into(), mend: None }
    }

    #[must_use]
    pub fn warn(
        part: &'static str,
        name: impl Into<String>,
        text: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        let mend = Some(mend.into());
        Self { part, name: name.into(), level: Level::Warn, text: text.into(), mend }
    }

    #[must_use]
    pub fn fail(
        part: &'static str,
        name: impl Into<String>,
        text: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        let mend = Some(mend.into());
        Self { part, name: name.into(), level: Level::Fail, text: text.into(), mend }
    }
}
