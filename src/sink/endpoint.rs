//! Where S2 is, which stream is meant, and with what token: settings turned into addresses. No I/O
//! but the reading of a token's file.

use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc};

use reqwest::{Url, header::HeaderValue};

use super::client::Settings;
use super::error::{Error, Place};

/// Which server speaks for S2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Endpoint {
    /// S2's own service: `https://{basin}.b.s2.dev`, and `https://a.s2.dev` for basins.
    #[default]
    Cloud,
    /// Any one server for all basins, such as s2-lite: `http://127.0.0.1:8080`. A path before
    /// `/v1` is kept.
    Url(String),
}

/// The addresses of one stream, worked out once.
#[derive(Clone, Debug)]
pub(super) struct Addresses {
    pub(super) place: Arc<Place>,
    pub(super) records: Url,
    pub(super) tail: Url,
    pub(super) stream: Url,
    pub(super) streams: Url,
    pub(super) basin: Url,
    pub(super) basins: Url,
    /// The `s2-basin` header, where one server speaks for all basins.
    pub(super) basin_header: Option<HeaderValue>,
}

impl Addresses {
    pub(super) fn new(settings: &Settings) -> Result<Self, Error> {
        let Settings { endpoint, basin, stream, named, .. } = settings;
        check_basin_name(basin)?;
        check_stream_name(stream)?;
        let (basin_base, account_base, basin_header) = match endpoint {
            Endpoint::Cloud => {
                (parse(&format!("https://{basin}.b.s2.dev"))?, parse("https://a.s2.dev")?, None)
            }
            Endpoint::Url(url) => {
                let base = parse(url)?;
                let header = HeaderValue::from_str(basin).map_err(|_| invalid_basin(basin))?;
                (base.clone(), base, Some(header))
            }
        };
        let streams = below(&basin_base, &["v1", "streams"]);
        let stream_url = below(&streams, &[stream]);
        let records = below(&stream_url, &["records"]);
        let basins = below(&account_base, &["v1", "basins"]);
        Ok(Self {
            place: Arc::new(Place {
                endpoint: basin_base.origin().ascii_serialization(),
                basin: basin.clone(),
                stream: stream.clone(),
                named: *named,
            }),
            tail: below(&records, &["tail"]),
            basin: below(&basins, &[basin]),
            records,
            stream: stream_url,
            streams,
            basins,
            basin_header,
        })
    }

    /// Whether the server is on this machine.
    pub(super) fn is_loopback(&self) -> bool {
        let host = self.records.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// Whether requests go in clear text, so that HTTP/2 has to be agreed on beforehand.
    pub(super) fn is_clear_text(&self) -> bool {
        self.records.scheme() == "http"
    }
}

fn below(base: &Url, segments: &[&str]) -> Url {
    let mut url = base.clone();
    // `http` and `https` addresses always have a path to extend; `parse` lets nothing else in.
    if let Ok(mut path) = url.path_segments_mut() {
        // A trailing slash is an empty last segment. Names are percent-encoded here, `/` included.
        path.pop_if_empty().extend(segments);
    }
    url
}

fn parse(text: &str) -> Result<Url, Error> {
    let wrong = |what: &str| Error::Settings {
        text: format!("`sink.endpoint` {what}; write it like `http://127.0.0.1:8080`"),
    };
    let mut url = Url::parse(text).map_err(|_| wrong("is not a URL"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong("does not begin with `http://` or `https://` and a host"));
    }
    // An access token in the address would end up in logs: there is a setting of its own for it.
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("must not hold a user or a password"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("must not hold a `?` or `#`"));
    }
    // S2's documentation shows addresses with `/v1`, so people will paste them.
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path).to_owned();
    url.set_path(&path);
    Ok(url)
}

/// Checks a basin's name as S2 does.
///
/// # Errors
///
/// When it is not 8 to 48 of `a-z`, `0-9` and `-`, beginning and ending with a letter or digit.
pub fn check_basin_name(basin: &str) -> Result<(), Error> {
    let bytes = basin.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let fits = (8..=48).contains(&bytes.len())
        && bytes.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && edge(bytes.first())
        && edge(bytes.last());
    if fits { Ok(()) } else { Err(invalid_basin(basin)) }
}

