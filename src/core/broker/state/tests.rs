//! Tests of the state under a virtual clock: no socket, file, thread or sleep.

mod bus;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::core::broker::protocol::parse_hello;
use crate::core::config::AuthMode;
use crate::core::events::Event;
use crate::core::events::HandshakeOutcome;
use crate::core::root::records::{GuestRecord, GuestsRecord};

const WINDOW: u64 = 45_000;

fn rules() -> Rules {
    Rules {
        run: "run".into(),
        boot_id: "boot".into(),
        freshness_ms: WINDOW,
        auth: AuthMode::Auto,
        max_connections: 3,
        max_host_connections: 2,
        bus_versions: &[1],
        bus: BusRules {
            idle_ms: 60_000,
            sessions_per_vm: 2,
            subscriptions_per_session: 3,
            publishes_per_sec_per_vm: 0,
            heartbeat_secs: 15,
        },
    }
}

fn table(names: &[&str], launched: Option<u64>) -> Input {
    let guests = names
        .iter()
        .map(|name| GuestRecord {
            closed: false,
            name: name.parse().unwrap(),
            second_name: None,
            launch_id: launched.map(|at| at.to_string().into()),
            launched_boottime_ms: launched,
            boot_id: Some("boot".into()),
            token_sha256: None,
        })
        .collect();
    let record = GuestsRecord { guests };
    Input::Guests(Some(GuestTable::from_record(&record, &"boot".into()).unwrap()))
}

fn opened(conn: u64) -> Input {
    Input::Opened {
        conn: ConnId(conn),
        peer: Peer::Guest,
        remote: format!("127.0.0.1:{}", 40_000 + conn),
    }
}

fn opened_by_host(conn: u64) -> Input {
    Input::Opened {
        conn: ConnId(conn),
        peer: Peer::Host,
        remote: "unix".into(),
    }
}

fn hello(conn: u64, words: &str) -> Input {
    Input::Hello {
        conn: ConnId(conn),
        hello: parse_hello(format!("hello vm:{words}").as_bytes()).unwrap(),
    }
}

fn refused(conn: u64, reason: DeclineReason, attempted: bool) -> Input {
    Input::HelloRefused {
        conn: ConnId(conn),
        refusal: HelloRefusal::unnamed(reason),
        attempted,
    }
}

fn closed(conn: u64) -> Input {
    Input::Closed { conn: ConnId(conn) }
}

fn name(text: &str) -> VmName {
    text.parse().unwrap()
}

/// A state, a clock that moves only when told, and a disk that can be full.
struct Script {
    state: State,
    disk_full: bool,
    on_disk: BTreeMap<String, HandshakeRecord>,
}

impl Script {
    fn new() -> Script {
        Script::with(rules())
    }

    fn with(rules: Rules) -> Script {
        Script {
            state: State::new(rules),
            disk_full: false,
            on_disk: BTreeMap::new(),
        }
    }

    /// One input and whatever its effects answer, as the loop does it.
    fn run(&mut self, ms: u64, input: Input) -> Vec<Effect> {
        let at = Timestamp {
            boot_ms: ms,
            wall_ms: 1_795_255_200_000 + ms,
        };
        let mut todo = vec![input];
        let mut all = Vec::new();
        while let Some(input) = todo.pop() {
            for effect in step(&mut self.state, at, input) {
                if let Effect::Record { record, asked_by } = &effect {
                    if !self.disk_full {
                        self.on_disk.insert(record.vm.key(), (**record).clone());
                    }
                    todo.push(Input::Recorded {
                        vm: record.vm.clone(),
                        asked_by: *asked_by,
                        made: !self.disk_full,
                    });
                }
                if let Effect::Append(_) = &effect {
                    todo.push(Input::Appended {
                        kept: !self.disk_full,
                        open: true,
                    });
                }
                all.push(effect);
            }
        }
        all
    }

    fn check(&mut self, ms: u64, input: Input, expected: &str) {
        let effects = self.run(ms, input.clone());
        let shown: Vec<String> = effects.iter().filter_map(show).collect();
        assert_eq!(shown.join("; "), expected, "at {ms} {input:?}");
    }
}

