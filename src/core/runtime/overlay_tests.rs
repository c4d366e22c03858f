//! Overlays, made by the real `qemu-img`.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::core::images::base::DiskFormat;
use crate::core::scratch::Scratch;

const MIB: u64 = 1 << 20;

fn raw_base(scratch: &Scratch, name: &str, size: u64) -> ResolvedBase {
    let path = scratch.path(name);
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    ResolvedBase {
        path,
        format: DiskFormat::Raw,
        virtual_size: size,
    }
}

fn spec<'a>(path: &'a Path, base: Option<&'a ResolvedBase>) -> OverlaySpec<'a> {
    OverlaySpec {
        path,
        base,
        disk_size: None,
        keep: Keep::Nothing,
        lock: None,
        ours: true,
    }
}

fn ensure(spec: &OverlaySpec<'_>) -> Result<OverlayPrepared> {
    ensure_overlay(spec, &Cancel::new())
}

fn header(path: &Path) -> Header {
    qcow2::load_header(path).unwrap().unwrap()
}

fn refusal(spec: &OverlaySpec<'_>, exit: Exit, why: &str) {
    let failure = ensure(spec).unwrap_err();
    assert_eq!(failure.exit, exit, "{failure}");
    assert!(failure.to_string().contains(why), "{failure}");
    let left: Vec<_> = fs::read_dir(spec.path.parent().unwrap())
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.ends_with(".new"))
        .collect();
    assert_eq!(left, [""; 0], "half an overlay is left");
}

/// A QEMU that holds the image open for writing, as a running VM does, and boots nothing.
struct Holding(Child);

