//! Many calls leave memory where it was.
//!
//! Memory is the process's own, so that the soak runs in a process that does nothing else: the test
//! starts this very binary with the ignored test alone. `make soak` makes ten million calls.

use std::process::Command;

use super::*;

const CALLS: &str = "SLUICEBOX_SOAK_CALLS";

/// What an allocator may keep for itself between two looks, far below what a leak of one byte in
/// each of ten million calls would leave.
const SLACK_BYTES: u64 = 8 << 20;

#[test]
#[cfg(target_os = "linux")]
fn calls_leave_memory_where_it_was() {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "transform::tests::soak::soak_alone"])
        .env(CALLS, "100000")
        .status()
        .unwrap();
    assert!(status.success());
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
#[ignore = "needs a process of its own; another test starts it"]
fn soak_alone() {
    let calls: u64 = std::env::var(CALLS).unwrap().parse().unwrap();
    // Edits, host functions that allocate, instances that are replaced after so many calls, and a
    // trap now and then.
    let good = chain(vec![
        transform("10-a.wasm", compress(), "[config]\ncolumns = [\"tags\"]\nmin_bytes = 1"),
        transform("20-b.wasm", strip(), "[config]\ncolumns = [\"body\"]"),
        transform("30-c.wasm", chaos(), "[config]\nact = \"log\"\nnumber = 1"),
    ]);
    let bad = acting("trap", 0, "");
    let mut runner = runner();
    let mut run = |calls: u64| {
        for call in 0..calls {
            if call % 5000 == 4999 {
                assert_eq!(failed(runner.run(&bad, draft("text"))).class, Class::Trap);
            } else {
                assert_eq!(several(runner.run(&good, draft("text"))).len(), 1);
            }
        }
    };
    run(calls / 10);
    let before = resident();
    let started = std::time::Instant::now();
    run(calls);
    let after = resident();
    println!(
        "{calls} messages through three modules: {before} bytes before, {after} after, {:?}",
        started.elapsed()
    );
    assert!(after <= before + SLACK_BYTES, "{before} bytes before, {after} after {calls} calls");
}
