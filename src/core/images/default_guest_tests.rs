//! The cache of default guests, with a stand-in builder of a few lines.

use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Instant;

use super::*;
use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::scratch::Scratch;

/// Makes a guest whose kernel holds what was in the file `seen`, counts its runs beside the cache,
/// waits for a file `go` if there is a file `slow`, and has one kernel for both kinds if there is a
/// file `one-kernel`.
const STAND_IN: &str = r#"
set -eu
out=$2 source=$4
home=${out%/*/*/*}
echo "guest: reading $(cat "$source/word")" >&2
echo x >>"$home/runs"
if [ -e "$home/slow" ]; then
    echo "guest: slow" >&2
    until [ -e "$home/go" ]; do sleep 0.02; done
fi
mkdir "$out"
cp "$source/word" "$out/vmlinux"
echo i >"$out/initramfs.cpio"
plain=true mounts=false
if [ "${5:-}" = --mounts ]; then mounts=true plain=false; fi
if [ -e "$home/one-kernel" ]; then mounts=true plain=true; fi
echo "{ \"mounts\": $mounts, \"plain\": $plain, \"cmdline\": \"console=ttyS0 quiet\" }" >"$out/manifest.json"
"#;

const FILES: &[(&str, &str)] = &[("word", "hello")];

fn recipe(script: &str) -> Recipe<'_> {
    Recipe { script, files: FILES }
}

fn run(
    script: &str,
    home: &Path,
    freshness: BuildMode,
    cancel: &Cancel,
) -> (Result<DefaultGuest>, Vec<String>) {
    run_kind(script, GuestKind::Plain, home, freshness, cancel)
}

fn run_kind(
    script: &str,
    kind: GuestKind,
    home: &Path,
    freshness: BuildMode,
    cancel: &Cancel,
) -> (Result<DefaultGuest>, Vec<String>) {
    let mut seen: Vec<Stamped> = Vec::new();
    let emitter = Emitter::new(&mut seen);
    let result = ensure(
        &recipe(script),
        Arch::host(),
        kind,
        home,
        freshness,
        &emitter,
        cancel,
    );
    let texts = seen
        .into_iter()
        .filter_map(|stamped| match stamped.event {
            Event::Message {
                severity,
                text,
                source,
                ..
            } => {
                assert_eq!(source.as_deref(), Some("image"));
                Some(format!("{severity:?} {text}"))
            }
            _ => None,
        })
        .collect();
    (result, texts)
}

fn runs(home: &Path) -> usize {
    fs::read_to_string(home.join("runs"))
        .unwrap_or_default()
        .lines()
        .count()
}

fn names(home: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(images_dir(home))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn eventually(what: &str, mut probe: impl FnMut() -> bool) {
    let pause = Cancel::new();
    let began = Instant::now();
    while !probe() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "waited in vain for {what}"
        );
        pause.pause(Duration::from_millis(10));
    }
}

