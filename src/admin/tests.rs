use std::collections::VecDeque;
use std::sync::Mutex;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::case::Case;
use crate::config::Listen;
use crate::pipeline::control::{
    self, Changed, ErrorView, Filter, MessageDetail, MessageList, MessageView, PageQuery, Request,
    Status,
};
use crate::pipeline::heartbeat::heartbeat;

/// A pipeline of two messages that writes down what it was asked.
struct Scripted {
    address: SocketAddr,
    asked: Arc<Mutex<VecDeque<String>>>,
    status: watch::Sender<Status>,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<Result<(), Error>>,
}

fn message(id: u64) -> MessageView {
    MessageView {
        id: id.to_string(),
        state: control::State::Parked,
        table: "public.t".to_owned(),
        key: json!({"id": id}),
        action: "insert".to_owned(),
        commit_lsn: 1,
        commit_idx: 0,
        error: Some(ErrorView {
            class: "oversize".to_owned(),
            status: None,
            text: "too large".to_owned(),
            body: None,
            transform: None,
        }),
        bytes: Some(3_000_000),
        bytes_max: 1_048_576,
        columns: vec![control::ColumnBytes { name: "body".to_owned(), bytes: 2_999_000 }],
        attempts: 1,
        next_attempt_at: None,
        stored_at: "2026-01-01T00:00:00Z".to_owned(),
        behind: None,
    }
}

fn change(filter: &Filter) -> Result<Changed, control::Error> {
    match filter.id {
        None => Ok(Changed { changed: 2, unchanged_behind: 0 }),
        Some(1) => Ok(Changed { changed: 1, unchanged_behind: 3 }),
        Some(2) => Err(control::Error::Busy { id: 2 }),
        Some(id) => Err(control::Error::NotFound { id }),
    }
}

fn list(query: &PageQuery) -> Result<MessageList, control::Error> {
    match query.filter.state.as_deref() {
        Some("odd") => Err(control::Error::Invalid { text: "`odd` is no state".to_owned() }),
        Some("broken") => Err(control::Error::Store("disk on fire".into())),
        _ => Ok(MessageList { messages: vec![message(1)], next: Some("1".to_owned()), total: 2 }),
    }
}

async fn answer(mut requests: mpsc::Receiver<Request>, asked: Arc<Mutex<VecDeque<String>>>) {
    while let Some(request) = requests.recv().await {
        let text = match &request {
            Request::List(query, _) => format!("list {query:?}"),
            Request::Show(id, _) => format!("show {id}"),
            Request::Export(id, _) => format!("export {id}"),
            Request::Retry(filter, _) => format!("retry {filter:?}"),
            Request::Acknowledge(filter, _) => format!("ack {filter:?}"),
        };
        asked.lock().unwrap().push_back(text);
        match request {
            Request::List(query, answer) => answer.send(list(&query)).unwrap(),
            Request::Show(id, answer) => {
                let detail = MessageDetail {
                    message: message(id),
                    payload: "{}".to_owned(),
                    payload_cut: false,
                    trace: Vec::new(),
                    hint: "remove it".to_owned(),
                    holds: 2,
                };
                let found = (id < 3).then_some(detail).ok_or(control::Error::NotFound { id });
                answer.send(found).unwrap();
            }
            Request::Export(id, answer) => {
                let case = || {
                    let change = crate::case::sized(8);
                    let pipeline = crate::message::EnvelopeSettings::default();
                    Box::new(Case::new(id.to_string(), &change, None, &pipeline, Vec::new()))
                };
                let found = (id < 3).then(case).ok_or(control::Error::NotFound { id });
                answer.send(found).unwrap();
            }
            Request::Retry(filter, answer) | Request::Acknowledge(filter, answer) => {
                answer.send(change(&filter)).unwrap();
            }
        }
    }
}

fn on_any_port() -> Console {
    let listen = Listen { host: "127.0.0.1".to_owned(), port: 0 };
    Console { listen, names: vec!["sluicebox.internal".to_owned()] }
}

