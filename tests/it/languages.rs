//! The projects that `transforms new` writes, built by the commands of their own README from the
//! language's own packages, and run in the real host.
//!
//! These need the network where npm's, pip's and cargo's packages are not there yet, and Node.js and
//! Python, which `.ci/setup` installs. A test whose tools are missing fails.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::CACHE;

/// The program as people call it.
const PROGRAM: &str = env!("CARGO_BIN_EXE_sluicebox");

fn run(command: &mut Command, what: &str) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        output.status.success(),
        "{what} ended with {}:\n{}\n{}\n(`.ci/setup` installs what building needs)",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A shell command in the project, with this program on PATH.
fn shell(project: &Path, line: &str) {
    let path = std::env::var("PATH").unwrap();
    let bin = Path::new(PROGRAM).parent().unwrap().display();
    let mut sh = Command::new("sh");
    sh.args(["-e", "-c", line]).current_dir(project);
    sh.env("PATH", format!("{bin}:{path}")).env("XDG_CACHE_HOME", CACHE);
    // What is meant for the build of this test.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR", "RUSTC_WRAPPER"] {
        sh.env_remove(name);
    }
    run(&mut sh, line);
}

/// Makes a project, follows its README to the letter, and looks at what the module does. Gives the
/// folder with the project, and with the transforms folder that the module was put into.
fn follow_the_readme(lang: &str, prepare: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("sluicebox-new-").tempdir().unwrap();
    let mut new = Command::new(PROGRAM);
    new.args(["transforms", "new", "hide-it", "--lang", lang]).current_dir(dir.path());
    run(&mut new, "transforms new");
    let project = dir.path().join("hide-it");
    prepare(&project);
    let transforms = dir.path().join("transforms");
    std::fs::create_dir(&transforms).unwrap();

    let readme = std::fs::read_to_string(project.join("README.md")).unwrap();
    let commands = readme.split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    assert_eq!(commands.lines().count(), 3, "{readme}");
    for line in commands.lines() {
        shell(&project, &line.replace("TRANSFORMS", &transforms.display().to_string()));
    }

    let mut test = Command::new(PROGRAM);
    test.args(["transforms", "test", "--json"]).arg(&transforms).env("XDG_CACHE_HOME", CACHE);
    let output = run(&mut test, "transforms test");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["transforms"][0]["file"], "50-hide-it.wasm");
    let insert = &report["samples"][0];
    assert_eq!(insert["records"][0]["body"]["record"]["title"], "***", "{insert}");
    // What an update had before must not stay beside what was hidden.
    let update = &report["samples"][2];
    assert_eq!(update["action"], "update");
    assert!(!update["records"][0]["body"].to_string().contains("draft"), "{update}");
    dir
}

/// `transforms test` of what is in the transforms folder, on these messages, whatever comes of them.
fn test_on(dir: &tempfile::TempDir, messages: &str) -> Value {
    let path = dir.path().join("messages.json");
    std::fs::write(&path, messages).unwrap();
    let mut test = Command::new(PROGRAM);
    test.args(["transforms", "test", "--json", "--messages"]).arg(path);
    test.arg(dir.path().join("transforms")).env("XDG_CACHE_HOME", CACHE);
    let output = test.output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("transforms test: {error}\n{}", String::from_utf8_lossy(&output.stderr))
    })
}

fn insert(title: &str) -> String {
    format!(r#"{{"action":"insert","table":"public.t","record":{{"id":1,"title":"{title}"}}}}"#)
}

#[test]
fn rust() {
    let dir = follow_the_readme("rust", |project| {
        // The versions that are here already.
        let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
        std::fs::copy(lock, project.join("Cargo.lock")).unwrap();
    });
    // The project's own test, without WebAssembly.
    shell(&dir.path().join("hide-it"), "cargo test --quiet");
    let mut inspect = Command::new(PROGRAM);
    inspect.args(["transforms", "inspect"]).arg(dir.path().join("transforms/50-hide-it.wasm"));
    let output = run(inspect.env("XDG_CACHE_HOME", CACHE), "transforms inspect");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("columns: a list, each a string, required: What to hide."), "{text}");
}

