//! What modules use of WebAssembly beyond its first version: each part works, or is refused by a sentence
//! that names it.

use super::*;
use crate::transform::loader::load;

/// The beginning of the hand-written guest's `transform`.
const TRANSFORM: &str = "(local $word i32)";
const MEMORY: &str = "(memory (export \"memory\") 2)";

/// The module with these fields, and this code before anything else.
fn using(fields: &str, code: &str) -> &'static [u8] {
    let text = guest::chaos_text();
    assert!(text.contains(TRANSFORM) && text.contains(MEMORY));
    let text = text.replacen(TRANSFORM, &format!("{TRANSFORM} {code}"), 1);
    let text = text.replacen(MEMORY, &format!("{MEMORY} {fields}"), 1);
    Box::leak(guest::core_module(&text, &guest::interface_text()).into_boxed_slice())
}

/// Why the module does not load, or nothing where it works.
fn refusal(fields: &str, code: &str) -> Option<String> {
    let bytes = using(fields, code);
    if let Err(error) = load(engine(), bytes, None) {
        return Some(error.to_string());
    }
    let chain = chain(vec![transform("10-x.wasm", bytes, "")]);
    kept(runner().run(&chain, draft("text")));
    None
}

#[test]
fn what_the_engine_has_works() {
    let swizzle = "(i8x16.relaxed_swizzle (v128.const i64x2 0 0) (v128.const i64x2 0 0))";
    let tail = "(func $t (result i32) (return_call $u)) (func $u (result i32) i32.const 1)";
    let reference = "(type $f (func)) (func $nop (type $f)) (elem declare func $nop)";
    for (fields, code) in [
        ("", "(drop (i8x16.splat (i32.const 1)))"),
        ("", &format!("(drop {swizzle})")),
        ("", "(memory.fill (i32.const 5000) (i32.const 0) (i32.const 10))"),
        ("", "(drop (i32.extend8_s (i32.const 1)))"),
        (tail, "(drop (call $t))"),
        ("(func $two (result i32 i32) i32.const 1 i32.const 2)", "(call $two) drop drop"),
        ("(global i32 (i32.add (i32.const 1) (i32.const 2)))", ""),
        (reference, "(call_ref $f (ref.func $nop))"),
    ] {
        assert_eq!(refusal(fields, code), None, "{fields} {code}");
    }
}

#[test]
fn what_it_does_not_have_is_named_and_not_taken_for_a_broken_file() {
    let continuation =
        "(type $f (func)) (type $c (cont $f)) (func $nop (type $f)) (elem declare func $nop)";
    let one = "(i64.const 1)";
    for (fields, code, part) in [
        ("(type $s (struct (field i32)))", "(drop (struct.new $s (i32.const 1)))", "gc types"),
        ("(tag $e)", "(block $h (try_table (catch_all $h) (throw $e)))", "exceptions proposal"),
        ("(tag $e)", "try throw $e catch_all end", "legacy_exceptions"),
        ("(memory $two 1)", "(drop (memory.size $two))", "multiple memories"),
        ("", "(drop (i32.atomic.load (i32.const 0)))", "threads support"),
        ("(memory $two 1 (pagesize 1))", "", "custom page sizes"),
        (continuation, "(drop (cont.new $c (ref.func $nop)))", "stack switching"),
        ("", &format!("(i64.add128 {one} {one} {one} {one}) drop drop"), "wide arithmetic"),
    ] {
        let text = refusal(fields, code).unwrap();
        let begin = "the module uses a part of WebAssembly that Sluicebox does not run (";
        assert!(text.starts_with(begin), "{text}");
        assert!(text.contains(part) && !text.contains("offset"), "{text}");
    }
}
