//! The sink against the real s2-lite, inside this process.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::{
    Append, Class, Client, Endpoint, Error, Guarantee, Mode, Opened, ReadRecord, Session, Settings,
    Token,
    client::{Created, ReadFrom},
    embedded::{Embedded, EmbeddedError, EmbeddedSettings, Storage},
    error::{Fault, Trouble},
    open,
    record::{Header, Record},
    session::Ack,
};
use crate::pipeline::size_gate::{self, SizedRecord};

const MODES: [Mode; 3] = [Mode::Session, Mode::SessionHttp2, Mode::Unary];

async fn server() -> Embedded {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Embedded::start(EmbeddedSettings { listen, storage: Storage::Memory }).await.unwrap()
}

fn settings(url: String, stream: &str, mode: Mode) -> Settings {
    Settings {
        endpoint: Endpoint::Url(url),
        mode,
        create: true,
        ..Settings::new("test-basin", stream)
    }
}

/// A client of a stream that exists, with a server that lives as long as it is held.
async fn ready(mode: Mode) -> (Embedded, Client) {
    let server = server().await;
    let client = Client::new(settings(server.url(), "a/stream?", mode)).unwrap();
    assert_eq!(client.create_missing().await.unwrap(), Created::New);
    (server, client)
}

fn record(text: &str) -> SizedRecord {
    let header = Header {
        name: Bytes::from_static(b"sb-key"),
        value: Bytes::copy_from_slice(text.as_bytes()),
    };
    size_gate::check(Record {
        timestamp_ms: Some(1_700_000_000_000),
        headers: header.into(),
        body: Bytes::copy_from_slice(text.as_bytes()),
    })
    .unwrap()
}

fn sized(body_bytes: usize) -> SizedRecord {
    let body = Bytes::from(vec![b'x'; body_bytes]);
    size_gate::check(Record { timestamp_ms: None, headers: Default::default(), body }).unwrap()
}

fn batch(name: &str, count: usize) -> Vec<SizedRecord> {
    (0..count).map(|index| record(&format!("{name}-{index}"))).collect()
}

fn send(session: &mut Session, records: &[SizedRecord], number: Option<u64>, token: Option<&str>) {
    let records = &records.iter().collect::<Vec<_>>();
    session.send(Append { records, match_seq_num: number, fencing_token: token }).unwrap();
}

async fn everything(client: &Client) -> Vec<ReadRecord> {
    let mut reader = client.read_to_tail(0).await.unwrap();
    let mut records = Vec::new();
    while let Some(page) = reader.next().await.unwrap() {
        records.extend(page);
    }
    records
}

/// The bodies of all data records.
async fn texts(client: &Client) -> Vec<String> {
    let records = everything(client).await;
    let data = records.iter().filter(|record| !record.is_command());
    data.map(|record| String::from_utf8(record.body.to_vec()).unwrap()).collect()
}

fn trouble(error: &Error) -> Trouble {
    let Class::Sink(trouble) = error.class() else { panic!("{error:?}") };
    trouble
}

async fn take_over(client: &Client, previous: &[&str], next: &str, from: u64) -> Opened {
    try_take_over(client, previous, next, from).await.unwrap()
}

async fn try_take_over(
    client: &Client,
    previous: &[&str],
    next: &str,
    from: u64,
) -> Result<Opened, Error> {
    let previous: Vec<String> = previous.iter().map(|&token| token.to_owned()).collect();
    open(client, &previous, next, from.into(), Guarantee::AtLeastOnce, |_| {}).await
}

#[tokio::test]
async fn what_is_appended_is_read_back() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut session = Session::open(&client);
        send(&mut session, &batch("a", 3), Some(0), None);
        send(&mut session, &batch("b", 2), None, None);
        let ack = session.next_ack().await.unwrap();
        assert_eq!((ack.start, ack.end), (0, 3), "{mode:?}");
        let acks = session.close().await.unwrap();
        assert_eq!(acks.len(), 1);
        assert_eq!((acks[0].start, acks[0].end, acks[0].tail.next_seq), (3, 5, 5));

        assert_eq!(texts(&client).await, ["a-0", "a-1", "a-2", "b-0", "b-1"]);
        let page = client.read(ReadFrom::TailOffset(1), 1000, Duration::ZERO).await.unwrap();
        assert_eq!(page.records.len(), 1);
        let last = &page.records[0];
        assert_eq!((last.seq, last.timestamp_ms), (4, 1_700_000_000_000));
        assert_eq!(last.header("sb-key").unwrap(), "b-1");
        assert_eq!(client.tail().await.unwrap().next_seq, 5);
        let page = client.read(ReadFrom::Seq(5), 1, Duration::ZERO).await.unwrap();
        assert_eq!((page.records.len(), page.tail.unwrap().next_seq), (0, 5));
    }
}

