//! The replication connection: login, commands, and the stream as frames.
//!
//! It reads in large pieces and hands frames out without copying them. It never reads the body of a
//! large frame by itself: the caller sees how long the frame will be, makes sure that there is
//! memory for it, and says so. Nothing here decides about errors; the caller reconnects.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::config::ChannelBinding;

use super::dsn::{Dsn, Endpoint};
use super::error::{Error, ServerError};
use super::frame::{self, Frame, Streamed};
use super::socket::{self, Stream};
use crate::change::Lsn;

/// What one read asks the kernel for: large enough that a busy stream needs few of them, small
/// enough that a change held back keeps little else in memory.
pub(super) const CHUNK_BYTES: usize = 256 * 1024;

/// With less than this left in the chunk, a new one is begun.
const CHUNK_REST_MIN: usize = 16 * 1024;

/// How long a write may take. Status updates are small: a peer that takes none for this long has
/// gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the server has to end the stream on a clean stop. It may have much to send before it
/// looks; what it has confirmed does not depend on it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Settings that decide how values look as text. They are pinned here, because a role or a database
/// may have others, and the same row must always give the same message.
pub(super) const VALUE_SETTINGS: [(&str, &str); 6] = [
    ("timezone", "UTC"),
    ("datestyle", "ISO"),
    ("intervalstyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
];

/// What `IDENTIFY_SYSTEM` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Drawn by initdb; another one is another cluster.
    pub system_identifier: String,
    pub timeline: u32,
    /// Where the server's WAL ends on disk.
    pub wal_end: Lsn,
}

/// A connection in replication mode.
pub(super) struct Replication {
    /// Of the server's process for this connection, as it says.
    pub pid: Option<i32>,
    stream: Stream,
    buffer: BytesMut,
    out: BytesMut,
}

impl fmt::Debug for Replication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replication").field("buffered", &self.buffer.len()).finish_non_exhaustive()
    }
}

impl Replication {
    /// Connects and logs in.
    pub(super) async fn connect(dsn: &Dsn, endpoint: &Endpoint) -> Result<Self, Error> {
        let stream = socket::connect(dsn, endpoint).await?;
        let buffer = BytesMut::with_capacity(CHUNK_BYTES);
        let mut connection = Self { pid: None, stream, buffer, out: BytesMut::new() };
        let timeout = dsn.connect_timeout();
        tokio::time::timeout(timeout, connection.log_in(dsn))
            .await
            .map_err(|_| Error::ConnectTimeout { address: endpoint.to_string(), timeout })??;
        Ok(connection)
    }

    async fn log_in(&mut self, dsn: &Dsn) -> Result<(), Error> {
        // Ours come last, and the last one wins.
        let mut options = dsn.config().get_options().unwrap_or_default().to_owned();
        for (name, value) in VALUE_SETTINGS {
            options.push_str(&format!(" -c {name}={value}"));
        }
        let parameters = [
            ("user", dsn.user.as_str()),
            ("database", dsn.database.as_str()),
            ("replication", "database"),
            ("application_name", super::APPLICATION_NAME),
            ("client_encoding", "UTF8"),
            ("options", options.as_str()),
        ];
        frontend::startup_message(parameters, &mut self.out).map_err(unsendable)?;
        self.flush().await?;
        self.authenticate(dsn).await?;
        loop {
            let Frame { tag, body } = self.receive().await?;
            match tag {
                b'Z' => return Ok(()),
                b'E' => return Err(Error::Server(ServerError::parse(&body))),
                b'K' => self.pid = body.first_chunk().copied().map(i32::from_be_bytes),
                b'S' | b'N' => {}
                tag => return Err(frame::unexpected(tag)),
            }
        }
    }

