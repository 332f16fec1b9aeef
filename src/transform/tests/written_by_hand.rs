//! What no compiler of ours makes: guests written by hand against the canonical ABI, as variants of
//! the module of the integration tests.

use super::*;
use crate::transform::instance::Instance;

const DROP_HANDLE: &str = "(call $drop_change (local.get $change))";
const DROP_LABEL: &str = ";; drop";
const IMPORTS: &str = "  (memory (export \"memory\")";

fn guest_of(text: &str, interface: &str) -> &'static [u8] {
    Box::leak(guest::core_module(text, interface).into_boxed_slice())
}

fn run(bytes: &'static [u8], settings: &str) -> Outcome {
    let chain = chain(vec![transform("10-hand.wasm", bytes, settings)]);
    runner().run(&chain, draft("text"))
}

/// The module with this code in place of its first look at the change.
fn acting_at_once(imports: &str, code: &str) -> String {
    let text = guest::chaos_text();
    assert!(text.contains(IMPORTS) && text.contains(DROP_HANDLE) && text.contains(DROP_LABEL));
    let text = text.replace(IMPORTS, &format!("{imports}\n{IMPORTS}"));
    text.replace(DROP_HANDLE, &format!("{DROP_HANDLE} {code}"))
}

#[test]
fn a_borrowed_handle_that_is_kept_fails_the_message() {
    let text = guest::chaos_text().replace(DROP_HANDLE, "");
    let failure = failed(run(guest_of(&text, &guest::interface_text()), ""));
    assert_eq!(failure.class, Class::Invalid);
    assert_eq!(
        failure.text,
        "`10-hand.wasm` broke the interface's rules: borrow handles still remain at the end of the \
         call"
    );
}

#[test]
fn an_answer_outside_of_memory_fails_the_message() {
    let text = acting_at_once("", "(return (i32.const -8))");
    let failure = failed(run(guest_of(&text, &guest::interface_text()), ""));
    assert_eq!(failure.class, Class::Invalid, "{}", failure.text);
}

#[test]
fn a_verdict_that_does_not_exist_fails_the_message() {
    let answer = "(i64.store (i32.const 2048) (i64.const 0)) (i64.store (i32.const 2056) \
                  (i64.const 9)) (return (i32.const 2048))";
    let text = acting_at_once("", answer);
    let failure = failed(run(guest_of(&text, &guest::interface_text()), ""));
    assert_eq!(failure.class, Class::Invalid, "{}", failure.text);
}

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
    let interface = guest::interface_text().replace(
        "import logging;",
        "import logging;\n    import wasi:clocks/monotonic-clock@0.2.6;",
    ) + "package wasi:io@0.2.6 { interface poll { resource pollable; } }\n\
           package wasi:clocks@0.2.6 {\n\
             interface monotonic-clock {\n\
               use wasi:io/poll@0.2.6.{pollable};\n\
               subscribe-duration: func(when: u64) -> pollable;\n\
             }\n\
           }\n";
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
