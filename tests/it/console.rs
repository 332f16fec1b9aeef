//! The console as a browser gets it from the real program, and what its page asks for: filters, one message
//! without its values and with them, what is held, and changes that no other page can make.

use serde_json::{Value, json};

use crate::support::world::World;
use crate::support::{guest, until};

const TABLES: &str = "create table notes (id bigint primary key, label text, body text);
    create table other (id bigint primary key, label text, body text);";

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_all_that_it_asks_for() {
    let world = World::new("console", TABLES, &["public.notes", "public.other"]).await;
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let running = world.start().ready().await;
    world
        .sql(
            "insert into other values (1, 'keep', 'r0wv4lue' || repeat('x', 1200000));
             update other set body = 'r0wv4lue, later' where id = 1;
             update other set body = 'r0wv4lue, last' where id = 1;
             insert into notes values (1, 'trap', null);
             insert into notes values (2, 'keep', 'r0wv4lue' || repeat('x', 1200000));",
        )
        .await;
    world.until_messages("failed", 3).await;
    world.until_messages("waiting", 2).await;
    let http = reqwest::Client::new();
    let get = async |path: &str| -> Value {
        let answer = http.get(world.url(path)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        answer.json().await.unwrap()
    };

    // What a browser loads, and nothing from elsewhere.
    let page = http.get(world.url("/")).header("accept", "text/html").send().await.unwrap();
    let policy = page.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'"), "{policy}");
    let page = page.text().await.unwrap();
    for file in ["console.css", "console.js"] {
        assert!(page.contains(file) && !page.contains("://"), "{page}");
        let answer = http.get(world.url(&format!("/{file}"))).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{file}");
    }

    // Each filter by itself and with others.
    let list = async |query: &str| -> Vec<String> {
        let list = get(&format!("/api/v1/messages?{query}")).await;
        let ids = list["messages"].as_array().unwrap().iter();
        let ids: Vec<_> = ids.map(|message| message["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(list["total"], ids.len(), "{query}");
        ids
    };
    let oversize = list("class=oversize").await;
    let trapped = list("class=trap").await;
    assert_eq!((oversize.len(), trapped.len()), (2, 1));
    assert_eq!(list("transform=10-chaos.wasm").await, trapped);
    assert_eq!(list("transform=11-none.wasm").await, [""; 0]);
    let in_notes = list("state=failed&class=oversize&table=public.notes").await;
    assert_eq!(in_notes.len(), 1);
    let cli = ["messages", "list", "--class", "oversize", "--table", "notes"];
    assert_eq!(world.json(&cli).await["messages"][0]["id"], in_notes[0].as_str());

    // One message: what is wrong, what it holds back, and its values only where they are asked for.
    let head = list("class=oversize&table=public.other").await.remove(0);
    let detail = get(&format!("/api/v1/messages/{head}?payload=false")).await;
    assert_eq!((&detail["holds"], &detail["payload"]), (&json!(2), &json!("")));
    assert!(!detail.to_string().contains("r0wv4lue"), "{detail}");
    assert!(detail["hint"].as_str().unwrap().contains("--column body"), "{detail}");
    assert_eq!(detail["columns"][0]["name"], "body");
    let whole = get(&format!("/api/v1/messages/{head}")).await;
    assert!(whole["payload"].as_str().unwrap().contains("r0wv4lue"));

    // Another page's request, in each form that a browser would send.
    let ack = world.url("/api/v1/messages/ack");
    let body = json!({"all": true, "class": "oversize"});
    let post = |origin: &'static str, kind: &'static str| {
        let request = http.post(&ack).header("origin", origin).header("content-type", kind);
        let request = request.body(body.to_string()).send();
        async move { request.await.unwrap().status().as_u16() }
    };
    assert_eq!(post("http://evil.example", "application/json").await, 403);
    assert_eq!(post("null", "application/json").await, 403);
    let own: &'static str = world.url("").leak();
    assert_eq!(post(own, "text/plain").await, 415);
    assert_eq!(list("class=oversize").await, oversize, "nothing was changed");

    // And its own: what the filter shows, and nothing else.
    assert_eq!(post(own, "application/json").await, 200);
    // What waited behind it follows.
    world.until_records(2).await;
    until("all others to have left the store", async || {
        let left = list("").await;
        if left == trapped { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    running.stop().await;
}
