//! What a module that imports WASI has of it, and what not: each side by name.

use super::written_by_hand::{acting_at_once, guest_of, run};
use super::*;
use crate::transform::instance::Instance;
use crate::transform::loader::load;
use crate::transform::wasi::GRANTED;

/// `TMPDIR` or the like would do, but this one cargo sets.
const SET: &str = "CARGO_MANIFEST_DIR";

#[test]
fn environment_variables_are_granted_by_name_and_nothing_else() {
    // Drops the message where there is exactly one variable.
    let import = "(import \"wasi_snapshot_preview1\" \"environ_sizes_get\" \
                  (func $sizes (param i32 i32) (result i32)))";
    let code = "(drop (call $sizes (i32.const 3000) (i32.const 3008))) \
                (i64.store (i32.const 2048) (i64.const 0)) \
                (i64.store (i32.const 2056) (i64.const 0)) \
                (if (i32.eq (i32.load (i32.const 3000)) (i32.const 1)) \
                  (then (i32.store8 (i32.const 2056) (i32.const 1)))) \
                (return (i32.const 2048))";
    // The adapter's own state takes a page of the guest's memory, and more.
    let text = acting_at_once(import, code).replace("\"memory\") 2)", "\"memory\") 8)");
    let bytes = guest_of(&text, &guest::interface_text());
    assert_eq!(several(run(bytes, "")).len(), 1, "the environment is empty");
    assert_eq!(several(run(bytes, &format!("[wasi]\nenv = [\"{SET}\"]"))).len(), 0);

    let settings = "[wasi]\nenv = [\"SLUICEBOX_HAS_NONE_OF_THIS_NAME\"]";
    let missing = transform("10-hand.wasm", bytes, settings);
    assert_eq!(
        Instance::new(engine(), &missing, false).unwrap_err().reason,
        "is to be given the environment variable `SLUICEBOX_HAS_NONE_OF_THIS_NAME` (`wasi.env`), and \
         Sluicebox itself has none of that name"
    );
}

#[test]
fn handles_without_end_are_stopped() {
    let interface = interface_with(
        "wasi:clocks/monotonic-clock@0.2.6",
        "package wasi:io@0.2.6 { interface poll { resource pollable; } }\n\
         package wasi:clocks@0.2.6 {\n\
           interface monotonic-clock {\n\
             use wasi:io/poll@0.2.6.{pollable};\n\
             subscribe-duration: func(when: u64) -> pollable;\n\
           }\n\
         }\n",
    );
    let import = "(import \"wasi:clocks/monotonic-clock@0.2.6\" \"subscribe-duration\" \
                  (func $subscribe (param i64) (result i32)))";
    let code = "(loop $more (drop (call $subscribe (i64.const 1))) (br $more))";
    let bytes = guest_of(&acting_at_once(import, code), &interface);
    for (settings, limit) in [("", 1000), ("[limits]\nhandles = 50", 50)] {
        let failure = failed(run(bytes, settings));
        assert_eq!(
            (failure.class, failure.text),
            (
                Class::Limit,
                format!(
                    "`10-hand.wasm` reached a limit: it holds more than {limit} handles \
                     (`limits.handles`)"
                )
            )
        );
    }
}

/// A component that imports an empty instance of this name, and exports it under each of the others.
fn importing(import: &str, exports: &[&str]) -> Vec<u8> {
    const INSTANCE: u8 = 5;
    let byte = |length: usize| u8::try_from(length).unwrap();
    let name = |name: &str| [&[0, byte(name.len())], name.as_bytes()].concat();
    let section = |id: u8, items: &[u8]| [&[id, byte(items.len())], items].concat();
    let import = [&[1][..], &name(import), &[INSTANCE, 0]].concat();
    let exported =
        exports.iter().flat_map(|export| [&name(export)[..], &[INSTANCE, 0, 0]].concat());
    let exports = [&[byte(exports.len())][..], &exported.collect::<Vec<u8>>()].concat();
    let no_declarations = [1, 0x42, 0];
    [
        b"\0asm\x0d\0\x01\0".to_vec(),
        section(7, &no_declarations),
        section(10, &import),
        section(11, &exports),
    ]
    .concat()
}

const EXPORTS: [&str; 2] = ["init", "transform"];

