//! The event contract as scripts and embedders meet it: one sample of every fact in both
//! encodings, and docs/EVENTS.md held to what the code says.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use castra::core::config::Protocol;
use castra::core::events::contract::{FACTS, Stamped};
use castra::core::events::endings::{LaunchEnding, ShutdownEnding};
use castra::core::events::{
    Accel, BootstrapMode, BootstrapPlan, BootstrapPlanAction, BootstrapPlanSsh, BootstrapPlanVerify,
    BootstrapStepKind, BootstrapStepStatus, BootstrapTrigger, Event, HandshakeOutcome, PlannedForward,
    PlannedMount, SessionPhase, Severity, VizierPlanStatus, VmCounts, VmPlan,
};
use castra::core::name::VmName;
use serde_json::Value;
use support::{golden, spawn_piped};

const HASH: &str = "7ee110f5bffdaf2362b0aa752aea307619f11fe712a9861677f77a1425f22f4d";

/// One of each fact, in the order of [`FACTS`].
fn samples() -> Vec<Event> {
    let mut samples = vec![Event::Message {
        severity: Severity::Blocker,
        text: "the guest can't be reached".into(),
        vm: Some(vm()),
        remediation: Some("castra logs web-0".into()),
        source: Some("bootstrap".into()),
        thread: Some("t-1".into()),
        turn: Some(2),
        data: Some(serde_json::json!({ "stream": "stderr" })),
    }];
    samples.extend(lifecycle());
    samples.extend(bootstrap());
    samples.extend(broker());
    samples.extend(commands());
    samples
}

fn vm() -> VmName {
    "web-0".parse().unwrap()
}

fn lifecycle() -> Vec<Event> {
    let vm = vm();
    let overlay = "/home/u/.castra/projects/demo-1a2b3c4d/overlays/web-0.qcow2";
    let method = "qmp-system-powerdown";
    vec![
        Event::OverlayPrepared {
            vm: vm.clone(),
            path: overlay.into(),
            base: Some("/images/debian.qcow2".into()),
            reused: false,
            elapsed_ms: 11,
        },
        Event::VmLaunched {
            vm: vm.clone(),
            pid: 4712,
            accel: Accel::Tcg,
            accel_reason: "there is no /dev/kvm".into(),
            elapsed_ms: 58,
        },
        Event::VmExited {
            vm: vm.clone(),
            pid: Some(4712),
            reason: "guest-reset".into(),
            outcome: LaunchEnding::Crashed.into(),
            last_words: Some("Kernel panic - not syncing".into()),
            qemu_words: None,
            remediation: Some("castra restart web-0 starts it again with its disk".into()),
        },
        Event::VmPaused {
            vm: vm.clone(),
            reason: "io-error".into(),
            detail: Some("no space is left on the host for its disk".into()),
            remediation: Some("make room there: it then runs on by itself".into()),
        },
        Event::VmResumed {
            vm: vm.clone(),
            reason: "io-error".into(),
            elapsed_ms: Some(12_003),
        },
        Event::VmRebooted {
            vm: vm.clone(),
            boots: 2,
        },
        Event::ShutdownRequested {
            vm: vm.clone(),
            pid: 4712,
        },
        Event::CooperativeAttempted {
            vm: vm.clone(),
            method: method.into(),
            timeout_ms: 20_000,
        },
        Event::CooperativeSucceeded {
            vm: vm.clone(),
            method: method.into(),
            elapsed_ms: 82,
        },
        Event::CooperativeTimedOut {
            vm: vm.clone(),
            method: method.into(),
            elapsed_ms: 20_000,
            detail: Some("the guest ignored the power button".into()),
        },
        Event::Escalated {
            vm: vm.clone(),
            pid: 4712,
            signal: "SIGTERM".into(),
            timeout_ms: 10_000,
        },
        Event::ShutdownComplete {
            vm: vm.clone(),
            outcome: ShutdownEnding::Terminated.into(),
            elapsed_ms: 20_011,
            changed: true,
        },
        Event::OverlayDiscarded {
            vm,
            path: overlay.into(),
            reclaimed_bytes: 4_136_960,
        },
    ]
}