fn invalid_basin(basin: &str) -> Error {
    Error::Settings {
        text: format!(
            "`{basin}` cannot be an S2 basin's name: those are 8 to 48 characters of `a` to `z`, \
             `0` to `9` and `-`, with a letter or digit at both ends; correct `sink.basin`"
        ),
    }
}

/// Checks a stream's name as S2 does.
///
/// # Errors
///
/// When it is not 1 to 512 bytes, holds a NUL, or is `.` or `..`.
pub fn check_stream_name(stream: &str) -> Result<(), Error> {
    if (1..=512).contains(&stream.len()) && !stream.contains('\0') && !matches!(stream, "." | "..")
    {
        return Ok(());
    }
    Err(Error::Settings {
        text: format!(
            "`{stream}` cannot be an S2 stream's name: those are 1 to 512 bytes without a NUL, and \
             neither `.` nor `..`; correct `sink.stream`"
        ),
    })
}

/// An S2 access token, fixed or in a file that may change. Its `Debug` shows where it is from only.
#[derive(Clone)]
pub struct Token(Source);

#[derive(Clone)]
enum Source {
    Fixed(HeaderValue),
    File { path: PathBuf, current: Arc<tokio::sync::Mutex<Option<HeaderValue>>> },
}

impl Token {
    /// A token that stays as it is.
    ///
    /// # Errors
    ///
    /// When it holds a character that no token has, such as a line break.
    pub fn fixed(token: &str) -> Result<Self, Error> {
        let value = bearer(token).ok_or_else(|| Error::Settings {
            text: "`sink.access_token` is empty or holds a character that no access token has; \
                 look for stray spaces or line breaks"
                .to_owned(),
        })?;
        Ok(Self(Source::Fixed(value)))
    }

    /// A token in a file, read when it is first needed and again whenever S2 says 401.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self(Source::File { path, current: Arc::default() })
    }

    /// The `authorization` header.
    pub(super) async fn header(&self) -> Result<HeaderValue, Error> {
        match &self.0 {
            Source::Fixed(value) => Ok(value.clone()),
            Source::File { path, current } => {
                let mut current = current.lock().await;
                if let Some(value) = &*current {
                    return Ok(value.clone());
                }
                let failed = |source| Error::TokenFile { path: path.clone(), source };
                let text = tokio::fs::read_to_string(path).await.map_err(failed)?;
                let value = bearer(text.trim()).ok_or_else(|| {
                    failed(std::io::Error::new(
                        std::io::ErrorKind::InvalidData,
                        "the file is empty or holds more than a token",
                    ))
                })?;
                *current = Some(value.clone());
                Ok(value)
            }
        }
    }

    /// S2 did not accept `refused`: the next request reads the file again.
    pub(super) async fn forget(&self, refused: &HeaderValue) {
        if let Source::File { current, .. } = &self.0 {
            let mut current = current.lock().await;
            // Another request may have read a newer one meanwhile.
            if current.as_ref() == Some(refused) {
                *current = None;
            }
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Fixed(_) => f.write_str("Token(redacted)"),
            Source::File { path, .. } => write!(f, "Token(redacted, from {})", path.display()),
        }
    }
}