#[test]
fn built_once_then_found() {
    let scratch = Scratch::new("guest");
    let home = scratch.dir();
    let (guest, said) = run(STAND_IN, home, BuildMode::AsCached, &Cancel::new());
    let guest = guest.unwrap();
    assert_eq!(guest.cmdline, "console=ttyS0 quiet");
    let seal = guest.kernel.with_file_name(COMPLETE);
    let mode = fs::metadata(seal).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "whatever umask castra was started under");
    assert_eq!(fs::read_to_string(&guest.kernel).unwrap(), "hello");
    let source = crate::core::images::digest::HashedSource::Kernel {
        kernel: &guest.kernel,
        initrd: Some(&guest.initrd),
        cmdline: &guest.cmdline,
    };
    let cache = crate::core::images::digest::DigestCache::new(scratch.path("digests"));
    let hash = crate::core::images::digest::base_hash(source, &cache, &Cancel::new()).unwrap();
    assert_eq!(
        guest.base_hash, hash,
        "what was taken at the build is what the files hash to"
    );
    assert!(said.contains(&"Progress reading hello".to_owned()), "{said:?}");
    let (again, said) = run(STAND_IN, home, BuildMode::AsCached, &Cancel::new());
    assert_eq!(again.unwrap(), guest);
    assert_eq!(said, [""; 0], "a guest that is there is no news");
    assert_eq!(runs(home), 1);
    let id = recipe(STAND_IN).id();
    assert_eq!(
        names(home),
        [format!("guest-x86_64-{id}"), format!("guest-x86_64-{id}.lock")]
    );
    assert_eq!(
        fs::metadata(images_dir(home)).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn another_recipe_is_another_guest() {
    let scratch = Scratch::new("guest-two");
    let one = run(STAND_IN, scratch.dir(), BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap();
    let changed = format!("{STAND_IN}\n# changed\n");
    let two = run(&changed, scratch.dir(), BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap();
    assert_ne!(one.dir, two.dir);
    assert!(one.kernel.exists(), "a guest of another castra stays");
}

fn ensured(home: &Path, kind: GuestKind) -> DefaultGuest {
    run_kind(STAND_IN, kind, home, BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap()
}

#[test]
fn the_guest_with_mounts_is_another_one() {
    let scratch = Scratch::new("guest-mounts");
    let home = scratch.dir();
    let mounts = ensured(home, GuestKind::Mounts);
    assert!(mounts.mounts && !mounts.plain);
    assert!(find(&recipe(STAND_IN), Arch::host(), GuestKind::Plain, home).is_err());
    let plain = ensured(home, GuestKind::Plain);
    assert!(plain.plain && !plain.mounts);
    let id = recipe(STAND_IN).id();
    let expected = [
        format!("guest-x86_64-{id}"),
        format!("guest-x86_64-{id}.lock"),
        format!("guest-x86_64-mounts-{id}"),
        format!("guest-x86_64-mounts-{id}.lock"),
    ];
    assert_eq!(names(home), expected);
    assert_eq!(ensured(home, GuestKind::Mounts), mounts);
    assert_eq!(ensured(home, GuestKind::Plain), plain);
    assert_eq!(runs(home), 2);
}

#[test]
fn one_guest_serves_as_both_where_the_kernel_is_the_same() {
    for [first, second] in [GuestKind::ALL, [GuestKind::Mounts, GuestKind::Plain]] {
        let scratch = Scratch::new("guest-one-kernel");
        let home = scratch.dir();
        fs::write(home.join("one-kernel"), "").unwrap();
        let guest = ensured(home, first);
        assert_eq!(ensured(home, second), guest);
        assert_eq!(runs(home), 1);
        // Its own place goes first once there is something in it.
        let own = run_kind(STAND_IN, second, home, BuildMode::Rebuild, &Cancel::new())
            .0
            .unwrap();
        assert_ne!(own.dir, guest.dir);
        assert_eq!(ensured(home, second), own);
        assert_eq!(ensured(home, first), guest);
    }
}

#[test]
fn a_builder_that_makes_the_other_kind_has_failed() {
    let scratch = Scratch::new("guest-wrong-kind");
    let script = STAND_IN.replace("mounts=true", "mounts=false");
    let (failed, _) = run_kind(
        &script,
        GuestKind::Mounts,
        scratch.dir(),
        BuildMode::AsCached,
        &Cancel::new(),
    );
    let failure = failed.unwrap_err();
    assert!(failure.why.clone().unwrap().contains("other kind"), "{failure}");
}

#[test]
fn a_rebuild_replaces_it() {
    let scratch = Scratch::new("guest-force");
    let home = scratch.dir();
    let guest = run(STAND_IN, home, BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap();
    fs::write(guest.dir.join("old"), "").unwrap();
    let again = run(STAND_IN, home, BuildMode::Rebuild, &Cancel::new()).0.unwrap();
    assert_eq!(again, guest);
    assert!(!guest.dir.join("old").exists());
    assert_eq!(runs(home), 2);
    assert_eq!(names(home).len(), 2, "nothing of the old one is left");
}

#[test]
fn a_damaged_guest_is_built_anew_and_that_is_said() {
    let scratch = Scratch::new("guest-damage");
    let home = scratch.dir();
    let guest = run(STAND_IN, home, BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap();
    let damages: [(&str, &dyn Fn()); 4] = [
        ("initramfs.cpio", &|| fs::remove_file(&guest.initrd).unwrap()),
        ("vmlinux", &|| fs::write(&guest.kernel, "").unwrap()),
        ("complete.json", &|| {
            fs::write(guest.dir.join("complete.json"), "{").unwrap()
        }),
        ("manifest.json", &|| {
            fs::write(guest.dir.join("manifest.json"), "{}").unwrap()
        }),
    ];
    for (count, (name, damage)) in damages.iter().enumerate() {
        damage();
        let (again, said) = run(STAND_IN, home, BuildMode::AsCached, &Cancel::new());
        assert_eq!(again.unwrap(), guest);
        assert_eq!(runs(home), count + 2);
        assert!(said[0].starts_with("Warn ") && said[0].contains(name), "{said:?}");
    }
}

#[test]
fn a_failed_build_leaves_nothing_and_says_why() {
    let scratch = Scratch::new("guest-fail");
    let home = scratch.dir();
    for (script, exit, why, next) in [
        (
            "echo 'guest: step' >&2; echo 'error: no dpkg-deb' >&2; echo '  because: this is no Debian' >&2; \
             echo '  try: another host' >&2; exit 69",
            Exit::Unavailable,
            "no dpkg-deb: this is no Debian",
            "another host",
        ),
        (
            "echo 'error: download failed' >&2; exit 74",
            Exit::Io,
            "download failed",
            "castra image build",
        ),
        (
            "echo boom >&2; exit 3",
            Exit::Failed,
            "exit status 3: boom",
            "castra image build",
        ),
        (
            "mkdir \"$2\"; : >\"$2/vmlinux\"",
            Exit::Failed,
            "the builder made no vmlinux",
            "",
        ),
    ] {
        let (failed, said) = run(script, home, BuildMode::AsCached, &Cancel::new());
        let failure = failed.unwrap_err();
        assert_eq!(failure.exit, exit);
        assert!(failure.why.clone().unwrap().contains(why), "{failure}");
        assert!(
            failure.next.clone().unwrap_or_default().contains(next),
            "{failure}"
        );
        assert!(!said.iter().any(|text| text.contains("error:")), "{said:?}");
        assert!(
            names(home).iter().all(|name| name.ends_with(".lock")),
            "{:?}",
            names(home)
        );
    }
}

#[test]
fn what_a_killed_builder_left_is_cleared() {
    let scratch = Scratch::new("guest-leftover");
    let home = scratch.dir();
    let staging = beside(
        &dir_of(&recipe(STAND_IN), Arch::host(), GuestKind::Plain, home),
        ".building",
    );
    fs::create_dir_all(staging.join("out")).unwrap();
    run(STAND_IN, home, BuildMode::AsCached, &Cancel::new())
        .0
        .unwrap();
    assert!(!staging.exists());
}

#[test]
fn two_at_once_build_it_once() {
    let scratch = Scratch::new("guest-race");
    let home = scratch.dir();
    fs::write(home.join("slow"), "").unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| run(STAND_IN, home, BuildMode::AsCached, &Cancel::new()));
        eventually("the first builder to start", || runs(home) == 1);
        assert!(
            !dir_of(&recipe(STAND_IN), Arch::host(), GuestKind::Plain, home).exists(),
            "half a guest can be seen"
        );
        let second = scope.spawn(|| run(STAND_IN, home, BuildMode::AsCached, &Cancel::new()));
        // A third one gives up: waiting ends when somebody asks to stop.
        let cancel = Cancel::new();
        cancel.request();
        let (third, said) = run(STAND_IN, home, BuildMode::AsCached, &cancel);
        assert_eq!(third.unwrap_err().exit, Exit::Interrupted);
        let waiting = format!(
            "Info another castra (pid {}) builds the default guest: waiting for it",
            std::process::id()
        );
        assert_eq!(said, [waiting]);
        fs::write(home.join("go"), "").unwrap();
        let one = first.join().unwrap().0.unwrap();
        assert_eq!(second.join().unwrap().0.unwrap(), one);
    });
    assert_eq!(runs(home), 1);
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    let scratch = Scratch::new("guest-interrupt");
    let home = scratch.dir();
    fs::write(home.join("slow"), "").unwrap();
    let cancel = Cancel::new();
    thread::scope(|scope| {
        let building = scope.spawn(|| run(STAND_IN, home, BuildMode::AsCached, &cancel));
        eventually("the builder to start", || runs(home) == 1);
        cancel.request();
        assert_eq!(building.join().unwrap().0.unwrap_err().exit, Exit::Interrupted);
    });
    assert!(
        names(home).iter().all(|name| name.ends_with(".lock")),
        "{:?}",
        names(home)
    );
}
