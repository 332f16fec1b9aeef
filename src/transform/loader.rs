//! From a file's bytes to a module that can be instantiated, or one sentence that says what the
//! file is and what to do about it.
//!
//! Bytes are never trusted: the whole binary is validated before anything else is done with it,
//! and precompiled code is never accepted, because running it would mean running whatever
//! somebody put there. A running pipeline does not even read it itself (see `compiler`).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use sha2::{Digest as _, Sha256};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wasmparser::{
    BinaryReader, ComponentType, ComponentTypeDeclaration, Encoding, InstanceTypeDeclaration,
    Parser, Payload, Validator, WasmFeatures,
};

use super::bindings::{TransformPre, VERSION};
use super::cache::Cache;
use super::compiler::Compiler;
use super::description::Packages;
use super::engine::Engine;
use super::state::GuestState;
use super::{hex, schema, wasi};

/// The largest module, in bytes. Components of JavaScript and Python have 12 to 20 MB.
pub const MODULE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// From this size on a module is an interpreter with a program inside: such ones leak over long
/// lives, and are recycled earlier.
const INTERPRETER_BYTES_MIN: usize = 4 * 1024 * 1024;

/// How deep components may be nested, and types within the text of types. Those of toolchains have two
/// levels, and those that are composed a few more. What reads them calls itself for each level of types, so
/// that this also keeps it in its stack.
const NESTED_MAX: usize = 100;

/// The interface's package in import and export names.
pub(super) const PACKAGE: &str = "sluicebox:transform/";

/// The custom section by which `wit-bindgen` says in a core module which interface it was built
/// for.
const INTERFACE_SECTION: &str = "component-type";

/// Why a file does not load. Each says what the file is, and the mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the file is empty; put the built `.wasm` file here")]
    Empty,
    #[error(
        "the file has more than the {MODULE_BYTES_MAX} bytes that a module may have; build it in release mode \
         and without debug information"
    )]
    TooLarge,
    #[error(
        "the file is text, not WebAssembly; put the built `.wasm` file here (WebAssembly text is \
         turned into it by `wasm-tools parse`)"
    )]
    Text,
    #[error(
        "the file is machine code compiled by wasmtime (`.cwasm`), which is not accepted because \
         it cannot be checked; put the `.wasm` file that it was compiled from here"
    )]
    Precompiled,
    #[error(
        "the file is not WebAssembly: it does not begin with `\\0asm`; put the built `.wasm` file \
         here"
    )]
    NotWasm,
    #[error(
        "the file ends too early, after {bytes} bytes: it is still being written, or its copy was \
         cut short; copy it to a name that ends in `.tmp` and rename it"
    )]
    Truncated { bytes: usize },
    #[error("the file is not valid WebAssembly ({reason}); build it again")]
    Invalid { reason: String },
    #[error(
        "the module uses a part of WebAssembly that Sluicebox does not run ({reason}); build it without: there are \
         no exceptions, no garbage-collected types, no threads, no 64-bit memory, no more than one memory, and \
         nothing that is not in the standard yet"
    )]
    Feature { reason: String },
    #[error(
        "the file is a WebAssembly module without an interface: it was not built for \
         sluicebox:transform; build it with `wit-bindgen` (or the `sluicebox-transform` crate) \
         against sluicebox:transform@{VERSION}, or give what another compiler made its interface: \
         `wasm-tools component embed transform.wit --world transform in.wasm -o out.wasm`"
    )]
    NoInterface,
    #[error("the module could not be turned into a component: {reason}")]
    Encode { reason: String },
    #[error(
        "the component is built for another interface: it exports {exports}, not `init` and \
         `transform` of sluicebox:transform@{VERSION}"
    )]
    OtherInterface { exports: String },
    #[error(
        "the module is built for sluicebox:transform@{found}, and this Sluicebox has \
         sluicebox:transform@{VERSION}; build it against that version, or update Sluicebox"
    )]
    OtherVersion { found: String },
    #[error(
        "the module imports {imports}, which a transform is not given: there are no files, there is \
         no network, and nothing beyond the clocks, random numbers, output and environment of WASI \
         0.2; build it without (in Python: \
         `componentize-py componentize --stub-wasi`; in JavaScript: `disableFeatures: [\"http\", \
         \"fetch-event\"]` for `componentize`; in AssemblyScript: `asc --use abort=`)"
    )]
    Imports { imports: String },
    #[error("the module does not fit the interface sluicebox:transform@{VERSION}: {reason}")]
    Mismatch { reason: String },
    #[error(
        "the component, or a type in it, is nested {NESTED_MAX} deep and deeper, which no toolchain does; \
         build it again"
    )]
    Nested,
    #[error(
        "the packages of the module's interface need each other ({packages}) in a ring, and it cannot \
         be put together; build it for one interface"
    )]
    Ring { packages: String },
    #[error("the module could not be compiled: {reason}")]
    Compile { reason: String },
    #[error(
        "the module could not be read or compiled, by a defect of the compiler ({reason}); build it in another \
         way, and report the defect with the file"
    )]
    Defect { reason: String },
    /// Another process did so.
    #[error("the module could not be compiled: {reason}")]
    BrokeOff { reason: String },
    /// In the words of another process.
    #[error("{reason}")]
    Apart { reason: String, may_be_unfinished: bool },
}

