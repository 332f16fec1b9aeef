//! Asking the running process, found by its console address.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::UsageError;
use crate::config::{Console, Listen};

/// Longer than the API itself waits for the pipeline, so that its own error arrives.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Where the running process is.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct ProcessArguments {
    /// The running process's address, instead of the configuration's console.listen.
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) console: Option<Listen>,
}

/// Why the running process gave no answer to work with.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("no running sluicebox answers at {address} ({origin}): {cause}")]
    NotRunning { address: String, origin: String, cause: String },
    #[error("what answers at {address} ({origin}) is no sluicebox: {cause}")]
    Foreign { address: String, origin: String, cause: String },
    /// In the API's own words.
    #[error("{text}")]
    Refused { code: String, text: String },
}

/// Speaks to one running process.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    /// How errors name the address, and where it came from.
    address: String,
    origin: String,
}

impl Client {
    /// Takes the address from the arguments, or else from the configuration.
    pub(super) fn new(arguments: &ProcessArguments, config: &Path) -> anyhow::Result<Self> {
        let (listen, origin) = match &arguments.console {
            Some(listen) => (listen.clone(), "--console".to_owned()),
            None => {
                let listen = Console::load(config)?.listen;
                (listen, format!("console.listen in {}", config.display()))
            }
        };
        if listen.port == 0 {
            let text =
                format!("port 0 of {origin} is chosen by the system; pass --console HOST:PORT");
            return Err(UsageError(text).into());
        }
        let base = Url::parse(&format!("http://{}/", reachable(&listen)))?;
        let http = reqwest::Client::builder()
            // The process is on this machine or beside it: a proxy for the internet is none for it.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_MAX)
            .timeout(ANSWER_MAX)
            // Plain HTTP only, so that a machine without certificates can ask too.
            .tls_certs_only([])
            .build()?;
        Ok(Self { http, base, address: listen.to_string(), origin })
    }

    /// `path` is in segments, which are escaped.
    pub(super) async fn get(
        &self,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Value, ClientError> {
        let mut url = self.url(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.send(self.http.request(Method::GET, url)).await
    }

    pub(super) async fn post(&self, path: &[&str], body: &Value) -> Result<Value, ClientError> {
        let request = self
            .http
            .request(Method::POST, self.url(path))
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .body(body.to_string());
        self.send(request).await
    }

    /// The answer as one of our own types.
    pub(super) fn read<T: DeserializeOwned>(&self, answer: Value) -> Result<T, ClientError> {
        serde_json::from_value(answer).map_err(|error| self.foreign(error.to_string()))
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["api", "v1"]).extend(path);
        }
        url
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Value, ClientError> {
        #[derive(Deserialize)]
        struct Refusal {
            error: RefusalText,
        }
        #[derive(Deserialize)]
        struct RefusalText {
            code: String,
            text: String,
        }
        let response = request.send().await.map_err(|error| self.not_running(&error))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.not_running(&error))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.foreign(error.to_string()));
        }
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(Refusal { error: RefusalText { code, text } }) => {
                Err(ClientError::Refused { code, text })
            }
            Err(_) => Err(self.foreign(format!("it answers with status {status}"))),
        }
    }

    fn not_running(&self, error: &reqwest::Error) -> ClientError {
        let cause = if error.is_timeout() && !error.is_connect() {
            "something listens there, and gives no answer; a sluicebox that is frozen or hangs is to be \
             ended and started again"
                .to_owned()
        } else if error.is_timeout() {
            "no answer in time; `sluicebox run` starts one".to_owned()
        } else {
            // The layers above the innermost cause repeat the address and say "connect error".
            let mut cause: &dyn std::error::Error = error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            format!("{cause}; `sluicebox run` starts one")
        };
        let (address, origin) = (self.address.clone(), self.origin.clone());
        ClientError::NotRunning { address, origin, cause }
    }

    fn foreign(&self, cause: String) -> ClientError {
        let (address, origin) = (self.address.clone(), self.origin.clone());
        ClientError::Foreign { address, origin, cause }
    }
}

/// A process that listens on every address of its machine is reached by the loopback one.
fn reachable(listen: &Listen) -> Listen {
    let host = match listen.host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) if address.is_unspecified() => "127.0.0.1".to_owned(),
        Ok(IpAddr::V6(address)) if address.is_unspecified() => "::1".to_owned(),
        Ok(_) | Err(_) => listen.host.clone(),
    };
    Listen { host, port: listen.port }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(console: &str) -> anyhow::Result<Client> {
        let console = Some(console.parse().unwrap());
        Client::new(&ProcessArguments { console }, Path::new("sluicebox.toml"))
    }

    #[test]
    fn addresses_become_urls() {
        #[track_caller]
        fn check(console: &str, expected: &str) {
            assert_eq!(client(console).unwrap().url(&["messages", "a/b"]).as_str(), expected);
        }
        check("127.0.0.1:7070", "http://127.0.0.1:7070/api/v1/messages/a%2Fb");
        check("0.0.0.0:7070", "http://127.0.0.1:7070/api/v1/messages/a%2Fb");
        check("[::]:7070", "http://[::1]:7070/api/v1/messages/a%2Fb");
        check("box.internal:80", "http://box.internal/api/v1/messages/a%2Fb");
        assert!(client("127.0.0.1:0").unwrap_err().is::<UsageError>());
    }

    #[tokio::test]
    async fn nobody_there_is_said_plainly() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let client = client(&address.to_string()).unwrap();
        let error = client.get(&["status"], &[]).await.unwrap_err().to_string();
        let expected = format!("no running sluicebox answers at {address} (--console): ");
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.to_lowercase().contains("refused"), "{error}");
        assert!(error.ends_with("`sluicebox run` starts one"), "{error}");
    }

    /// The kernel takes the connection for a process that is frozen, and another cannot be started
    /// beside it.
    #[tokio::test]
    async fn who_gives_no_answer_is_not_to_be_started() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let http = reqwest::Client::builder().timeout(Duration::from_millis(50)).build().unwrap();
        let client = Client { http, ..client(&address).unwrap() };
        let error = client.get(&["status"], &[]).await.unwrap_err().to_string();
        assert!(error.contains("something listens there"), "{error}");
        assert!(!error.contains("starts one"), "{error}");
    }
}
