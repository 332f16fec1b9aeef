//! The stream that the configuration means, for the commands that look at it themselves.

use super::UsageError;
use crate::app;
use crate::config::{Endpoint, Sink};
use crate::sink::Client;

/// A client for the stream. `endpoint` takes the place of the configured one; a server inside the
/// running process is reached by it alone, at the address that `run` names in its log.
pub(super) fn client(mut config: Sink, endpoint: Option<String>) -> anyhow::Result<Client> {
    match (endpoint, &config.endpoint) {
        (Some(url), _) => config.endpoint = Endpoint::Url(url),
        (None, Endpoint::Embedded) => {
            let text = "the embedded S2 of sink.endpoint is inside the running process: pass \
                        --endpoint with the address that `sluicebox run` logs at its start";
            return Err(UsageError(text.to_owned()).into());
        }
        (None, Endpoint::Cloud | Endpoint::Url(_)) => {}
    }
    Ok(Client::new(app::sink_settings(&config, None)?)?)
}
