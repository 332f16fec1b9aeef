//! Where Postgres is and how to log in, read once from a URL or a `key=value` list.
//!
//! `tokio_postgres::Config` reads most of it. What it does not know is taken out first: the
//! sslmodes `verify-ca` and `verify-full`, and the certificate files. Errors never repeat what was
//! written, because what was written may hold a password; the Debug form leaves it out too.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslNegotiation, TargetSessionAttrs};

/// How long one connection attempt to one address may take, TLS and login each: long enough for
/// another continent, short enough that the next host is tried while somebody watches.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What libpq calls sslmode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS where the server offers it, without checking who it is. The default, as in libpq.
    #[default]
    Prefer,
    /// TLS or nothing; the certificate is checked only where `sslrootcert` is given.
    Require,
    /// The certificate must come from a trusted authority.
    VerifyCa,
    /// And it must name the host.
    VerifyFull,
}

impl SslMode {
    /// As libpq spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// Whom to trust when a certificate is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootCert {
    /// Nothing was written: the system's authorities where a check is asked for.
    #[default]
    Unset,
    /// `sslrootcert=system`.
    System,
    /// A PEM file.
    File(PathBuf),
}

/// Where to connect: a name and port, or a socket's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp {
        host: String,
        /// `hostaddr`, which spares the look-up.
        address: Option<std::net::IpAddr>,
        port: u16,
    },
    Unix {
        path: PathBuf,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, .. } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Unix { path } => write!(f, "{}", path.display()),
        }
    }
}

/// A data source name that holds together.
#[derive(Clone)]
pub struct Dsn {
    /// Everything but hosts and TLS, for `connect_raw`.
    config: Config,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) user: String,
    pub(super) database: String,
    pub(super) ssl: Ssl,
}

/// What was written about TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ssl {
    pub mode: SslMode,
    pub root_cert: RootCert,
    /// `sslcert` and `sslkey`, PEM files.
    pub client: Option<(PathBuf, PathBuf)>,
    /// `sslnegotiation=direct`: TLS from the first byte (Postgres 17).
    pub direct: bool,
}

/// Why a data source name cannot be used. Never repeats what was written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DsnError {
    #[error(
        "it is neither a URL such as postgres://user:password@host:5432/database nor a list such \
         as `host=… user=… dbname=…`"
    )]
    Form,
    #[error("it names no user; write postgres://USER:password@host/database")]
    NoUser,
    #[error("`{0}` is not a connection option that Sluicebox knows")]
    Unknown(String),
    #[error("the value of `{option}` cannot be used: {reason}")]
    Value { option: String, reason: &'static str },
    #[error("it has {hosts} hosts but {others} {what}; give one for all, or one for each")]
    Count { hosts: usize, others: usize, what: &'static str },
    #[error("`sslcert` and `sslkey` go together: only one is there")]
    HalfClientCertificate,
}

impl Dsn {
    /// The role that logs in.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database that is read.
    #[must_use]
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The first host, or the socket's directory as a host name of its own: for the messages'
    /// `database_hostname`, without user or password.
    #[must_use]
    pub fn hostname(&self) -> String {
        match &self.endpoints[0] {
            Endpoint::Tcp { host, .. } => host.clone(),
            Endpoint::Unix { .. } => "localhost".to_owned(),
        }
    }

    /// All places that are tried, in order, without user or password.
    #[must_use]
    pub fn address(&self) -> String {
        let all: Vec<_> = self.endpoints.iter().map(ToString::to_string).collect();
        all.join(", ")
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT)
    }

    /// `target_session_attrs=read-write`: a standby is passed over.
    pub(super) fn wants_primary(&self) -> bool {
        self.config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite
    }
}

impl fmt::Debug for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dsn")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("database", &self.database)
            .field("ssl", &self.ssl)
            .finish_non_exhaustive()
    }
}

impl FromStr for Dsn {
    type Err = DsnError;