#[test]
fn each_interface_of_wasi_is_either_linked_or_refused_by_name() {
    for name in GRANTED.map(|interface| format!("{interface}@0.2.6")) {
        let component = importing(&name, &[]);
        let component = wasmtime::component::Component::new(engine().wasm(), component).unwrap();
        assert!(engine().linker(true).instantiate_pre(&component).is_ok(), "{name} is not linked");
        // Such a one ends where its functions are looked at, and not at the name.
        let error = load(engine(), &importing(&name, &EXPORTS), None).unwrap_err();
        assert!(matches!(error, loader::Error::Mismatch { .. }), "{name}: {error}");
    }
    for name in [
        "wasi:sockets/tcp@0.2.6",
        "wasi:sockets/udp-create-socket@0.2.6",
        "wasi:sockets/ip-name-lookup@0.2.6",
        "wasi:sockets/instance-network@0.2.6",
        "wasi:http/outgoing-handler@0.2.6",
        "wasi:http/types@0.2.6",
        "wasi:keyvalue/store@0.2.0-draft",
        "wasi:cli/run@0.2.6",
        "wasi:clocks/timezone@0.2.6",
        "wasi:clocks/system-clock@0.3.0",
        "wasi:filesystem/types@0.3.0",
        "wasi:random/random",
        "example:other/thing@1.0.0",
    ] {
        let error = load(engine(), &importing(name, &EXPORTS), None).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the module imports `{name}`, which")), "{error}");
    }
}

/// A module that calls something of wasip1 first, and drops the message where the answer is 0.
fn of_wasip1(function: &str, parameters: &str, arguments: &str) -> Vec<u8> {
    let import = format!(
        "(import \"wasi_snapshot_preview1\" \"{function}\" (func $asked (param {parameters}) \
         (result i32)))"
    );
    let code = format!(
        "(i64.store (i32.const 2048) (i64.const 0)) (i64.store (i32.const 2056) (i64.const 0)) \
         (if (i32.eqz (call $asked {arguments})) (then (i32.store8 (i32.const 2056) (i32.const 1)))) \
         (return (i32.const 2048))"
    );
    // The adapter's own state takes a page of the guest's memory, and more.
    let text = acting_at_once(&import, &code).replace("\"memory\") 2)", "\"memory\") 8)");
    guest::core_module(&text, &guest::interface_text())
}

const PATH_OPEN: (&str, &str, &str) = (
    "path_open",
    "i32 i32 i32 i32 i32 i64 i64 i32 i32",
    "(i32.const 3) (i32.const 0) (i32.const 0) (i32.const 5) (i32.const 1) (i64.const 2) (i64.const 0) \
     (i32.const 0) (i32.const 3000)",
);

#[test]
fn sockets_and_signals_of_wasip1_are_refused_by_name() {
    for (function, parameters) in [
        ("sock_accept", "i32 i32 i32"),
        ("sock_recv", "i32 i32 i32 i32 i32 i32"),
        ("sock_send", "i32 i32 i32 i32 i32"),
        ("sock_shutdown", "i32 i32"),
        ("proc_raise", "i32"),
    ] {
        let arguments = "(i32.const 0) ".repeat(parameters.split(' ').count());
        let bytes = of_wasip1(function, parameters, &arguments);
        let error = load(engine(), &bytes, None).unwrap_err().to_string();
        let expected = format!("the module imports `wasi_snapshot_preview1.{function}`, which");
        assert!(error.starts_with(&expected), "{error}");
    }
    let unknown = of_wasip1("sock_dance", "i32", "(i32.const 0)");
    let error = load(engine(), &unknown, None).unwrap_err().to_string();
    assert!(error.contains("sock_dance"), "{error}");
}

#[test]
fn there_are_no_files_to_open() {
    let asked = |(function, parameters, arguments): (&str, &str, &str)| {
        let bytes: &'static [u8] = of_wasip1(function, parameters, arguments).leak();
        assert!(module(bytes).wants_wasi);
        several(run(bytes, "")).len()
    };
    // A clock answers; whatever has to do with a folder does not.
    let clock = ("clock_time_get", "i32 i64 i32", "(i32.const 0) (i64.const 1) (i32.const 3000)");
    assert_eq!(asked(clock), 0);
    let random = ("random_get", "i32 i32", "(i32.const 3000) (i32.const 8)");
    assert_eq!(asked(random), 0);
    assert_eq!(asked(PATH_OPEN), 1);
    let preopened = ("fd_prestat_get", "i32 i32", "(i32.const 3) (i32.const 3000)");
    assert_eq!(asked(preopened), 1);
    let made =
        ("path_create_directory", "i32 i32 i32", "(i32.const 3) (i32.const 0) (i32.const 5)");
    assert_eq!(asked(made), 1);
}

