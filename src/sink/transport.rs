//! What carries a request to S2 and its answer back: HTTP, and in the simulation a model of the server.
//!
//! The seam lies this low so that everything above it is the same in both: fencing and reading back,
//! the frames of a session, what each answer means. It is asked once for each request, and once for a
//! whole append session; a request names its stream by its address, so that one serves all streams.

use std::{error::Error as StdError, fmt, future::Future, pin::Pin, time::Duration};

use reqwest::{Request, Response};

use super::{
    client::{Mode, Settings},
    endpoint::Addresses,
    error::{Error, Fault, fault_of},
};

/// How long a connection may take. Five seconds outlast a lost packet or two of the handshake.
const CONNECT_TIME_OUT: Duration = Duration::from_secs(5);
/// HTTP/2 pings, as S2's SDK sends them (`sdk/src/client.rs` of s2-streamstore/s2).
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIME_OUT: Duration = Duration::from_secs(10);

/// Which kind of connection a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// One request, one answer, within the request's own time-out.
    Unary,
    /// A body that is still sent while the answer comes, for as long as both sides like.
    Session,
}

/// Why there is no answer, or no whole one.
#[derive(Debug)]
pub struct Failed {
    pub fault: Fault,
    /// Without addresses: they are in the error's own text, as far as they may be shown.
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl From<reqwest::Error> for Failed {
    fn from(error: reqwest::Error) -> Self {
        Self { fault: fault_of(&error), source: Some(Box::new(error.without_url())) }
    }
}

/// An answer that is being waited for. Dropping it gives the request up, which S2 may have got.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response, Failed>> + Send>>;

/// See the module. It sends each request at most once, and judges no status.
pub trait Transport: fmt::Debug + Send + Sync {
    fn execute(&self, lane: Lane, request: Request) -> Answering;
}

/// HTTP over connections that are kept.
#[derive(Debug)]
pub(super) struct Http {
    unary: reqwest::Client,
    session: reqwest::Client,
}

impl Http {
    /// Without connecting.
    ///
    /// # Errors
    ///
    /// When this machine has no certificate authorities (`https`).
    pub(super) fn new(settings: &Settings, addresses: &Addresses) -> Result<Self, Error> {
        let clear_text = addresses.is_clear_text();
        let builder = || {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("sluicebox/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIME_OUT)
                .tcp_nodelay(true)
                .tcp_keepalive(PING_INTERVAL)
                .redirect(reqwest::redirect::Policy::none())
                // What may be sent again, and when, is decided by the owner of the pipeline.
                .retry(reqwest::retry::never());
            // Without this, a machine without certificate authorities could not even speak HTTP.
            let builder = if clear_text { builder.tls_certs_only([]) } else { builder };
            // A proxy of the environment does not reach this machine, whatever NO_PROXY says.
            if addresses.is_loopback() { builder.no_proxy() } else { builder }
        };
        // A stock s2-lite leaves TCP_NODELAY off, which costs unary requests over HTTP/2 44 ms each.
        let unary = if clear_text { builder().http1_only() } else { builder() };
        let session = if clear_text && settings.mode == Mode::SessionHttp2 {
            builder().http2_prior_knowledge()
        } else if clear_text {
            builder().http1_only()
        } else {
            builder()
        };
        let session = session
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_TIME_OUT)
            .http2_keep_alive_while_idle(true);
        let build = |builder: reqwest::ClientBuilder| {
            builder.build().map_err(|source| Error::HttpClient { source })
        };
        Ok(Self { unary: build(unary)?, session: build(session)? })
    }
}

impl Transport for Http {
    fn execute(&self, lane: Lane, request: Request) -> Answering {
        let client = match lane {
            Lane::Unary => &self.unary,
            Lane::Session => &self.session,
        };
        let answering = client.execute(request);
        Box::pin(async move { answering.await.map_err(Failed::from) })
    }
}