fn machine() -> VmPlan {
    VmPlan {
        running: false,
        image: "/images/debian.qcow2".into(),
        pending: false,
        kernel: None,
        cpus: 2,
        memory_bytes: 1 << 30,
        disk_bytes: Some(2 << 30),
        persist: false,
        network: "user".into(),
        forwards: vec![PlannedForward {
            host: None,
            guest: 22,
            protocol: Protocol::Tcp,
        }],
        mounts: vec![PlannedMount {
            host: "/home/u/demo/site".into(),
            guest: "/srv".into(),
            readonly: true,
        }],
    }
}

fn bootstrap() -> Vec<Event> {
    let vm = vm();
    let plan = BootstrapPlan {
        vm: vm.clone(),
        mode: BootstrapMode::Auto,
        action: BootstrapPlanAction::Run,
        reason: "mode `auto` runs it on every `up`".into(),
        trigger: Some(BootstrapTrigger::Auto),
        script_path: Some("/home/u/demo/bootstrap/run.sh".into()),
        payload_path: Some("/home/u/demo/bootstrap/payload".into()),
        payload_bytes: Some(20),
        handshake_timeout_secs: Some(240),
        step_timeout_secs: Some(60),
        apply_timeout_secs: Some(600),
        remote_dir: Some("/var/tmp/castra".into()),
        ssh: Some(BootstrapPlanSsh {
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: Some(2222),
            identity: Some("/home/u/.castra/projects/demo-1a2b3c4d/id_ed25519".into()),
            options: vec!["ServerAliveInterval=5".into()],
        }),
        env_keys: vec!["GREETING".into()],
        verify: Some(BootstrapPlanVerify {
            command: Some("test -f ready".into()),
            path: None,
        }),
        artifact_hash: Some(HASH.into()),
        metadata_path: None,
        warnings: vec!["`CASTRA_VM` under `env` has no effect: castra sets it".into()],
        vizier_status: Some(VizierPlanStatus::Disabled),
        vizier_log_path: None,
        vizier_remediation: None,
        machine: Some(machine()),
    };
    vec![
        Event::BootstrapPlanned(Box::new(plan)),
        Event::BootstrapStarted {
            vm: vm.clone(),
            base_hash: Some(HASH.into()),
            artifact_hash: Some(HASH.into()),
            trigger: BootstrapTrigger::Always,
        },
        Event::BootstrapStep {
            vm: vm.clone(),
            step: BootstrapStepKind::WaitHandshake,
            status: BootstrapStepStatus::Success,
            duration_ms: 2286,
            detail: Some("handshake".into()),
        },
        Event::BootstrapCompleted {
            vm: vm.clone(),
            noop: true,
            duration_ms: 3421,
            stamp: None,
        },
        Event::BootstrapFailed {
            vm,
            duration_ms: 276,
            error: "the script ended with exit status 3".into(),
        },
    ]
}

fn broker() -> Vec<Event> {
    let vm = vm();
    vec![
        Event::BrokerStarted {
            pid: 4711,
            port: 7070,
        },
        Event::BrokerStopped {
            pid: 4711,
            port: 7070,
        },
        Event::BrokerHandshake {
            vm: None,
            capabilities: vec!["bus-v1".into(), "x-demo".into()],
            outcome: HandshakeOutcome::Declined,
            reason: Some("unknown-vm".into()),
            session: None,
            remote: "127.0.0.1:41002".into(),
            repeated: Some(12),
        },
        Event::BrokerSession {
            vm: vm.clone(),
            session: "s-17".into(),
            phase: SessionPhase::Closed,
            reason: Some("idle".into()),
            repeated: Some(19),
        },
        Event::BrokerFreshness {
            vm: vm.clone(),
            reachable: false,
            last_handshake_age_ms: Some(45_001),
        },
        Event::BrokerBackpressure {
            vm: Some(vm),
            session: Some("s-17".into()),
            reason: "slow-consumer".into(),
            queued_bytes: Some(4_194_304),
            repeated: None,
        },
    ]
}

