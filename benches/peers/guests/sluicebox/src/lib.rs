//! The same edits as a transform: through the handle, or on the message as JSON text.

use std::io::Write as _;

use base64::Engine as _;
use serde::Deserialize;
use serde_json::Value;
use sluicebox_transform::{Change, Codec, Transform, Verdict, export};

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Job {
    Strip,
    Mask,
    Compress,
}

#[derive(Deserialize)]
struct Peer {
    job: Job,
    json: bool,
}

impl Transform for Peer {
    type Config = Self;

    fn new(config: Self) -> Result<Self, String> {
        Ok(config)
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        if self.json {
            let mut message: Value =
                serde_json::from_str(&change.message()?).map_err(|error| error.to_string())?;
            if let Some(record) = message["record"].as_object_mut() {
                edit(self.job, record);
            }
            change.set_message(&message.to_string())?;
            return Ok(Verdict::Keep);
        }
        match self.job {
            Job::Strip => drop(change.remove("body")?),
            Job::Mask => change.set_text("title", "***")?,
            Job::Compress => drop(change.compress("body", Codec::Zstd, 3)?),
        }
        Ok(Verdict::Keep)
    }
}

fn edit(job: Job, record: &mut serde_json::Map<String, Value>) {
    match job {
        Job::Strip => drop(record.remove("body")),
        Job::Mask => drop(record.insert("title".into(), "***".into())),
        // By deflate: a guest has no zstd without a C compiler for WebAssembly.
        Job::Compress => {
            let Some(Value::String(body)) = record.get("body") else { return };
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            if encoder.write_all(body.as_bytes()).is_ok()
                && let Ok(packed) = encoder.finish()
            {
                let packed = base64::engine::general_purpose::STANDARD.encode(packed);
                record.insert("body".into(), packed.into());
            }
        }
    }
}

export!(Peer);