/// What JSON cannot spell, and what it would blow up over the size of a request, travel in every mode.
#[tokio::test]
async fn any_bytes_up_to_the_limit_are_read_back() {
    let full = usize::try_from(super::record::RECORD_BYTES_MAX).unwrap() - 8;
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut session = Session::open(&client);
        let bodies = [vec![0xff; 10], vec![1; full], vec![b'x'; full]];
        for body in &bodies {
            let body = Bytes::from(body.clone());
            let record = Record { timestamp_ms: Some(1), headers: Default::default(), body };
            send(&mut session, &[size_gate::check(record).unwrap()], None, None);
        }
        session.close().await.unwrap();
        let read = everything(&client).await;
        assert!(read.iter().map(|record| &record.body).eq(&bodies), "{mode:?}");
    }
}

#[tokio::test]
async fn fifty_batches_under_way_are_acknowledged_in_order() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut session = Session::open(&client);
        for index in 0..50 {
            let records = batch(&index.to_string(), 20);
            send(&mut session, &records, Some(index * 20), None);
        }
        assert_eq!(session.outstanding(), 50);
        for index in 0..50 {
            let Ack { start, end, .. } = session.next_ack().await.unwrap();
            assert_eq!((start, end), (index * 20, index * 20 + 20), "{mode:?}");
        }
        session.half_close();
        assert!(matches!(session.next_ack().await, Err(Error::Closed)));
        let expected: Vec<String> = (0..50)
            .flat_map(|batch| (0..20).map(move |index| format!("{batch}-{index}")))
            .collect();
        assert_eq!(texts(&client).await, expected);
    }
}

#[tokio::test]
async fn a_wrong_number_ends_the_session_and_what_was_behind_it_never_lands() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut session = Session::open(&client);
        send(&mut session, &batch("a", 3), Some(0), None);
        send(&mut session, &batch("b", 1), Some(7), None);
        send(&mut session, &batch("c", 1), None, None);
        assert_eq!(session.next_ack().await.unwrap().end, 3);
        let error = session.next_ack().await.unwrap_err();
        // Over HTTP/1.1 the reason may be lost with the connection; it is never a success.
        if let Class::SeqMismatch { next } = error.class() {
            assert_eq!(next, 3);
        } else {
            assert!(mode == Mode::Session && trouble(&error).ambiguous, "{mode:?}: {error:?}");
        }
        assert!(session.next_ack().await.is_err());
        assert_eq!(texts(&client).await, ["a-0", "a-1", "a-2"], "{mode:?}");
    }
}

// Several threads, so that writing and reading race as they do in the real process.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_first_batch_is_always_explained() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let large: Vec<SizedRecord> = (0..10).map(|_| sized(100_000)).collect();
        for _ in 0..20 {
            let mut session = Session::open(&client);
            send(&mut session, &large, Some(7), None);
            for _ in 0..20 {
                send(&mut session, &large, None, None);
            }
            let error = session.next_ack().await.unwrap_err();
            assert_eq!(error.class(), Class::SeqMismatch { next: 0 }, "{mode:?}");
        }
        assert_eq!(client.tail().await.unwrap().next_seq, 0);
    }
}

#[tokio::test]
async fn batches_beyond_the_limits_are_not_sent() {
    let (_server, client) = ready(Mode::Session).await;
    let mut session = Session::open(&client);
    let large = sized(600_000);
    for records in [vec![], batch("a", 1001), vec![large.clone(), large.clone()]] {
        let records = &records.iter().collect::<Vec<_>>();
        let append = Append { records, match_seq_num: None, fencing_token: None };
        let error = session.send(append).unwrap_err();
        assert!(matches!(error.class(), Class::Fatal { .. }), "{error}");
    }
    send(&mut session, &batch("a", 1000), None, None);
    send(&mut session, std::slice::from_ref(&large), None, None);
    let acks = session.close().await.unwrap();
    assert_eq!(acks.last().unwrap().end, 1001);
    assert_eq!(everything(&client).await.len(), 1001);
}