fn commands() -> Vec<Event> {
    let (command, source) = (|| "up".to_owned(), || "cli".to_owned());
    let (thread, turn) = (None, None);
    vec![
        Event::Cleanup {
            path: "/home/u/.castra/projects/demo-1a2b3c4d/overlays/web-0.qcow2".into(),
            category: "overlay".into(),
            bytes: 4_136_960,
            dry_run: false,
        },
        Event::CommandAccepted {
            command: command(),
            detail: Some("web-0".into()),
            source: source(),
            thread: thread.clone(),
            turn,
            duration_ms: None,
            exit_status: None,
        },
        Event::CommandRejected {
            command: command(),
            detail: "project `demo` is busy".into(),
            remediation: Some("try again when it has ended".into()),
            exit_status: Some(75),
            source: source(),
            thread: thread.clone(),
            turn,
            duration_ms: None,
        },
        Event::CommandCompleted {
            command: command(),
            detail: None,
            duration_ms: Some(11_333),
            exit_status: Some(0),
            source: source(),
            thread: thread.clone(),
            turn,
        },
        Event::CommandFailed {
            command: command(),
            detail: "failed: web-0".into(),
            duration_ms: Some(11_333),
            exit_status: Some(1),
            source: source(),
            thread,
            turn,
        },
        Event::Usage {
            source: "codex".into(),
            scope: "turn".into(),
            turn: Some(2),
            prompt_tokens: 1200,
            cached_tokens: 800,
            completion_tokens: 90,
            thread: Some("t-1".into()),
        },
        Event::Summary {
            operation: command(),
            duration_ms: 11_333,
            exit_status: 0,
            vms: VmCounts {
                total: 2,
                changed: 1,
                unchanged: 1,
                failed: 0,
            },
            bytes: 0,
            verdict: None,
        },
    ]
}

fn stamped(seq: usize, event: Event) -> Stamped {
    Stamped {
        ts: "2026-11-21T10:00:00.123Z".into(),
        offset_ms: 412,
        seq: seq as u64,
        run: "e25632fb95f3f609".into(),
        event,
    }
}

#[test]
fn every_fact_has_a_sample_in_both_encodings_and_reads_back() {
    let samples = samples();
    let mut lines = String::new();
    for (seq, event) in samples.iter().enumerate() {
        let stamped = stamped(seq, event.clone());
        lines.push_str(&format!(
            "{}\n{}\n",
            stamped.contract_line(),
            serde_json::to_string(event).unwrap()
        ));
    }
    golden("events.jsonl", &lines);

    // Read from the golden file, not from the line just made: old lines must be readable for ever.
    let kept = fs::read_to_string(path("tests/golden/events.jsonl")).unwrap();
    let kept: Vec<&str> = kept.lines().collect();
    assert_eq!(samples.len(), FACTS.len(), "a fact has no sample");
    for (seq, (event, fact)) in samples.into_iter().zip(FACTS).enumerate() {
        assert_eq!(event.fact(), *fact);
        let (line, tagged) = (kept[2 * seq], kept[2 * seq + 1]);
        assert!(
            tagged.starts_with(&format!("{{\"{}\":", fact.variant)),
            "{tagged}"
        );
        assert_eq!(serde_json::from_str::<Event>(tagged).unwrap(), event);
        assert_eq!(Stamped::from_contract_line(line), Some(stamped(seq, event)));
    }
}

#[test]
fn fields_of_a_later_castra_are_passed_over() {
    for (seq, event) in samples().into_iter().enumerate() {
        let stamped = stamped(seq, event);
        let mut later = stamped.contract_object();
        later["added_later"] = serde_json::json!({ "any": ["thing"] });
        assert_eq!(
            Stamped::from_contract_line(&later.to_string()),
            Some(stamped),
            "{later}"
        );
    }
}

#[test]
fn the_page_names_every_fact_and_every_field() {
    let page = fs::read_to_string(path("docs/EVENTS.md")).unwrap();
    let named = |word: &str| page.contains(&format!("`{word}`"));
    let mut missing = BTreeSet::new();
    for fact in FACTS {
        missing.extend([fact.variant, fact.kind].into_iter().filter(|word| !named(word)));
        missing.extend(fact.phase.filter(|word| !named(word)));
    }
    let mut fields = BTreeSet::new();
    for (seq, event) in samples().into_iter().enumerate() {
        let object = stamped(seq, event).contract_object();
        fields.extend(object.as_object().unwrap().keys().cloned());
    }
    let unnamed: Vec<&String> = fields.iter().filter(|field| !named(field)).collect();
    assert!(
        missing.is_empty() && unnamed.is_empty(),
        "docs/EVENTS.md lacks {missing:?} {unnamed:?}"
    );
}

