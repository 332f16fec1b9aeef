//! The way to Postgres: a TCP or Unix socket, with TLS where the sslmode asks for it.
//!
//! Both the SQL connection and the replication connection are opened here, so that time-outs, TLS
//! and the choice of host are the same for both.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream as PostgresTls};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::dsn::{Dsn, Endpoint, SslMode};
use super::error::Error;
use super::tls;

/// TCP keepalive: first probe after this, then at this interval. Finds a dead peer within a minute
/// or two on a connection that only listens; the replication connection has its own watchdog.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// A connected socket.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Connects to one of the DSN's endpoints. Every step has the DSN's connect time-out.
pub(super) async fn connect(dsn: &Dsn, endpoint: &Endpoint) -> Result<Stream, Error> {
    match endpoint {
        Endpoint::Unix { path } => {
            let connected = within(dsn, endpoint, UnixStream::connect(path)).await?;
            Ok(Stream::Unix(connected.map_err(|source| unreachable(endpoint, source))?))
        }
        Endpoint::Tcp { host, address, port } => {
            let addresses = match address {
                Some(address) => vec![SocketAddr::new(*address, *port)],
                None => within(dsn, endpoint, tokio::net::lookup_host((host.as_str(), *port)))
                    .await?
                    .map_err(|source| unreachable(endpoint, source))?
                    .collect(),
            };
            let mut last = unreachable(endpoint, io::Error::other("the name has no address"));
            for address in addresses {
                match connect_tcp(dsn, endpoint, host, address).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

async fn connect_tcp(
    dsn: &Dsn,
    endpoint: &Endpoint,
    host: &str,
    address: SocketAddr,
) -> Result<Stream, Error> {
    let tcp = open_tcp(dsn, endpoint, address).await?;
    match within(dsn, endpoint, negotiate(dsn, endpoint, host, tcp)).await? {
        // libpq: with `prefer`, TLS that fails is no reason not to talk.
        Err(Error::Tls { .. }) if dsn.ssl.mode == SslMode::Prefer => {
            Ok(Stream::Tcp(open_tcp(dsn, endpoint, address).await?))
        }
        negotiated => negotiated,
    }
}

async fn open_tcp(dsn: &Dsn, endpoint: &Endpoint, address: SocketAddr) -> Result<TcpStream, Error> {
    let failed = |source| unreachable(endpoint, source);
    let tcp = within(dsn, endpoint, TcpStream::connect(address)).await?.map_err(failed)?;
    tcp.set_nodelay(true).map_err(failed)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    SockRef::from(&tcp).set_tcp_keepalive(&keepalive).map_err(failed)?;
    Ok(tcp)
}

/// Asks for TLS as the sslmode says, and shakes hands.
async fn negotiate(
    dsn: &Dsn,
    endpoint: &Endpoint,
    host: &str,
    mut tcp: TcpStream,
) -> Result<Stream, Error> {
    let mode = dsn.ssl.mode;
    if mode == SslMode::Disable {
        return Ok(Stream::Tcp(tcp));
    }
    if !dsn.ssl.direct {
        let mut request = BytesMut::new();
        frontend::ssl_request(&mut request);
        let lost = |source| unreachable(endpoint, source);
        tcp.write_all(&request).await.map_err(lost)?;
        if tcp.read_u8().await.map_err(lost)? != b'S' {
            return if mode == SslMode::Prefer {
                Ok(Stream::Tcp(tcp))
            } else {
                Err(Error::TlsNotOffered { address: endpoint.to_string(), mode: mode.as_str() })
            };
        }
    }
    let failed = |source| Error::Tls { address: endpoint.to_string(), source };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let config = tls::client_config(&dsn.ssl)?;
    let connected = TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    Ok(Stream::Tls(Box::new(connected.map_err(failed)?)))
}

fn unreachable(endpoint: &Endpoint, source: io::Error) -> Error {
    Error::Connect { address: endpoint.to_string(), source }
}

async fn within<T>(
    dsn: &Dsn,
    endpoint: &Endpoint,
    step: impl Future<Output = T>,
) -> Result<T, Error> {
    let timeout = dsn.connect_timeout();
    tokio::time::timeout(timeout, step)
        .await
        .map_err(|_| Error::ConnectTimeout { address: endpoint.to_string(), timeout })
}

impl Stream {
    /// What SCRAM can be bound to, where this is TLS with a certificate that has such a hash.
    pub(super) fn channel_binding(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tcp(_) | Self::Unix(_) => None,
            Self::Tls(stream) => {
                let certificates = stream.get_ref().1.peer_certificates()?;
                tls::channel_binding(certificates.first()?)
            }
        }
    }

    pub(super) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Tells `tokio_postgres` that the stream it was given is already encrypted.
///
/// It is used with `sslnegotiation=direct`, with which the library starts TLS without asking the
/// server: the asking was done in [`connect`].
#[derive(Debug)]
pub(super) struct AlreadyTls;

impl TlsConnect<Stream> for AlreadyTls {
    type Stream = Stream;
    type Error = io::Error;
    type Future = Ready<io::Result<Stream>>;

    fn connect(self, stream: Stream) -> Self::Future {
        ready(Ok(stream))
    }
}

impl PostgresTls for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        match Stream::channel_binding(self) {
            Some(hash) => ChannelBinding::tls_server_end_point(hash),
            None => ChannelBinding::none(),
        }
    }
}
