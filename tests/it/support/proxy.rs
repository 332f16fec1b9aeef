//! What goes wrong between Sluicebox and its servers: a relay of bytes that cuts and stalls
//! connections, and an HTTP server in front of S2 that answers statuses of its own.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::serve::ListenerExt;
use futures_util::{Stream, StreamExt};
use prost::Message;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::free_port;

/// What a [`Relay`] does with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Pass,
    /// Connections stay open, new ones are accepted, and no byte passes.
    Stall,
    /// Nobody listens, and every connection is gone.
    Cut,
    /// Every connection is reset, new ones too.
    Reset,
    /// Every piece arrives late.
    Delay,
    /// The bytes come one by one.
    Drip,
    /// Some 600 KB a second.
    Slow,
    /// The server's side is closed, and what the client sends still arrives.
    HalfClose,
    /// The client's side is closed, and what the server sends still arrives.
    HalfCloseBack,
    /// What the client sends arrives, and no answer comes back.
    Mute,
}

impl Wire {
    /// Everything that is wrong with a wire.
    pub const FAULTS: [Self; 8] = [
        Self::Stall,
        Self::Cut,
        Self::Reset,
        Self::Delay,
        Self::Drip,
        Self::HalfClose,
        Self::HalfCloseBack,
        Self::Mute,
    ];
}

/// A relay of bytes to one server, which knows nothing of what they mean.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    wire: watch::Sender<Wire>,
}

impl Relay {
    pub async fn to(server: u16) -> Self {
        let port = free_port();
        let wire = watch::Sender::new(Wire::Pass);
        let mut state = wire.subscribe();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut listener = Some(TcpListener::bind(address).await.unwrap());
        tokio::spawn(async move {
            loop {
                let accepted = async {
                    match &listener {
                        Some(listener) => listener.accept().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    changed = state.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        if *state.borrow_and_update() == Wire::Cut {
                            listener = None;
                        } else if listener.is_none() {
                            listener = Some(TcpListener::bind(address).await.unwrap());
                        }
                    }
                    Ok((client, _)) = accepted => {
                        tokio::spawn(relay(client, server, state.clone()));
                    }
                }
            }
        });
        Self { port, wire }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }

    /// Ends every connection; new ones pass at once.
    pub async fn cut_once(&self) {
        self.set(Wire::Cut);
        // Every connection's task has to see it before it passes again.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        self.set(Wire::Pass);
    }
}

async fn relay(mut client: TcpStream, server: u16, mut state: watch::Receiver<Wire>) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    let is_gone = |wire: &Wire| matches!(wire, Wire::Cut | Wire::Reset);
    let was_reset = tokio::select! {
        () = pump(client_read, server_write, state.clone(), Wire::HalfCloseBack) => false,
        () = pump(server_read, client_write, state.clone(), Wire::HalfClose) => false,
        wire = state.wait_for(is_gone) => wire.is_ok_and(|wire| *wire == Wire::Reset),
    };
    if was_reset {
        for stream in [&client, &server] {
            // What is closed without lingering is reset.
            drop(socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO)));
        }
    }
}

/// Carries bytes one way, which `closing` closes.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut state: watch::Receiver<Wire>,
    closing: Wire,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let closed = async { drop(state.wait_for(|wire| *wire == closing).await) };
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = closed => {
                drop(to.shutdown().await);
                // The other way goes on until whoever was closed off has had enough.
                return std::future::pending().await;
            }
        };
        let Ok(count @ 1..) = read else { return };
        let is_answer = closing == Wire::HalfClose;
        // What is held back when a connection goes is gone with it.
        let passes = |wire: &Wire| {
            let is_held = matches!(wire, Wire::Stall | Wire::Cut | Wire::Reset);
            !(is_held || is_answer && *wire == Wire::Mute)
        };
        let Ok(wire) = state.wait_for(passes).await.map(|wire| *wire) else {
            return;
        };
        if wire == Wire::Delay {
            tokio::time::sleep(std::time::Duration::from_millis(40)).await;
        }
        let piece = match wire {
            Wire::Drip => 1,
            Wire::Slow => 30_000,
            Wire::Pass
            | Wire::Stall
            | Wire::Cut
            | Wire::Reset
            | Wire::Delay
            | Wire::HalfClose
            | Wire::HalfCloseBack
            | Wire::Mute => count,
        };
        for bytes in buffer[..count].chunks(piece) {
            if wire == Wire::Slow {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            if to.write_all(bytes).await.is_err() {
                return;
            }
        }
    }
}