async fn start() -> Scripted {
    let (requests, received) = mpsc::channel(1);
    let (status, watched) = watch::channel(Status::default());
    let asked = Arc::new(Mutex::new(VecDeque::new()));
    tokio::spawn(answer(received, Arc::clone(&asked)));
    let server = Server::bind(&on_any_port()).await.unwrap();
    let address = server.address();
    let shutdown = CancellationToken::new();
    let transforms: TransformsView = Arc::new(|| json!({"generation": 7, "transforms": []}));
    let control = Control::new(requests, watched, heartbeat().1);
    let served = tokio::spawn(server.serve(control, transforms, shutdown.clone()));
    Scripted { address, asked, status, shutdown, served }
}

impl Scripted {
    async fn request(&self, method: Method, path: &str, body: Option<&str>) -> (u16, String) {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut request = client.request(method, format!("http://{}{path}", self.address));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.headers()["cache-control"], "no-store");
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// What the pipeline was asked since the last call.
    fn asked(&self) -> Option<String> {
        self.asked.lock().unwrap().pop_front()
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test]
async fn messages_are_listed_and_shown() {
    let scripted = start().await;
    let (status, body) = scripted.request(Method::GET, "/api/v1/messages", None).await;
    assert_eq!(status, 200);
    assert_eq!(
        json(&body),
        json!({"messages": [{
            "id": "1", "state": "parked", "table": "public.t", "key": {"id": 1},
            "action": "insert", "commit_lsn": 1, "commit_idx": 0,
            "error": {"class": "oversize", "status": null, "text": "too large", "body": null,
                      "transform": null},
            "bytes": 3_000_000, "bytes_max": 1_048_576,
            "columns": [{"name": "body", "bytes": 2_999_000}],
            "attempts": 1, "next_attempt_at": null, "stored_at": "2026-01-01T00:00:00Z",
            "behind": null,
        }], "next": "1", "total": 2})
    );
    let asked = scripted.asked().unwrap();
    assert!(asked.contains("transform: None }, after: None, limit: 100"), "{asked}");

    let path = "/api/v1/messages?state=failed&table=public.t&class=trap&transform=10-x.wasm&after=5&limit=7";
    assert_eq!(scripted.request(Method::GET, path, None).await.0, 200);
    let asked = scripted.asked().unwrap();
    for part in [
        "state: Some(\"failed\")",
        "table: Some(\"public.t\")",
        "class: Some(\"trap\")",
        "transform: Some(\"10-x.wasm\")",
        "after: Some(5)",
        "limit: 7",
    ] {
        assert!(asked.contains(part), "{asked}");
    }

    let (status, body) = scripted.request(Method::GET, "/api/v1/messages/2", None).await;
    assert_eq!((status, &json(&body)["id"]), (200, &json!("2")));
    assert_eq!(json(&body)["hint"], "remove it");
    assert_eq!(json(&body)["payload"], "{}");
    let (_, body) = scripted.request(Method::GET, "/api/v1/messages/2?payload=false", None).await;
    assert_eq!((&json(&body)["payload"], &json(&body)["payload_cut"]), (&json!(""), &json!(true)));
}

#[tokio::test]
async fn messages_are_retried_and_acknowledged() {
    let scripted = start().await;
    let (status, body) = scripted.request(Method::POST, "/api/v1/messages/1/ack", Some("")).await;
    assert_eq!((status, json(&body)), (200, json!({"changed": 1, "unchanged_behind": 3})));
    assert_eq!(
        scripted.asked().unwrap(),
        "ack Filter { id: Some(1), state: None, table: None, class: None, transform: None }"
    );
    let body = r#"{"all":true,"table":"public.t"}"#;
    let (status, body) = scripted.request(Method::POST, "/api/v1/messages/retry", Some(body)).await;
    assert_eq!((status, json(&body)), (200, json!({"changed": 2, "unchanged_behind": 0})));
    assert_eq!(
        scripted.asked().unwrap(),
        "retry Filter { id: None, state: None, table: Some(\"public.t\"), class: None, transform: None }"
    );
}

#[tokio::test]
async fn errors_have_a_status_a_code_and_a_text() {
    let scripted = start().await;
    for (method, path, body, expected, code, text) in [
        (Method::GET, "/api/v1/nothing", None, 404, "no_route", "there is nothing here"),
        (Method::GET, "/api/v1/messages/1/ack", None, 405, "no_method", "does not take"),
        (Method::GET, "/api/v1/messages/9", None, 404, "not_found", "there is no message 9"),
        (Method::GET, "/api/v1/messages/x", None, 400, "invalid", "`x` is no message id"),
        (Method::GET, "/api/v1/messages?limit=0", None, 400, "invalid", "limit is from 1 to 1000"),
        (Method::GET, "/api/v1/messages?stat=x", None, 400, "invalid", "unknown field `stat`"),
        (Method::GET, "/api/v1/messages?state=odd", None, 400, "invalid", "`odd` is no state"),
        (Method::GET, "/api/v1/messages?state=broken", None, 500, "store", ": disk on fire"),
        (Method::POST, "/api/v1/messages/2/retry", Some("{}"), 409, "busy", "message 2"),
        (Method::POST, "/api/v1/messages/9/ack", Some("{}"), 404, "not_found", "message 9"),
        (Method::POST, "/api/v1/messages/ack", Some("{}"), 400, "invalid", "the filter is empty"),
        (Method::POST, "/api/v1/messages/ack", None, 415, "content_type", "application/json"),
    ] {
        let (status, answer) = scripted.request(method, path, body).await;
        let answer = json(&answer);
        assert_eq!((status, &answer["error"]["code"]), (expected, &json!(code)), "{path} {answer}");
        assert!(answer["error"]["text"].as_str().unwrap().contains(text), "{path} {answer}");
    }
    let large = format!("{{\"table\":\"{}\"}}", "x".repeat(BODY_BYTES_MAX));
    let (status, _) = scripted.request(Method::POST, "/api/v1/messages/ack", Some(&large)).await;
    assert_eq!(status, 413);
}

#[tokio::test]
async fn readiness_says_why_not() {
    let scripted = start().await;
    let reason = Reason {
        part: "sink".to_owned(),
        code: "sink_401".to_owned(),
        text: "S2 refused the token".to_owned(),
    };
    scripted.status.send_modify(|status| status.reasons = vec![reason]);
    let (status, body) = scripted.request(Method::GET, "/readyz", None).await;
    assert_eq!(status, 503);
    assert_eq!(
        body,
        r#"{"ready":false,"reasons":[{"part":"sink","code":"sink_401","text":"S2 refused the token"}]}"#
    );
    scripted.status.send_modify(|status| {
        status.ready = true;
        status.reasons.clear();
        status.records = 5;
    });
    let (status, body) = scripted.request(Method::GET, "/readyz", None).await;
    assert_eq!((status, body.as_str()), (200, r#"{"ready":true,"reasons":[]}"#));
    let (status, body) = scripted.request(Method::GET, "/api/v1/status", None).await;
    assert_eq!((status, &json(&body)["records"]), (200, &json!(5)));
    let (status, body) = scripted.request(Method::GET, "/api/v1/transforms", None).await;
    assert_eq!((status, &json(&body)["generation"]), (200, &json!(7)));
    assert_eq!(scripted.request(Method::GET, "/healthz", None).await, (200, "ok\n".to_owned()));
    assert!(scripted.request(Method::GET, "/", None).await.1.contains("GET  /api/v1/status"));
}

#[tokio::test]
async fn a_foreign_host_is_refused_over_the_wire() {
    let scripted = start().await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for (host, expected) in
        [("evil.example", 403), ("sluicebox.internal", 200), ("127.0.0.1:1", 200)]
    {
        let url = format!("http://{}/api/v1/messages", scripted.address);
        let response = client.get(url).header("host", host).send().await.unwrap();
        assert_eq!(response.status(), expected, "{host}");
    }
}

#[tokio::test]
async fn an_address_in_use_names_the_key() {
    let scripted = start().await;
    let mut console = on_any_port();
    console.listen.port = scripted.address.port();
    let error = Server::bind(&console).await.unwrap_err().to_string();
    let expected = format!("could not listen on {}: another process does", scripted.address);
    assert!(error.starts_with(&expected), "{error}");
    assert!(error.contains("console.listen"), "{error}");
}

#[tokio::test]
async fn the_shutdown_ends_it() {
    let scripted = start().await;
    assert_eq!(scripted.request(Method::GET, "/healthz", None).await.0, 200);
    scripted.shutdown.cancel();
    scripted.served.await.unwrap().unwrap();
    assert!(TcpListener::bind(scripted.address).await.is_ok());
}

#[tokio::test]
async fn a_stopped_pipeline_is_said() {
    let (requests, received) = mpsc::channel(1);
    let (_status, watched) = watch::channel(Status::default());
    drop(received);
    let control = Control::new(requests, watched, heartbeat().1);
    let error = ApiError::from(control.show(1).await.unwrap_err());
    let response = error.into_response();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

/// A browser gets the console, and a policy under which nothing but its three files can do anything.
#[tokio::test]
async fn a_browser_gets_the_console() {
    let scripted = start().await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async |path: &str, accept: &str| {
        let url = format!("http://{}/{path}", scripted.address);
        let answer = client.get(url).header("accept", accept).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        let headers = answer.headers().clone();
        let header = |name: &str| headers[name].to_str().unwrap().to_owned();
        assert_eq!(
            (header("x-content-type-options"), header("cache-control")),
            ("nosniff".into(), "no-store".into())
        );
        let kind = header("content-type");
        let policy = headers
            .get("content-security-policy")
            .map(|policy| policy.to_str().unwrap().to_owned());
        (kind, policy, answer.text().await.unwrap())
    };
    let (kind, policy, page) = get("", "text/html,application/xhtml+xml,*/*;q=0.8").await;
    let policy = policy.unwrap();
    assert_eq!(kind, "text/html; charset=utf-8");
    for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    // What the policy would keep from working is not in it.
    for bad in ["<style", " style=", "<script>", "onclick", "http://", "https://"] {
        assert!(!page.contains(bad), "{bad}");
    }
    for (file, expected) in [
        ("console.css", "text/css; charset=utf-8"),
        ("console.js", "text/javascript; charset=utf-8"),
    ] {
        assert!(page.contains(&format!("=\"{file}\"")), "{file}");
        assert_eq!(get(file, "*/*").await.0, expected);
    }
    let (_, _, script) = get("console.js", "*/*").await;
    for bad in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "://"] {
        assert!(!script.contains(bad), "{bad}");
    }
    let (kind, _, text) = get("", "*/*").await;
    assert!(
        kind.starts_with("text/plain") && text.contains("GET  /api/v1/status"),
        "{kind} {text}"
    );
}

/// What the document says of a path's method.
fn documented<'a>(document: &'a Value, path: &str, method: &Method) -> Option<&'a Value> {
    document["paths"][path].get(method.as_str().to_lowercase())
}

#[tokio::test]
async fn the_document_has_every_route_and_no_other() {
    let scripted = start().await;
    let (status, body) = scripted.request(Method::GET, "/api/v1/openapi.json", None).await;
    let document = json(&body);
    assert_eq!((status, &document), (200, &openapi::parsed()));
    let paths = document["paths"].as_object().unwrap();
    let routes: Vec<&str> = routes().iter().map(|(path, _)| *path).collect();
    for path in paths.keys() {
        assert!(routes.contains(&path.as_str()), "{path} is documented, and there is none");
    }
    for path in routes {
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            let has_body = method != Method::GET;
            let asked = path.replace("{id}", "1");
            let body = has_body.then_some(r#"{"all":true}"#);
            let (status, _) = scripted.request(method.clone(), &asked, body).await;
            let said = documented(&document, path, &method);
            assert_eq!(said.is_some(), status != 405, "{method} {path} answers {status}");
        }
    }
}

/// Follows a reference within the document.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let Some(reference) = schema["$ref"].as_str() else { return schema };
    let name = reference.strip_prefix("#/components/schemas/").expect("a schema of the document");
    let found = &document["components"]["schemas"][name];
    assert!(found.is_object(), "{reference} is not in the document");
    found
}

