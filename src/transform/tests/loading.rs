//! Every kind of file that is not a module for this interface.

use std::fs;

use super::*;
use crate::transform::cache::Cache;
use crate::transform::loader::{Error, encode, load};

fn check(bytes: &[u8], expected: &str) {
    assert_eq!(load(engine(), bytes, None).unwrap_err().to_string(), expected);
}

/// Replaces a text by one of the same length, wherever it is.
fn patched(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let mut found = 0;
    for start in 0..bytes.len().saturating_sub(from.len()) {
        if bytes[start..].starts_with(from.as_bytes()) {
            bytes[start..start + to.len()].copy_from_slice(to.as_bytes());
            found += 1;
        }
    }
    assert!(found > 0, "there is no {from}");
    bytes
}

fn component() -> Vec<u8> {
    encode(strip(), false).unwrap()
}

#[test]
fn core_modules_and_components_load() {
    assert!(load(engine(), strip(), None).is_ok());
    let component = component();
    let module = load(engine(), &component, None).unwrap();
    assert_eq!(module.digest, loader::digest(&component));
    assert!(!module.wants_wasi);
}

#[test]
fn files_that_are_something_else_are_named() {
    check(b"", "the file is empty; put the built `.wasm` file here");
    check(
        b"(module)",
        "the file is text, not WebAssembly; put the built `.wasm` file here (WebAssembly text is \
         turned into it by `wasm-tools parse`)",
    );
    check(
        b"\x89PNG\r\n\x1a\n\0\0",
        "the file is not WebAssembly: it does not begin with `\\0asm`; put the built `.wasm` file \
         here",
    );
    let compiled = engine().wasm().precompile_component(&component()).unwrap();
    check(
        &compiled,
        "the file is machine code compiled by wasmtime (`.cwasm`), which is not accepted because \
         it cannot be checked; put the `.wasm` file that it was compiled from here",
    );
    check(
        b"\0asm\x01\0\0\0",
        "the file is a WebAssembly module without an interface: it was not built for \
         sluicebox:transform; build it with `wit-bindgen` (or the `sluicebox-transform` crate) \
         against sluicebox:transform@1.0.0, or give what another compiler made its interface: \
         `wasm-tools component embed transform.wit --world transform in.wasm -o out.wasm`",
    );
    check(
        b"\0asm\x0d\0\x01\0",
        "the component is built for another interface: it exports nothing, not `init` and \
         `transform` of sluicebox:transform@1.0.0",
    );
    assert!(matches!(load(engine(), b"\0asm\x63\0\0\0", None), Err(Error::Invalid { .. })));
}

#[test]
fn other_interfaces_and_versions_are_named() {
    check(
        &patched(&component(), "\x09transform", "\x09transfarm"),
        "the component is built for another interface: it exports `init`, `transfarm`, not `init` \
         and `transform` of sluicebox:transform@1.0.0",
    );
    check(
        &patched(&component(), "@1.0.0", "@2.1.0"),
        "the module is built for sluicebox:transform@2.1.0, and this Sluicebox has \
         sluicebox:transform@1.0.0; build it against that version, or update Sluicebox",
    );
    check(
        &patched(
            &component(),
            "sluicebox:transform/logging@1.0.0",
            "wasi:sockets/ip-name-lookup@0.2.0",
        ),
        "the module imports `wasi:sockets/ip-name-lookup@0.2.0`, which a transform is not given: \
         there are no files, there is no network, and nothing beyond the clocks, random numbers, \
         output and environment of WASI 0.2; build it without (in Python: `componentize-py \
         componentize --stub-wasi`; in JavaScript: `disableFeatures: [\"http\", \"fetch-event\"]` \
         for `componentize`; in AssemblyScript: `asc --use abort=`)",
    );
    let odd = patched(&component(), "[method]change.append", "[method]change.apqend");
    let error = load(engine(), &odd, None).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("apqend"), "{error}");
}

#[test]
fn a_module_cut_anywhere_is_refused_and_nothing_panics() {
    for bytes in [strip().to_vec(), component()] {
        // Every offset of the headers, and every 997th of the rest: the whole takes minutes.
        let offsets = (0..200).chain((200..bytes.len()).step_by(997));
        for end in offsets {
            let error = load(engine(), &bytes[..end], None).unwrap_err();
            assert!(error.may_be_unfinished(), "{end}: {error}");
        }
    }
}

#[test]
fn a_module_with_a_flipped_byte_never_panics() {
    let bytes = component();
    for offset in (8..bytes.len()).step_by(2111) {
        let mut bytes = bytes.clone();
        bytes[offset] ^= 0x55;
        // Some flips change data or names only, and load.
        drop(load(engine(), &bytes, None));
    }
}

#[test]
fn compiled_code_is_used_only_as_it_was_written() {
    let state = tempfile::tempdir().unwrap();
    let cache = Cache::open(state.path()).unwrap();
    let digest = loader::digest(strip());
    assert!(cache.get(engine().wasm(), &digest).is_none());
    load(engine(), strip(), Some(&cache)).unwrap();
    assert!(cache.get(engine().wasm(), &digest).is_some());
    assert!(load(engine(), strip(), Some(&cache)).is_ok());

    let dir = state.path().join("compiled-transforms");
    let file = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap() != "key")
        .unwrap();
    let good = fs::read(&file).unwrap();
    let doctored = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let bad = [
        doctored(0),
        doctored(40),
        doctored(good.len() - 1),
        good[..good.len() / 2].to_vec(),
        Vec::new(),
    ];
    for bytes in bad {
        fs::write(&file, &bytes).unwrap();
        assert!(cache.get(engine().wasm(), &digest).is_none());
        assert!(!file.exists());
    }
    // Another module's code under this name, and code from under another key.
    fs::write(&file, &good).unwrap();
    assert!(cache.get(engine().wasm(), &digest).is_some());
    let other = file.with_file_name(
        file.file_name().unwrap().to_str().unwrap().replace(&digest, &loader::digest(b"other")),
    );
    fs::copy(&file, &other).unwrap();
    assert!(cache.get(engine().wasm(), &loader::digest(b"other")).is_none());
    fs::remove_file(dir.join("key")).unwrap();
    let cache = Cache::open(state.path()).unwrap();
    assert!(cache.get(engine().wasm(), &digest).is_none());
}

#[test]
fn the_cache_is_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let state = tempfile::tempdir().unwrap();
    let dir = state.path().join("compiled-transforms");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    Cache::open(state.path()).unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.clone()), 0o700);
    assert_eq!(mode(dir.join("key")), 0o600);
}
