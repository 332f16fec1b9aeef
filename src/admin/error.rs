//! Errors as the API's clients see them: a status, a word that programs compare, and a text.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::pipeline::control;

/// `{"error":{"code","text"}}` with its status.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    text: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, text: impl Into<String>) -> Self {
        Self { status, code, text: text.into() }
    }

    pub(super) fn invalid(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", text)
    }

    pub(super) fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "no_route", "there is nothing here; GET / lists what is")
    }

    pub(super) fn no_method() -> Self {
        let text = "this path does not take that method; GET / lists what it takes";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "no_method", text)
    }
}

impl From<control::Error> for ApiError {
    fn from(error: control::Error) -> Self {
        let (status, code) = match &error {
            control::Error::NotFound { .. } | control::Error::NeverStored { .. } => {
                (StatusCode::NOT_FOUND, "not_found")
            }
            control::Error::Invalid { .. } => (StatusCode::BAD_REQUEST, "invalid"),
            control::Error::Busy { .. } => (StatusCode::CONFLICT, "busy"),
            control::Error::Unread { .. } => (StatusCode::CONFLICT, "unread"),
            control::Error::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
            control::Error::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "store"),
        };
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self { status, code, text }
    }
}

#[derive(Serialize)]
struct View<'a> {
    error: ErrorView<'a>,
}

#[derive(Serialize)]
struct ErrorView<'a> {
    code: &'a str,
    text: &'a str,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let view = View { error: ErrorView { code: self.code, text: &self.text } };
        (self.status, Json(view)).into_response()
    }
}
