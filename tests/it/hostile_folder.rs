//! A transforms folder that somebody means harm with, or that goes wrong in odd ways, while changes flow:
//! what is live stays live, good modules can be replaced, each trouble is told, and none is paid for
//! without an end.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use crate::support::disk::SmallDisk;
use crate::support::guest;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::sluicebox::Running;
use crate::support::until;
use crate::support::world::World;

/// A module of half a megabyte that keeps a compiler busy for minutes.
pub fn bomb(number: usize) -> Vec<u8> {
    let text = guest::slow_text(&guest::chaos_text(), 60_000, number);
    guest::core_module(&text, &guest::interface_text())
}

/// A component of types within types, three bytes each, or of components within components.
fn nested(types: bool, depth: usize) -> Vec<u8> {
    let section = |id: u8, content: &[u8]| {
        let mut bytes = vec![id];
        let mut rest = content.len();
        while rest >= 0x80 {
            bytes.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
            rest >>= 7;
        }
        bytes.push(u8::try_from(rest).unwrap());
        [&bytes[..], content].concat()
    };
    let header: &[u8] = b"\0asm\x0d\0\x01\0";
    if types {
        let content = [&[1], &[0x41, 1, 1].repeat(depth)[..], &[0x41, 0]].concat();
        return [header, &section(7, &content)].concat();
    }
    (0..depth).fold(header.to_vec(), |inner, _| [header, &section(4, &inner)].concat())
}

/// The nice values of a process's threads of this name.
fn nice_of(pid: u32, thread: &str) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let stat = |task: std::io::Result<fs::DirEntry>| {
        fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default()
    };
    let stats = tasks.map(stat).filter_map(|stat| {
        let (start, rest) = stat.rsplit_once(") ")?;
        let name = start.split_once('(')?.1.to_owned();
        let nice = rest.split(' ').nth(16)?.parse().ok()?;
        (name == thread).then_some(nice)
    });
    stats.collect()
}

/// The process ids of what a process has started.
fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: std::io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>()
    };
    tasks.flat_map(of_task).collect()
}