impl Error {
    /// Whether whoever read or compiled it was taken along.
    pub(super) fn is_dangerous(&self) -> bool {
        matches!(self, Self::BrokeOff { .. })
    }

    /// Whether more bytes might mend it, as while a file is being written in place.
    pub(crate) fn may_be_unfinished(&self) -> bool {
        match self {
            Self::Empty
            | Self::Truncated { .. }
            | Self::Invalid { .. }
            | Self::NoInterface
            | Self::OtherInterface { .. } => true,
            Self::TooLarge
            | Self::Text
            | Self::Precompiled
            | Self::NotWasm
            | Self::Encode { .. }
            | Self::OtherVersion { .. }
            | Self::Imports { .. }
            | Self::Mismatch { .. }
            | Self::Nested
            | Self::Ring { .. }
            | Self::BrokeOff { .. }
            | Self::Defect { .. }
            | Self::Feature { .. }
            | Self::Compile { .. } => false,
            Self::Apart { may_be_unfinished, .. } => *may_be_unfinished,
        }
    }
}

/// A compiled module, ready to be instantiated any number of times.
pub(crate) struct Module {
    /// SHA-256 of the file, in hexadecimal.
    pub(crate) digest: String,
    pub(crate) pre: TransformPre<GuestState>,
    pub(crate) wants_wasi: bool,
    pub(crate) is_interpreter: bool,
    /// How it can be set, where it says so.
    pub(crate) schema: Option<serde_json::Value>,
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("digest", &self.digest).finish_non_exhaustive()
    }
}

/// SHA-256 of a file's bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Checks, encodes where it is a core module, and compiles.
///
/// # Errors
///
/// For everything that is not a module built for this interface.
pub(crate) fn load(engine: &Engine, bytes: &[u8], cache: Option<&Cache>) -> Result<Module, Error> {
    load_by(&Compiler::Here, engine, bytes, cache)
}

/// The same by a compiler of one's choice.
///
/// # Errors
///
/// As [`load`].
pub(crate) fn load_by(
    compiler: &Compiler,
    engine: &Engine,
    bytes: &[u8],
    cache: Option<&Cache>,
) -> Result<Module, Error> {
    if bytes.len() as u64 > MODULE_BYTES_MAX {
        return Err(Error::TooLarge);
    }
    let digest = digest(bytes);
    // What was compiled was checked before.
    let cached = cache.and_then(|cache| cache.get(engine.wasm(), &digest));
    let component = match cached {
        Some(component) => component,
        None => {
            let component = compiler.compile(engine, bytes)?;
            if let Some(cache) = cache {
                cache.put(engine.wasm(), &digest, &component);
            }
            component
        }
    };
    let of = component.component_type();
    let wants_wasi = of.imports(engine.wasm()).any(|(name, _)| wasi::is_granted(name));
    let pre = engine
        .linker(wants_wasi)
        .instantiate_pre(&component)
        .and_then(TransformPre::new)
        .map_err(|error| Error::Mismatch { reason: chain(&error) })?;
    let is_interpreter = bytes.len() >= INTERPRETER_BYTES_MIN;
    Ok(Module { digest, pre, wants_wasi, is_interpreter, schema: schema::of(bytes) })
}

