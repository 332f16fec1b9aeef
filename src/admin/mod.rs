//! The HTTP interface of a running process: messages, transforms, status and probes.
//!
//! Handlers parse, ask [`Control`] once, and turn the answer into JSON; they decide nothing about
//! delivery and touch neither Postgres nor S2 nor the store. Everybody who reaches the address may
//! read parked messages and give them up, so [`guard`] keeps out web pages that a browser on this
//! machine happens to show; keeping the address private is the operator's part.

mod console;
mod error;
mod guard;
mod messages;
mod metrics;
mod openapi;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router, middleware};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Console;
use crate::pipeline::control::{Control, Reason};
use crate::pipeline::heartbeat;
use crate::transform::without_words;

use error::ApiError;

/// What `GET /api/v1/transforms` answers: the folder's state in the shape of
/// `transforms list --json`.
pub type TransformsView = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// The most bytes of a request's body. A filter takes a few hundred.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// How long requests that are under way may go on after the shutdown began.
const DRAIN_MAX: Duration = Duration::from_secs(5);

const ROOT_TEXT: &str = "\
Sluicebox

GET  /                               this, and in a browser the console
GET  /api/v1/openapi.json            all of this for programs, as OpenAPI 3.1
GET  /api/v1/status                  what the pipeline is doing
GET  /api/v1/messages                messages in the store: state, table, class, transform, after, limit
GET  /api/v1/messages/ID             one message with its trace and payload: payload=false
GET  /api/v1/messages/ID/case        one message to be replayed elsewhere: redact=true
POST /api/v1/messages/ID/retry|ack   try it again at once, or give it up
POST /api/v1/messages/retry|ack      the same for {\"all\": true}, or for a state, table, class, transform
GET  /api/v1/transforms              the transforms folder
GET  /metrics                        the same and more in numbers, for Prometheus
GET  /healthz                        200 while the process lives, 503 when it hangs
GET  /readyz                         200 when it delivers, 503 with the reasons when it does not

POST takes content-type: application/json.
";

/// Why the interface could not be offered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "could not listen on {address}: another process does; end it, or set console.listen to \
         another address"
    )]
    InUse { address: String },
    #[error("could not listen on {address} (console.listen)")]
    Listen { address: String, source: io::Error },
    #[error("the HTTP interface on {address} failed")]
    Serve { address: SocketAddr, source: io::Error },
}

/// The interface with its address taken and nobody served yet.
///
/// The address is taken first, before anything else is started, so that a second process on the
/// same configuration stops at once.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    /// Host names that requests may name.
    names: Vec<String>,
}

impl Server {
    /// Takes the address of `console.listen`.
    ///
    /// # Errors
    ///
    /// When the address is in use, is not one of this machine, or its name cannot be resolved.
    pub async fn bind(console: &Console) -> Result<Self, Error> {
        let listen = &console.listen;
        let fail = |source: io::Error| {
            let address = listen.to_string();
            if source.kind() == io::ErrorKind::AddrInUse {
                Error::InUse { address }
            } else {
                Error::Listen { address, source }
            }
        };
        let listener =
            TcpListener::bind((listen.host.as_str(), listen.port)).await.map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        if !address.ip().is_loopback() {
            tracing::warn!(
                %address,
                "the console is reachable from other machines; whoever reaches it reads parked \
                 messages and may give them up"
            );
        }
        let mut names = console.names.clone();
        names.push(listen.host.clone());
        Ok(Self { listener, address, names })
    }

    /// The address with the port that the system chose, where the configuration says 0.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests until the shutdown, and those under way for a few seconds more.
    ///
    /// # Errors
    ///
    /// When the listening socket fails.
    pub async fn serve(
        self,
        control: Control,
        transforms: TransformsView,
        shutdown: CancellationToken,
    ) -> Result<(), Error> {
        let Self { listener, address, names } = self;
        let listener = listener.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "could not set TCP_NODELAY on a console connection");
            }
        });
        let router = router(App { control, transforms, names: names.into() });
        let serve = axum::serve(listener, router)
            .with_graceful_shutdown(shutdown.clone().cancelled_owned())
            .into_future();
        tokio::select! {
            served = serve => served.map_err(|source| Error::Serve { address, source }),
            // A client that never finishes its request must not keep the process alive.
            () = async {
                shutdown.cancelled().await;
                tokio::time::sleep(DRAIN_MAX).await;
            } => Ok(()),
        }
    }
}

/// [`Server::bind`] and [`Server::serve`] in one.
///
/// # Errors
///
/// As both.
pub async fn serve(
    console: &Console,
    control: Control,
    transforms: TransformsView,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    Server::bind(console).await?.serve(control, transforms, shutdown).await
}

/// What handlers work with.
#[derive(Clone)]
struct App {
    control: Control,
    transforms: TransformsView,
    names: Arc<[String]>,
}

/// Every path that there is; `openapi.json` describes each.
fn routes() -> [(&'static str, MethodRouter<App>); 16] {
    [
        ("/", get(console::root)),
        ("/console.css", get(console::style)),
        ("/console.js", get(console::script)),
        ("/healthz", get(healthz)),
        ("/readyz", get(readyz)),
        ("/metrics", get(metrics)),
        ("/api/v1/openapi.json", get(openapi::document)),
        ("/api/v1/status", get(status)),
        ("/api/v1/transforms", get(transforms)),
        ("/api/v1/messages", get(messages::list)),
        ("/api/v1/messages/retry", post(messages::retry_many)),
        ("/api/v1/messages/ack", post(messages::acknowledge_many)),
        ("/api/v1/messages/{id}", get(messages::show)),
        ("/api/v1/messages/{id}/case", get(messages::export)),
        ("/api/v1/messages/{id}/retry", post(messages::retry_one)),
        ("/api/v1/messages/{id}/ack", post(messages::acknowledge_one)),
    ]
}

fn router(app: App) -> Router {
    let routes = routes().into_iter();
    routes
        .fold(Router::new(), |router, (path, handlers)| router.route(path, handlers))
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(app.clone(), guard::check))
        .layer(middleware::map_response(add_headers))
        .with_state(app)
}

async fn status(State(app): State<App>) -> Response {
    Json(app.control.status()).into_response()
}

async fn transforms(State(app): State<App>) -> Response {
    Json((app.transforms)()).into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    let text = metrics::text(&app.control.status(), &(app.transforms)());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// For whoever ends a process that hangs. Nothing that the pipeline holds is touched.
async fn healthz(State(app): State<App>) -> (StatusCode, String) {
    match app.control.stalled() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(stalled) => {
            let (code, text) = (heartbeat::CODE, heartbeat::TEXT);
            let text = format!("{code}: {text} ({} s)\n", stalled.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}

#[derive(Serialize)]
struct ReadyView {
    ready: bool,
    reasons: Vec<Reason>,
}

/// Whoever probes keeps what is answered, so that what a transform said of a row is in the status alone.
async fn readyz(State(app): State<App>) -> Response {
    let mut status = app.control.status();
    let code = if status.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    for reason in &mut status.reasons {
        let length = without_words(&reason.text).0.len();
        reason.text.truncate(length);
    }
    let view = ReadyView { ready: status.ready, reasons: status.reasons };
    (code, Json(view)).into_response()
}

/// Answers show rows: nothing on the way may keep them or take them for something else.
async fn add_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests;