/// Frames as their JSON.
fn frames_in(bytes: &[u8]) -> Vec<String> {
    let mut frames = Vec::new();
    let mut rest = bytes;
    while let Some((head, more)) = rest.split_first_chunk::<4>() {
        let (body, more) = more.split_at(u32::from_be_bytes(*head) as usize);
        frames.push(String::from_utf8(body.to_vec()).unwrap());
        rest = more;
    }
    frames
}

/// An effect in a few words; log lines by their event, which says the same.
fn show(effect: &Effect) -> Option<String> {
    let text = match effect {
        Effect::Reply { conn, line } => format!("reply {} {}", conn.0, line.trim_end()),
        Effect::Grant { conn, line } => format!("grant {} {}", conn.0, line.trim_end()),
        Effect::Send { conn, parts } => {
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes().to_vec()).collect();
            format!("send {} {}", conn.0, frames_in(&bytes).join(" "))
        }
        Effect::SetDelivery {
            conn,
            delivery: order,
        } => match order {
            Delivery::Live => format!("attach {}", conn.0),
            Delivery::Replay(plan) => format!("replay {} upto {}", conn.0, plan.upto),
        },
        Effect::End { conn, last } => format!("end {} {}", conn.0, frames_in(last).join(" ")),
        Effect::Append(lines) => format!("append {}", lines.iter().filter(|byte| **byte == b'\n').count()),
        Effect::SenderLog { vm, .. } => format!("shelve {vm}"),
        Effect::ServiceLog { vm, payloads } => format!("service {vm} {}", payloads.join(" ")),
        Effect::Evict { conn, reason } => format!("evict {} {reason}", conn.0),
        Effect::Drop { conn } => format!("drop {}", conn.0),
        Effect::Record { record, .. } => format!("record {} {}", record.vm, record.heard_boottime_ms),
        Effect::Log(line) if line.contains("hello from") || line.contains("freshness of") => return None,
        Effect::Log(line) => format!("log {}", line.split_once("Z ").unwrap().1),
        Effect::Emit(Event::BrokerHandshake {
            vm, reason, repeated, ..
        }) => format!(
            "hello {} {}{}",
            vm.as_ref().map_or("-", VmName::as_str),
            reason.as_deref().unwrap_or("ok"),
            repeated.map(|n| format!(" x{n}")).unwrap_or_default()
        ),
        Effect::Emit(Event::BrokerFreshness {
            vm,
            reachable,
            last_handshake_age_ms,
        }) => format!("fresh {vm} {reachable} {}", last_handshake_age_ms.unwrap()),
        Effect::Emit(event) => format!("{event:?}"),
    };
    Some(text)
}

#[test]
fn a_hand_shake_and_its_end() {
    let mut script = Script::new();
    script.check(0, opened(1), "");
    script.check(
        5,
        hello(1, "web"),
        "record web 5; hello web ok; fresh web true 0; reply 1 ok",
    );
    script.check(6, closed(1), "");
    script.check(5 + WINDOW, Input::Tick, "");
    assert_eq!(script.state.due(), Some(6 + WINDOW));
    script.check(6 + WINDOW, Input::Tick, "fresh web false 45001");
    script.check(7 + WINDOW, Input::Tick, "");
    script.check(8 + WINDOW, opened(2), "");
    script.check(
        9 + WINDOW,
        hello(2, "WEB"),
        "record web 45009; hello web ok; fresh web true 0; reply 2 ok",
    );
}

#[test]
fn a_beat_in_time_keeps_a_guest_in_the_window() {
    let mut script = Script::new();
    for beat in 0..10 {
        let at = beat * (WINDOW / 3);
        script.run(at, opened(beat + 1));
        let told = script.run(at, hello(beat + 1, "web"));
        let entered = told
            .iter()
            .filter(|effect| matches!(effect, Effect::Emit(Event::BrokerFreshness { .. })))
            .count();
        assert_eq!(entered, usize::from(beat == 0), "told once");
        let due = script.state.due().unwrap();
        script.run(due, Input::Tick);
        script.run(at, closed(beat + 1));
    }
}

#[test]
fn records_are_written_at_once_then_four_times_a_second() {
    let mut script = Script::new();
    let mut written = 0;
    for ms in 0..1000u64 {
        script.run(ms, opened(ms + 1));
        for effect in script.run(ms, hello(ms + 1, "web")) {
            written += u32::from(matches!(effect, Effect::Record { .. }));
        }
        script.run(ms, closed(ms + 1));
        if script.state.due().is_some_and(|due| due <= ms) {
            for effect in script.run(ms, Input::Tick) {
                written += u32::from(matches!(effect, Effect::Record { .. }));
            }
        }
    }
    assert_eq!(written, 4);
    script.run(1249, Input::Tick);
    assert_eq!(
        script.on_disk["web"].heard_boottime_ms, 999,
        "the last one is never lost"
    );
}