#[tokio::test]
async fn the_servers_own_word_on_an_oversize_record_is_understood() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut session = Session::open(&client);
        let oversize = Record {
            timestamp_ms: None,
            headers: Default::default(),
            body: Bytes::from(vec![b'x'; 1024 * 1024]),
        };
        send(&mut session, &batch("a", 2), None, None);
        // Around the gate, as no caller can.
        session.send_records(std::iter::once(&oversize), 1, None, None).unwrap();
        assert_eq!(session.next_ack().await.unwrap().end, 2);
        let error = session.next_ack().await.unwrap_err();
        let Class::Oversize(refusal) = error.class() else { panic!("{mode:?}: {error:?}") };
        assert_eq!(refusal.status, 422);
        assert!(refusal.body.contains("metered size"));
        assert_eq!(texts(&client).await, ["a-0", "a-1"]);
        let error = client.append_unary(std::iter::once(&oversize), None, None).await.unwrap_err();
        assert!(matches!(error.class(), Class::Oversize(_)));
    }
}

#[tokio::test]
async fn missing_streams_and_basins_are_named_and_created_on_wish() {
    let server = server().await;
    for mode in MODES {
        let client =
            Client::new(Settings { create: false, ..settings(server.url(), "missing", mode) })
                .unwrap();
        let code = |error: Error| {
            assert!(!trouble(&error).ambiguous);
            trouble(&error).code
        };
        assert_eq!(code(client.tail().await.unwrap_err()), "sink_404_basin");
        let error = try_take_over(&client, &[], "t", 0).await.unwrap_err();
        assert_eq!(code(error), "sink_404_basin");
        let mut session = Session::open(&client);
        send(&mut session, &batch("a", 1), None, None);
        assert_eq!(code(session.next_ack().await.unwrap_err()), "sink_404_basin");
    }
    let client = Client::new(settings(server.url(), "missing", Mode::Session)).unwrap();
    assert_eq!(client.create_basin().await.unwrap(), Created::New);
    assert_eq!(client.create_basin().await.unwrap(), Created::Existed);
    let error = client.tail().await.unwrap_err();
    assert!(error.is_stream_missing(), "{error}");
    assert_eq!(client.stream_exists().await.unwrap(), Some(false));
    let error = client.check_append().await.unwrap_err();
    assert!(error.is_stream_missing(), "{error}");
    // A stream that was written to before is not begun anew without a word.
    let error = try_take_over(&client, &[], "t", 5).await.unwrap_err();
    assert!(matches!(error, Error::StreamRecreated { reached: 5, tail: 0, .. }), "{error}");
    let opened = take_over(&client, &[], "t", 0).await;
    assert_eq!(opened.next_seq, Some(1));
    // Nor is one that has what is to be read, and not what it had behind that.
    let stream = crate::sink::open::Known { read_from: 0, reached: 2 };
    let older = open(&client, &["t".to_owned()], "u", stream, Guarantee::ExactlyOnce, |_| {}).await;
    let error = older.err().unwrap();
    assert!(matches!(error, Error::StreamRecreated { reached: 2, tail: 1, .. }), "{error}");
    assert_eq!(client.create_missing().await.unwrap(), Created::Existed);
    assert_eq!(client.stream_exists().await.unwrap(), Some(true));
    assert_eq!(client.check_append().await.unwrap(), 1);
    assert_eq!(client.tail().await.unwrap().next_seq, 1);
}

#[tokio::test]
async fn a_takeover_reads_what_is_there_and_goes_on_behind_its_fence() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut first = take_over(&client, &[], "one", 0).await;
        assert_eq!(first.guarantee, Guarantee::ExactlyOnce);
        assert_eq!(first.next_seq, Some(1));
        send(&mut first.session, &batch("a", 1000), first.next_seq, Some("one"));
        assert_eq!(first.session.next_ack().await.unwrap().end, 1001);

        let previous = ["one".to_owned()];
        let mut keys = Vec::new();
        let second = open(&client, &previous, "two", 1.into(), Guarantee::AtLeastOnce, |record| {
            keys.push((record.seq, record.header("sb-key").unwrap().clone()));
        })
        .await
        .unwrap();
        assert_eq!(second.next_seq, Some(1002));
        assert_eq!(second.fencing_token.as_deref(), Some("two"));
        assert_eq!(keys.len(), 1000);
        assert_eq!(keys[999], (1000, Bytes::from_static(b"a-999")));
        // The fence did not move time on: later records keep their own.
        let fence = client.read(ReadFrom::Seq(1001), 1, Duration::ZERO).await.unwrap();
        assert!(fence.records[0].is_command());
        assert_eq!(fence.records[0].timestamp_ms, 1_700_000_000_000);
    }
}

