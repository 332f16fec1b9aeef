//! Guests that mean harm, written by hand: each is stopped at its limit, by a sentence that names the
//! file and the rule.

use super::*;
use crate::transform::compiler;
use crate::transform::instance::{Fault, Instance};
use crate::transform::loader::{encode, load};

/// What `init` of the hand-written guest does.
const INIT: &str = "(i32.store8 (i32.const 1024) (i32.const 0))\n    (i32.const 1024))";

/// The beginning of its `transform`.
const TRANSFORM: &str = "(local $word i32)";

/// The module with a text in place of another, and more fields.
fn changed(from: &str, to: &str, fields: &str) -> &'static [u8] {
    let text = guest::chaos_text();
    assert!(text.contains(from), "{from}");
    let text = text.replacen(from, to, 1);
    // A column that the messages here have.
    let text = text.replace("\"label\"", "\"title\"");
    // Behind the imports, which must come first.
    let text = text.replacen("(memory (export", &format!("{fields}\n(memory (export"), 1);
    let module = guest::core_module(&text, &guest::interface_text());
    Box::leak(module.into_boxed_slice())
}

/// One that does this in `transform` before anything else.
fn acting(code: &str, fields: &str) -> &'static [u8] {
    changed(TRANSFORM, &format!("{TRANSFORM} {code}"), fields)
}

#[track_caller]
fn check(bytes: &'static [u8], settings: &str, class: Class, expected: &str) {
    let chain = chain(vec![transform("10-hostile.wasm", bytes, settings)]);
    let mut runner = runner();
    for _ in 0..2 {
        let failure = failed(runner.run(&chain, draft("text")));
        assert_eq!(failure.class, class, "{}", failure.text);
        assert!(failure.text.starts_with("`10-hostile.wasm` "), "{}", failure.text);
        assert!(failure.text.contains(expected), "{}", failure.text);
    }
}

fn start(bytes: &'static [u8]) -> Fault {
    let transform = transform("10-hostile.wasm", bytes, "");
    Instance::new(engine(), &transform, false).unwrap_err()
}

#[test]
fn what_never_starts_does_not_go_live() {
    let for_ever = "(loop $more (br $more))";
    let init = changed(INIT, &format!("{for_ever} unreachable)"), "");
    let started = changed(TRANSFORM, TRANSFORM, &format!("(func $s {for_ever}) (start $s)"));
    // Each takes the ten seconds that a start may take.
    std::thread::scope(|scope| {
        for bytes in [init, started] {
            scope.spawn(move || {
                let fault = start(bytes);
                assert_eq!(fault.class, Class::Timeout, "{}", fault.reason);
                assert!(fault.reason.ends_with("(while it was starting)"), "{}", fault.reason);
            });
        }
    });
    let grown = changed(TRANSFORM, TRANSFORM, "(table 1000000 funcref)");
    assert!(start(grown).reason.contains("`limits.table_elements`"));
    let many = changed(TRANSFORM, TRANSFORM, &"(table 60000 funcref)".repeat(2));
    assert!(start(many).reason.contains("`limits.table_elements`"));
    let trapped = changed(TRANSFORM, TRANSFORM, "(func $s unreachable) (start $s)");
    assert_eq!(start(trapped).class, Class::Trap);
}

#[test]
fn growth_and_depth_end_at_their_limits() {
    let grow = "(loop $more (drop (table.grow $t (ref.null func) (i32.const 1000))) (br $more))";
    let table = "(table $t 1 funcref)";
    check(acting(grow, table), "", Class::Limit, "(`limits.table_elements`)");
    // The stack of calls, without a bit of memory.
    let deep = "(func $deep (call $deep))";
    check(acting("(call $deep)", deep), "", Class::Limit, "its calls went too deep");
}