#[test]
fn who_is_refused_is_told_and_logged_once() {
    let mut script = Script::new();
    script.run(0, table(&["web"], None));
    let cases = [
        (
            hello(1, "evil"),
            "hello evil unknown-vm; reply 1 declined reason=unknown-vm",
        ),
        (
            hello(1, "Host"),
            "hello Host reserved-identity; reply 1 declined reason=reserved-identity",
        ),
        (
            refused(1, DeclineReason::ProtocolError, true),
            "hello - protocol-error; reply 1 declined reason=protocol-error",
        ),
        (
            refused(1, DeclineReason::Timeout, true),
            "hello - timeout; reply 1 declined reason=timeout",
        ),
        (
            refused(1, DeclineReason::Timeout, false),
            "reply 1 declined reason=timeout",
        ),
    ];
    for (input, expected) in cases {
        script.check(1, opened(1), "");
        script.check(1, input.clone(), expected);
        script.check(1, input, "");
        script.check(1, closed(1), "");
    }
    assert!(script.on_disk.is_empty(), "declined hellos leave no record");
}

#[test]
fn names_are_those_of_the_project() {
    let mut script = Script::new();
    script.run(0, table(&["Web-0"], None));
    script.run(0, opened(1));
    script.check(
        1,
        hello(1, "web-0"),
        "record Web-0 1; hello Web-0 ok; fresh Web-0 true 0; reply 1 ok",
    );
    script.check(2, table(&["other"], None), "fresh Web-0 false 1");
}

#[test]
fn a_record_belongs_to_one_launch() {
    let mut script = Script::new();
    script.run(0, table(&["web"], Some(0)));
    script.run(1, opened(1));
    script.run(10, hello(1, "web"));
    script.check(20, Input::VmGone { vm: name("web") }, "fresh web false 10");
    script.check(25, table(&["web"], Some(25)), "");
    script.run(26, opened(2));
    script.run(30, hello(2, "web"));
    script.check(50, table(&["web"], Some(40)), "fresh web false 20");
    script.check(51, table(&["web"], Some(40)), "");
}

#[test]
fn the_host_comes_by_its_own_door_alone() {
    let mut script = Script::new();
    script.run(0, opened_by_host(1));
    script.check(0, hello(1, "host"), "hello host ok; reply 1 ok");
    script.run(0, opened_by_host(2));
    script.check(
        0,
        hello(2, "web"),
        "hello web unknown-vm; reply 2 declined reason=unknown-vm",
    );
    assert!(script.on_disk.is_empty());
}

#[test]
fn at_the_cap_who_was_answered_goes_first_then_the_oldest() {
    let mut script = Script::new();
    script.run(0, opened(1));
    script.run(0, opened(2));
    script.run(0, hello(2, "web"));
    script.run(0, opened(3));
    script.check(1, opened(4), "drop 2");
    script.check(1, opened(5), "evict 1 session-limit");
    script.check(1, opened_by_host(6), "");
    script.check(
        2,
        refused(1, DeclineReason::SessionLimit, true),
        "hello - session-limit; reply 1 declined reason=session-limit",
    );
    script.check(2, closed(1), "");
    script.check(2, opened(7), "evict 3 session-limit");
    // Its hello was on its way when it was told to go.
    script.check(2, hello(3, "web"), "hello web ok; reply 3 ok");
}

#[test]
fn without_room_for_a_record_a_hello_is_declined() {
    let mut script = Script::new();
    script.disk_full = true;
    script.run(0, opened(1));
    script.check(
        0,
        hello(1, "web"),
        "record web 0; hello web storage-error; reply 1 declined reason=storage-error",
    );
    script.check(1, Input::Tick, "");
    script.disk_full = false;
    script.run(2, opened(2));
    script.check(
        2,
        hello(2, "web"),
        "record web 2; hello web ok; fresh web true 0; reply 2 ok",
    );
    script.check(
        3,
        Input::RecordLost { vm: name("web") },
        "log WARN record of vm:web was removed; the broker made it again; record web 2",
    );
    script.disk_full = true;
    script.run(4, Input::RecordLost { vm: name("web") });
    script.disk_full = false;
    script.check(1003, Input::Tick, "");
    script.check(1004, Input::Tick, "record web 2");
}

