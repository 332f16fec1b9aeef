//! What a Postgres type means for JSON: the classes of types that are mapped alike.

use serde::{Deserialize, Serialize};

/// How the text of a value becomes JSON. Domains are already their base type here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `t` and `f` become `true` and `false`.
    Bool,
    /// int2, int4, int8, oid: a JSON number with the digits that Postgres sent.
    Integer,
    /// float4, float8: a number; `NaN` and the infinities become strings.
    Float,
    /// json, jsonb: embedded as they are, never parsed.
    Json,
    /// `2025-06-11T01:19:22.402358`; what does not fit that form stays Postgres text.
    Timestamp,
    /// The same in UTC with microseconds and `Z`.
    Timestamptz,
    /// `{"months","days","microseconds"}`.
    Interval,
    /// Nested JSON arrays; arrays with non-default bounds stay Postgres text.
    Array { element: Box<Kind>, delimiter: char },
    /// An object with one key per attribute.
    Composite { attributes: Vec<(String, Kind)> },
    /// pgvector's `vector` and `halfvec`: an array of numbers.
    Vector,
    /// Everything else: a JSON string holding Postgres text. numeric, money, text, uuid, date,
    /// time, timetz, bytea (`\x` hexadecimal), enums, ranges, network, geometry and unknown types.
    Text,
}