#[test]
fn javascript() {
    // An interpreter that counts its calls and never lets go of anything: it is replaced before it
    // runs out of memory, and after so many calls in any case.
    let dir = follow_the_readme("js", |project| {
        let path = project.join("transform.js");
        let text = std::fs::read_to_string(&path).unwrap();
        let counting = text.replace(
            "  return { tag: \"keep\" };",
            "  calls += 1;\n  if (asked === \"throw\") throw new TypeError(\"not to my taste\");\n  \
             change.annotate(\"calls\", String(calls));\n  \
             if (asked === \"hoard\") hoard.push(new Uint8Array(1 << 20).fill(1));\n  \
             return { tag: \"keep\" };",
        );
        let counting = counting.replace(
            "  for (const name of columns)",
            "  const asked = change.getText(\"asked\");\n  for (const name of columns)",
        );
        assert_ne!(text, counting);
        std::fs::write(path, format!("let calls = 0;\nconst hoard = [];\n{counting}")).unwrap();
    });
    let calls = |report: &Value| -> Vec<u64> {
        let samples = report["samples"].as_array().unwrap();
        let calls = |sample: &Value| sample["records"][0]["body"]["metadata"]["calls"].as_u64();
        samples.iter().map(|sample| calls(sample).unwrap_or_else(|| panic!("{sample}"))).collect()
    };
    let many: Vec<String> = (0..1010).map(|number| insert(&number.to_string())).collect();
    let counted = calls(&test_on(&dir, &many.join("\n")));
    let expected: Vec<u64> = (1..=1000).chain(1..=10).collect();
    assert_eq!(counted, expected, "a fresh instance after 1,000 calls");

    // 200 MiB, where it has 128.
    let hoarding = r#"{"action":"insert","table":"public.t","record":{"id":1,"asked":"hoard"}}"#;
    let report = test_on(&dir, &vec![hoarding; 200].join("\n"));
    let counted = calls(&report);
    let lives = counted.iter().filter(|calls| **calls == 1).count();
    assert!((2..100).contains(&lives), "{counted:?}");
    let memory = report["transforms"][0]["memory_bytes"].as_u64().unwrap();
    assert!(memory < 128 << 20, "{memory}");

    let throwing = r#"{"action":"insert","table":"public.t","record":{"id":1,"asked":"throw"}}"#;
    let report = test_on(&dir, throwing);
    let failed = &report["samples"][0];
    assert_eq!(failed["error"]["class"], "guest", "{report}");
    let text = failed["error"]["text"].as_str().unwrap();
    assert!(text.contains("TypeError: not to my taste"), "{report}");
    assert!(failed["trace"][0]["logs"].to_string().contains("hide@"), "{report}");
}

#[test]
fn python() {
    let dir = follow_the_readme("python", |project| {
        let path = project.join("app.py");
        let text = std::fs::read_to_string(&path).unwrap();
        let failing = text.replace(
            "    return Verdict_Keep()",
            "    if change.get_text(\"asked\") == \"raise\":\n        1 / 0\n    return Verdict_Keep()",
        );
        assert_ne!(text, failing);
        std::fs::write(path, failing).unwrap();
    });
    let raising = r#"{"action":"insert","table":"public.t","record":{"id":1,"asked":"raise"}}"#;
    let report = test_on(&dir, raising);
    let failed = &report["samples"][0];
    assert_eq!(failed["error"]["class"], "guest", "{report}");
    let text = failed["error"]["text"].as_str().unwrap();
    assert!(text.contains("ZeroDivisionError: division by zero"), "{report}");
    let logs = failed["trace"][0]["logs"].to_string();
    assert!(logs.contains("app.py:") && logs.contains("in hide"), "{logs}");
}