    async fn authenticate(&mut self, dsn: &Dsn) -> Result<(), Error> {
        let (kind, data) = self.authentication_request().await?;
        let password = || {
            dsn.config()
                .get_password()
                .ok_or_else(|| Error::PasswordMissing { role: dsn.user.clone() })
        };
        let binding_required = dsn.config().get_channel_binding() == ChannelBinding::Require;
        if binding_required && kind != AUTHENTICATION_SASL {
            return Err(Error::ChannelBinding);
        }
        match kind {
            AUTHENTICATION_OK => return Ok(()),
            AUTHENTICATION_CLEARTEXT => self.send_password(password()?).await?,
            AUTHENTICATION_MD5 => {
                let salt = data.get(..4).and_then(|salt| salt.try_into().ok());
                let salt = salt.ok_or_else(|| malformed("an md5 request without salt"))?;
                let hash = authentication::md5_hash(dsn.user.as_bytes(), password()?, salt);
                self.send_password(hash.as_bytes()).await?;
            }
            AUTHENTICATION_SASL => self.authenticate_scram(dsn, &data, password()?).await?,
            kind => {
                let method = match kind {
                    2 => "Kerberos".to_owned(),
                    7 | 8 => "GSSAPI".to_owned(),
                    9 => "SSPI".to_owned(),
                    kind => format!("number {kind}"),
                };
                return Err(Error::AuthenticationMethod { method });
            }
        }
        match self.authentication_request().await? {
            (AUTHENTICATION_OK, _) => Ok(()),
            _ => Err(malformed("a second authentication request")),
        }
    }

