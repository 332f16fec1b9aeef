//! What no compiler of ours makes: guests written by hand against the canonical ABI, as variants of
//! the module of the integration tests.

use super::*;

const DROP_HANDLE: &str = "(call $drop_change (local.get $change))";
const DROP_LABEL: &str = ";; drop";
const IMPORTS: &str = "  (memory (export \"memory\")";

pub(super) fn guest_of(text: &str, interface: &str) -> &'static [u8] {
    Box::leak(guest::core_module(text, interface).into_boxed_slice())
}

pub(super) fn run(bytes: &'static [u8], settings: &str) -> Outcome {
    let chain = chain(vec![transform("10-hand.wasm", bytes, settings)]);
    runner().run(&chain, draft("text"))
}

/// The module with this code in place of its first look at the change.
pub(super) fn acting_at_once(imports: &str, code: &str) -> String {
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

/// Rust's own types do not let such a text out; other languages' do.
#[test]
fn a_verdict_that_is_not_utf8_fails_the_message() {
    let bad = "(i32.store8 (i32.const 3000) (i32.const 255)) (i64.store (i32.const 2048) (i64.const 0)) \
               (i64.store (i32.const 2056) (i64.const 0))";
    let error = "(i32.store8 (i32.const 2048) (i32.const 1)) (i32.store (i32.const 2056) (i32.const 3000)) \
                 (i32.store (i32.const 2060) (i32.const 1))";
    let split = "(i32.store8 (i32.const 2056) (i32.const 2)) (i32.store (i32.const 2064) (i32.const 3100)) \
                 (i32.store (i32.const 2068) (i32.const 1)) (i32.store (i32.const 3100) (i32.const 3000)) \
                 (i32.store (i32.const 3104) (i32.const 1))";
    for answer in [error, split] {
        let text = acting_at_once("", &format!("{bad} {answer} (return (i32.const 2048))"));
        let failure = failed(run(guest_of(&text, &guest::interface_text()), ""));
        assert_eq!(failure.class, Class::Invalid, "{}", failure.text);
        assert!(
            failure.text.starts_with("`10-hand.wasm` broke the interface's rules: ")
                && failure.text.contains("utf-8"),
            "{}",
            failure.text
        );
    }
}