pub async fn until_warned(world: &World<'_>, parts: &[&str]) {
    until(&format!("a warning with {parts:?}"), async || {
        let list = world.json(&["transforms", "list"]).await;
        let all = list["warnings"].to_string();
        let is_there = parts.iter().all(|part| all.contains(part));
        if is_there { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_compiler_never_ends_with_keeps_nothing_else_waiting() {
    let world = World::new("bombs", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let mut running = world.start().ready().await;
    let work = load.start();
    let bombs = ["20-bomb.wasm", "30-bomb.wasm", "40-bomb.wasm"];
    for (number, file) in bombs.iter().enumerate() {
        world.drop_in(file, &bomb(number));
    }
    for file in bombs {
        world.until_transform(file, "compiling").await;
    }
    // What has just been started is no such process yet.
    let mut compiler = 0;
    until("a process that compiles", async || {
        let found = children(running.pid());
        compiler = found.first().copied().unwrap_or_default();
        let is_at_work = found.len() == 1 && !nice_of(compiler, "transform-compi").is_empty();
        if is_at_work { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    // It and what it does give way to what delivers, and so do our own threads beside that.
    for (pid, thread, nice) in [
        (compiler, "transform-compi", 10),
        (running.pid(), "transform-slow", 10),
        (running.pid(), "transform-large", 10),
        (running.pid(), "transform-vet", 10),
        (running.pid(), "transform-load", 5),
        (running.pid(), "transform-watch", 0),
    ] {
        let found = nice_of(pid, thread);
        assert!(!found.is_empty() && found.iter().all(|it| *it == nice), "{thread}: {found:?}");
    }
    // Another module is replaced meanwhile, more than once, and changes flow.
    for form in [guest::component(&guest::chaos()), guest::chaos()] {
        let before = world.json(&["transforms", "list"]).await["generation"].as_u64().unwrap();
        world.drop_in("10-chaos.wasm", &form);
        until("the other module to be replaced", async || {
            let list = world.json(&["transforms", "list"]).await;
            let now = list["generation"].as_u64().unwrap();
            if now > before { Ok(()) } else { Err(list.to_string()) }
        })
        .await;
        work.commits(20).await;
    }
    for file in bombs {
        world.until_transform(file, "compiling").await;
    }
    // Whoever takes them away has the processor back.
    for file in bombs {
        fs::remove_file(world.path("transforms").join(file)).unwrap();
    }
    until("nothing to be compiled any more", async || {
        let list = world.json(&["transforms", "list"]).await;
        let found = children(running.pid());
        let is_quiet = found.is_empty() && list["transforms"].as_array().unwrap().len() == 1;
        if is_quiet { Ok(()) } else { Err(format!("{found:?} {list}")) }
    })
    .await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.assert_alive();
    running.stop().await;
}

/// What would take whoever reads it along is refused, at a start too.
#[tokio::test(flavor = "multi_thread")]
async fn what_kills_its_reader_kills_nothing_else() {
    let world = World::new("killers", TABLES, &["public.items"]).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let mut running = world.start().ready().await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    let deep = nested(true, 200_000);
    for (file, bytes, part) in [
        ("20-types.wasm", &deep, "nested 100 deep and deeper"),
        ("30-components.wasm", &nested(false, 5000), "nested 100 deep and deeper"),
        ("10-strip-columns.wasm", &deep, "nested 100 deep and deeper"),
    ] {
        world.drop_in(file, bytes);
        let rejected = world.until_transform(file, "rejected").await;
        assert!(rejected["reason"].as_str().unwrap().contains(part), "{rejected}");
        running.assert_alive();
    }
    running.stop().await;
    let mut running = world.start().ready().await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    world.until_transform("20-types.wasm", "rejected").await;
    running.assert_alive();
    running.stop().await;
    // Whoever asks what it is gets an answer.
    let path = world.transforms().join("20-types.wasm").display().to_string();
    let output = world.cli(&["transforms", "inspect", &path, "--json"]).await;
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["reason"].as_str().unwrap().contains("nested 100 deep"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_a_module_keeps_busy_ends_when_it_is_told_to() {
    let world = World::new("bomb_at_start", TABLES, &["public.items"]).await;
    world.drop_in("10-bomb.wasm", &bomb(0));
    let running = world.start();
    until("a process that compiles", async || {
        let found = children(running.pid());
        if found.len() == 1 { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let compiler = children(running.pid());
    running.stop().await;
    let log = world.log();
    assert!(log.contains("stopped before its pipeline ran"), "{log}");
    until("what it had begun to end with it", async || {
        let is_gone = !std::path::Path::new(&format!("/proc/{}", compiler[0])).exists();
        if is_gone { Ok(()) } else { Err(format!("{compiler:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_and_what_is_no_file_are_told_and_cost_nothing() {
    let world = World::new("odd_names", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let mut running = world.start().ready().await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    let work = load.start();
    let dir = world.path("transforms");
    let at = |name: &str| dir.join(name);

    // A file that grows for ever is never read.
    let growing = std::thread::spawn({
        let path = at("20-growing.wasm");
        move || {
            let mut file = fs::File::create(&path).unwrap();
            while path.exists() {
                file.write_all(b"\0asm\x01\0\0\0").unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let _socket = UnixListener::bind(at("30-socket.wasm")).unwrap();
    let longest = format!("40-{}.wasm", "x".repeat(247));
    assert_eq!(longest.len(), 255);
    world.drop_in("40-new.wasm", &guest::chaos());
    fs::rename(at("40-new.wasm"), at(&longest)).unwrap();
    let broken_name = "50-two\nlines\u{1b}[31m.wasm";
    fs::write(at(broken_name), guest::chaos()).unwrap();
    fs::write(at("60-empty.wasm"), "").unwrap();

    world.until_transform(&longest, "live").await;
    until_warned(&world, &["50-two", "has control characters"]).await;
    world.until_transform("60-empty.wasm", "rejected").await;
    let socket = world.until_transform("30-socket.wasm", "rejected").await;
    assert!(socket["reason"].to_string().contains("it is no file"), "{socket}");
    until_warned(&world, &["20-growing.wasm", "change again and again", ".tmp"]).await;
    work.commits(20).await;
    for file in ["20-growing.wasm", "30-socket.wasm", &longest, broken_name, "60-empty.wasm"] {
        fs::remove_file(at(file)).unwrap();
    }
    growing.join().unwrap();
    until("only one to be left", async || {
        let list = world.json(&["transforms", "list"]).await;
        let left = list["transforms"].as_array().unwrap().len();
        let is_told = list["warnings"].to_string().contains("again and again");
        if left == 1 && !is_told { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    let log = world.log();
    assert!(!log.contains('\u{1b}') && log.contains("50-two\\nlines\\u{1b}"), "{log}");
    running.assert_alive();
    running.stop().await;
}

/// As some synchronisation does that never notices that it has done its work.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_broken_and_put_there_again_and_again_is_told_once() {
    let world = World::new("again", TABLES, &["public.items"]).await;
    let running = world.start().ready().await;
    let rejections = |world: &World<'_>| world.log().matches("rejected a transform").count();
    for number in 0..5 {
        world.drop_in("10-broken.wasm", b"\0asm\x01\0\0\0");
        world.until_transform("10-broken.wasm", "rejected").await;
        // Longer than what does not load is waited for.
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(rejections(&world), 1, "{number}: {}", world.log());
    }
    // Another one is told of.
    world.drop_in("10-broken.wasm", b"not a module");
    until("the other reason", async || {
        let log = world.log();
        if log.contains("is text, not WebAssembly") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(rejections(&world), 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_files_at_once_end_in_what_the_folder_shows() {
    let world = World::new("thousand", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    let mut running = world.start().ready().await;
    let work = load.start();
    let module = guest::chaos();
    let name = |number: usize| format!("{number:04}-chaos.wasm");
    for number in 0..1000 {
        // Some of them are no modules.
        let bytes: &[u8] = if number % 10 == 0 { b"not a module" } else { &module };
        fs::write(world.path("transforms").join(name(number)), bytes).unwrap();
    }
    let count = async |running: &mut Running<'_>, live: usize, rejected: usize| {
        until(&format!("{live} live, {rejected} rejected"), async || {
            running.assert_alive();
            let list = world.json(&["transforms", "list"]).await;
            let all = list["transforms"].as_array().unwrap();
            let of = |state: &str| all.iter().filter(|entry| entry["state"] == state).count();
            let found = (of("live"), of("rejected"), all.len());
            if found == (live, rejected, live + rejected) {
                Ok(())
            } else {
                Err(format!("{found:?}"))
            }
        })
        .await;
    };
    count(&mut running, 900, 100).await;
    work.commits(10).await;
    for number in 0..1000 {
        fs::remove_file(world.path("transforms").join(name(number))).unwrap();
    }
    count(&mut running, 0, 0).await;
    work.commits(10).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

/// Neither compiled code nor copies can be kept; modules are replaced all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_for_compiled_code_stops_no_replacement() {
    let world = World::new("full_cache", TABLES, &["public.items"]).await;
    let compiled = world.path("state/compiled-transforms");
    fs::create_dir_all(&compiled).unwrap();
    let Some(disk) = SmallDisk::mount(&compiled, "4m") else {
        println!("not tested with a full disk: nothing can be mounted here");
        return;
    };
    let load = Workload::new(world.database.url(), 2);
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let mut running = world.start().ready().await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    let work = load.start();
    disk.fill();
    world.drop_in("20-chaos.wasm", &guest::chaos());
    world.until_transform("20-chaos.wasm", "live").await;
    until("it to be told", async || {
        let log = world.log();
        if log.contains("could not keep compiled code") { Ok(()) } else { Err(log) }
    })
    .await;
    work.commits(10).await;
    // What a full disk leaves behind is not half of a file.
    let left = fs::read_dir(&compiled).unwrap().map(|file| file.unwrap().file_name());
    let left: Vec<_> = left.collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
    disk.resize("4m");
    world.drop_in("30-chaos.wasm", &guest::component(&guest::chaos()));
    world.until_transform("30-chaos.wasm", "live").await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.assert_alive();
    running.stop().await;
}

/// A module with the row's value in everything that it says: where the label begins with `erro`, its last
/// line and its error; where with `trap`, its last line before it traps; and in lines of its own, more than one.
fn talkative(fails_at_all: bool) -> Vec<u8> {
    let text = guest::chaos_text();
    let label = "(i32.load (i32.const 1032)) (i32.load (i32.const 1036))";
    let log =
        "(import \"sluicebox:transform/logging@1.0.0\" \"log\" (func $log (param i32 i32 i32)))";
    let import = "(memory (export \"memory\") 2)";
    let trap = "(then (unreachable)))\n    (if (i32.eq (local.get $word) (i32.const 0x706f6f6c))";
    let error = "(i32.store (i32.const 2056) (i32.const 16))\n        (i32.store (i32.const 2060) (i32.const 27))";
    let condition = "(if (i32.eq (local.get $word) (i32.const 0x6f727265)) ;; erro";
    for part in [import, trap, error, condition] {
        assert!(text.contains(part), "{part}");
    }
    let lines = "(data (i32.const 3500) \"one\\nWARN two\") ";
    let text = text.replace(import, &format!("{log} {import} {lines}"));
    let said = format!(
        "(then (call $log (i32.const 2) (i32.const 3500) (i32.const 12)) \
         (call $log (i32.const 3) {label}) (unreachable)))\n    \
         (if (i32.eq (local.get $word) (i32.const 0x706f6f6c))"
    );
    let text = text.replace(trap, &said);
    let value = format!(
        "(call $log (i32.const 3) {label}) \
         (i32.store (i32.const 2056) (i32.load (i32.const 1032))) \
         (i32.store (i32.const 2060) (i32.load (i32.const 1036)))"
    );
    let text = text.replace(error, &value);
    let always =
        if fails_at_all { "(if (i32.const 1)" } else { condition.trim_end_matches(" ;; erro") };
    guest::core_module(&text.replace(condition, always), &guest::interface_text())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_module_says_of_a_row_stands_with_the_message_and_in_no_log() {
    const VALUE: &str = "v4lue-of-a-row";
    let sql = "create table public.notes (id int primary key, label text)";
    let world = World::new("talkative", sql, &["public.notes"]).await;
    world.drop_in("10-talk.wasm", &talkative(false));
    let mut running = world.start().ready().await;
    let insert =
        |id: u32, label: &str| format!("insert into notes values ({id}, '{label} {VALUE}')");
    for (id, label) in [(1, "well"), (2, "erro"), (3, "trap")] {
        world.sql(&insert(id, label)).await;
        if id == 1 {
            world.until_records(1).await;
        }
    }
    let parked = world.until_messages("failed", 2).await;
    for message in &parked {
        let text = message["error"]["text"].as_str().unwrap();
        assert!(text.contains(VALUE), "{message:#}");
        let id = message["id"].as_str().unwrap();
        assert!(world.log().contains(&format!("said of it: sluicebox messages show {id}")));
    }
    let log = world.log();
    assert!(
        log.contains("`10-talk.wasm` failed the message\"") && log.contains("class=\"guest\""),
        "{log}"
    );
    assert!(
        log.contains("`10-talk.wasm` trapped: wasm `unreachable` instruction executed\""),
        "{log}"
    );
    // A line of its own is one line, whatever is in it.
    assert!(log.contains("one\\nWARN two") && !log.contains("\nWARN"), "{log}");

    // What breaks at a trial is told the same way.
    world.drop_in("20-talk.wasm", &talkative(true));
    let refused = world.until_transform("20-talk.wasm", "rejected").await;
    assert!(refused["reason"].as_str().unwrap().contains(VALUE), "{refused:#}");
    assert!(world.log().contains("(what it said of it: sluicebox transforms list)"));
    fs::remove_file(world.transforms().join("20-talk.wasm")).unwrap();

    for on_error in ["drop", "halt"] {
        world.drop_in_settings(
            "10-talk.wasm",
            &format!("on_error = \"{on_error}\"\nvet = \"off\"\n"),
        );
        until(on_error, async || {
            let log = world.log();
            let told = [
                "dropped a message",
                "the pipeline stands still: `10-talk.wasm` failed the message; its",
            ];
            let is_told = log.contains(told[usize::from(on_error == "halt")]);
            if on_error == "halt" && !is_told {
                world.sql(&insert(10 + u32::try_from(log.len()).unwrap(), "erro")).await;
            }
            if is_told { Ok(()) } else { Err(log) }
        })
        .await;
    }
    // Whoever probes keeps the answer; the status is for an operator.
    let text = running.unready("halted").await;
    assert!(!text.contains(VALUE) && text.ends_with("with nothing lost"), "{text}");
    let status = world.status().await.unwrap();
    let said = status["reasons"][0]["text"].as_str().unwrap();
    assert!(said.starts_with(&format!("{text}; what it said of it: ")), "{said}");
    assert!(said.contains(VALUE), "{said}");
    assert!(!world.log().contains(VALUE), "{}", world.log());
    running.stop().await;
}