    fn from_str(text: &str) -> Result<Self, DsnError> {
        let mut own = Own::default();
        let rest = if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            strip_url(text, &mut own)?
        } else {
            strip_list(text, &mut own)?
        };
        let config: Config = rest.parse().map_err(|error| library_error(&error))?;
        own.finish(config)
    }
}

/// The options that are read here and not by `tokio_postgres`.
#[derive(Default)]
struct Own {
    mode: Option<SslMode>,
    root_cert: RootCert,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Own {
    /// Takes an option if it is one of ours.
    fn take(&mut self, option: &str, value: &str) -> Result<bool, DsnError> {
        match option {
            "sslmode" => {
                self.mode = Some(match value {
                    "disable" => SslMode::Disable,
                    "prefer" => SslMode::Prefer,
                    "require" => SslMode::Require,
                    "verify-ca" => SslMode::VerifyCa,
                    "verify-full" => SslMode::VerifyFull,
                    _ => {
                        return Err(DsnError::Value {
                            option: option.to_owned(),
                            reason: "use disable, prefer, require, verify-ca or verify-full",
                        });
                    }
                });
            }
            "sslrootcert" if value == "system" => self.root_cert = RootCert::System,
            "sslrootcert" => self.root_cert = RootCert::File(value.into()),
            "sslcert" => self.cert = Some(value.into()),
            "sslkey" => self.key = Some(value.into()),
            // What libpq knows and what changes nothing here.
            "gssencmode" | "sslsni" | "fallback_application_name" | "sslcompression" => {}
            _ if option.is_empty()
                || !option.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') =>
            {
                // Not an option's name, so it may be a piece of a password.
                return Err(DsnError::Form);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn finish(self, mut config: Config) -> Result<Dsn, DsnError> {
        let user = config.get_user().filter(|user| !user.is_empty()).ok_or(DsnError::NoUser)?;
        let user = user.to_owned();
        let database = config.get_dbname().unwrap_or(&user).to_owned();
        let mut endpoints = endpoints(&config)?;
        if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
            use rand::seq::SliceRandom;
            endpoints.shuffle(&mut rand::rng());
        }
        let client = match (self.cert, self.key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => return Err(DsnError::HalfClientCertificate),
        };
        // libpq: `sslrootcert=system` alone means verify-full.
        let system_default =
            if self.root_cert == RootCert::System { SslMode::VerifyFull } else { SslMode::Prefer };
        let mode = self.mode.unwrap_or(system_default);
        let direct = config.get_ssl_negotiation() == SslNegotiation::Direct;
        if direct && matches!(mode, SslMode::Disable | SslMode::Prefer) {
            return Err(DsnError::Value {
                option: "sslnegotiation".to_owned(),
                reason: "direct needs sslmode=require or stricter",
            });
        }
        config.user(&user).dbname(&database).application_name(super::APPLICATION_NAME);
        let ssl = Ssl { mode, root_cert: self.root_cert, client, direct };
        Ok(Dsn { config, endpoints, user, database, ssl })
    }
}

/// Hosts, addresses and ports as pairs.
fn endpoints(config: &Config) -> Result<Vec<Endpoint>, DsnError> {
    let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
    let count = hosts.len().max(addresses.len()).max(1);
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err(DsnError::Count {
            hosts: hosts.len(),
            others: addresses.len(),
            what: "hostaddrs",
        });
    }
    let ports = config.get_ports();
    if ports.len() > 1 && ports.len() != count {
        return Err(DsnError::Count { hosts: count, others: ports.len(), what: "ports" });
    }
    let endpoint = |index: usize| {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        let address = addresses.get(index).copied();
        match (hosts.get(index), address) {
            (Some(Host::Unix(directory)), _) => {
                Endpoint::Unix { path: directory.join(format!(".s.PGSQL.{port}")) }
            }
            (Some(Host::Tcp(host)), address) => Endpoint::Tcp {
                host: if host.is_empty() { "localhost".to_owned() } else { host.clone() },
                address,
                port,
            },
            (None, Some(address)) => {
                Endpoint::Tcp { host: address.to_string(), address: Some(address), port }
            }
            (None, None) => Endpoint::Tcp { host: "localhost".to_owned(), address: None, port },
        }
    };
    Ok((0..count).map(endpoint).collect())
}

/// Takes our options out of a URL's query.
fn strip_url(text: &str, own: &mut Own) -> Result<String, DsnError> {
    // As `tokio_postgres` does: the query begins at the first `?` behind the credentials.
    let credentials_end = text.find('@').unwrap_or(0);
    let Some(query_start) = text[credentials_end..].find('?').map(|at| at + credentials_end) else {
        return Ok(text.to_owned());
    };
    let mut rest = String::new();
    for pair in text[query_start + 1..].split('&').filter(|pair| !pair.is_empty()) {
        let (option, value) = pair.split_once('=').ok_or(DsnError::Form)?;
        if !own.take(&percent_decode(option)?, &percent_decode(value)?)? {
            rest.push(if rest.is_empty() { '?' } else { '&' });
            rest.push_str(pair);
        }
    }
    Ok(format!("{}{rest}", &text[..query_start]))
}

/// Takes our options out of a `key=value` list, in which values may be quoted.
fn strip_list(text: &str, own: &mut Own) -> Result<String, DsnError> {
    let mut rest = String::new();
    let mut left = text.trim_start();
    while !left.is_empty() {
        let whole = left;
        let (option, after) = left.split_once('=').ok_or(DsnError::Form)?;
        let (value, after) = list_value(after.trim_start())?;
        left = after.trim_start();
        if !own.take(option.trim_end(), &value)? {
            rest.push_str(&whole[..whole.len() - after.len()]);
            rest.push(' ');
        }
    }
    if rest.is_empty() { Err(DsnError::Form) } else { Ok(rest) }
}

/// One value of such a list, and what follows it.
fn list_value(text: &str) -> Result<(String, &str), DsnError> {
    let (quoted, text) = match text.strip_prefix('\'') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            space if !quoted && space.is_whitespace() => return Ok((value, &text[at..])),
            other => value.push(other),
        }
    }
    if quoted || value.is_empty() { Err(DsnError::Form) } else { Ok((value, "")) }
}

