//! Routes of the message store.

use std::future::Future;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Deserializer};

use super::App;
use super::error::ApiError;
use crate::case::Case;
use crate::pipeline::control::{self, Changed, Filter, MessageDetail, MessageList, PageQuery};

/// Messages of a page where the request does not say.
const LIMIT_DEFAULT: usize = 100;

/// The most messages of a page, as [`PageQuery::limit`] has it.
const LIMIT_MAX: usize = 1000;

/// The pipeline answers within milliseconds; while it starts or ends, nobody may answer at all.
const ANSWER_MAX: Duration = Duration::from_secs(30);

type Answer<T> = Result<Json<T>, ApiError>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ListQuery {
    state: Option<String>,
    table: Option<String>,
    class: Option<String>,
    transform: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

pub(super) async fn list(
    State(app): State<App>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<MessageList> {
    let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(ApiError::invalid(format!("limit is from 1 to {LIMIT_MAX}")));
    }
    let after = query.after.as_deref().map(parse_id).transpose()?;
    let ListQuery { state, table, class, transform, .. } = query;
    let filter = Filter { id: None, state, table, class, transform };
    ask(app.control.list(PageQuery { filter, after, limit })).await
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ShowQuery {
    payload: Option<bool>,
}

/// One message. Without its payload where a reader wants to know what is wrong and not what is in the
/// row.
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<ShowQuery>, QueryRejection>,
) -> Answer<MessageDetail> {
    let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let Json(mut detail) = ask(app.control.show(parse_id(&id)?)).await?;
    if query.payload == Some(false) {
        (detail.payload, detail.payload_cut) = (String::new(), true);
    }
    Ok(Json(detail))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ExportQuery {
    redact: bool,
}

/// Redacted here, so that the row's values do not leave the machine.
pub(super) async fn export(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<ExportQuery>, QueryRejection>,
) -> Answer<Case> {
    let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let Json(case) = ask(app.control.export(parse_id(&id)?)).await?;
    Ok(Json(if query.redact { case.redact() } else { *case }))
}

pub(super) async fn retry_one(State(app): State<App>, Path(id): Path<String>) -> Answer<Changed> {
    ask(app.control.retry(one(&id)?)).await
}

pub(super) async fn acknowledge_one(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Answer<Changed> {
    ask(app.control.acknowledge(one(&id)?)).await
}

pub(super) async fn retry_many(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Changed> {
    ask(app.control.retry(many(body)?)).await
}

pub(super) async fn acknowledge_many(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Changed> {
    ask(app.control.acknowledge(many(body)?)).await
}

async fn ask<T>(answer: impl Future<Output = Result<T, control::Error>>) -> Answer<T> {
    match tokio::time::timeout(ANSWER_MAX, answer).await {
        Ok(answer) => Ok(Json(answer?)),
        Err(_) => {
            let text = format!("the pipeline did not answer within {} s", ANSWER_MAX.as_secs());
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_answer", text))
        }
    }
}

fn parse_id(text: &str) -> Result<u64, ApiError> {
    text.parse()
        .map_err(|_| ApiError::invalid(format!("`{text}` is no message id: ids are numbers")))
}

fn one(id: &str) -> Result<Filter, ApiError> {
    Ok(Filter { id: Some(parse_id(id)?), ..Filter::default() })
}

/// A [`Filter`], with `all` for the empty one: a body that was forgotten must not mean everything.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ManyBody {
    all: bool,
    #[serde(deserialize_with = "id_or_text")]
    id: Option<u64>,
    state: Option<String>,
    table: Option<String>,
    class: Option<String>,
    transform: Option<String>,
}

fn many(body: Result<Bytes, BytesRejection>) -> Result<Filter, ApiError> {
    let body = body
        .map_err(|rejection| ApiError::new(rejection.status(), "invalid", rejection.body_text()))?;
    let body: ManyBody = serde_json::from_slice(&body)
        .map_err(|error| ApiError::invalid(format!("the body is no filter: {error}")))?;
    let ManyBody { all, id, state, table, class, transform } = body;
    let filter = Filter { id, state, table, class, transform };
    if filter == Filter::default() && !all {
        let text = "the filter is empty: name id, state, table, class or transform, or say \
                    {\"all\": true}";
        return Err(ApiError::invalid(text));
    }
    Ok(filter)
}

/// Lists show ids as strings, so that both forms are taken.
fn id_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Id {
        Number(u64),
        Text(String),
    }
    match Option::<Id>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Id::Number(id)) => Ok(Some(id)),
        Some(Id::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_of_bulk_requests() {
        #[track_caller]
        fn check(body: &'static str, expected: Option<Filter>) {
            let actual = many(Ok(Bytes::from_static(body.as_bytes()))).ok();
            assert_eq!(actual, expected, "{body}");
        }
        let id = |id| Some(Filter { id: Some(id), ..Filter::default() });
        let table = Some(Filter { table: Some("t".to_owned()), ..Filter::default() });
        check(r#"{"all":true}"#, Some(Filter::default()));
        check(r#"{"all":true,"table":"t"}"#, table.clone());
        check(r#"{"table":"t"}"#, table);
        check(r#"{"id":7}"#, id(7));
        check(r#"{"id":"7"}"#, id(7));
        check("", None);
        check("{}", None);
        check("[]", None);
        check(r#"{"all":false}"#, None);
        check(r#"{"id":null}"#, None);
        check(r#"{"id":"x"}"#, None);
        check(r#"{"all":true,"tabel":"t"}"#, None);
    }
}