#[test]
fn every_sample_on_the_page_is_a_valid_event() {
    let page = fs::read_to_string(path("docs/EVENTS.md")).unwrap();
    let mut kinds = BTreeSet::new();
    for line in json_lines(&page) {
        let event = Stamped::from_contract_line(line)
            .map(|stamped| stamped.event)
            .or_else(|| serde_json::from_str(line).ok());
        let event = event.unwrap_or_else(|| panic!("no event: {line}"));
        kinds.insert(event.fact().variant);
    }
    let all: BTreeSet<&str> = FACTS.iter().map(|fact| fact.variant).collect();
    assert_eq!(kinds, all, "each fact has a sample on the page");
}

/// The operations that write events, as the code spells them, stand where the page lists them.
#[test]
fn the_page_names_every_operation() {
    let page = fs::read_to_string(path("docs/EVENTS.md")).unwrap();
    let list = page
        .lines()
        .find(|line| line.starts_with("An operation ("))
        .unwrap();
    let mut names = BTreeSet::new();
    let mut dirs = vec![path("src/core/operations")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                dirs.push(entry.path());
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap();
            for call in text.split("Operation::accept").skip(1) {
                // The name is the first argument, where it is written out.
                let arguments = call
                    .trim_start_matches("_unkept")
                    .trim_start_matches('(')
                    .trim_start();
                names.extend(
                    arguments
                        .strip_prefix('"')
                        .and_then(|rest| Some(rest.split_once('"')?.0.to_owned())),
                );
            }
        }
    }
    assert!(names.contains("restart") && names.contains("clean"), "{names:?}");
    for name in names {
        assert!(list.contains(&format!("`{name}`")), "`{name}` is missing: {list}");
    }
}

/// docs/events.schema.json has a definition for each fact, named by its variant, reached by its type
/// and phase, with exactly the fields that the fact has, all of them required. That their values fit
/// is for a validator that isn't ours (scripts/check-events.sh).
#[test]
fn the_schema_has_every_fact_and_every_field() {
    let schema = schema();
    let mut rules = schema["allOf"].as_array().unwrap().iter();
    for (seq, (event, fact)) in samples().into_iter().zip(FACTS).enumerate() {
        let rule = rules.next().unwrap();
        let mut wanted = serde_json::json!({ "type": { "const": fact.kind } });
        if let Some(phase) = fact.phase {
            wanted["phase"] = serde_json::json!({ "const": phase });
        }
        assert_eq!(rule["if"]["properties"], wanted, "{fact:?}");
        assert_eq!(rule["then"]["$ref"], format!("#/$defs/{}", fact.variant));
        let definition = &schema["$defs"][fact.variant];
        let properties: BTreeSet<&String> = definition["properties"].as_object().unwrap().keys().collect();
        let required: Vec<&str> = definition["required"]
            .as_array()
            .unwrap()
            .iter()
            .map(|field| field.as_str().unwrap())
            .collect();
        let line = stamped(seq, event).contract_line();
        let keys = keys(&line);
        let envelope = ["type", "v", "ts", "offset_ms", "seq", "run"];
        assert_eq!(keys[..6], envelope, "{line}");
        assert_eq!(keys[6..], required, "{line}");
        assert!(
            properties
                .iter()
                .copied()
                .eq(required.iter().copied().collect::<BTreeSet<_>>())
        );
    }
    // The last rule is for phases of a later castra; a definition more is that of VM names.
    assert_eq!(rules.count(), 1);
    assert_eq!(schema["$defs"].as_object().unwrap().len(), FACTS.len() + 1);
}

/// Scripts rely on every name and on what kind of value it has: none of them may go, nor change.
/// CASTRA_BLESS=1 adds new ones and never removes any.
#[test]
fn names_are_only_ever_added() {
    let schema = schema();
    let mut names = BTreeSet::new();
    for fact in FACTS {
        let name = match fact.phase {
            Some(phase) => format!("{}/{phase}", fact.kind),
            None => fact.kind.to_owned(),
        };
        names.insert(format!("{name} = {}", fact.variant));
        for (field, value) in schema["$defs"][fact.variant]["properties"].as_object().unwrap() {
            names_of(&format!("{name} {field}"), value, &mut names);
        }
    }
    for (field, value) in schema["properties"].as_object().unwrap() {
        names_of(&format!("* {field}"), value, &mut names);
    }
    let golden_path = path("tests/golden/events-names.txt");
    let kept = fs::read_to_string(&golden_path).unwrap_or_default();
    let kept: BTreeSet<String> = kept.lines().map(str::to_owned).collect();
    let gone: Vec<&String> = kept.difference(&names).collect();
    assert!(
        gone.is_empty(),
        "gone or changed, which breaks whoever reads them: {gone:#?}"
    );
    if std::env::var_os("CASTRA_BLESS").is_some() {
        let lines: String = names.iter().map(|name| format!("{name}\n")).collect();
        fs::write(&golden_path, lines).unwrap();
        return;
    }
    let new: Vec<&String> = names.difference(&kept).collect();
    assert!(
        new.is_empty(),
        "new names have to be on docs/EVENTS.md with the version that brings them; then CASTRA_BLESS=1 \
         keeps them: {new:#?}"
    );
}

