//! Base images, judged with the real `qemu-img`.

use std::process::Command;

use super::*;
use crate::core::scratch::Scratch;

fn qemu_img(args: &[&str]) {
    assert!(Command::new("qemu-img").args(args).status().unwrap().success());
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn refusal(path: &Path, why: &str) {
    let failure = inspect(path, &Cancel::new()).unwrap_err();
    assert_eq!(failure.exit, Exit::Config, "{failure}");
    assert!(failure.why.clone().unwrap().contains(why), "{failure}");
    assert!(failure.next.is_some(), "{failure}");
}

#[test]
fn qcow2_and_raw_are_taken() {
    let scratch = Scratch::new("base");
    let (qcow2, raw) = (scratch.path("a.img"), scratch.path("b.img"));
    qemu_img(&["create", "-q", "-f", "qcow2", &text(&qcow2), "8M"]);
    qemu_img(&["create", "-q", "-f", "raw", &text(&raw), "1M"]);
    let found = inspect(&qcow2, &Cancel::new()).unwrap();
    assert_eq!((found.format, found.virtual_size), (DiskFormat::Qcow2, 8 << 20));
    let found = inspect(&raw, &Cancel::new()).unwrap();
    assert_eq!((found.format, found.virtual_size), (DiskFormat::Raw, 1 << 20));
    assert_eq!(found.path, raw);
}

#[test]
fn what_is_no_disk_image_is_named() {
    let scratch = Scratch::new("base-bad");
    let file = |name: &str, bytes: &[u8]| {
        fs::write(scratch.path(name), bytes).unwrap();
        scratch.path(name)
    };
    refusal(&scratch.path("gone"), "there is no such file");
    refusal(scratch.dir(), "it is a directory");
    std::os::unix::fs::symlink("nowhere", scratch.path("link")).unwrap();
    refusal(&scratch.path("link"), "symbolic link to a file that isn't there");
    refusal(Path::new("/dev/null"), "neither a file nor a block device");
    refusal(&file("empty", b""), "it is empty");
    refusal(&file("a.xz", b"\xfd7zXZ\0rest"), "packed with xz");
    refusal(
        &file("a.html", b"<!DOCTYPE html>\n<p>404"),
        "beginning `<!DOCTYPE html>`",
    );
    refusal(&file("vmlinux", b"\x7fELF\x02\x01"), "kernel");
    refusal(&file("odd", &[1; 1000]), "no multiple of 512");
    refusal(&file("short.qcow2", b"QFI\xfb\0\0\0\x03"), "not a valid qcow2");
    let mut newer = b"QFI\xfb\0\0\0\x03".to_vec();
    newer.resize(512, 0xff);
    newer[8..20].fill(0);
    newer[72..80].copy_from_slice(&(1u64 << 63).to_be_bytes());
    refusal(&file("newer.qcow2", &newer), "");
}

#[test]
fn other_formats_are_named_with_the_way_out() {
    let scratch = Scratch::new("base-formats");
    for format in ["vmdk", "vdi", "vhdx", "qed", "vpc"] {
        let path = scratch.path(format);
        qemu_img(&["create", "-q", "-f", format, &text(&path), "8M"]);
        let failure = inspect(&path, &Cancel::new()).unwrap_err();
        assert!(failure.why.clone().unwrap().contains(format), "{failure}");
        assert!(failure.next.unwrap().contains("qemu-img convert -f"));
    }
}

#[test]
fn images_that_name_other_files_are_refused() {
    let scratch = Scratch::new("base-names");
    let secret = scratch.path("secret");
    fs::write(&secret, vec![7; 1 << 20]).unwrap();
    let layered = scratch.path("layered.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &text(&secret),
        &text(&layered),
    ]);
    refusal(&layered, "layer over");
    let external = scratch.path("external.qcow2");
    let option = format!("data_file={}", text(&scratch.path("data")));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &option,
        &text(&external),
        "8M",
    ]);
    refusal(&external, "its data lies in another file");
}

#[test]
fn a_pinned_digest_is_verified() {
    let scratch = Scratch::new("base-digest");
    let path = scratch.path("disk.img");
    fs::write(&path, vec![0; 512]).unwrap();
    // sha256sum and sha512sum of 512 zero bytes.
    let right = "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560";
    let state = StateRoot::new(scratch.path("state"));
    let mut silent = crate::core::reporter::Silent;
    let emitter = Emitter::new(&mut silent);
    let resolve = |digest| {
        let image = BaseImage {
            source: ImageSource::Path(path.clone()),
            digest,
        };
        resolve_base_image(&image, scratch.dir(), &state, &emitter, &Cancel::new())
    };
    assert_eq!(resolve(None).unwrap().format, DiskFormat::Raw);
    assert!(
        !state.images().exists(),
        "nothing was asked for, nothing is hashed"
    );
    resolve(Some(ImageDigest::Sha256(right.into()))).unwrap();
    let failure = resolve(Some(ImageDigest::Sha256("0".repeat(64)))).unwrap_err();
    assert_eq!(failure.exit, Exit::Config);
    assert!(failure.why.unwrap().contains(right));
    let failure = resolve(Some(ImageDigest::Sha512("0".repeat(128)))).unwrap_err();
    assert!(failure.next.unwrap().contains("base_image_sha512"));
}
