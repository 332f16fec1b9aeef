use rustls::CertificateError;

use super::*;

fn place() -> Arc<Place> {
    Arc::new(Place {
        endpoint: "http://127.0.0.1:8080".to_owned(),
        basin: "my-basin".to_owned(),
        stream: "products".to_owned(),
        named: Named::Sink,
    })
}

fn refused(operation: Operation, status: u16, body: &str) -> Error {
    let answer = Answer::new(status, body.as_bytes(), None);
    Error::Refused { place: place(), operation, answer }
}

fn standard(code: &str, message: &str) -> String {
    format!(r#"{{"code":"{code}","message":"{message}"}}"#)
}

#[test]
fn every_code_of_s2_has_its_class() {
    fn check(status: u16, code: &str, expected: &str, ambiguous: bool) {
        let error = refused(Operation::Append, status, &standard(code, "said so"));
        let Class::Sink(trouble) = error.class() else {
            panic!("{status} {code}: {:?}", error.class())
        };
        assert_eq!(trouble.code, expected, "{status} {code}");
        assert_eq!(trouble.ambiguous, ambiguous, "{status} {code}");
        for name in ["my-basin", "products", "http://127.0.0.1:8080"] {
            assert!(trouble.text.contains(name), "{}", trouble.text);
        }
    }
    check(400, "bad_header", "sink_400", false);
    check(400, "bad_json", "sink_400", false);
    check(400, "bad_frame", "sink_400", false);
    check(400, "bad_path", "sink_400", false);
    check(400, "bad_query", "sink_400", false);
    check(400, "decryption_failed", "sink_400", false);
    check(401, "authn", "sink_401", false);
    check(403, "permission_denied", "sink_403", false);
    check(403, "quota_exhausted", "sink_403_quota", false);
    check(404, "basin_not_found", "sink_404_basin", false);
    check(404, "stream_not_found", "sink_404_stream", false);
    check(404, "access_token_not_found", "sink_404_token", false);
    check(408, "request_timeout", "sink_408", true);
    check(409, "resource_already_exists", "sink_409", false);
    check(409, "basin_deletion_pending", "sink_409", false);
    check(409, "stream_deletion_pending", "sink_409", false);
    check(409, "transaction_conflict", "sink_409", false);
    check(429, "rate_limited", "sink_429", false);
    check(499, "client_hangup", "sink_499", true);
    check(500, "other", "sink_500", true);
    check(500, "storage", "sink_500", true);
    check(501, "not_implemented", "sink_501", false);
    check(502, "hot_server", "sink_502", false);
    check(503, "server_draining", "sink_503", false);
    check(503, "unavailable", "sink_503", true);
    check(504, "upstream_timeout", "sink_504", true);
}

#[test]
fn what_stands_in_front_of_s2_cannot_know_whether_an_append_landed() {
    fn check(status: u16, code: &str, ambiguous: bool) {
        let error = refused(Operation::Append, status, "<html>\nno\n</html>");
        let Class::Sink(trouble) = error.class() else { panic!("{:?}", error.class()) };
        assert_eq!((&*trouble.code, trouble.ambiguous), (code, ambiguous), "{status}");
    }
    check(301, "sink_301", false);
    check(401, "sink_401", false);
    check(403, "sink_403", false);
    check(404, "sink_404", false);
    check(407, "sink_407", false);
    check(408, "sink_408", true);
    check(429, "sink_429", false);
    check(500, "sink_500", true);
    check(502, "sink_502", true);
    check(503, "sink_503", true);
    check(504, "sink_504", true);
    check(520, "sink_520", true);
}

#[test]
fn a_record_is_to_blame_for_an_append_alone() {
    fn check(status: u16, body: &str, oversize: bool) {
        let refusal = Refusal { status, body: body.to_owned() };
        let expected = if oversize { Class::Oversize(refusal) } else { Class::Refused(refusal) };
        assert_eq!(refused(Operation::Append, status, body).class(), expected);
        for operation in [Operation::Fence, Operation::Tail, Operation::Read] {
            let class = refused(operation, status, body).class();
            let Class::Sink(trouble) = class else { panic!("{operation:?}: {class:?}") };
            assert_eq!(trouble.code, format!("sink_{status}"));
            assert!(!trouble.ambiguous);
        }
    }
    check(413, "<html>413 Request Entity Too Large</html>", true);
    check(413, "", true);
    let text = "record must have metered size less than 1 MiB";
    check(422, &standard("invalid", text), true);
    let text = "record batch must not exceed a metered size of 1 MiB";
    check(422, &standard("invalid", text), true);
    let text = "Failed to buffer the request body: length limit exceeded";
    check(400, &standard("bad_json", text), true);
    check(400, &standard("bad_proto", text), true);
    check(400, &standard("bad_frame", "frame exceeds decode limit"), true);
    check(422, &standard("invalid", "record batch must not exceed 1000 records"), false);
    check(422, &standard("invalid", "unknown command"), false);
    check(422, &standard("invalid", "record timestamp was missing"), false);
    check(422, "", false);
    check(400, &standard("bad_proto", "failed to decode Protobuf message"), false);
}

#[test]
fn the_rest_of_the_table() {
    let connection = |fault, ambiguous| Error::Connection {
        place: place(),
        operation: Operation::Append,
        fault,
        ambiguous,
        source: None,
    };
    for (fault, code) in [
        (Fault::Dns, "sink_dns"),
        (Fault::Connect, "sink_unreachable"),
        (Fault::CertificateExpired, "sink_tls"),
        (Fault::CertificateNotYet, "sink_tls"),
        (Fault::CertificateName, "sink_tls"),
        (Fault::CertificateIssuer, "sink_tls"),
        (Fault::Tls, "sink_tls"),
        (Fault::TimeOut, "sink_timeout"),
        (Fault::Cut, "sink_cut"),
    ] {
        for ambiguous in [false, true] {
            let class = connection(fault, ambiguous).class();
            let Class::Sink(trouble) = class else { panic!("{class:?}") };
            assert_eq!((&*trouble.code, trouble.ambiguous), (code, ambiguous));
            assert!(trouble.text.contains("http://127.0.0.1:8080"));
        }
    }
    let error = Error::SeqMismatch { place: place(), next: 7 };
    assert_eq!(error.class(), Class::SeqMismatch { next: 7 });
    let error = Error::Fenced { place: place(), actual: "theirs".to_owned() };
    assert_eq!(error.class(), Class::Fenced { actual: "theirs".to_owned() });
    let error = Error::StreamRecreated { place: place(), reached: 9, tail: 3 };
    assert!(matches!(error.class(), Class::Stream { code: "sink_stream_recreated", .. }));
    let error = Error::StreamTrimmed { place: place(), read_from: 9, first: 12 };
    assert!(matches!(error.class(), Class::Stream { code: "sink_stream_trimmed", .. }));
    let error = Error::Batch { what: "it is empty".to_owned() };
    assert!(matches!(error.class(), Class::Fatal { code: "sink_batch", .. }));
}

#[test]
fn an_answer_is_cut_and_its_wait_is_kept() {
    let body = "é".repeat(ANSWER_BYTES_MAX);
    let answer = Answer::new(503, body.as_bytes(), Some(Duration::from_millis(250)));
    assert_eq!(answer.body.len(), ANSWER_BYTES_MAX);
    let error = Error::Refused { place: place(), operation: Operation::Tail, answer };
    let Class::Sink(trouble) = error.class() else { panic!("{error}") };
    assert_eq!(trouble.retry_after, Some(Duration::from_millis(250)));
    assert!(trouble.text.len() < 1000, "{}", trouble.text);
}

#[test]
fn sentences_name_the_mend() {
    fn check(error: &Error, mends: &[&str]) {
        let text = error.to_string();
        for mend in mends {
            assert!(text.contains(mend), "{text}");
        }
    }
    check(&refused(Operation::Tail, 401, "{}"), &["sink.access_token", "401"]);
    check(
        &refused(Operation::Fence, 403, &standard("permission_denied", "no")),
        &["`fence`", "check-tail", "(no)"],
    );
    check(
        &refused(Operation::Tail, 404, &standard("stream_not_found", "")),
        &["s2 create-stream s2://my-basin/products", "sink.create = true"],
    );
    check(
        &refused(Operation::Tail, 404, &standard("basin_not_found", "")),
        &["s2 create-basin my-basin", "sink.basin"],
    );
    check(&refused(Operation::Tail, 404, "nginx"), &["sink.endpoint", "(nginx)"]);
}

#[test]
fn a_fault_is_found_in_the_chain() {
    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);
    fn check(error: io::Error, expected: Fault) {
        assert_eq!(fault_of(&Outer(error)), expected);
    }
    check(io::ErrorKind::ConnectionRefused.into(), Fault::Connect);
    check(io::ErrorKind::HostUnreachable.into(), Fault::Connect);
    check(io::ErrorKind::TimedOut.into(), Fault::TimeOut);
    check(io::ErrorKind::ConnectionReset.into(), Fault::Cut);
    check(io::ErrorKind::UnexpectedEof.into(), Fault::Cut);
    check(io::Error::other(rustls::Error::DecryptError), Fault::Tls);
    let certificate = |error| io::Error::other(rustls::Error::InvalidCertificate(error));
    check(certificate(CertificateError::Expired), Fault::CertificateExpired);
    check(certificate(CertificateError::NotValidYet), Fault::CertificateNotYet);
    check(certificate(CertificateError::NotValidForName), Fault::CertificateName);
    check(certificate(CertificateError::UnknownIssuer), Fault::CertificateIssuer);
    check(certificate(CertificateError::BadEncoding), Fault::Tls);
    check(io::Error::other("dns error: no such host"), Fault::Dns);
}

