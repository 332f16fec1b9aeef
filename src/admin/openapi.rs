//! The interface as an OpenAPI document, written by hand: `openapi.json` beside this file.
//!
//! A library that gathers it from attributes would want them on every type of the pipeline that is
//! shown, and a document of its own words is better read. What keeps it in step is the tests: each
//! route is in it and nothing else is, and each answer has the fields that it names and no other.

use axum::http::header;
use axum::response::{IntoResponse, Response};

const DOCUMENT: &str = include_str!("openapi.json");

pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

#[cfg(test)]
pub(super) fn parsed() -> serde_json::Value {
    serde_json::from_str(DOCUMENT).expect("the document is JSON")
}