#[tokio::test]
async fn a_takeover_reads_back_pages_larger_than_s2_gives_at_once() {
    let (_server, client) = ready(Mode::Session).await;
    let mut session = Session::open(&client);
    for _ in 0..10 {
        send(&mut session, &[sized(300_000)], None, None);
    }
    session.close().await.unwrap();
    let mut seqs = Vec::new();
    open(&client, &[], "t", 3.into(), Guarantee::AtLeastOnce, |record| seqs.push(record.seq))
        .await
        .unwrap();
    assert_eq!(seqs, [3, 4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn a_zombie_stands_down() {
    for mode in MODES {
        let (_server, client) = ready(mode).await;
        let mut zombie = take_over(&client, &[], "zombie", 0).await;
        let mut heir = take_over(&client, &["zombie"], "heir", 0).await;
        send(&mut heir.session, &batch("heir", 1), heir.next_seq, Some("heir"));
        heir.session.next_ack().await.unwrap();

        // Its number is right, which is what the token is for.
        send(&mut zombie.session, &batch("zombie", 1), Some(3), Some("zombie"));
        let error = zombie.session.next_ack().await.unwrap_err();
        assert!(matches!(&error, Error::Fenced { actual, .. } if actual == "heir"), "{error}");
        let error = try_take_over(&client, &["zombie"], "zombie-2", 0).await.unwrap_err();
        assert_eq!(error.class(), Class::Fenced { actual: "heir".to_owned() });
        assert_eq!(texts(&client).await, ["heir-0"]);
    }
}

#[tokio::test]
async fn tokens_of_fences_whose_answer_was_lost_are_recognised() {
    let (_server, client) = ready(Mode::Session).await;
    // The store knows a token that never reached the stream.
    take_over(&client, &["never-landed"], "one", 0).await;
    // The newest one did not, the one before did.
    take_over(&client, &["never-landed-2", "one", "never-landed"], "two", 0).await;
    let error = try_take_over(&client, &["one"], "three", 0).await.unwrap_err();
    assert!(matches!(error, Error::Fenced { actual, .. } if actual == "two"));
    let error = try_take_over(&client, &[], "three", 0).await.unwrap_err();
    assert!(matches!(error, Error::Fenced { actual, .. } if actual == "two"));
    let error = try_take_over(&client, &["two"], &"t".repeat(37), 0).await.unwrap_err();
    assert!(matches!(error, Error::Settings { .. }));
    take_over(&client, &["two"], &"t".repeat(36), 0).await;
}

#[tokio::test]
async fn a_writer_that_appends_all_the_time_does_not_keep_us_out() {
    let (_server, client) = ready(Mode::Session).await;
    let busy = client.clone();
    let writer = tokio::spawn(async move {
        let mut session = Session::open(&busy);
        loop {
            send(&mut session, &batch("busy", 1), None, None);
            session.next_ack().await.unwrap();
        }
    });
    for round in 0..3 {
        let previous = format!("token-{}", round - 1);
        take_over(&client, &[&previous], &format!("token-{round}"), 0).await;
    }
    writer.abort();
}

#[tokio::test]
async fn a_recreated_stream_is_refused() {
    let (_server, client) = ready(Mode::Session).await;
    take_over(&client, &[], "one", 0).await;
    let error = try_take_over(&client, &["one"], "two", 9).await.unwrap_err();
    let Class::Stream { code, .. } = error.class() else { panic!("{error}") };
    assert_eq!(code, "sink_stream_recreated");
    assert_eq!(client.tail().await.unwrap().next_seq, 1, "a refusal leaves no trace");
}

#[tokio::test]
async fn a_trimmed_stream_is_refused() {
    let (_server, client) = ready(Mode::Session).await;
    let mut session = Session::open(&client);
    send(&mut session, &batch("a", 10), None, None);
    session.next_ack().await.unwrap();
    let trim = Record {
        timestamp_ms: None,
        headers: Header { name: Bytes::new(), value: Bytes::from_static(b"trim") }.into(),
        body: Bytes::copy_from_slice(&5_u64.to_be_bytes()),
    };
    session.send_records(std::iter::once(&trim), 1, None, None).unwrap();
    session.next_ack().await.unwrap();
    // Trimming is lazy.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let first = loop {
        let page = client.read(ReadFrom::Seq(0), 1, Duration::ZERO).await.unwrap();
        let first = page.records[0].seq;
        if first > 0 {
            break first;
        }
        assert!(tokio::time::Instant::now() < deadline, "it was not trimmed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let error = try_take_over(&client, &[], "one", first - 1).await.unwrap_err();
    let Class::Stream { code, text } = error.class() else { panic!("{error}") };
    assert_eq!(code, "sink_stream_trimmed");
    assert!(text.contains(&format!("begins at record {first}")), "{text}");
    assert_eq!(client.tail().await.unwrap().next_seq, 11, "a refusal leaves no trace");
    take_over(&client, &[], "one", first).await;
}

#[tokio::test]
async fn without_fencing_numbers_alone_are_promised() {
    let (server, client) = ready(Mode::Session).await;
    let client = Client::new(Settings {
        fencing: false,
        ..settings(server.url(), &client.place().stream, Mode::Session)
    })
    .unwrap();
    let opened = take_over(&client, &[], "t", 0).await;
    assert_eq!((opened.next_seq, opened.fencing_token), (Some(0), None));
    assert_eq!(opened.guarantee, Guarantee::NumbersOnly);
    assert_eq!(client.tail().await.unwrap().next_seq, 0);
}

#[tokio::test]
async fn a_reader_follows_the_stream() {
    let (_server, client) = ready(Mode::Session).await;
    let mut reader = client.follow(0);
    let mut session = Session::open(&client);
    for index in 0..3 {
        let (page, ()) = tokio::join!(reader.next(), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            send(&mut session, &batch(&index.to_string(), 2), None, None);
            session.next_ack().await.unwrap();
        });
        let page = page.unwrap().unwrap();
        assert_eq!(page[0].seq, index * 2);
    }
    assert_eq!(reader.next_seq(), 6);
}

/// Passes bytes through to `target` until told to cut every connection.
async fn proxy(target: SocketAddr) -> (String, tokio::sync::watch::Sender<bool>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (cut, watch) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut watch = watch.clone();
            tokio::spawn(async move {
                let Ok(mut far) = TcpStream::connect(target).await else { return };
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    _ = watch.wait_for(|cut| *cut) => {}
                }
            });
        }
    });
    (url, cut)
}