/// The fields that a schema names, by their schemas.
fn properties<'a>(document: &'a Value, schema: &'a Value) -> Vec<(&'a String, &'a Value)> {
    let schema = resolved(document, schema);
    let own = schema["properties"].as_object().into_iter().flatten();
    let parts = schema["allOf"].as_array().into_iter().flatten();
    own.chain(parts.flat_map(|part| properties(document, part))).collect()
}

/// That a value has the fields of its schema, and no others, all the way down.
#[track_caller]
fn assert_fits(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = match schema["oneOf"].as_array() {
        Some(_) if value.is_null() => return,
        Some(either) => resolved(document, &either[0]),
        None => resolved(document, schema),
    };
    match value {
        Value::Object(fields) => {
            let named = properties(document, schema);
            // A schema without fields says nothing of them.
            for (name, field) in fields.iter().filter(|_| !named.is_empty()) {
                let known = named.iter().find(|(known, _)| *known == name);
                let (_, schema) = known.unwrap_or_else(|| panic!("{at}.{name} is not documented"));
                assert_fits(document, schema, field, &format!("{at}.{name}"));
            }
            for (name, _) in named {
                assert!(fields.contains_key(name), "{at} has no {name}: {value}");
            }
        }
        Value::Array(items) => {
            let each = &schema["items"];
            items.iter().for_each(|item| assert_fits(document, each, item, &format!("{at}[]")));
        }
        Value::Null => assert_kind(schema, "null", at),
        Value::Bool(_) => assert_kind(schema, "boolean", at),
        Value::Number(_) => assert_kind(schema, "integer", at),
        Value::String(_) => assert_kind(schema, "string", at),
    }
}