/// Each error that is no answer has its row, and its class is what the row says.
#[test]
fn each_condition_has_its_row_and_its_class() {
    #[track_caller]
    fn check(error: Error, condition: Condition, says: &[&str]) {
        let row = outcomes::of_condition(condition);
        let text = error.to_string();
        assert!(!text.contains('{') && !text.contains('}'), "{text}");
        for part in says {
            assert!(text.contains(part), "{text} does not say {part}");
        }
        match (row.happens, error.class()) {
            (Happens::LineReopens, Class::SeqMismatch { next }) => assert_eq!(next, 7),
            (Happens::LineReopens, Class::Fenced { actual }) => assert_eq!(actual, ""),
            (Happens::StandsDown, Class::Fenced { actual }) => assert_eq!(actual, "theirs"),
            (Happens::OperatorDecides, Class::Stream { code, .. })
            | (Happens::PipelineStops, Class::Fatal { code, .. }) => assert_eq!(code, row.code),
            (Happens::SinkWaits, Class::Sink(trouble)) => {
                assert_eq!(trouble.code, row.code);
                assert_eq!(trouble.ambiguous, row.may_have_landed);
            }
            (happens, class) => panic!("{condition:?}: {happens:?} and {class:?}"),
        }
    }
    let place = place();
    let fenced = |actual: &str| Error::Fenced { place: place.clone(), actual: actual.to_owned() };
    let names = ["`products`", "`my-basin`"];
    check(
        Error::SeqMismatch { place: place.clone(), next: 7 },
        Condition::OtherNumber,
        &[&names[..], &["record 7"]].concat(),
    );
    check(fenced(""), Condition::NoToken, &names);
    check(fenced("theirs"), Condition::OtherToken, &[&names[..], &["`theirs`"]].concat());
    check(
        Error::StreamRecreated { place: place.clone(), reached: 9, tail: 2 },
        Condition::Recreated,
        &[&names[..], &["record 9", "record 2", "--lost-records resend", "`skip`"]].concat(),
    );
    check(
        Error::StreamTrimmed { place: place.clone(), read_from: 9, first: 12 },
        Condition::Trimmed,
        &[&names[..], &["record 9", "record 12", "--lost-records resend", "`skip`"]].concat(),
    );
    let what = "{basin} is no template".to_owned();
    let protocol = Error::Protocol {
        place: place.clone(),
        operation: Operation::Append,
        what: "no numbers".to_owned(),
        source: None,
    };
    check(protocol, Condition::Protocol, &["append to", "no numbers", "`sink.endpoint`"]);
    let path = PathBuf::from("/run/token");
    let source = io::Error::from(io::ErrorKind::NotFound);
    check(Error::TokenFile { path, source }, Condition::TokenFile, &["/run/token"]);
    check(Error::Closed, Condition::Closed, &["closed"]);
    check(Error::Batch { what: "too many".to_owned() }, Condition::Batch, &["too many"]);
    check(Error::Settings { text: "wrong".to_owned() }, Condition::Settings, &["wrong"]);
    // It takes a broken machine to have one.
    assert_eq!(outcomes::of_condition(Condition::HttpClient).happens, Happens::PipelineStops);
    let settings = Error::Settings { text: what.clone() };
    assert_eq!(settings.to_string(), what, "a value is no template");
}

/// What listens there is not what the endpoint says.
#[tokio::test]
async fn a_server_of_another_kind_is_told_by_the_wire() {
    async fn check(scheme: &str, answer: &'static [u8], expected: Fault) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{scheme}://127.0.0.1:{}/", listener.local_addr().unwrap().port());
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            drop(stream.read(&mut [0; 1024]).await);
            drop(stream.write_all(answer).await);
        });
        let error = reqwest::Client::new().get(url).send().await.unwrap_err();
        served.await.unwrap();
        assert_eq!(fault_of(&error), expected, "{scheme}: {error:?}");
    }
    check("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", Fault::Tls).await;
    // As Postgres does, and a server that wants TLS.
    check("http", b"", Fault::Cut).await;
}