fn bearer(token: &str) -> Option<HeaderValue> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(endpoint: &Endpoint, stream: &str) -> Result<Addresses, Error> {
        let endpoint = endpoint.clone();
        Addresses::new(&Settings { endpoint, ..Settings::new("my-basin", stream) })
    }

    #[test]
    fn addresses() {
        fn check(endpoint: &str, stream: &str, records: &str) {
            let endpoint = Endpoint::Url(endpoint.to_owned());
            let addresses = at(&endpoint, stream).unwrap();
            assert_eq!(addresses.records.as_str(), records);
            assert_eq!(addresses.tail.as_str(), format!("{records}/tail"));
            assert_eq!(addresses.basin_header.unwrap(), "my-basin");
        }
        let plain = "http://127.0.0.1:8080/v1/streams/s/records";
        check("http://127.0.0.1:8080", "s", plain);
        check("http://127.0.0.1:8080/", "s", plain);
        check("http://127.0.0.1:8080/v1", "s", plain);
        check("http://127.0.0.1:8080/v1/", "s", plain);
        check("https://s2.example/at", "s", "https://s2.example/at/v1/streams/s/records");
        check("http://h", "a/b", "http://h/v1/streams/a%2Fb/records");
        check("http://h", "a?b#c d%", "http://h/v1/streams/a%3Fb%23c%20d%25/records");
        check("http://h", "ü", "http://h/v1/streams/%C3%BC/records");

        let cloud = at(&Endpoint::Cloud, "a/b").unwrap();
        assert_eq!(cloud.records.as_str(), "https://my-basin.b.s2.dev/v1/streams/a%2Fb/records");
        assert_eq!(cloud.basin.as_str(), "https://a.s2.dev/v1/basins/my-basin");
        assert_eq!(cloud.basin_header, None);
        assert_eq!(cloud.place.endpoint, "https://my-basin.b.s2.dev");
    }

    #[test]
    fn servers_on_this_machine() {
        fn check(endpoint: &str, expected: bool) {
            let endpoint = Endpoint::Url(endpoint.to_owned());
            let addresses = at(&endpoint, "s").unwrap();
            assert_eq!(addresses.is_loopback(), expected, "{endpoint:?}");
        }
        check("http://127.0.0.1:8080", true);
        check("http://127.9.9.9", true);
        check("http://[::1]:8080", true);
        check("http://LOCALHOST", true);
        check("http://localhost.example", false);
        check("http://10.0.0.1", false);
        check("https://s2.example", false);
    }

    #[test]
    fn wrong_endpoints_are_named_without_their_secrets() {
        for endpoint in [
            "",
            "127.0.0.1:8080",
            "localhost:8080",
            "ftp://h",
            "http://",
            "http://user:secret@h",
            "http://h?token=secret",
            "http://h#secret",
        ] {
            let endpoint = Endpoint::Url(endpoint.to_owned());
            let error = at(&endpoint, "s").unwrap_err().to_string();
            assert!(error.contains("`sink.endpoint`"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn names() {
        for basin in ["my-basin", "abcdefgh", "12345678", &"a".repeat(48)] {
            check_basin_name(basin).unwrap();
        }
        for basin in ["", "short", "My-Basin", "my_basin1", "-my-basin", "my-basin-", "bäsinbäsin"]
        {
            check_basin_name(basin).unwrap_err();
        }
        check_basin_name(&"a".repeat(49)).unwrap_err();
        for stream in ["s", "a/b", "...", &"s".repeat(512)] {
            check_stream_name(stream).unwrap();
        }
        for stream in ["", ".", "..", "a\0b", &"s".repeat(513)] {
            check_stream_name(stream).unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_token_is_never_shown_and_a_file_is_read_again() {
        let token = Token::fixed("YAAAAAsecret").unwrap();
        assert!(!format!("{token:?}").contains("secret"));
        assert!(!format!("{:?}", token.header().await.unwrap()).contains("secret"));
        assert_eq!(token.header().await.unwrap(), "Bearer YAAAAAsecret");
        for wrong in ["", "secret word", "secret\n", "secrét"] {
            assert!(!Token::fixed(wrong).unwrap_err().to_string().contains("secr"));
        }

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let token = Token::file(path.clone());
        assert!(matches!(token.header().await, Err(Error::TokenFile { .. })));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(token.header().await, Err(Error::TokenFile { .. })));
        std::fs::write(&path, "first\n").unwrap();
        let first = token.header().await.unwrap();
        assert_eq!(first, "Bearer first");
        std::fs::write(&path, "second\n").unwrap();
        assert_eq!(token.header().await.unwrap(), "Bearer first");
        token.forget(&first).await;
        assert_eq!(token.header().await.unwrap(), "Bearer second");
        token.forget(&first).await;
        assert_eq!(token.header().await.unwrap(), "Bearer second");
        assert!(!format!("{token:?}").contains("second"));
    }
}