    /// SCRAM-SHA-256, bound to the TLS channel where both sides can. The password is prepared by
    /// SASLprep in `postgres-protocol`.
    async fn authenticate_scram(
        &mut self,
        dsn: &Dsn,
        mechanisms: &[u8],
        password: &[u8],
    ) -> Result<(), Error> {
        let offers = |name: &str| mechanisms.split(|&byte| byte == 0).any(|m| m == name.as_bytes());
        let wanted = dsn.config().get_channel_binding();
        let hash = self.stream.channel_binding().filter(|_| wanted != ChannelBinding::Disable);
        let (mechanism, binding) = match hash {
            Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(hash))
            }
            _ if wanted == ChannelBinding::Require => return Err(Error::ChannelBinding),
            Some(_) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };
        if !offers(mechanism) {
            return Err(Error::AuthenticationMethod {
                method: "SASL without SCRAM-SHA-256".into(),
            });
        }
        let mut scram = ScramSha256::new(password, binding);
        frontend::sasl_initial_response(mechanism, scram.message(), &mut self.out)
            .map_err(unsendable)?;
        self.flush().await?;
        match self.authentication_request().await? {
            (AUTHENTICATION_SASL_CONTINUE, data) => {
                scram.update(&data).map_err(Error::Authentication)?;
            }
            _ => return Err(malformed("an answer that SCRAM does not have")),
        }
        frontend::sasl_response(scram.message(), &mut self.out).map_err(unsendable)?;
        self.flush().await?;
        match self.authentication_request().await? {
            (AUTHENTICATION_SASL_FINAL, data) => scram.finish(&data).map_err(Error::Authentication),
            _ => Err(malformed("an answer that SCRAM does not have")),
        }
    }

    async fn authentication_request(&mut self) -> Result<(u32, Bytes), Error> {
        loop {
            let Frame { tag, mut body } = self.receive().await?;
            match tag {
                b'R' if body.len() >= 4 => {
                    let kind = bytes::Buf::get_u32(&mut body);
                    return Ok((kind, body));
                }
                b'E' => return Err(Error::Server(ServerError::parse(&body))),
                b'N' => {}
                tag => return Err(frame::unexpected(tag)),
            }
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<(), Error> {
        frontend::password_message(password, &mut self.out).map_err(unsendable)?;
        self.flush().await
    }

    /// Which cluster this is, and where its WAL ends.
    pub(super) async fn identify(&mut self) -> Result<Identity, Error> {
        let row = self.command("IDENTIFY_SYSTEM").await?;
        let field = |index: usize| row.get(index).and_then(Option::as_deref).unwrap_or_default();
        let malformed = || malformed("an IDENTIFY_SYSTEM answer of another form");
        Ok(Identity {
            system_identifier: field(0).to_owned(),
            timeline: field(1).parse().map_err(|_| malformed())?,
            wal_end: field(2).parse().map_err(|_| malformed())?,
        })
    }

    /// Runs a command and returns the fields of its first row.
    async fn command(&mut self, command: &str) -> Result<Vec<Option<String>>, Error> {
        frontend::query(command, &mut self.out).map_err(unsendable)?;
        self.flush().await?;
        let mut row = Vec::new();
        loop {
            let Frame { tag, body } = self.receive().await?;
            match tag {
                b'D' if row.is_empty() => row = data_row(&body)?,
                b'D' | b'T' | b'C' | b'S' | b'N' => {}
                b'Z' => return Ok(row),
                b'E' => return Err(Error::Server(ServerError::parse(&body))),
                tag => return Err(frame::unexpected(tag)),
            }
        }
    }

    /// Starts streaming from where the slot was confirmed: the server knows that best, and another
    /// start position is skipped silently.
    ///
    /// Text mode and protocol version 1: whole transactions in the order of their commits, never
    /// an aborted one, and memory for one message at a time.
    pub(super) async fn start(&mut self, slot: &str, publication: &str) -> Result<(), Error> {
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names {}, \
             messages 'true')",
            super::quote_identifier(slot),
            super::quote_literal(&super::quote_identifier(publication)),
        );
        frontend::query(&command, &mut self.out).map_err(unsendable)?;
        self.flush().await?;
        loop {
            let Frame { tag, body } = self.receive().await?;
            match tag {
                b'W' => return Ok(()),
                b'E' => return Err(Error::Server(ServerError::parse(&body))),
                b'N' | b'S' => {}
                tag => return Err(frame::unexpected(tag)),
            }
        }
    }

    /// The next streamed message, if all of it has been read.
    pub(super) fn next_streamed(&mut self) -> Result<Option<Streamed>, Error> {
        frame::next_frame(&mut self.buffer)?.map(frame::streamed).transpose()
    }

    /// How long the frame that has begun will be, and more than one chunk: memory for it has to be
    /// found before it is read.
    pub(super) fn large_frame(&self) -> Result<Option<usize>, Error> {
        let bytes = frame::frame_bytes(&self.buffer)?;
        Ok(bytes.filter(|&bytes| bytes > CHUNK_BYTES && bytes > self.buffer.len()))
    }

    /// Makes room for a frame of this many bytes, and not for more.
    pub(super) fn reserve_frame(&mut self, bytes: usize) {
        if self.buffer.capacity() < bytes {
            self.new_chunk(bytes);
        }
    }

    fn new_chunk(&mut self, bytes: usize) {
        let mut chunk = BytesMut::with_capacity(bytes);
        chunk.extend_from_slice(&self.buffer);
        self.buffer = chunk;
    }

    /// Reads what there is, and waits if there is nothing. Dropping the future loses nothing.
    pub(super) async fn read(&mut self) -> Result<usize, Error> {
        let (capacity, length) = (self.buffer.capacity(), self.buffer.len());
        let expected = frame::frame_bytes(&self.buffer)?.unwrap_or(0);
        // The end of a chunk is given up rather than filled by a short read, unless that would
        // copy much.
        let at_end = capacity - length < CHUNK_REST_MIN && length <= CHUNK_BYTES / 4;
        if at_end || expected > capacity {
            self.new_chunk(CHUNK_BYTES.max(expected));
        }
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err(Error::Closed),
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(Error::Lost(error)),
        }
    }

    /// Tells the server that everything up to `confirmed` is safe. Not to be dropped half-way.
    pub(super) async fn send_status(
        &mut self,
        confirmed: Lsn,
        request_reply: bool,
    ) -> Result<(), Error> {
        frame::status_update(&mut self.out, confirmed, now_unix_us(), request_reply);
        self.flush().await
    }

    /// Ends the stream: a last status update, and time for the server to take it.
    pub(super) async fn close(mut self, confirmed: Lsn) -> Result<(), Error> {
        frame::status_update(&mut self.out, confirmed, now_unix_us(), false);
        frontend::copy_done(&mut self.out);
        self.flush().await?;
        // What is still on its way is thrown away, but it has to be read: closing a socket with
        // unread bytes resets it, and the reset may overtake the status update.
        let drained = tokio::time::timeout(CLOSE_TIMEOUT, async {
            let mut scratch = vec![0; CHUNK_BYTES];
            self.buffer = BytesMut::new();
            loop {
                match self.stream.read(&mut scratch).await {
                    // The server has ended: its CommandComplete and ReadyForQuery came last.
                    Ok(bytes) if scratch[..bytes].ends_with(&READY) => break,
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
            }
        });
        if drained.await.is_err() {
            tracing::debug!("Postgres had more to send when the stream was closed");
        }
        self.terminate().await
    }

    /// Ends a connection that does not stream.
    pub(super) async fn terminate(mut self) -> Result<(), Error> {
        frontend::terminate(&mut self.out);
        self.flush().await?;
        self.stream.shutdown().await.map_err(Error::Lost)
    }

    async fn receive(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = frame::next_frame(&mut self.buffer)? {
                return Ok(frame);
            }
            self.read().await?;
        }
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let written = tokio::time::timeout(WRITE_TIMEOUT, async {
            self.stream.write_all_buf(&mut self.out).await?;
            self.stream.flush().await
        });
        match written.await {
            Ok(written) => written.map_err(Error::Lost),
            Err(_) => Err(Error::Silent { silence: WRITE_TIMEOUT }),
        }
    }
}

