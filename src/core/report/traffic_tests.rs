//! Tests of counting what went over the bus.

use std::fs;

use super::*;
use crate::core::report::from_events::RunBuilder;
use crate::core::scratch::Scratch;

const BEGIN: u64 = 1_763_719_200_000;

fn line(seq: u64, ts: u64, vm: &str, payload: &str) -> String {
    format!(r#"{{"seq":{seq},"ts":{ts},"vm":"{vm}","topic":"t","payload":{payload}}}"#) + "\n"
}

/// Runs that begin then.
fn runs(begins: &[u64]) -> Vec<RunReport> {
    begins
        .iter()
        .map(|begin| RunBuilder::new("r".into(), "up".into(), None, "", *begin).finish(&[]))
        .collect()
}

fn count(state: &StateRoot, begins: &[u64], most: u64) -> (Vec<Option<Traffic>>, Option<String>) {
    let mut runs = runs(begins);
    let left_out = add_of(state, &mut runs, begins, &[], most).unwrap();
    (runs.into_iter().map(|run| run.bus).collect(), left_out)
}

#[test]
fn each_run_has_the_messages_until_the_next() {
    let scratch = Scratch::new("report-traffic");
    let state = StateRoot::new(scratch.dir());
    assert_eq!(count(&state, &[BEGIN], 1 << 20), (vec![None], None), "no bus yet");
    fs::create_dir_all(state.bus_logs()).unwrap();
    let older = line(1, BEGIN - 1, "web", "1") + &line(2, BEGIN + 10, "web", "\"aé\"") + "{\"torn";
    fs::write(state.bus_logs().join("bus.log.1"), older).unwrap();
    let newer = [
        &line(3, BEGIN + 1_070, "host", "{}"),
        "no message\n",
        r#"{"ts":1763719201080,"vm":"w\u0065b","seq":4,"topic":"a\"b","payload":[1, 2]}"#,
        "\n",
        &line(5, BEGIN + 5_000, "db", "null"),
        line(6, BEGIN + 5_001, "db", "null").trim_end(),
    ]
    .concat();
    fs::write(state.bus_log(), newer).unwrap();
    let (counted, left_out) = count(&state, &[BEGIN, BEGIN + 5_000], 1 << 20);
    assert_eq!(left_out, None);
    let first = counted[0].as_ref().unwrap();
    assert_eq!((first.start_ms, first.bucket_ms), (10, FINEST_MS));
    assert_eq!((first.messages, first.bytes), (3, 5 + 2 + 6));
    assert_eq!(first.points, [[1, 5], [2, 8]]);
    let senders: Vec<_> = first
        .senders
        .iter()
        .map(|one| (one.sender.as_str(), one.points.clone()))
        .collect();
    assert_eq!(
        senders,
        [("web", vec![[1, 5], [1, 6]]), ("host", vec![[0, 0], [1, 2]])],
        "who sent most is first; a name is what JSON says"
    );
    let second = counted[1].as_ref().unwrap();
    assert_eq!(
        (second.messages, second.senders[0].sender.as_str()),
        (1, "db"),
        "the last line isn't whole"
    );

    let mut picked = runs(&[BEGIN]);
    add_of(&state, &mut picked, &[BEGIN], &["web".to_owned()], 1 << 20).unwrap();
    assert_eq!(picked[0].bus.as_ref().unwrap().messages, 2);
}

#[test]
fn points_grow_with_the_time_and_never_in_number() {
    let mut counted = RunTraffic::from(1_000);
    for at in [0, 999, 1_000, 239_999, 3_600_000, u64::MAX - 1_000] {
        counted.add(&MessageHead {
            ts: 1_000 + at,
            vm: "web".into(),
            bytes: 7,
        });
    }
    // Earlier than the first: the clock was set back.
    counted.add(&MessageHead {
        ts: 3,
        vm: "web".into(),
        bytes: 7,
    });
    let traffic = counted.finish(0, false);
    assert!(traffic.points.len() <= MAX_POINTS);
    let sum = traffic
        .points
        .iter()
        .fold([0, 0], |sum, point| [sum[0] + point[0], sum[1] + point[1]]);
    assert_eq!((sum, traffic.messages, traffic.bytes), ([7, 49], 7, 49));
    assert_eq!(traffic.senders[0].points, traffic.points);
}

#[test]
fn many_senders_are_added_up() {
    let mut counted = RunTraffic::from(0);
    for number in 0..100_u64 {
        counted.add(&MessageHead {
            ts: 0,
            vm: format!("vm-{number}").into(),
            bytes: number,
        });
    }
    let traffic = counted.finish(0, false);
    assert_eq!((traffic.messages, traffic.senders.len()), (100, MAX_SENDERS));
    assert_eq!(traffic.senders_left_out, MAX_FOLLOWED - MAX_SENDERS + 1);
}

#[test]
fn a_long_log_is_read_from_the_place_that_is_wanted() {
    let scratch = Scratch::new("report-traffic-long");
    let state = StateRoot::new(scratch.dir());
    fs::create_dir_all(state.bus_logs()).unwrap();
    let lines = |from: u64| -> String {
        (from..from + 5_000)
            .map(|seq| line(seq, BEGIN + seq * 10, "web", &format!("\"{:0>80}\"", seq)))
            .collect()
    };
    fs::write(state.bus_logs().join("bus.log.2"), lines(0)).unwrap();
    fs::write(state.bus_logs().join("bus.log.1"), lines(5_000)).unwrap();
    fs::write(state.bus_log(), lines(10_000)).unwrap();
    for first in [0, 1, 4_999, 5_000, 5_001, 7_777, 14_998, 14_999, 15_000, 99_999] {
        let (counted, left_out) = count(&state, &[BEGIN + first * 10], 1 << 30);
        let messages = counted[0].as_ref().map_or(0, |traffic| traffic.messages);
        assert_eq!(
            (messages, left_out),
            (15_000_u64.saturating_sub(first), None),
            "{first}"
        );
    }
    // Of more than may be read the newest is.
    let (counted, left_out) = count(&state, &[BEGIN, BEGIN + 1, BEGIN + 149_990], 1 << 20);
    let messages: Vec<_> = counted
        .iter()
        .map(|one| one.as_ref().map_or(0, |one| one.messages))
        .collect();
    assert_eq!((messages[0], messages[2]), (0, 1));
    assert!((7_000..9_000).contains(&messages[1]), "{messages:?}");
    assert!(counted[1].as_ref().unwrap().cut && !counted[2].as_ref().unwrap().cut);
    assert!(left_out.unwrap().contains("newest 1 MiB"));
}
