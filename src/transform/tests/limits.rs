//! What settings may change of a module's limits, and whom a module at its limits hits.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn settings_move_the_limits() {
    let check = |act: &str, number: u64, limit: &str, expected: &str| {
        let chain = acting(act, number, &format!("[limits]\n{limit}\ntime_ms = 20000"));
        let failure = failed(runner().run(&chain, draft("text")));
        assert_eq!(
            (failure.class, failure.text),
            (Class::Limit, format!("`10-chaos.wasm` reached a limit: {expected}"))
        );
    };
    check(
        "large-call",
        0,
        "call_mib = 2",
        "it passed more than 2 MiB in a call (`limits.call_mib`)",
    );
    check(
        "host-edits",
        0,
        "edits_mib = 1",
        "its edits of one message hold more than 1 MiB (`limits.edits_mib`)",
    );
    // More headers than a record may have, at 4 KiB each.
    check(
        "overlook-headers",
        1_000_000,
        "edits_mib = 8",
        "its edits of one message hold more than 8 MiB (`limits.edits_mib`)",
    );
    let more = acting("large-call", 0, "[limits]\ncall_mib = 32\nmemory_mib = 256");
    assert_eq!(message(&kept(runner().run(&more, draft("text"))))["record"]["id"], 1);
}

#[test]
fn a_module_beyond_its_tables_or_memory_does_not_go_live() {
    let check = |limit: &str, expected: &str| {
        let settings = format!("[limits]\n{limit}\n[config]\nact = \"keep\"");
        let transform = transform("10-chaos.wasm", chaos(), &settings);
        let fault =
            crate::transform::instance::Instance::new(engine(), &transform, false).unwrap_err();
        assert_eq!(fault.class, Class::Limit);
        assert!(fault.reason.contains(expected), "{}", fault.reason);
        assert!(fault.reason.ends_with("(while it was starting)"), "{}", fault.reason);
    };
    check("table_elements = 1", "and its limit is 1 (`limits.table_elements`)");
    check("memory_mib = 1", "and its limit is 1 MiB (`limits.memory_mib`)");
    check("instances = 1", "(`limits.instances`)");
}

#[test]
fn fresh_isolation_lets_nothing_of_a_message_reach_the_next() {
    let calls = |isolation: &str| {
        let chain = acting("count", 0, &format!("isolation = \"{isolation}\""));
        let mut runner = runner();
        let mut call =
            || message(&kept(runner.run(&chain, draft("text"))))["metadata"]["calls"].clone();
        [call(), call(), call()]
    };
    assert_eq!(calls("reuse"), [1, 2, 3]);
    assert_eq!(calls("fresh"), [1, 1, 1]);
}

#[test]
fn a_neighbour_on_another_worker_is_not_hit() {
    let looping = acting("loop", 0, "[limits]\ntime_ms = 100");
    let hoarding = acting("allocate", 0, "[limits]\nmemory_mib = 64");
    let good = chain(vec![transform("10-a.wasm", strip(), "[config]\ncolumns = [\"body\"]")]);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bad = [(&looping, Class::Timeout), (&hoarding, Class::Limit)].map(|(chain, class)| {
            scope.spawn(move || {
                let mut runner = runner();
                for _ in 0..5 {
                    assert_eq!(failed(runner.run(chain, draft("text"))).class, class);
                }
            })
        });
        let neighbour = scope.spawn(|| {
            let mut runner = runner();
            let mut calls = 0_u64;
            while !ended.load(Ordering::Relaxed) || calls == 0 {
                let kept = kept(runner.run(&good, draft("text")));
                assert_eq!(message(&kept)["record"]["body"], Value::Null);
                calls += 1;
            }
            // Its one instance has lived through all of it.
            assert!(runner.trace().iter().all(|step| step.verdict == "keep"));
        });
        for bad in bad {
            bad.join().unwrap();
        }
        ended.store(true, Ordering::Relaxed);
        neighbour.join().unwrap();
    });
    assert_eq!(good.transforms()[0].counters.errors(), 0);
}
