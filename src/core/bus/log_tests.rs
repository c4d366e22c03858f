//! Logs read while they are written, rotated, torn and cut back.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use super::*;
use crate::core::lines::journal::rotate;
use crate::core::scratch::Scratch;

fn line(seq: u64, topic: &str) -> String {
    format!("{{\"seq\":{seq},\"ts\":{seq},\"vm\":\"web\",\"topic\":\"{topic}\",\"payload\":{seq}}}\n")
}

fn lines(seqs: impl IntoIterator<Item = u64>) -> String {
    seqs.into_iter().map(|seq| line(seq, "t")).collect()
}

fn append(path: &Path, text: &str) {
    let mut file = File::options().append(true).create(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn reader(path: &Path, topics: &[&str]) -> LogReader {
    let topics = topics.iter().map(|topic| topic.parse().unwrap()).collect();
    LogReader::open(path, topics).unwrap()
}

fn drain(reader: &mut LogReader) -> Vec<u64> {
    let mut seqs = Vec::new();
    while let Some(message) = reader.next_message().unwrap() {
        seqs.push(message.seq);
    }
    seqs
}

fn range(from: u64, to: u64) -> Vec<u64> {
    (from..=to).collect()
}

/// Five messages a file, the youngest with three: 1–5 in `.2`, 6–10 in `.1`, 11–13.
fn three_files(scratch: &Scratch) -> PathBuf {
    let path = scratch.path("bus.log");
    for (from, to) in [(1, 5), (6, 10)] {
        append(&path, &lines(from..=to));
        rotate(&path, 4).unwrap();
    }
    append(&path, &lines(11..=13));
    path
}

#[test]
fn from_the_oldest_file_to_the_youngest() {
    let scratch = Scratch::new("buslog-all");
    let path = scratch.path("bus.log");
    assert!(drain(&mut reader(&path, &[])).is_empty(), "no log yet");
    let path = three_files(&scratch);
    let mut all = reader(&path, &[]);
    assert_eq!(drain(&mut all), range(1, 13));
    assert_eq!((all.skipped(), all.lost()), (0, 0));
}

#[test]
fn the_last_messages_in_one_file_and_over_several() {
    let scratch = Scratch::new("buslog-last");
    let path = three_files(&scratch);
    for count in 0..=15 {
        let mut reader = reader(&path, &[]);
        reader.seek_last(count).unwrap();
        let first = 14_u64.saturating_sub(count).max(1);
        assert_eq!(drain(&mut reader), range(first, 13), "last {count}");
    }
}

#[test]
fn the_last_of_some_topics_between_many_others() {
    let scratch = Scratch::new("buslog-topics");
    let path = scratch.path("bus.log");
    // Many pieces of the file, lines across their borders.
    let text: String = (0..20_000)
        .map(|seq| line(seq, if seq % 1000 == 7 { "ci/a" } else { "other" }))
        .collect();
    append(&path, &text);
    for (topics, count, expected) in [
        (&["ci/*"][..], 3, vec![17007, 18007, 19007]),
        (&["ci/a", "nothing"], 1, vec![19007]),
        (&["nothing"], 5, vec![]),
        (&["other"], 2, vec![19998, 19999]),
        (&[], 1, vec![19999]),
    ] {
        let mut reader = reader(&path, topics);
        reader.seek_last(count).unwrap();
        assert_eq!(drain(&mut reader), expected, "{topics:?}");
    }
    let mut some = reader(&path, &["ci/*"]);
    some.seek_last(1000).unwrap();
    assert_eq!(drain(&mut some).len(), 20);
}

#[test]
fn a_line_that_another_writer_wrote_means_the_same() {
    let scratch = Scratch::new("buslog-glance");
    let path = scratch.path("bus.log");
    append(
        &path,
        "{\"topic\":\"a\",\"payload\":1,\"vm\":\"x\",\"ts\":0,\"seq\":1}\n",
    );
    append(
        &path,
        "{\"seq\":2,\"ts\":0,\"vm\":\"x\",\"topic\":\"\\u0061\",\"payload\":1}\n",
    );
    append(&path, &line(3, "a"));
    append(&path, &line(4, "b"));
    assert_eq!(drain(&mut reader(&path, &["a"])), [1, 2, 3]);
}

#[test]
fn what_is_no_message_is_passed_over_and_counted() {
    let scratch = Scratch::new("buslog-corrupt");
    let path = scratch.path("bus.log");
    append(&path, &lines(1..=2));
    append(&path, "no json\n\n{\"seq\":9}\n\u{0}\u{1b}[2J\n");
    let mut bad = File::options().append(true).open(&path).unwrap();
    bad.write_all(b"\xff\xfe\n").unwrap();
    append(&path, &lines(3..=4));
    append(&path, "{\"seq\":5,\"ts\":5,\"vm\":\"we");
    let mut all = reader(&path, &[]);
    assert_eq!(drain(&mut all), range(1, 4));
    assert_eq!(all.skipped(), 5, "a torn tail is no line yet");
    for (count, first) in [(2, 3), (3, 2), (4, 1), (9, 1)] {
        let mut last = reader(&path, &[]);
        last.seek_last(count).unwrap();
        assert_eq!(drain(&mut last), range(first, 4));
    }
}

#[test]
fn a_file_without_line_ends_takes_no_memory() {
    let scratch = Scratch::new("buslog-endless");
    let path = scratch.path("bus.log");
    append(&path, &lines(1..=2));
    // Sparse: some 20 MB of zeros that take no room on the disk.
    let file = File::options().append(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() + 20_000_000).unwrap();
    append(&path, "\n");
    append(&path, &lines(3..=4));
    let mut all = reader(&path, &[]);
    assert_eq!(drain(&mut all), range(1, 4));
    assert_eq!(all.skipped(), 1);
    let mut last = reader(&path, &[]);
    last.seek_last(3).unwrap();
    assert_eq!(drain(&mut last), range(2, 4));
}

#[test]
fn followed_across_rotations() {
    let scratch = Scratch::new("buslog-follow");
    let path = three_files(&scratch);
    let mut follower = reader(&path, &[]);
    follower.seek_last(1).unwrap();
    assert_eq!(drain(&mut follower), [13]);
    append(&path, &lines(14..=15));
    rotate(&path, 4).unwrap();
    assert_eq!(drain(&mut follower), [14, 15], "moved, and nothing new yet");
    append(&path, &lines(16..=16));
    assert_eq!(drain(&mut follower), [16]);
    // Several rotations between two looks.
    append(&path, &lines(17..=17));
    rotate(&path, 4).unwrap();
    append(&path, &lines(18..=19));
    rotate(&path, 4).unwrap();
    append(&path, &lines(20..=20));
    assert_eq!(drain(&mut follower), [17, 18, 19, 20]);
    assert_eq!((follower.skipped(), follower.lost()), (0, 0));
    // More than are kept: what is gone is told.
    for seq in 21..=29 {
        append(&path, &lines(seq..=seq));
        rotate(&path, 4).unwrap();
    }
    append(&path, &lines(30..=30));
    assert_eq!(drain(&mut follower), [21, 26, 27, 28, 29, 30]);
    assert_eq!(follower.lost(), 1);
}

#[test]
fn a_log_that_keeps_no_rotated_file_can_be_followed() {
    let scratch = Scratch::new("buslog-keep0");
    let path = scratch.path("bus.log");
    let mut follower = reader(&path, &[]);
    assert!(drain(&mut follower).is_empty());
    for seq in 1..=5 {
        append(&path, &lines(seq..=seq));
        assert_eq!(drain(&mut follower), [seq]);
        // Kept under another name, so that the file system doesn't give its inode away again.
        fs::rename(&path, scratch.path(&format!("gone-{seq}"))).unwrap();
    }
    assert_eq!(follower.lost(), 0, "the numbers go on without a hole");
}

#[test]
fn a_torn_line_is_waited_for_and_may_be_replaced() {
    let scratch = Scratch::new("buslog-torn");
    let path = scratch.path("bus.log");
    append(&path, &lines(1..=1));
    let (second, third) = (line(2, "t"), line(3, "t"));
    append(&path, &second[..20]);
    let mut follower = reader(&path, &[]);
    assert_eq!(drain(&mut follower), [1]);
    append(&path, &second[20..]);
    assert_eq!(drain(&mut follower), [2]);
    // The disk was full: the broker cuts back and writes something else.
    let whole = fs::metadata(&path).unwrap().len();
    append(&path, "{\"seq\":3,\"ts\":3,\"vm\":\"x\",\"topic\":\"never\"");
    assert!(drain(&mut follower).is_empty());
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(whole)
        .unwrap();
    append(&path, &third);
    assert_eq!(drain(&mut follower), [3]);
    // Cut back behind what was read: the numbers are given again, and to other messages.
    append(&path, &lines(4..=9));
    assert_eq!(drain(&mut follower), range(4, 9));
    let cut = File::options().write(true).open(&path).unwrap();
    cut.set_len(lines(1..=5).len() as u64).unwrap();
    append(&path, &line(6, "again"));
    assert_eq!(drain(&mut follower), [6]);
    assert!(drain(&mut follower).is_empty());
    // Emptied by somebody: it is a new log.
    cut.set_len(0).unwrap();
    assert!(drain(&mut follower).is_empty());
    append(&path, &lines(1..=2));
    assert_eq!(drain(&mut follower), [1, 2]);
    assert_eq!(follower.skipped(), 0);
}