/// Checks a file's bytes, and gives the component that they are or are turned into.
///
/// # Errors
///
/// For everything that is not a module built for this interface.
pub(super) fn check(bytes: &[u8]) -> Result<Cow<'_, [u8]>, Error> {
    let component = match examine(bytes)? {
        Kind::Component => Cow::Borrowed(bytes),
        Kind::Core { wasip1 } => Cow::Owned(encode(bytes, wasip1)?),
    };
    check_interface(&component)?;
    Ok(component)
}

/// Bytes from outside run through the parser and the compiler: a defect of them costs the file, and not
/// whoever reads it.
pub(super) fn caught<T>(read: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Defect { reason: text.unwrap_or_else(|| "without a word".to_owned()) })
    })
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &wasmtime::Error) -> String {
    error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub(super) enum Kind {
    Component,
    /// With an interface section.
    Core {
        wasip1: bool,
    },
}

/// Reads the whole binary and validates it.
pub(super) fn examine(bytes: &[u8]) -> Result<Kind, Error> {
    caught(|| examine_whole(bytes))
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a binary has dozens of kinds of sections, and few of them matter here"
)]
fn examine_whole(bytes: &[u8]) -> Result<Kind, Error> {
    if bytes.is_empty() {
        return Err(Error::Empty);
    }
    if bytes.len() as u64 > MODULE_BYTES_MAX {
        return Err(Error::TooLarge);
    }
    const MAGIC: &[u8] = b"\0asm";
    if !bytes.starts_with(MAGIC) {
        return Err(if MAGIC.starts_with(bytes) {
            Error::Truncated { bytes: bytes.len() }
        } else if wasmtime::Engine::detect_precompiled(bytes).is_some() {
            Error::Precompiled
        } else if is_text(bytes) {
            Error::Text
        } else {
            Error::NotWasm
        });
    }

    // What checks it takes the longer for each the deeper it lies.
    refuse_nested(bytes)?;
    let mut validator = Validator::new();
    let mut encoding = None;
    let mut has_interface = false;
    let mut wasip1 = false;
    let mut foreign = BTreeSet::new();
    let mut depth = 0_usize;
    let mut packages = Packages::default();
    let mut bodies = wasmparser::FuncValidatorAllocations::default();
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload.map_err(|error| unreadable(&error, bytes.len()))?;
        match &payload {
            Payload::Version { encoding: found, .. } => {
                encoding.get_or_insert(*found);
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::CustomSection(section)
                if depth == 0 && section.name().starts_with(INTERFACE_SECTION) =>
            {
                has_interface = true;
                packages.read(section.data())?;
            }
            Payload::ImportSection(imports) if depth == 0 => {
                for import in imports.clone().into_imports() {
                    let import = import.map_err(|error| unreadable(&error, bytes.len()))?;
                    wasip1 |= import.module == WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME;
                    if is_foreign(import.module, import.name) {
                        foreign.insert(format!("{}.{}", import.module, import.name));
                    }
                }
            }
            _ => {}
        }
        let valid = validator.payload(&payload).and_then(|valid| match valid {
            wasmparser::ValidPayload::Func(function, body) => {
                let mut function = function.into_validator(std::mem::take(&mut bodies));
                function.validate(&body)?;
                bodies = function.into_allocations();
                Ok(())
            }
            _ => Ok(()),
        });
        valid.map_err(|error| {
            if is_valid_elsewhere(bytes) {
                Error::Feature { reason: error.message().to_owned() }
            } else {
                unreadable(&error, bytes.len())
            }
        })?;
    }
    if let Some(ring) = packages.ring() {
        return Err(Error::Ring { packages: list(ring.iter()) });
    }
    match encoding {
        Some(Encoding::Component) => Ok(Kind::Component),
        Some(Encoding::Module) if has_interface && !foreign.is_empty() => {
            Err(Error::Imports { imports: list(foreign.iter()) })
        }
        Some(Encoding::Module) if has_interface => Ok(Kind::Core { wasip1 }),
        Some(Encoding::Module) => Err(Error::NoInterface),
        None => Err(Error::Truncated { bytes: bytes.len() }),
    }
}