/// The interface with a part of WASI 0.2 beside it.
fn interface_with(import: &str, packages: &str) -> String {
    let import = format!("import logging;\n    import {import};");
    guest::interface_text().replace("import logging;", &import) + packages
}

#[test]
fn no_folder_is_given_to_a_component_either() {
    let interface = interface_with(
        "wasi:filesystem/preopens@0.2.6",
        "package wasi:filesystem@0.2.6 {\n\
           interface types { resource descriptor; }\n\
           interface preopens {\n\
             use types.{descriptor};\n\
             get-directories: func() -> list<tuple<descriptor, string>>;\n\
           }\n\
         }\n",
    );
    let import = "(import \"wasi:filesystem/preopens@0.2.6\" \"get-directories\" \
                  (func $folders (param i32)))";
    // Drops the message where the list is empty.
    let code = "(call $folders (i32.const 3000)) \
                (i64.store (i32.const 2048) (i64.const 0)) (i64.store (i32.const 2056) (i64.const 0)) \
                (if (i32.eqz (i32.load (i32.const 3004))) \
                  (then (i32.store8 (i32.const 2056) (i32.const 1)))) \
                (return (i32.const 2048))";
    assert_eq!(several(run(guest_of(&acting_at_once(import, code), &interface), "")).len(), 0);
}

/// An hour on a clock, which the host has to wait for.
#[test]
fn who_sleeps_is_woken_at_the_end_of_the_time() {
    #[track_caller]
    fn check(bytes: &'static [u8]) {
        let settings = "[limits]\ntime_ms = 200";
        let chain = chain(vec![transform("10-hand.wasm", bytes, settings)]);
        let mut runner = runner();
        for _ in 0..2 {
            let failure = failed(runner.run(&chain, draft("text")));
            assert_eq!(
                (failure.class, failure.text.as_str()),
                (Class::Timeout, "`10-hand.wasm` ran for more than 200 ms (`limits.time_ms`)")
            );
        }
    }
    // A subscription of 48 bytes: at 8 its kind, 0 for a clock; at 16 the clock, 1 for the monotonic
    // one; at 24 the time in nanoseconds.
    let poll = of_wasip1(
        "poll_oneoff",
        "i32 i32 i32 i32",
        "(block (result i32) (memory.fill (i32.const 3000) (i32.const 0) (i32.const 48)) \
           (i32.store (i32.const 3016) (i32.const 1)) \
           (i64.store (i32.const 3024) (i64.const 3600000000000)) (i32.const 3000)) \
         (i32.const 3100) (i32.const 1) (i32.const 3200)",
    );
    check(poll.leak());

    let interface = interface_with(
        "wasi:clocks/monotonic-clock@0.2.6",
        "package wasi:io@0.2.6 { interface poll { resource pollable { block: func(); } \
           poll: func(in: list<borrow<pollable>>) -> list<u32>; } }\n\
         package wasi:clocks@0.2.6 {\n\
           interface monotonic-clock {\n\
             use wasi:io/poll@0.2.6.{pollable};\n\
             subscribe-duration: func(when: u64) -> pollable;\n\
           }\n\
         }\n",
    );
    let imports = "(import \"wasi:clocks/monotonic-clock@0.2.6\" \"subscribe-duration\" \
                   (func $subscribe (param i64) (result i32))) \
                   (import \"wasi:io/poll@0.2.6\" \"[method]pollable.block\" \
                   (func $block (param i32))) \
                   (import \"wasi:io/poll@0.2.6\" \"poll\" (func $poll (param i32 i32 i32)))";
    let hour = "(call $subscribe (i64.const 3600000000000))";
    let block = format!("(call $block {hour})");
    check(guest_of(&acting_at_once(imports, &block), &interface));
    let poll = format!(
        "(i32.store (i32.const 3000) {hour}) \
         (call $poll (i32.const 3000) (i32.const 1) (i32.const 3100))"
    );
    check(guest_of(&acting_at_once(imports, &poll), &interface));
}