#[test]
fn unlisted_guests_are_bounded() {
    let mut script = Script::new();
    for number in 0..MAX_UNLISTED as u64 {
        script.run(number, opened(1));
        script.run(number, hello(1, &format!("vm-{number}")));
        script.run(number, closed(1));
    }
    script.run(5000, opened(1));
    let told = script.run(5000, hello(1, "one-more"));
    assert!(told.contains(&Effect::Reply {
        conn: ConnId(1),
        line: "declined reason=storage-error\n".into()
    }));
    script.run(5000, closed(1));
    script.run(5001, opened(1));
    let told = script.run(5001, hello(1, "VM-7"));
    assert!(told.contains(&Effect::Reply {
        conn: ConnId(1),
        line: "ok\n".into()
    }));
}

#[test]
fn a_hand_shake_outlives_the_broker() {
    let mut first = Script::new();
    first.run(0, opened(1));
    first.run(1000, hello(1, "web"));
    let record = first.on_disk["web"].clone();
    let restored = |alive| Input::Restored {
        record: Box::new(record.clone()),
        alive,
    };

    let mut second = Script::new();
    second.check(5000, restored(true), "fresh web true 4000");
    assert_eq!(second.state.recorded().count(), 1);
    second.check(1001 + WINDOW, Input::Tick, "fresh web false 45001");

    let mut dead = Script::new();
    dead.check(5000, restored(false), "");
    dead.check(1001 + WINDOW, Input::Tick, "");

    let mut relaunched = Script::new();
    relaunched.run(4000, table(&["web"], Some(3000)));
    relaunched.check(5000, restored(true), "");
    relaunched.check(1001 + WINDOW, Input::Tick, "");

    let mut rebooted = Script::with(Rules {
        boot_id: "another".into(),
        ..rules()
    });
    rebooted.check(5000, restored(true), "");
    assert_eq!(rebooted.state.recorded().count(), 0);
}

#[test]
fn the_wall_clock_bends_no_age() {
    let mut script = Script::new();
    script.run(0, opened(1));
    script.run(10, hello(1, "web"));
    let hour_back = Timestamp {
        boot_ms: 20,
        wall_ms: 1_795_255_200_000 - 3_600_000,
    };
    assert_eq!(step(&mut script.state, hour_back, Input::Tick), []);
    assert_eq!(
        script.state.due(),
        Some(1010),
        "the second of the first line, nothing else"
    );
    script.check(10 + WINDOW, Input::Tick, "");
    script.check(11 + WINDOW, Input::Tick, "fresh web false 45001");
}

#[test]
fn stopping_tells_everybody_who_waits() {
    let mut script = Script::new();
    script.run(0, opened(1));
    script.run(0, opened(2));
    script.check(1, Input::Stop, "evict 1 shutting-down; evict 2 shutting-down");
    assert!(!script.state.all_answered());
    script.check(1, opened(3), "evict 3 shutting-down");
    script.check(
        2,
        refused(1, DeclineReason::ShuttingDown, true),
        "hello - shutting-down; reply 1 declined reason=shutting-down",
    );
    script.check(
        2,
        refused(2, DeclineReason::ShuttingDown, false),
        "reply 2 declined reason=shutting-down",
    );
    script.check(
        2,
        hello(3, "web"),
        "hello web shutting-down; reply 3 declined reason=shutting-down",
    );
    assert!(script.state.all_answered());
}

#[test]
fn what_was_held_back_is_told_at_the_end() {
    let mut script = Script::new();
    for conn in 1..=25 {
        script.run(0, opened(conn));
        script.run(0, hello(conn, "web"));
        script.run(0, closed(conn));
    }
    script.check(1, Input::Finish, "hello - ok x5; record web 0; fresh web false 1");
}

/// xorshift64*: enough to make schedules, small enough to read.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % sides
    }
}

/// Whatever comes in whatever order: everybody is answered at most once, every attempt is
/// accounted for, places are kept, the window is told in turns.
#[test]
fn random_schedules_keep_the_invariants() {
    for seed in 1..=400 {
        let run = std::panic::catch_unwind(|| random_schedule(seed));
        assert!(run.is_ok(), "seed {seed} fails; run random_schedule({seed})");
    }
}