#[test]
fn a_loop_that_asks_the_host_again_and_again_runs_out_of_time() {
    let names = "(import \"sluicebox:transform/types@1.0.0\" \"[method]change.column-names\" \
                 (func $names (param i32 i32)))";
    let ask = "(loop $more (global.set $free (i32.const 4096)) (call $names (local.get $change) \
               (i32.const 1024)) (br $more))";
    let bytes = acting(ask, names);
    check(bytes, "[limits]\ntime_ms = 200", Class::Timeout, "ran for more than 200 ms");

    // 60 MiB of a line each time, where a page would do: nothing of it is kept.
    let log =
        "(import \"sluicebox:transform/logging@1.0.0\" \"log\" (func $log (param i32 i32 i32)))";
    let shout = "(drop (memory.grow (i32.const 1000))) (loop $more (call $log (i32.const 0) \
                 (i32.const 0) (i32.const 60000000)) (br $more))";
    check(acting(shout, log), "", Class::Limit, "(`limits.call_mib`)");
    let settings = "[limits]\ncall_mib = 128\ntime_ms = 300";
    check(acting(shout, log), settings, Class::Timeout, "ran for more than 300 ms");
}

#[test]
fn what_the_host_needs_of_a_guest_fails_like_the_guest_itself() {
    const REALLOC: &str = "(global.set $free (i32.add (local.get $at) (local.get $size)))";
    // Its settings may come in; what comes next may not.
    let realloc = |code: &str| {
        let once = "(global.set $n (i32.add (global.get $n) (i32.const 1)))";
        let then = format!("{once} (if (i32.gt_u (global.get $n) (i32.const 1)) (then {code}))");
        changed(REALLOC, &format!("{then} {REALLOC}"), "(global $n (mut i32) (i32.const 0))")
    };
    check(realloc("(unreachable)"), "", Class::Trap, "trapped");
    let settings = "[limits]\ntime_ms = 200";
    let for_ever = "(loop $more (br $more))";
    check(realloc(for_ever), settings, Class::Timeout, "ran for more than 200 ms");
    check(realloc("(return (i32.const -8))"), "", Class::Invalid, "broke the interface's rules");
    let post = "(func (export \"cabi_post_transform\") (param i32) unreachable)";
    check(acting("", post), "", Class::Trap, "trapped");
}

#[test]
fn what_is_imported_beside_the_interface_is_named() {
    let steal = changed(TRANSFORM, TRANSFORM, "(import \"env\" \"steal\" (func))");
    let error = load(engine(), steal, None).unwrap_err().to_string();
    assert!(error.starts_with("the module imports `env.steal`, which"), "{error}");
}

#[test]
fn a_file_that_is_too_large_is_refused_unread() {
    let bytes = vec![0; usize::try_from(crate::transform::MODULE_BYTES_MAX).unwrap() + 1];
    let error = load(engine(), &bytes, None).unwrap_err().to_string();
    assert!(error.contains("more than the 67108864 bytes that a module may have"), "{error}");
}

#[test]
fn many_functions_are_no_more_than_their_bytes() {
    let many = "(func)\n".repeat(20_000);
    let bytes = changed(TRANSFORM, TRANSFORM, &many);
    let chain = chain(vec![transform("10-many.wasm", bytes, "")]);
    kept(runner().run(&chain, draft("text")));
}

#[test]
fn only_what_may_take_long_is_compiled_apart() {
    let is_demanding = |nops: usize| {
        let function = format!("(func {})", "nop ".repeat(nops));
        let component = encode(changed(TRANSFORM, TRANSFORM, &function), false).unwrap();
        compiler::is_demanding(&component)
    };
    assert!(!is_demanding(1000));
    assert!(is_demanding(100_000));
    assert!(!compiler::is_demanding(&encode(strip(), false).unwrap()));
}

#[test]
fn what_an_instance_writes_counts_for_the_next_one_too() {
    let log =
        "(import \"sluicebox:transform/logging@1.0.0\" \"log\" (func $log (param i32 i32 i32)))";
    // The last line before a trap is for the message alone.
    let line = "(call $log (i32.const 1) (i32.const 0) (i32.const 5))";
    let shout = &format!("{line} {line} unreachable");
    let chain = chain(vec![transform("10-log.wasm", acting(shout, log), "")]);
    let mut runner = runner();
    let quota = &chain.transforms()[0].counters.logs;
    for _ in 0..10 {
        failed(runner.run(&chain, draft("text")));
    }
    assert_eq!(quota.written(), 10);
}