#[tokio::test]
async fn a_cut_is_ambiguous_only_with_batches_under_way() {
    for mode in [Mode::Session, Mode::SessionHttp2] {
        for under_way in [false, true] {
            let (server, direct) = ready(mode).await;
            let (url, cut) = proxy(server.address()).await;
            let client = Client::new(settings(url, &direct.place().stream, mode)).unwrap();
            let mut session = Session::open(&client);
            send(&mut session, &batch("a", 1), Some(0), None);
            session.next_ack().await.unwrap();
            cut.send(true).unwrap();
            if under_way {
                send(&mut session, &batch("b", 1), Some(1), None);
            }
            let error = session.next_ack().await.unwrap_err();
            let trouble = trouble(&error);
            assert_eq!((&*trouble.code, trouble.ambiguous), ("sink_cut", under_way), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_runs_out_of_time() {
    for mode in [Mode::Session, Mode::SessionHttp2] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let silent = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut sink = Vec::new();
            drop(stream.read_to_end(&mut sink).await);
        });
        let client = Client::new(Settings {
            ack_time_out: Duration::from_millis(200),
            ..settings(url, "s", mode)
        })
        .unwrap();
        let mut session = Session::open(&client);
        let idle = tokio::time::timeout(Duration::from_millis(400), session.next_ack()).await;
        assert!(idle.is_err(), "nothing under way, nothing due");
        send(&mut session, &batch("a", 1), None, None);
        let error = session.next_ack().await.unwrap_err();
        assert!(
            matches!(error, Error::Connection { fault: Fault::TimeOut, ambiguous: true, .. }),
            "{error:?}"
        );
        silent.abort();
    }
}

/// A server that answers every request with these bytes.
async fn canned(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = vec![0; 64 * 1024];
                // Each request comes as one piece, or the answer comes early, as from a proxy.
                while let Ok(1..) = stream.read(&mut request).await {
                    drop(stream.write_all(answer).await);
                    if answer.windows(17).any(|window| window == b"connection: close") {
                        // Let the answer arrive before the connection ends.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        return;
                    }
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn what_a_proxy_or_another_server_answers_is_told() {
    async fn check(answer: &'static [u8], expected: &str) {
        for mode in [Mode::Session, Mode::Unary] {
            let url = canned(answer).await;
            let client =
                Client::new(Settings { create: false, ..settings(url, "s", mode) }).unwrap();
            let mut session = Session::open(&client);
            send(&mut session, &batch("a", 1), None, None);
            let error = session.next_ack().await.unwrap_err();
            assert_eq!(trouble(&error).code, expected, "{error:?}");
            let error = client.tail().await.unwrap_err();
            assert_eq!(trouble(&error).code, expected, "{error:?}");
        }
    }
    check(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "sink_401").await;
    check(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nBusy", "sink_503").await;
    check(b"HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n", "sink_302").await;
    check(b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n<html>hi</html>", "sink_protocol").await;
    check(b"HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 400\r\n\r\nBus", "sink_503")
        .await;
}

#[tokio::test]
async fn a_413_of_a_proxy_is_oversize() {
    let url = canned(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno").await;
    for mode in [Mode::Session, Mode::Unary] {
        let client = Client::new(settings(url.clone(), "s", mode)).unwrap();
        let mut session = Session::open(&client);
        send(&mut session, &batch("a", 1), None, None);
        let class = session.next_ack().await.unwrap_err().class();
        let Class::Oversize(refusal) = class else { panic!("{class:?}") };
        assert_eq!((refusal.status, &*refusal.body), (413, "no"));
    }
}

#[tokio::test]
async fn a_directory_keeps_records_and_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let settings_of = || EmbeddedSettings { listen, storage: Storage::Dir(dir.path().join("s2")) };
    let server = Embedded::start(settings_of()).await.unwrap();
    let second = Embedded::start(settings_of()).await.unwrap_err();
    assert!(matches!(second, EmbeddedError::Locked { .. }), "{second}");
    let client = Client::new(settings(server.url(), "s", Mode::Session)).unwrap();
    let mut opened = take_over(&client, &[], "one", 0).await;
    send(&mut opened.session, &batch("a", 3), opened.next_seq, Some("one"));
    opened.session.close().await.unwrap();
    server.shutdown().await.unwrap();

    let server = Embedded::start(settings_of()).await.unwrap();
    let health = reqwest::get(format!("{}/health", server.url())).await.unwrap();
    assert!(health.status().is_success());
    let client = Client::new(settings(server.url(), "s", Mode::Session)).unwrap();
    assert_eq!(texts(&client).await, ["a-0", "a-1", "a-2"]);
    let taken = EmbeddedSettings { listen: server.address(), storage: Storage::Memory };
    let error = Embedded::start(taken).await.unwrap_err();
    assert!(matches!(error, EmbeddedError::Listen { .. }), "{error}");
    server.shutdown().await.unwrap();
}

/// Stands in front of `target` and refuses what `refuse` says, with that status and code; a 200 has
/// no body. For requests with an end: a session does not pass.
async fn gate(
    target: String,
    refuse: impl Fn(&axum::http::request::Parts, &[u8]) -> Option<(u16, &'static str)>
    + Clone
    + Send
    + Sync
    + 'static,
) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let client = reqwest::Client::new();
    let router = axum::Router::new().fallback(move |request: axum::extract::Request| async move {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let refused = refuse(&parts, &body);
        let (status, body) = if let Some((200, _)) = refused {
            (200, Bytes::new())
        } else if let Some((status, code)) = refused {
            (status, Bytes::from(format!(r#"{{"code":"{code}","message":"refused"}}"#)))
        } else {
            let path = parts.uri.path_and_query().unwrap();
            let answer = client
                .request(parts.method, format!("{target}{path}"))
                .headers(parts.headers)
                .body(body)
                .send()
                .await
                .unwrap();
            (answer.status().as_u16(), answer.bytes().await.unwrap())
        };
        (axum::http::StatusCode::from_u16(status).unwrap(), body)
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

#[tokio::test]
async fn the_guarantee_is_what_the_token_allows() {
    type Refuse = fn(&axum::http::request::Parts, &[u8]) -> bool;
    async fn check(refuse: Refuse, guarantee: Guarantee, next_seq: Option<u64>) {
        let (server, direct) = ready(Mode::Unary).await;
        let mut session = Session::open(&direct);
        send(&mut session, &batch("a", 3), None, None);
        session.close().await.unwrap();
        let url = gate(server.url(), move |parts, body| {
            refuse(parts, body).then_some((403, "permission_denied"))
        })
        .await;
        let client = Client::new(settings(url, &direct.place().stream, Mode::Unary)).unwrap();
        let mut seen = 0;
        let mut opened =
            open(&client, &[], "t", 0.into(), Guarantee::AtLeastOnce, |_| seen += 1).await.unwrap();
        assert_eq!((opened.guarantee, opened.next_seq), (guarantee, next_seq));
        assert_eq!(opened.fencing_token.is_some(), guarantee == Guarantee::ExactlyOnce);
        assert_eq!(seen, if guarantee.has_numbers() { 3 } else { 0 });
        let token = opened.fencing_token.as_deref();
        send(&mut opened.session, &batch("b", 1), opened.next_seq, token);
        opened.session.close().await.unwrap();
        assert_eq!(texts(&direct).await, ["a-0", "a-1", "a-2", "b-0"]);
        // What was promised once is not taken back for a refusal that may pass.
        let before = direct.tail().await.unwrap();
        let again =
            open(&client, &["t".to_owned()], "u", 0.into(), Guarantee::ExactlyOnce, |_| {}).await;
        match guarantee {
            Guarantee::ExactlyOnce => drop(again.unwrap()),
            Guarantee::NumbersOnly | Guarantee::AtLeastOnce => {
                assert!(again.unwrap_err().is_forbidden());
                assert_eq!(direct.tail().await.unwrap(), before);
            }
        }
    }
    check(|_, _| false, Guarantee::ExactlyOnce, Some(4)).await;
    check(
        |_, body| body.windows(5).any(|window| window == b"fence"),
        Guarantee::NumbersOnly,
        Some(3),
    )
    .await;
    check(|parts, _| parts.uri.path().ends_with("/tail"), Guarantee::AtLeastOnce, None).await;
    check(
        |parts, _| parts.method == "GET" && parts.uri.path().ends_with("/records"),
        Guarantee::AtLeastOnce,
        None,
    )
    .await;
    check(|parts, _| parts.method == "GET", Guarantee::AtLeastOnce, None).await;
}

/// An answer that something has cut off is no proof that records are gone, which would stop the
/// pipeline.
#[tokio::test]
async fn an_empty_page_is_asked_for_again() {
    let (server, direct) = ready(Mode::Unary).await;
    let mut session = Session::open(&direct);
    send(&mut session, &batch("a", 3), None, None);
    session.close().await.unwrap();
    let (asked, mut seen) = (std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0)), 0);
    let url = gate(server.url(), move |parts, _| {
        let is_page = parts.method == "GET" && parts.uri.path().ends_with("/records");
        // Every second page is cut.
        let is_cut =
            is_page && asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed).is_multiple_of(2);
        is_cut.then_some((200, ""))
    })
    .await;
    let client = Client::new(settings(url, &direct.place().stream, Mode::Unary)).unwrap();
    let opened =
        open(&client, &[], "t", 1.into(), Guarantee::AtLeastOnce, |_| seen += 1).await.unwrap();
    assert_eq!((opened.next_seq, seen), (Some(4), 2));
}

#[tokio::test]
async fn an_append_only_token_can_be_checked() {
    let (server, direct) = ready(Mode::Unary).await;
    let url = gate(server.url(), |parts, _| {
        (parts.method == "GET").then_some((403, "permission_denied"))
    })
    .await;
    let client = Client::new(settings(url, &direct.place().stream, Mode::Unary)).unwrap();
    assert_eq!(client.stream_exists().await.unwrap(), None);
    assert_eq!(client.check_append().await.unwrap(), 0);
    assert!(client.tail().await.unwrap_err().is_forbidden());
    assert_eq!(client.create_stream().await.unwrap(), Created::Existed);
    assert_eq!(everything(&direct).await.len(), 0);
}

#[tokio::test]
async fn a_token_that_is_mended_needs_no_restart() {
    let (server, direct) = ready(Mode::Unary).await;
    let url = gate(server.url(), |parts, _| {
        let token = parts.headers.get("authorization").and_then(|token| token.to_str().ok());
        (token != Some("Bearer right")).then_some((401, "authn"))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "wrong").unwrap();
    let of = |token| Settings {
        token: Some(token),
        ..settings(url.clone(), &direct.place().stream, Mode::Unary)
    };
    let client = Client::new(of(Token::file(path.clone()))).unwrap();
    let code = |error: Error| trouble(&error).code;
    assert_eq!(code(client.tail().await.unwrap_err()), "sink_401");
    let mut session = Session::open(&client);
    send(&mut session, &batch("a", 1), None, None);
    assert_eq!(code(session.next_ack().await.unwrap_err()), "sink_401");
    std::fs::write(&path, "right").unwrap();
    assert_eq!(client.tail().await.unwrap().next_seq, 0);
    // A token that is changed before the old one is refused is picked up within one request.
    std::fs::write(&path, "wrong").unwrap();
    let client = Client::new(of(Token::file(path.clone()))).unwrap();
    client.tail().await.unwrap_err();
    std::fs::write(&path, "right").unwrap();
    client.tail().await.unwrap();
    let client = Client::new(of(Token::fixed("wrong").unwrap())).unwrap();
    let error = client.tail().await.unwrap_err();
    assert!(!format!("{error} {error:?} {client:?}").contains("wrong"));
    assert_eq!(code(error), "sink_401");
}

/// The protocol as a whole: connections are cut at any moment, the writer forgets everything but
/// its tokens and its checkpoint, and in the end each record is there once and in order.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_doubled_or_reordered_by_cuts() {
    const RECORDS: u64 = 3000;
    const BATCHES_UNDER_WAY: usize = 8;
    for mode in MODES {
        let (server, direct) = ready(mode).await;
        let mut tokens: Vec<String> = Vec::new();
        // The store: what is known to be in the stream, and where to read from.
        let (mut done, mut read_from) = (0_u64, 0_u64);
        let mut cuts = 0_u64;
        while done < RECORDS {
            let (url, cut) = proxy(server.address()).await;
            let client = Client::new(settings(url, &direct.place().stream, mode)).unwrap();
            let moment = Duration::from_millis(5 + 7 * (cuts % 9));
            let killer = tokio::spawn(async move {
                tokio::time::sleep(moment).await;
                cut.send_replace(true);
                // The proxy lives as long as this.
                std::future::pending::<()>().await;
            });
            let next_token = format!("token-{cuts}");
            let previous = tokens.clone();
            tokens.insert(0, next_token.clone());
            let mut found = Vec::new();
            let opened = open(
                &client,
                &previous,
                &next_token,
                read_from.into(),
                Guarantee::ExactlyOnce,
                |record| {
                    found.push(String::from_utf8(record.body.to_vec()).unwrap());
                },
            )
            .await;
            if let Ok(opened) = opened {
                for body in found {
                    assert_eq!(body, done.to_string());
                    done += 1;
                }
                let (mut session, mut seq) = (opened.session, opened.next_seq.unwrap());
                read_from = seq;
                let mut sent = done;
                loop {
                    while session.outstanding() < BATCHES_UNDER_WAY && sent < RECORDS {
                        let end = (sent + 7).min(RECORDS);
                        let records: Vec<SizedRecord> =
                            (sent..end).map(|item| record(&item.to_string())).collect();
                        send(&mut session, &records, Some(seq), Some(&next_token));
                        seq += end - sent;
                        sent = end;
                    }
                    if done == RECORDS {
                        break;
                    }
                    let Ok(ack) = session.next_ack().await else { break };
                    done += ack.end - ack.start;
                    read_from = ack.end;
                }
            }
            killer.abort();
            cuts += 1;
        }
        let expected: Vec<String> = (0..RECORDS).map(|item| item.to_string()).collect();
        assert_eq!(texts(&direct).await, expected, "{mode:?}");
        assert!(cuts > 3, "{mode:?}: only {cuts} cuts");
    }
}
