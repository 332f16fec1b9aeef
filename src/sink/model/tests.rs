//! The model beside the real server: the same requests, the same answers.

use prost::Message as _;

use super::*;
use crate::sink::embedded::{Embedded, EmbeddedSettings, Storage};
use crate::sink::proto::ReadBatch;

const BASIN: &str = "model-basin";

/// What of an answer the client looks at.
#[derive(Debug, PartialEq)]
enum Seen {
    Ack(AppendAck),
    Records(Vec<SequencedRecord>),
    Json(serde_json::Value),
    /// Of an error the status and the code: the texts are the server's own.
    Refused(u16, serde_json::Value),
}

fn seen(method: &str, path: &str, status: u16, body: &[u8]) -> Seen {
    if (method, status) == ("POST", 200) {
        return match body.starts_with(b"{") {
            true => Seen::Json(serde_json::from_slice(body).unwrap()),
            false => Seen::Ack(AppendAck::decode(body).unwrap()),
        };
    }
    if status == 200 && !path.ends_with("/tail") {
        return Seen::Records(ReadBatch::decode(body).unwrap().records);
    }
    let mut json: serde_json::Value = serde_json::from_slice(body).unwrap();
    if status == 200 {
        return Seen::Json(json);
    }
    if let Some(object) = json.as_object_mut() {
        object.remove("message");
    }
    Seen::Refused(status, json)
}

/// Both servers, with one stream.
struct Both {
    model: Model,
    real: Embedded,
    client: reqwest::Client,
}

impl Both {
    async fn new() -> Self {
        let listen = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let settings = EmbeddedSettings { listen, storage: Storage::Memory };
        let real = Embedded::start(settings).await.unwrap();
        let client = reqwest::Client::new();
        for (path, name) in [("v1/basins", "basin"), ("v1/streams", "stream")] {
            let value = if name == "basin" { BASIN } else { "s" };
            let body = serde_json::json!({ name: value }).to_string();
            let url = format!("{}/{path}", real.url());
            let request = client.post(url).header("s2-basin", BASIN);
            let request = request.header("content-type", "application/json").body(body);
            assert!(request.send().await.unwrap().status().is_success());
        }
        let mut model = Model::default();
        model.create("s");
        Self { model, real, client }
    }

    /// Asks both, and wants the same of them.
    async fn ask(&mut self, method: &str, path: &str, query: &[(&str, u64)], body: Vec<u8>) {
        let asked = query.iter().map(|(name, value)| format!("{name}={value}"));
        let asked = asked.collect::<Vec<_>>().join("&");
        let url = format!("{}/v1/streams/{path}?{asked}", self.real.url());
        let form = if body.starts_with(b"{") { "json" } else { "protobuf" };
        let form = format!("application/{form}");
        let answer = self
            .client
            .request(method.parse().unwrap(), url)
            .header("s2-basin", BASIN)
            .header("content-type", &form)
            .header("accept", &form)
            .body(body.clone())
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        let real = seen(method, path, status, &answer.bytes().await.unwrap());
        let parameter = |name: &str| query.iter().find(|(known, _)| *known == name).map(|q| q.1);
        let path_of_model = format!("/v1/streams/{path}");
        let answer = self.model.answer(method, &path_of_model, parameter, &body);
        let model = seen(method, path, answer.status, &answer.body);
        assert_eq!(model, real, "{method} {path} {query:?}");
    }

    async fn append(
        &mut self,
        stream: &str,
        records: Vec<AppendRecord>,
        match_seq_num: Option<u64>,
        token: Option<&str>,
    ) {
        let fencing_token = token.map(str::to_owned);
        let input = AppendInput { records, match_seq_num, fencing_token };
        let path = format!("{stream}/records");
        self.ask("POST", &path, &[], input.encode_to_vec()).await;
    }

    async fn append_json(&mut self, records: serde_json::Value, seq: Option<u64>, token: &str) {
        let input = serde_json::json!({
            "records": records, "match_seq_num": seq, "fencing_token": token,
        });
        self.ask("POST", "s/records", &[], input.to_string().into_bytes()).await;
    }

    async fn read(&mut self, seq: u64, count: u64) {
        let query = [("seq_num", seq), ("count", count), ("bytes", RECORD_BYTES_MAX)];
        self.ask("GET", "s/records", &query, Vec::new()).await;
    }
}

fn record(timestamp: u64, body_bytes: usize) -> AppendRecord {
    let header = HeaderMessage { name: Bytes::from_static(b"n"), value: Bytes::from_static(b"v") };
    let body = Bytes::from(vec![b'x'; body_bytes]);
    AppendRecord { timestamp: Some(timestamp), headers: vec![header], body }
}

fn fence(timestamp: u64, token: &'static str) -> AppendRecord {
    let header = HeaderMessage { name: Bytes::new(), value: Bytes::from_static(b"fence") };
    AppendRecord { timestamp: Some(timestamp), headers: vec![header], body: token.into() }
}

#[tokio::test]
async fn the_model_answers_as_the_server_does() {
    let mut both = Both::new().await;
    both.ask("GET", "s/records/tail", &[], Vec::new()).await;
    both.read(0, 10).await;
    both.append("absent", vec![record(5, 1)], None, None).await;
    both.append("s", vec![record(5, 1), record(9, 2)], Some(0), None).await;
    // Later records are never older than earlier ones.
    both.append("s", vec![record(7, 3)], Some(2), Some("")).await;
    both.append("s", vec![record(9, 1)], Some(2), None).await;
    both.append("s", vec![record(9, 1)], Some(4), None).await;
    both.append("s", vec![record(9, 1)], None, Some("unknown")).await;
    both.append("s", Vec::new(), None, None).await;
    both.append("s", vec![record(9, 1); 1001], None, None).await;
    let limit = usize::try_from(RECORD_BYTES_MAX).unwrap() - 8 - 4;
    both.append("s", vec![record(9, limit + 1)], None, None).await;
    both.append("s", vec![record(9, limit / 2), record(9, limit / 2 + 1)], None, None).await;
    both.append("s", vec![record(9, limit)], None, None).await;

    both.append("s", vec![fence(9, "one")], Some(4), Some("")).await;
    both.append("s", vec![record(10, 1)], Some(5), Some("")).await;
    both.append("s", vec![record(10, 1)], Some(5), None).await;
    both.append("s", vec![record(10, 1)], Some(6), Some("one")).await;
    // The token is looked at before the number.
    both.append("s", vec![record(10, 1)], Some(1), Some("two")).await;
    both.append("s", vec![fence(10, "two")], None, Some("one")).await;
    both.append("s", vec![record(11, 1)], None, Some("one")).await;

    let record = serde_json::json!([{ "timestamp": 12, "headers": [["n", "v"]], "body": "x" }]);
    both.append_json(record.clone(), Some(7), "two").await;
    both.append_json(record.clone(), Some(7), "two").await;
    both.append_json(record.clone(), Some(8), "one").await;
    both.append_json(record, None, "two").await;
    both.append_json(serde_json::json!([]), None, "two").await;

    both.ask("GET", "s/records/tail", &[], Vec::new()).await;
    both.ask("GET", "absent/records/tail", &[], Vec::new()).await;
    for (seq, count) in [(0, 1), (0, 1000), (1, 2), (3, 1000), (4, 1000), (8, 1), (9, 1)] {
        both.read(seq, count).await;
    }
    both.real.shutdown().await.unwrap();
}
