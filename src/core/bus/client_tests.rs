//! The client against a stand-in for the broker: a thread at the other end of a socket pair that
//! says what its script says.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use super::*;
use crate::core::bus::greeting::HELLO;
use crate::core::host;
use crate::core::scratch::Scratch;

const SOON: Duration = Duration::from_secs(20);

/// A script that gets the broker's end, behind the hello.
fn played(script: impl FnOnce(&mut UnixStream) + Send + 'static) -> (UnixStream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(SOON)).unwrap();
    let thread = thread::spawn(move || {
        let mut hello = vec![0; HELLO.len()];
        theirs.read_exact(&mut hello).unwrap();
        assert_eq!(hello, HELLO.as_bytes());
        script(&mut theirs);
    });
    (ours, thread)
}

fn session(script: impl FnOnce(&mut UnixStream) + Send + 'static) -> (Client, JoinHandle<()>) {
    let (stream, thread) = played(|stream| {
        stream
            .write_all(b"castra-broker 1 ready\r\nok session=s-1.ab heartbeat_secs=1 later=x\n")
            .unwrap();
        script(stream);
    });
    (Client::over(stream, SOON).unwrap(), thread)
}

fn say(stream: &mut UnixStream, body: &str) {
    let length = u32::try_from(body.len()).unwrap();
    let frame = [length.to_be_bytes().as_slice(), body.as_bytes()].concat();
    stream.write_all(&frame).unwrap();
}

fn hear(stream: &mut UnixStream) -> serde_json::Value {
    let mut head = [0; 4];
    stream.read_exact(&mut head).unwrap();
    let mut body = vec![0; u32::from_be_bytes(head) as usize];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn delivery(seq: u64) -> String {
    format!(r#"{{"type":"publish","seq":{seq},"ts":0,"vm":"web","topic":"t","payload":{seq}}}"#)
}

fn next_seq(client: &mut Client) -> Result<u64, BusError> {
    match client.next_frame(Instant::now() + SOON)? {
        Some(Frame::Delivery(message)) => Ok(message.seq),
        other => panic!("{other:?}"),
    }
}

#[test]
fn answers_to_a_hello() {
    let never = |text: &'static str| {
        let (stream, thread) = played(move |stream| stream.write_all(text.as_bytes()).unwrap());
        let error = Client::over(stream, SOON).unwrap_err();
        thread.join().unwrap();
        error
    };
    assert_eq!(never("castra-broker 1 ready\nok\n"), BusError::NoBus);
    assert_eq!(
        never("castra-broker 1 ready\ndeclined reason=session-limit\n"),
        BusError::Declined("session-limit".to_owned())
    );
    for text in [
        "SSH-2.0-OpenSSH\n",
        "castra-broker 2 ready\n",
        "castra-broker 1 ready\nhm\n",
    ] {
        assert!(matches!(never(text), BusError::Stranger(_)), "{text}");
    }
    assert_eq!(never("castra-broker 1 rea"), BusError::Ended);
    let (stream, _kept) = UnixStream::pair().unwrap();
    let error = Client::over(stream, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error, BusError::TimedOut("greeting"));
    let (stream, thread) = played(|stream| {
        let _ = stream.write_all(&[b'x'; 4096]);
    });
    assert!(matches!(Client::over(stream, SOON), Err(BusError::Stranger(_))));
    thread.join().unwrap();
}

#[test]
fn a_broker_that_is_not_there_is_told_from_one_that_can_not_be_reached() {
    let scratch = Scratch::new("bus-connect");
    let socket = scratch.path("broker.sock");
    let error = Client::connect(&socket, SOON).unwrap_err();
    assert_eq!(error, BusError::NoBroker(socket.clone()));
    // The socket of one that was killed.
    drop(UnixListener::bind(&socket).unwrap());
    assert_eq!(Client::connect(&socket, SOON).unwrap_err(), error);
    let error = Client::connect(Path::new("/dev/null/broker.sock"), SOON).unwrap_err();
    assert!(matches!(error, BusError::Socket(..)), "{error:?}");
    // A path that a socket address has no room for.
    let deep = scratch.path(&"d".repeat(200));
    std::fs::create_dir(&deep).unwrap();
    let there = File::open(&deep).unwrap();
    let listener = UnixListener::bind(host::short_path(&there, "broker.sock")).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"castra-broker 1 ready\nok session=s-9 heartbeat_secs=5\n")
            .unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let client = Client::connect(&deep.join("broker.sock"), SOON).unwrap();
    assert_eq!((client.session(), client.heartbeat().as_secs()), ("s-9", 5));
    drop(client);
    thread.join().unwrap();
}