fn random_schedule(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let names = ["a", "b", "Evil", "host"];
    let mut script = Script::new();
    let (mut now, mut next) = (0, 1);
    let mut open: BTreeSet<u64> = BTreeSet::new();
    let mut told_to_go: BTreeSet<u64> = BTreeSet::new();
    let mut replied: BTreeSet<u64> = BTreeSet::new();
    let mut heard_of: BTreeSet<u64> = BTreeSet::new();
    let (mut attempts, mut report) = (0, 0);
    let mut fresh: BTreeMap<String, bool> = BTreeMap::new();
    let mut stopped = false;
    for turn in 0..200 {
        now += [0, 1, 40, 900, WINDOW][dice.roll(5) as usize];
        let someone = |dice: &mut Dice| {
            let all: Vec<u64> = open.iter().copied().collect();
            (!all.is_empty()).then(|| all[dice.roll(all.len() as u64) as usize])
        };
        let input = match dice.roll(12) {
            0..=3 => {
                next += 1;
                open.insert(next);
                if dice.roll(5) == 0 {
                    opened_by_host(next)
                } else {
                    opened(next)
                }
            }
            4..=6 => match someone(&mut dice) {
                Some(conn) if heard_of.insert(conn) => {
                    attempts += 1;
                    hello(conn, names[dice.roll(4) as usize])
                }
                _ => Input::Tick,
            },
            7 => match someone(&mut dice) {
                Some(conn) if heard_of.insert(conn) => {
                    let attempted = dice.roll(2) == 0;
                    attempts += u64::from(attempted);
                    refused(conn, DeclineReason::Timeout, attempted)
                }
                _ => Input::Tick,
            },
            8 => match someone(&mut dice) {
                Some(conn) => {
                    open.remove(&conn);
                    closed(conn)
                }
                None => Input::Tick,
            },
            9 => {
                script.disk_full = dice.roll(3) == 0;
                match dice.roll(3) {
                    0 => Input::Guests(None),
                    1 => table(&["a", "b"], None),
                    _ => table(&["A", "b"], Some(now)),
                }
            }
            10 => Input::VmGone {
                vm: name(names[dice.roll(3) as usize]),
            },
            _ if turn > 180 && !stopped => {
                stopped = true;
                Input::Stop
            }
            _ => Input::Tick,
        };
        let effects = script.run(now, input);
        for effect in effects {
            match effect {
                Effect::Reply { conn, .. } => assert!(replied.insert(conn.0), "two answers to {}", conn.0),
                Effect::Evict { conn, .. } => assert!(told_to_go.insert(conn.0), "told to go twice"),
                Effect::Emit(Event::BrokerHandshake {
                    outcome,
                    reason,
                    repeated,
                    ..
                }) => {
                    report += repeated.unwrap_or(1);
                    assert_eq!(outcome == HandshakeOutcome::Declined, reason.is_some());
                }
                Effect::Emit(Event::BrokerFreshness { vm, reachable, .. }) => {
                    assert_ne!(fresh.insert(vm.key(), reachable).unwrap_or(false), reachable);
                }
                _ => {}
            }
        }
        let state = &script.state;
        for (places, max) in [(&state.guest_occupancy, 3), (&state.host_occupancy, 2)] {
            assert!(places.waiting.len() + places.answered.len() <= max);
            for conn in places.waiting.iter().chain(&places.answered) {
                assert!(state.conns.contains_key(conn), "a place of nobody");
            }
        }
        for (key, guest) in &state.guests {
            assert_eq!(fresh.get(key).copied().unwrap_or(false), guest.fresh, "{key}");
            assert!(guest.record.heard_boottime_ms <= now);
        }
    }
    for effect in script.run(now, Input::Finish) {
        if let Effect::Emit(Event::BrokerHandshake { repeated, .. }) = effect {
            report += repeated.unwrap_or(1);
        }
    }
    assert_eq!(attempts, report, "every attempt is logged once");
    assert!(
        script.disk_full
            || script
                .state
                .guests
                .iter()
                .all(|(key, guest)| { !guest.dirty && script.on_disk.contains_key(key) }),
        "nothing is held back at the end"
    );
}