/// A field, its kinds of value, the words it can be, and the fields inside it.
fn names_of(name: &str, value: &Value, names: &mut BTreeSet<String>) {
    let list = |key: &str| match &value[key] {
        Value::Array(several) => several.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let kinds = [list("type"), list("$ref"), list("anyOf")].concat();
    for kind in kinds {
        names.insert(format!("{name}: {kind}"));
    }
    for word in [list("enum"), list("const")].concat() {
        names.insert(format!("{name} = {word}"));
    }
    names.insert(name.to_owned());
    for (field, value) in value["properties"].as_object().into_iter().flatten() {
        names_of(&format!("{name}.{field}"), value, names);
    }
}

/// What a reader sees of a castra that is years ahead: types, phases and words it doesn't know are no
/// events to it, and no error; fields are passed over.
#[test]
fn types_of_a_later_castra_are_passed_over() {
    let envelope = "\"v\":1,\"ts\":\"2031-11-21T10:00:00.000Z\",\"offset_ms\":0,\"seq\":0,\"run\":\"r\"";
    for later in [
        r#""type":"vm.teleported","vm":["a","b"]"#,
        r#""type":"vm.lifecycle","vm":"web","phase":"teleported""#,
        r#""type":"message.v2","severity":"info","text":"x""#,
        r#""type":"message","severity":"catastrophe","text":"x""#,
        r#""type":"cleanup""#,
    ] {
        let line = format!("{{{later},{envelope}}}");
        assert_eq!(Stamped::from_contract_line(&line), None, "{line}");
    }
}

/// The Python reader on the page does with later types and fields, and with a torn line, what the
/// page says.
#[test]
fn the_reader_on_the_page_ignores_what_it_does_not_know() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let page = fs::read_to_string(path("docs/EVENTS.md")).unwrap();
    let from = page.split("```python\n").nth(1).expect("a reader in Python");
    let program = from.split("```").next().unwrap();
    let mut child = spawn_piped(
        Command::new("python3")
            .args(["-c", program])
            .stdin(Stdio::piped()),
    );
    let mut lines = String::new();
    for (seq, event) in samples().into_iter().enumerate() {
        let mut later = stamped(seq, event).contract_object();
        later["added_later"] = serde_json::json!({ "any": ["thing"] });
        lines.push_str(&format!("{later}\n"));
    }
    lines.push_str("{\"type\":\"vm.teleported\",\"vm\":[\"a\"]}\n{\"type\":\"torn\n");
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(lines.as_bytes()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(
        told.contains("web-0: wait-handshake success after 2286 ms"),
        "{told}"
    );
    assert!(told.ends_with("up ended with 0: 1 changed, 0 failed\n"), "{told}");
}

fn schema() -> Value {
    serde_json::from_str(&fs::read_to_string(path("docs/events.schema.json")).unwrap()).unwrap()
}

/// The keys of an object in the order in which they stand.
fn keys(line: &str) -> Vec<String> {
    struct Keys(Vec<String>);
    impl<'de> serde::Deserialize<'de> for Keys {
        fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Keys, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Keys;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                    let mut keys = Vec::new();
                    while let Some((key, serde::de::IgnoredAny)) = map.next_entry()? {
                        keys.push(key);
                    }
                    Ok(Keys(keys))
                }
            }
            from.deserialize_map(Visitor)
        }
    }
    serde_json::from_str::<Keys>(line).unwrap().0
}

/// The lines of all fenced blocks that are marked as JSON.
fn json_lines(page: &str) -> Vec<&str> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```json";
        } else if inside && !line.trim().is_empty() {
            lines.push(line);
        }
    }
    lines
}

fn path(below: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(below)
}