/// Whether this is WebAssembly for an engine that has all of it.
fn is_valid_elsewhere(bytes: &[u8]) -> bool {
    Validator::new_with_features(WasmFeatures::all()).validate_all(bytes).is_ok()
}

/// What the engine says of bytes that are valid.
pub(super) fn of_engine(error: &wasmtime::Error) -> Error {
    let text = chain(error);
    // It reads with the features that it has, and has no type for those that it lacks.
    let lacks = ["failed to parse WebAssembly module: ", "Invalid input WebAssembly code at "];
    let Some((_, reason)) = lacks.iter().find_map(|lack| text.split_once(lack)) else {
        return Error::Compile { reason: text };
    };
    // The places are those of what the file was encoded as.
    let reason = reason.split(" (at offset").next().unwrap_or(reason);
    let reason = match reason.split_once(": ") {
        Some((place, rest)) if place.starts_with("offset") => rest,
        Some(_) | None => reason,
    };
    Error::Feature { reason: reason.to_owned() }
}

/// Refuses what is nested too deep in a component: such as the description of an interface, which is one, and
/// which the encoder reads. What else is wrong with it, whoever reads it says.
pub(super) fn refuse_nested(bytes: &[u8]) -> Result<(), Error> {
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(bytes).map_while(Result::ok) {
        if let Payload::ModuleSection { .. } | Payload::ComponentSection { .. } = payload {
            depth += 1;
        } else if let Payload::End(_) = payload {
            depth = depth.saturating_sub(1);
        } else if let Payload::ComponentTypeSection(types) = payload
            && nests_too_deep(&bytes[types.range()])
        {
            return Err(Error::Nested);
        }
        if depth >= NESTED_MAX {
            return Err(Error::Nested);
        }
    }
    Ok(())
}

/// Whether types of components and instances are nested too deep in each other's text, which is the one
/// place where the parser calls itself: everything else in a type is referred to by a number. Read here
/// without doing so, in the same order; what cannot be read is left to the parser.
fn nests_too_deep(section: &[u8]) -> bool {
    const COMPONENT: u8 = 0x41;
    const INSTANCE: u8 = 0x42;
    /// Begins the declaration that is a type.
    const TYPE: u8 = 0x01;
    let mut reader = BinaryReader::new(section, 0);
    // For each type that has begun, what it is and how many declarations of it are left.
    let mut begun: Vec<(u8, u32)> = Vec::new();
    let mut walk = || -> wasmparser::Result<bool> {
        for _ in 0..reader.read_var_u32()? {
            let mut is_type = true;
            loop {
                if is_type {
                    let mut ahead = reader.clone();
                    let kind = ahead.read_u8()?;
                    if kind == COMPONENT || kind == INSTANCE {
                        begun.push((kind, ahead.read_var_u32()?));
                        reader = ahead;
                        if begun.len() >= NESTED_MAX {
                            return Ok(true);
                        }
                    } else {
                        reader.read::<ComponentType<'_>>()?;
                    }
                }
                while begun.pop_if(|(_, left)| *left == 0).is_some() {}
                let Some((kind, left)) = begun.last_mut() else { break };
                *left -= 1;
                let mut ahead = reader.clone();
                is_type = ahead.read_u8()? == TYPE;
                if is_type {
                    reader = ahead;
                } else if *kind == COMPONENT {
                    reader.read::<ComponentTypeDeclaration<'_>>()?;
                } else {
                    reader.read::<InstanceTypeDeclaration<'_>>()?;
                }
            }
        }
        Ok(false)
    };
    walk().unwrap_or(false)
}

/// Whether a core module imports something that no interface can have, such as `env.abort`, or that
/// the adapter of wasip1 would link without anything behind it. Interfaces have a colon, and what
/// binding generators write for themselves a sign in front.
fn is_foreign(module: &str, name: &str) -> bool {
    if module == WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME {
        return !wasi::is_granted_of_wasip1(name);
    }
    !module.contains(':') && !module.starts_with(['$', '[', '_'])
}