#[test]
fn publish_and_subscribe_wait_for_their_acks_and_keep_what_comes_between() {
    let (mut client, thread) = session(|stream| {
        let subscribe = hear(stream);
        assert_eq!(
            (
                subscribe["type"].as_str(),
                subscribe["topic"].as_str(),
                subscribe["from"].as_u64()
            ),
            (Some("subscribe"), Some("t*"), Some(3))
        );
        say(
            stream,
            r#"{"type":"ack","ack":"subscribe","status":"ok","topic":"t*","id":1,"seq":4}"#,
        );
        say(stream, &delivery(3));
        let publish = hear(stream);
        assert_eq!(publish["payload"]["a"], 1);
        say(stream, &delivery(4));
        say(stream, &delivery(5));
        say(
            stream,
            r#"{"type":"ack","ack":"publish","status":"ok","id":2,"seq":5}"#,
        );
        hear(stream);
        say(
            stream,
            r#"{"type":"ack","ack":"publish","status":"error","id":3,"reason":"storage-error"}"#,
        );
        say(stream, r#"{"type":"close","reason":"shutting-down"}"#);
    });
    let pattern: Pattern = "t*".parse().unwrap();
    assert_eq!(client.subscribe(&pattern, Some(3), SOON), Ok(Some(4)));
    assert_eq!(client.publish("t", "{\n\"a\":1}", SOON), Ok(5));
    assert_eq!(
        client.publish("t", "2", SOON),
        Err(BusError::Refused("storage-error".to_owned()))
    );
    assert!(matches!(
        client.publish("t t", "2", SOON),
        Err(BusError::BadTopic(_))
    ));
    assert!(matches!(
        client.publish("t", "{", SOON),
        Err(BusError::BadPayload(_))
    ));
    for seq in 3..=5 {
        assert_eq!(next_seq(&mut client), Ok(seq));
    }
    let closed = BusError::Closed("shutting-down".to_owned());
    assert_eq!(next_seq(&mut client), Err(closed.clone()));
    assert_eq!(client.publish("t", "2", SOON), Err(closed), "it stays closed");
    thread.join().unwrap();
}

#[test]
fn a_client_with_nothing_to_say_sends_heartbeats() {
    let (mut client, thread) = session(|stream| {
        for _ in 0..2 {
            let beat = hear(stream);
            assert_eq!(beat["type"], "heartbeat");
            let ack = format!(
                r#"{{"type":"ack","ack":"heartbeat","status":"ok","id":{}}}"#,
                beat["id"]
            );
            say(stream, &ack);
        }
        say(stream, &delivery(1));
    });
    assert_eq!(next_seq(&mut client), Ok(1), "their acks are nobody's business");
    assert_eq!(next_seq(&mut client), Err(BusError::Ended));
    thread.join().unwrap();
}

#[test]
fn a_broker_that_reads_nothing_stops_nobody() {
    let (go_on, may_go_on) = crossbeam_channel::bounded::<()>(1);
    let (mut client, thread) = session(move |stream| {
        // Says something all the while: who writes without reading would never see it.
        for seq in 0..1000 {
            say(stream, &delivery(seq));
        }
        may_go_on.recv().unwrap();
        for _ in 0..1000 {
            hear(stream);
        }
        say(stream, &delivery(1000));
    });
    let payload = format!("\"{}\"", "x".repeat(4000));
    for id in 0..1000 {
        client.queue(Request::Publish {
            topic: "t",
            payload: &payload,
            reply: None,
            id,
        });
    }
    for seq in 0..1000 {
        assert_eq!(next_seq(&mut client), Ok(seq));
    }
    assert!(client.unsent() > 0, "4 MB don't fit into the socket");
    assert_eq!(client.next_frame(Instant::now()), Ok(None));
    go_on.send(()).unwrap();
    assert_eq!(next_seq(&mut client), Ok(1000));
    assert_eq!(client.unsent(), 0);
    thread.join().unwrap();
}

#[test]
fn the_reason_is_read_even_when_nothing_can_be_sent_any_more() {
    let (mut client, thread) = session(|stream| {
        say(stream, r#"{"type":"close","reason":"protocol-error"}"#);
    });
    thread.join().unwrap();
    client.queue(Request::Ack { seq: 1 });
    assert_eq!(
        client.next_frame(Instant::now() + SOON),
        Err(BusError::Closed("protocol-error".to_owned()))
    );
}

#[test]
fn ends_and_nonsense_are_told_apart() {
    for (bytes, expected) in [
        (&b""[..], "Ended"),
        (&b"\0\0\0\x09{\"typ"[..], "Broken"),
        (&b"\0\0\0\0"[..], "Garbled"),
        (&b"\0\0\0\x02{}"[..], "Garbled"),
    ] {
        let (mut client, thread) = session(move |stream| stream.write_all(bytes).unwrap());
        let error = client.next_frame(Instant::now() + SOON).unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        thread.join().unwrap();
    }
}

#[test]
fn another_descriptor_ends_the_wait() {
    let (mut client, thread) = session(|stream| {
        say(stream, &delivery(1));
        assert_eq!(hear(stream)["type"], "ack");
    });
    let (reader, mut writer) = UnixStream::pair().unwrap();
    writer.write_all(b"x").unwrap();
    let until = Instant::now() + SOON;
    let mut woken = Vec::new();
    while woken.len() < 2 {
        let by = client.wait(until, Some(reader.as_fd())).unwrap();
        let word = match by {
            WaitEnd::Frame(_) => "frame",
            WaitEnd::Other => "other",
            WaitEnd::Timeout => "time",
        };
        if woken.last() != Some(&word) {
            woken.push(word);
        }
    }
    woken.sort_unstable();
    assert_eq!(woken, ["frame", "other"]);
    client.queue(Request::Ack { seq: 1 });
    assert_eq!(client.next_frame(until), Err(BusError::Ended));
    thread.join().unwrap();
}