const AUTHENTICATION_OK: u32 = 0;
const AUTHENTICATION_CLEARTEXT: u32 = 3;
const AUTHENTICATION_MD5: u32 = 5;
const AUTHENTICATION_SASL: u32 = 10;
const AUTHENTICATION_SASL_CONTINUE: u32 = 11;
const AUTHENTICATION_SASL_FINAL: u32 = 12;

/// ReadyForQuery, idle.
const READY: [u8; 6] = [b'Z', 0, 0, 0, 5, b'I'];

fn malformed(what: &str) -> Error {
    Error::Protocol { what: what.to_owned() }
}

/// A text with a zero byte in it, or one that is too long for a message.
fn unsendable(error: std::io::Error) -> Error {
    Error::Protocol { what: format!("a name or password that cannot be sent: {error}") }
}

fn now_unix_us() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)
}

/// The fields of a DataRow as text.
fn data_row(mut body: &[u8]) -> Result<Vec<Option<String>>, Error> {
    let cut = || malformed("a row that ends early");
    let mut take = |bytes: usize| {
        let (taken, rest) = body.split_at_checked(bytes).ok_or_else(cut)?;
        body = rest;
        Ok::<_, Error>(taken)
    };
    let count = take(2)?;
    let count = u16::from_be_bytes([count[0], count[1]]);
    let mut fields = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let length = take(4)?;
        let length = i32::from_be_bytes([length[0], length[1], length[2], length[3]]);
        fields.push(match usize::try_from(length) {
            Ok(length) => Some(String::from_utf8_lossy(take(length)?).into_owned()),
            Err(_) => None,
        });
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_as_text() {
        let row = b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0";
        let expected = vec![Some("ab".to_owned()), None, Some(String::new())];
        assert_eq!(data_row(row).unwrap(), expected);
        for end in 0..row.len() {
            assert!(data_row(&row[..end]).is_err());
        }
    }
}
