//! The same edits as an Extism plug-in, as its users write them: a JSON message in, one out.

use std::io::Write as _;

use base64::Engine as _;
use extism_pdk::{FnResult, plugin_fn};
use serde_json::{Value, from_slice, to_vec};

fn edit(input: &[u8], edit: impl FnOnce(&mut serde_json::Map<String, Value>)) -> FnResult<Vec<u8>> {
    let mut message: Value = from_slice(input)?;
    if let Some(record) = message["record"].as_object_mut() {
        edit(record);
    }
    Ok(to_vec(&message)?)
}

#[plugin_fn]
pub fn strip(input: Vec<u8>) -> FnResult<Vec<u8>> {
    edit(&input, |record| drop(record.remove("body")))
}

#[plugin_fn]
pub fn mask(input: Vec<u8>) -> FnResult<Vec<u8>> {
    edit(&input, |record| drop(record.insert("title".into(), "***".into())))
}

/// By deflate: a guest has no zstd without a C compiler for WebAssembly.
#[plugin_fn]
pub fn compress(input: Vec<u8>) -> FnResult<Vec<u8>> {
    edit(&input, |record| {
        let Some(Value::String(body)) = record.get("body") else { return };
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        if encoder.write_all(body.as_bytes()).is_ok()
            && let Ok(packed) = encoder.finish()
        {
            let packed = base64::engine::general_purpose::STANDARD.encode(packed);
            record.insert("body".into(), packed.into());
        }
    })
}