/// What a [`Front`] answers instead of S2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Everything passes.
    None,
    /// Every request: this status, with S2's code for it.
    Status { status: u16, code: &'static str, retry_after_ms: Option<u64> },
    /// The same to every request about one stream.
    OfStream { stream: &'static str, status: u16, code: &'static str },
    /// 401 to every request that does not bear this token.
    Unless { token: String },
    /// 413 to records with a body of more bytes, as a proxy with a limit of its own would.
    BodiesOver { bytes: usize },
    /// Append sessions are taken and never answered; everything else passes.
    SwallowSessions,
    /// 403 to everything but append sessions.
    AppendOnly,
}

impl Fault {
    pub fn status(status: u16, code: &'static str) -> Self {
        Self::Status { status, code, retry_after_ms: None }
    }
}

/// An HTTP server in front of S2, for HTTP/1.1 and HTTP/2, whose answers a test chooses.
#[derive(Debug)]
pub struct Front {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    http: reqwest::Client,
    fault: watch::Sender<Fault>,
    refused: Mutex<u64>,
}

impl Front {
    pub async fn of(server: &super::s2::Server) -> Self {
        let port = free_port();
        let shared = Arc::new(Shared {
            upstream: server.endpoint(),
            // Append sessions are two streams at once, which HTTP/1.1 cannot do.
            http: reqwest::Client::builder().http2_prior_knowledge().build().unwrap(),
            fault: watch::Sender::new(Fault::None),
            refused: Mutex::new(0),
        });
        let router = Router::new().fallback(forward).with_state(Arc::clone(&shared));
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let listener = listener.tap_io(|connection| {
            drop(connection.set_nodelay(true));
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on; sessions that are open end.
    pub fn set(&self, fault: Fault) {
        *self.shared.refused.lock().unwrap() = 0;
        self.shared.fault.send_replace(fault);
    }

    /// Requests and sessions refused since the last [`Self::set`].
    pub fn refused(&self) -> u64 {
        *self.shared.refused.lock().unwrap()
    }
}

impl Shared {
    fn refuse(&self) {
        *self.refused.lock().unwrap() += 1;
    }
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let mut faults = shared.fault.subscribe();
    let fault = faults.borrow_and_update().clone();
    let is_session = |headers: &HeaderMap| {
        headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "s2s/proto")
    };
    let forbidden = (fault == Fault::AppendOnly && !is_session(request.headers()))
        .then(|| error_answer(403, "permission_denied", "a fault that a test asked for"));
    let fault = if let Fault::OfStream { stream, status, code } = fault {
        // As a client escapes it in a path.
        let path = format!("/streams/{}/", stream.replace('/', "%2F"));
        let is_meant = request.uri().path().contains(&path);
        if is_meant { Fault::status(status, code) } else { Fault::None }
    } else {
        fault
    };
    if let Some(answer) = forbidden.or_else(|| refusal(&fault, request.headers())) {
        shared.refuse();
        drain(request.into_body().into_data_stream());
        return answer;
    }

    if fault == Fault::SwallowSessions && is_session(request.headers()) {
        shared.refuse();
        drain(request.into_body().into_data_stream());
        // Until the fault is over, and then as a proxy does that gives up.
        drop(faults.changed().await);
        return error_answer(502, "hot_server", "a fault that a test asked for");
    }
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut upstream = shared.http.request(parts.method, format!("{}{path}", shared.upstream));
    upstream = upstream.headers(end_to_end(&parts.headers));
    let session = is_session(&parts.headers);
    let body_bytes_max = match fault {
        Fault::BodiesOver { bytes } if session => bytes,
        Fault::None
        | Fault::Status { .. }
        | Fault::OfStream { .. }
        | Fault::Unless { .. }
        | Fault::BodiesOver { .. }
        | Fault::SwallowSessions
        | Fault::AppendOnly => usize::MAX,
    };
    let (oversize, met_oversize) = watch::channel(false);
    let upload = until_oversize(body.into_data_stream(), body_bytes_max, oversize);
    let answer = match upstream.body(reqwest::Body::wrap_stream(upload)).send().await {
        Ok(answer) => answer,
        // What was sent may have been taken: a code that says so.
        Err(error) => return error_answer(504, "upstream_timeout", &error.to_string()),
    };

    let mut response = Response::builder().status(answer.status());
    if let Some(headers) = response.headers_mut() {
        headers.extend(end_to_end(answer.headers()));
    }
    let counted = Arc::clone(&shared);
    let terminal = async move {
        let refused = *met_oversize.borrow();
        refused.then(|| {
            counted.refuse();
            Ok::<_, std::io::Error>(terminal_frame(413, "the request is too large for this proxy"))
        })
    };
    let terminal = futures_util::stream::once(terminal).filter_map(std::future::ready);
    let download = answer.bytes_stream().map(|chunk| chunk.map_err(std::io::Error::other));
    let download = download.chain(terminal);
    // A change of the fault ends the session, as a proxy that is configured anew would. Any other
    // answer has an end of its own.
    let changed = async move {
        if session {
            drop(faults.changed().await);
        } else {
            std::future::pending::<()>().await;
        }
    };
    response.body(Body::from_stream(Box::pin(download).take_until(Box::pin(changed)))).unwrap()
}

/// Reads what the client still sends: a connection that is closed over unread bytes is reset, and
/// over HTTP/1.1 the reset can overtake the answer.
fn drain(mut upload: impl Stream<Item = Result<Bytes, axum::Error>> + Send + Unpin + 'static) {
    tokio::spawn(async move { while let Some(Ok(_)) = upload.next().await {} });
}

/// The answer in place of S2's, if the fault says so before the body is seen.
fn refusal(fault: &Fault, headers: &HeaderMap) -> Option<Response> {
    match fault {
        Fault::None
        | Fault::OfStream { .. }
        | Fault::BodiesOver { .. }
        | Fault::SwallowSessions
        | Fault::AppendOnly => None,
        Fault::Status { status, code, retry_after_ms } => {
            let mut answer = error_answer(*status, code, "a fault that a test asked for");
            if let Some(wait) = retry_after_ms {
                answer.headers_mut().insert("retry-after-ms", HeaderValue::from(*wait));
            }
            Some(answer)
        }
        Fault::Unless { token } => {
            let expected = format!("Bearer {token}");
            let given = headers.get(header::AUTHORIZATION);
            let good = given.is_some_and(|given| given.as_bytes() == expected.as_bytes());
            (!good).then(|| error_answer(401, "authn", "the access token is not valid"))
        }
    }
}

fn error_answer(status: u16, code: &str, message: &str) -> Response {
    let body = json!({ "code": code, "message": message }).to_string();
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// The headers that a proxy passes on.
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    const HOP_BY_HOP: [HeaderName; 4] =
        [header::HOST, header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING];
    let mut headers = headers.clone();
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers
}

/// S2's terminal frame: its length, the flag, the status and the error.
fn terminal_frame(status: u16, message: &str) -> Bytes {
    let error = json!({ "code": "payload_too_large", "message": message }).to_string();
    let length = u32::try_from(1 + 2 + error.len()).unwrap();
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.push(0x80);
    frame.extend(status.to_be_bytes());
    frame.extend(error.as_bytes());
    frame.into()
}

#[derive(Clone, PartialEq, Message)]
struct AppendInput {
    #[prost(message, repeated, tag = "1")]
    records: Vec<AppendRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct AppendRecord {
    #[prost(bytes = "vec", tag = "3")]
    body: Vec<u8>,
}

/// Passes an append session's frames on, until one holds a body over the limit: there the upload
/// ends. Anything that is not a session passes as it is.
fn until_oversize(
    upload: impl Stream<Item = Result<Bytes, axum::Error>> + Send + Unpin + 'static,
    body_bytes_max: usize,
    oversize: watch::Sender<bool>,
) -> impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static {
    let start = Some((upload, Vec::new(), oversize));
    futures_util::stream::unfold(start, move |state| async move {
        let (mut upload, mut pending, oversize) = state?;
        let chunk = match upload.next().await? {
            Ok(chunk) if body_bytes_max < usize::MAX => chunk,
            other => return Some((other, Some((upload, pending, oversize)))),
        };
        pending.extend_from_slice(&chunk);
        let mut passed = Vec::new();
        while pending.len() >= 3 {
            let length = u32::from_be_bytes([0, pending[0], pending[1], pending[2]]) as usize;
            if pending.len() < 3 + length {
                break;
            }
            let frame: Vec<u8> = pending.drain(..3 + length).collect();
            assert_eq!(frame[3], 0, "frames of clients are neither terminal nor compressed");
            let input = AppendInput::decode(&frame[4..]).unwrap();
            if input.records.iter().any(|record| record.body.len() > body_bytes_max) {
                oversize.send_replace(true);
                drain(upload);
                return Some((Ok(passed.into()), None));
            }
            passed.extend(frame);
        }
        Some((Ok(passed.into()), Some((upload, pending, oversize))))
    })
}