#[track_caller]
fn assert_kind(schema: &Value, kind: &str, at: &str) {
    let kinds = &schema["type"];
    let is_one_of = |kinds: &Vec<Value>| kinds.iter().any(|one| one == kind);
    let fits = kinds.is_null() || kinds == kind || kinds.as_array().is_some_and(is_one_of);
    assert!(fits, "{at} is a {kind}, and documented as {kinds}");
}

#[tokio::test]
async fn answers_have_the_fields_that_the_document_names() {
    let scripted = start().await;
    let document = openapi::parsed();
    let reason = control::Reason {
        part: "sink".to_owned(),
        code: "sink_401".to_owned(),
        text: "no".to_owned(),
    };
    let stream = control::StreamView {
        name: "s".to_owned(),
        state: "shut".to_owned(),
        reason: Some(reason.clone()),
        queued: 1,
        queued_bytes: 1,
        parked: 1,
        tail: Some(1),
    };
    let keeper = control::KeeperView { code: "halted".to_owned(), text: "no".to_owned() };
    let letters = control::DeadLettersView {
        place: "stream `dead`".to_owned(),
        written: 1,
        waiting: 1,
        reason: Some("no".to_owned()),
    };
    scripted.status.send_replace(Status {
        reasons: vec![reason],
        streams: vec![stream],
        wal_kept_by: Some(keeper),
        dead_letters: Some(letters),
        stuck: vec![control::StuckView { part: "sink".to_owned(), seconds: 1 }],
        ..Status::default()
    });
    let all = r#"{"all":true}"#;
    for (method, path, asked, body, expected) in [
        (Method::GET, "/readyz", "/readyz", None, 503),
        (Method::GET, "/api/v1/status", "/api/v1/status", None, 200),
        (Method::GET, "/api/v1/messages", "/api/v1/messages", None, 200),
        (Method::GET, "/api/v1/messages", "/api/v1/messages?limit=0", None, 400),
        (Method::GET, "/api/v1/messages/{id}", "/api/v1/messages/1", None, 200),
        (Method::GET, "/api/v1/messages/{id}", "/api/v1/messages/9", None, 404),
        (Method::POST, "/api/v1/messages/retry", "/api/v1/messages/retry", Some(all), 200),
        (Method::POST, "/api/v1/messages/{id}/ack", "/api/v1/messages/2/ack", Some("{}"), 409),
    ] {
        let (status, text) = scripted.request(method.clone(), asked, body).await;
        assert_eq!(status, expected, "{method} {asked}: {text}");
        let said = documented(&document, path, &method).expect("it is documented");
        let answer = &said["responses"][status.to_string()];
        let schema = &answer["content"]["application/json"]["schema"];
        assert!(schema.is_object(), "{method} {path} documents no {status}");
        assert_fits(&document, schema, &json(&text), asked);
    }
    let transform = json!({
        "file": "10-x.wasm", "digest": "", "state": "live", "reason": null, "since": "",
        "calls": 0, "errors": 0, "dropped": 0, "micros": 0, "vet": null,
    });
    let view: crate::transform::TransformView = serde_json::from_value(transform).unwrap();
    let list = crate::transform::TransformList {
        generation: 1,
        digest: String::new(),
        transforms: vec![view],
        warnings: vec![String::new()],
    };
    let schema = &document["components"]["schemas"]["TransformList"];
    assert_fits(&document, schema, &serde_json::to_value(list).unwrap(), "transforms");
}