fn unreadable(error: &wasmparser::BinaryReaderError, bytes: usize) -> Error {
    // The parser says "unexpected end-of-file" where more bytes were announced than there are.
    let message = error.message();
    if error.offset() >= bytes || message.contains("unexpected end") {
        Error::Truncated { bytes }
    } else {
        Error::Invalid { reason: format!("{message} at byte {}", error.offset()) }
    }
}

fn is_text(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(4096)];
    let is_utf8 = match std::str::from_utf8(start) {
        Ok(_) => true,
        // A character that the cut went through.
        Err(error) => error.error_len().is_none(),
    };
    is_utf8 && !start.contains(&0)
}

/// A core module as a component.
pub(super) fn encode(bytes: &[u8], wasip1: bool) -> Result<Vec<u8>, Error> {
    let failed = |error: anyhow::Error| Error::Encode { reason: format!("{error:#}") };
    caught(|| {
        let mut encoder =
            wit_component::ComponentEncoder::default().module(bytes).map_err(failed)?;
        if wasip1 {
            let adapter = WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER;
            encoder =
                encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, adapter).map_err(failed)?;
        }
        encoder.encode().map_err(failed)
    })
}

/// Compares the names of a component's imports and exports with what there is, before minutes are
/// spent on compiling it.
fn check_interface(component: &[u8]) -> Result<(), Error> {
    let names = Names::of(component).map_err(|error| unreadable(&error, component.len()))?;
    let ours = |name: &str| name.strip_prefix(PACKAGE).map(str::to_owned);
    for name in names.imports.iter().chain(&names.exports).filter_map(|name| ours(name)) {
        let found = name.split_once('@').map_or("", |(_, version)| version);
        // Semantic versions: a module for 1.0.x runs on 1.0.0, one for 1.1 may need more.
        if !found.starts_with("1.0.") {
            return Err(Error::OtherVersion { found: found.to_owned() });
        }
    }
    let has = |name: &str| names.exports.iter().any(|export| export == name);
    if !has("init") || !has("transform") {
        let exports = match names.exports.as_slice() {
            [] => "nothing".to_owned(),
            exports => list(exports.iter()),
        };
        return Err(Error::OtherInterface { exports });
    }
    let unmet: Vec<&String> = names
        .imports
        .iter()
        .filter(|name| !name.starts_with(PACKAGE) && !wasi::is_granted(name))
        .collect();
    if !unmet.is_empty() {
        return Err(Error::Imports { imports: list(unmet.into_iter()) });
    }
    Ok(())
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The outermost imports and exports of a component that need something from the host.
#[derive(Default)]
pub(super) struct Names {
    pub(super) imports: Vec<String>,
    pub(super) exports: Vec<String>,
}

impl Names {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a binary has dozens of kinds of sections, and few of them matter here"
    )]
    pub(super) fn of(component: &[u8]) -> Result<Self, wasmparser::BinaryReaderError> {
        let mut names = Self { imports: Vec::new(), exports: Vec::new() };
        // Nested modules and components have imports of their own, met inside.
        let mut nested: Vec<Range<usize>> = Vec::new();
        for payload in Parser::new(0).parse_all(component) {
            match payload? {
                Payload::ModuleSection { unchecked_range, .. }
                | Payload::ComponentSection { unchecked_range, .. } => nested.push(unchecked_range),
                Payload::ComponentImportSection(section) => {
                    if nested.iter().any(|range| range.contains(&section.range().start)) {
                        continue;
                    }
                    for import in section {
                        let import = import?;
                        // A type is a name for what is already there.
                        if !matches!(import.ty, wasmparser::ComponentTypeRef::Type(_)) {
                            names.imports.push(import.name.name.to_owned());
                        }
                    }
                }
                Payload::ComponentExportSection(section) => {
                    if nested.iter().any(|range| range.contains(&section.range().start)) {
                        continue;
                    }
                    for export in section {
                        names.exports.push(export?.name.name.to_owned());
                    }
                }
                _ => {}
            }
        }
        Ok(names)
    }
}