fn percent_decode(text: &str) -> Result<String, DsnError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut left = text.as_bytes();
    while let Some((&byte, after)) = left.split_first() {
        left = after;
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(decoded) if byte == b'%' => {
                bytes.push(decoded);
                left = &after[2..];
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).map_err(|_| DsnError::Form)
}

/// The library's texts are passed on only where they hold an option's name and nothing else.
fn library_error(error: &tokio_postgres::Error) -> DsnError {
    let text = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let name = |prefix: &str| {
        let name = text.strip_prefix(prefix)?.strip_suffix('`')?;
        name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_').then(|| name.to_owned())
    };
    if let Some(option) = name("unknown option `") {
        DsnError::Unknown(option)
    } else if let Some(option) = name("invalid value for option `") {
        DsnError::Value { option, reason: "see the Postgres manual on connection strings" }
    } else {
        DsnError::Form
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Dsn {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn modes_and_files_are_taken_out() {
        fn check(text: &str, ssl: Ssl) {
            assert_eq!(parse(text).ssl, ssl, "{text}");
        }
        let mode = |mode| Ssl { mode, ..Ssl::default() };
        check("postgres://u@h/d", mode(SslMode::Prefer));
        check("postgres://u@h/d?sslmode=disable", mode(SslMode::Disable));
        check("postgres://u@h/d?sslmode=require&connect_timeout=3", mode(SslMode::Require));
        check("host=h user=u sslmode = 'verify-ca' dbname=d", mode(SslMode::VerifyCa));
        check(
            "postgresql://u@h/d?application_name=x&sslmode=verify-full&sslrootcert=%2Fa%20b.pem",
            Ssl {
                mode: SslMode::VerifyFull,
                root_cert: RootCert::File("/a b.pem".into()),
                ..Ssl::default()
            },
        );
        check(
            "postgres://u@h/d?sslrootcert=system",
            Ssl { mode: SslMode::VerifyFull, root_cert: RootCert::System, ..Ssl::default() },
        );
        check(
            "host=h user=u sslmode=require sslcert='/c\\'s.pem' sslkey=/k.pem",
            Ssl {
                mode: SslMode::Require,
                client: Some(("/c's.pem".into(), "/k.pem".into())),
                ..Ssl::default()
            },
        );
        check(
            "postgres://u@h/d?sslmode=require&sslnegotiation=direct",
            Ssl { mode: SslMode::Require, direct: true, ..Ssl::default() },
        );
    }

    #[test]
    fn endpoints_in_order() {
        fn check(text: &str, endpoints: &[&str]) {
            let dsn = parse(text);
            let found: Vec<_> = dsn.endpoints.iter().map(ToString::to_string).collect();
            assert_eq!(found, endpoints, "{text}");
        }
        check("postgres://u@h/d", &["h:5432"]);
        check("postgres://u@h:1/d", &["h:1"]);
        check("postgres://u@[::1]:1/d", &["[::1]:1"]);
        check("postgres://u@a:1,b:2/d", &["a:1", "b:2"]);
        check("postgres://u@a,b/d", &["a:5432", "b:5432"]);
        check("host=a,b port=7 user=u", &["a:7", "b:7"]);
        check("host=/run/pg port=7 user=u", &["/run/pg/.s.PGSQL.7"]);
        check("postgres://u@%2Frun%2Fpg:7/d", &["/run/pg/.s.PGSQL.7"]);
        check("postgres://u@/d?host=/run/pg", &["/run/pg/.s.PGSQL.5432"]);
        check("user=u", &["localhost:5432"]);
        check("hostaddr=127.0.0.1 user=u", &["127.0.0.1:5432"]);
    }

    #[test]
    fn names_have_defaults() {
        let dsn = parse("postgres://u:p%40@h");
        assert_eq!((dsn.user(), dsn.database(), dsn.hostname()), ("u", "u", "h".to_owned()));
        assert_eq!(dsn.config().get_password(), Some(b"p@".as_slice()));
        assert_eq!(dsn.connect_timeout(), CONNECT_TIMEOUT);
        assert!(parse("postgres://u@a,b/d?target_session_attrs=read-write").wants_primary());
    }

    #[test]
    fn errors_never_repeat_a_password() {
        fn check(text: &str, error: DsnError) {
            let found = text.parse::<Dsn>().unwrap_err();
            assert!(!found.to_string().contains("secret"), "{found}");
            assert_eq!(found, error, "{text}");
        }
        let value = |option: &str, reason| DsnError::Value { option: option.to_owned(), reason };
        let manual = "see the Postgres manual on connection strings";
        check("", DsnError::Form);
        check("secret", DsnError::Form);
        check("mysql://u:secret@h/d?x=1", DsnError::Form);
        check("postgres:/u:secret@h/d", DsnError::Form);
        check("host=h user=u password='secret", DsnError::Form);
        check("host=h user=u password=", DsnError::Form);
        check("postgres://u:secret@h/d?sslmode", DsnError::Form);
        check("postgres://u:sec?ret=secret@h/d?Secret=1", DsnError::Form);
        check("postgres://h/d", DsnError::NoUser);
        check("postgres://u:secret@h/d?schema=public", DsnError::Unknown("schema".to_owned()));
        check("postgres://u:secret@h:x/d", value("port", manual));
        check("postgres://u:secret@h/d?connect_timeout=x", value("connect_timeout", manual));
        check(
            "postgres://u:secret@h/d?sslmode=allow",
            value("sslmode", "use disable, prefer, require, verify-ca or verify-full"),
        );
        check("postgres://u:secret@h/d?sslcert=/c", DsnError::HalfClientCertificate);
        check("host=a,b,c port=1,2 user=u", DsnError::Count { hosts: 3, others: 2, what: "ports" });
    }

    #[test]
    fn debug_leaves_the_password_out() {
        let dsn = parse("postgres://u:secret@h/d");
        assert!(!format!("{dsn:?}").contains("secret"));
    }
}