impl Holding {
    fn new(image: &Path) -> Holding {
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "none",
                "-nodefaults",
                "-display",
                "none",
                "-S",
                "-blockdev",
            ])
            .arg(format!("driver=file,node-name=d,filename={}", image.display()))
            .args(["-device", "virtio-blk-pci,drive=d"])
            .args(["-machine", "q35"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while host::image_use(image) != ImageUse::Written {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "QEMU didn't lock its image"
            );
            Cancel::new().pause(Duration::from_millis(10));
        }
        Holding(child)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn over_a_base_and_over_nothing() {
    let scratch = Scratch::new("overlay");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let path = scratch.path("overlays/web.qcow2");
    let made = ensure(&spec(&path, Some(&base))).unwrap();
    assert_eq!(
        made,
        OverlayPrepared {
            path: path.clone(),
            reused: false,
            base: Some(base.path.clone()),
            virtual_size: 4 * MIB
        }
    );
    assert_eq!(header(&path).backing_file.as_deref(), Some(base.path.as_path()));
    assert_eq!(header(&path).virtual_size, 4 * MIB);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

    let empty = scratch.path("overlays/empty.qcow2");
    assert_eq!(
        ensure(&spec(&empty, None)).unwrap().virtual_size,
        EMPTY_DISK_BYTES
    );
    assert_eq!(header(&empty).backing_file, None);
    assert_eq!(header(&empty).virtual_size, EMPTY_DISK_BYTES);
    assert!(host::disk_usage(&empty) < MIB, "an empty disk takes no space");
}

#[test]
fn the_disk_grows_and_never_shrinks() {
    let scratch = Scratch::new("overlay-size");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let path = scratch.path("web.qcow2");
    let sized = |disk_size, keep| OverlaySpec {
        disk_size: Some(disk_size),
        keep,
        ..spec(&path, Some(&base))
    };
    assert_eq!(
        ensure(&sized(8 * MIB, Keep::Nothing)).unwrap().virtual_size,
        8 * MIB
    );
    assert_eq!(header(&path).virtual_size, 8 * MIB);
    assert_eq!(
        ensure(&sized(4 * MIB, Keep::Nothing)).unwrap().virtual_size,
        4 * MIB
    );
    assert_eq!(
        ensure(&sized(4 * MIB + 1, Keep::Nothing)).unwrap().virtual_size,
        4 * MIB + 512
    );
    refusal(
        &sized(4 * MIB - 512, Keep::Nothing),
        Exit::Config,
        "can't be shrunk",
    );
    refusal(&sized(u64::MAX, Keep::Nothing), Exit::Config, "beyond any disk");
    // A kept disk grows in place, and is refused if it would have to shrink.
    assert_eq!(
        ensure(&sized(8 * MIB, Keep::Nothing)).unwrap().virtual_size,
        8 * MIB
    );
    let grown = ensure(&sized(16 * MIB, Keep::Persist)).unwrap();
    assert!(grown.reused);
    assert_eq!(header(&path).virtual_size, 16 * MIB);
    refusal(&sized(8 * MIB, Keep::Persist), Exit::Config, "can't be shrunk");
    let as_it_is = OverlaySpec {
        disk_size: None,
        ..sized(0, Keep::Persist)
    };
    assert_eq!(ensure(&as_it_is).unwrap().virtual_size, 16 * MIB);
}

#[test]
fn persist_keeps_what_stands_on_the_same_base() {
    let scratch = Scratch::new("overlay-persist");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let other = raw_base(&scratch, "other.img", 4 * MIB);
    let path = scratch.path("web.qcow2");
    let kept = |base| OverlaySpec {
        keep: Keep::Persist,
        ours: false,
        ..spec(&path, base)
    };
    assert!(!ensure(&kept(Some(&base))).unwrap().reused);
    let inode = fs::metadata(&path).unwrap().ino();
    assert!(ensure(&kept(Some(&base))).unwrap().reused);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    // Another path to the same file is the same base.
    let mut linked = base.clone();
    linked.path = scratch.path("link.img");
    std::os::unix::fs::symlink(&base.path, &linked.path).unwrap();
    assert!(ensure(&kept(Some(&linked))).unwrap().reused);
    refusal(&kept(Some(&other)), Exit::CantCreate, "other.img");
    refusal(&kept(None), Exit::CantCreate, "nothing (an empty disk)");
    fs::write(&path, "something").unwrap();
    refusal(&kept(Some(&base)), Exit::CantCreate, "isn't a qcow2 overlay");
}

#[test]
fn leftovers_are_replaced_but_nobodys_own_disk() {
    let scratch = Scratch::new("overlay-leftover");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let path = scratch.path("web.qcow2");
    let strange = OverlaySpec {
        ours: false,
        ..spec(&path, Some(&base))
    };
    fs::write(&path, "a disk somebody needs").unwrap();
    refusal(&strange, Exit::CantCreate, "castra didn't make");
    assert_eq!(fs::read(&path).unwrap(), b"a disk somebody needs");
    assert!(!ensure(&spec(&path, Some(&base))).unwrap().reused);
    // An inode number may be used again, a birth time isn't.
    let birth = || {
        let meta = fs::metadata(&path).unwrap();
        (meta.ino(), meta.created().ok())
    };
    let first = birth();
    // A layer over the same base counts as a leftover.
    assert!(!ensure(&strange).unwrap().reused);
    assert_ne!(birth(), first);

    let dir = scratch.path("dir.qcow2");
    fs::create_dir(&dir).unwrap();
    refusal(&spec(&dir, Some(&base)), Exit::CantCreate, "isn't a regular file");
    let link = scratch.path("link.qcow2");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    refusal(
        &spec(&link, Some(&base)),
        Exit::CantCreate,
        "isn't a regular file",
    );
}

#[test]
fn an_overlay_in_use_is_neither_replaced_nor_removed() {
    let scratch = Scratch::new("overlay-held");
    let path = scratch.path("web.qcow2");
    ensure(&spec(&path, None)).unwrap();
    let qemu = Holding::new(&path);
    let who = format!("qemu-system-x86 (pid {})", qemu.0.id());
    refusal(&spec(&path, None), Exit::Busy, &who);
    let failure = discard_overlay(&path).unwrap_err();
    assert_eq!(failure.exit, Exit::Busy);
    assert!(failure.to_string().contains(&who), "{failure}");
    drop(qemu);
    assert!(discard_overlay(&path).unwrap() > 0);
    assert!(!path.exists());
}

#[test]
fn a_base_that_is_being_written_is_named() {
    let scratch = Scratch::new("overlay-base-held");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let path = scratch.path("web.qcow2");
    let qemu = Holding::new(&base.path);
    refusal(
        &spec(&path, Some(&base)),
        Exit::Busy,
        &format!("(pid {})", qemu.0.id()),
    );
    assert!(!path.exists());
}

#[test]
fn what_can_not_be_made_leaves_nothing() {
    let scratch = Scratch::new("overlay-fail");
    let mut base = raw_base(&scratch, "base.img", 4 * MIB);
    fs::write(scratch.path("file"), "").unwrap();
    let under_a_file = scratch.path("file/web.qcow2");
    let failure = ensure(&spec(&under_a_file, Some(&base))).unwrap_err();
    assert!(failure.to_string().contains("Not a directory"), "{failure}");
    let path = scratch.path("web.qcow2");
    base.path = scratch.path("gone.img");
    refusal(&spec(&path, Some(&base)), Exit::CantCreate, "gone.img");
    assert!(!path.exists());
    let cancel = Cancel::new();
    cancel.request();
    let failure = ensure_overlay(&spec(&path, None), &cancel).unwrap_err();
    assert_eq!(failure.exit, Exit::Interrupted);
    assert_eq!(
        fs::read_dir(scratch.dir()).unwrap().count(),
        2,
        "base.img and file alone"
    );
}

#[test]
fn names_with_odd_characters() {
    let scratch = Scratch::new("overlay-names");
    let base = raw_base(&scratch, "a b,c:d%20'é.img", 4 * MIB);
    let path = scratch.path("o v,e:r%20'é.qcow2");
    ensure(&spec(&path, Some(&base))).unwrap();
    assert_eq!(header(&path).backing_file.as_deref(), Some(base.path.as_path()));
    assert!(discard_overlay(&path).unwrap() > 0);
}

#[test]
fn discarding_says_what_it_gave_back() {
    let scratch = Scratch::new("overlay-discard");
    let path = scratch.path("web.qcow2");
    assert_eq!(discard_overlay(&path).unwrap(), 0);
    ensure(&spec(&path, None)).unwrap();
    let taken = host::disk_usage(&path);
    assert_eq!(discard_overlay(&path).unwrap(), taken);
    fs::create_dir(&path).unwrap();
    assert!(discard_overlay(&path).is_err());
}

#[test]
fn a_kept_layer_wants_its_base_as_it_was() {
    let scratch = Scratch::new("overlay-base");
    let base = raw_base(&scratch, "base.img", 4 * MIB);
    let path = scratch.path("web.qcow2");
    let digests = DigestCache::new(scratch.path("digests"));
    let kept = OverlaySpec {
        keep: Keep::Persist,
        ..spec(&path, Some(&base))
    };
    let check = |spec: &OverlaySpec<'_>, then: &BaseRecord| {
        check_same_base(spec, Some(then), &digests, &Cancel::new())
    };
    let then = base_record(Some(&base), &digests).unwrap();
    ensure(&kept).unwrap();
    check(&kept, &then).unwrap();
    let touch = || {
        let file = fs::File::options().write(true).open(&base.path).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        file.set_modified(later).unwrap();
    };
    // Its digest was unknown, so nobody can say whether the contents are the same.
    touch();
    let failure = check(&kept, &then).unwrap_err();
    assert!(failure.to_string().contains("was rewritten"), "{failure}");
    for keep in [Keep::Nothing, Keep::Restart] {
        let outcome = check(&OverlaySpec { keep, ..kept }, &then);
        assert_eq!(outcome.is_ok(), keep == Keep::Nothing);
    }
    // A base with a known digest may be touched and copied, but not changed.
    digests
        .digest(&base.path, Algorithm::Sha256, &Cancel::new())
        .unwrap();
    let then = base_record(Some(&base), &digests).unwrap();
    assert!(then.sha256.is_some());
    let copy = scratch.path("copy");
    fs::copy(&base.path, &copy).unwrap();
    fs::rename(&copy, &base.path).unwrap();
    check(&kept, &then).unwrap();
    fs::write(&base.path, vec![1; 4 << 20]).unwrap();
    check(&kept, &then).unwrap_err();
    // When the old contents are back, the base is accepted again, however often it was checked meanwhile.
    fs::write(&base.path, vec![0; 4 << 20]).unwrap();
    check(&kept, &then).unwrap();
    // Without an overlay there is nothing to protect.
    fs::write(&base.path, vec![1; 4 << 20]).unwrap();
    discard_overlay(&path).unwrap();
    check(&kept, &then).unwrap();
}
