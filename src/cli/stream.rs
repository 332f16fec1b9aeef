//! The stream that the configuration means, for the commands that look at it themselves.

use super::UsageError;
use crate::config::{AccessToken, Endpoint, Sink};
use crate::sink::{self, Client, Token};

/// A client for the stream. `endpoint` takes the place of the configured one; a server inside the
/// running process is reached by it alone, at the address that `run` names in its log.
pub(super) fn client(config: &Sink, endpoint: Option<&str>) -> anyhow::Result<Client> {
    let mut settings = sink::Settings::new(&config.basin, &config.stream);
    settings.endpoint = match (endpoint, &config.endpoint) {
        (Some(url), _) => sink::Endpoint::Url(url.to_owned()),
        (None, Endpoint::Url(url)) => sink::Endpoint::Url(url.clone()),
        (None, Endpoint::Cloud) => sink::Endpoint::Cloud,
        (None, Endpoint::Embedded) => {
            let text = "the embedded S2 of sink.endpoint is inside the running process: pass \
                        --endpoint with the address that `sluicebox run` logs at its start";
            return Err(UsageError(text.to_owned()).into());
        }
    };
    settings.token = match &config.access_token {
        Some(AccessToken::Value(token)) => Some(Token::fixed(token.expose())?),
        Some(AccessToken::File(path)) => Some(Token::file(path.clone())),
        None => None,
    };
    Ok(Client::new(settings)?)
}
