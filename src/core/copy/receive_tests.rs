//! What tars make is read back, and what a hostile guest sends goes nowhere else.

use std::io::Cursor;
use std::os::unix::fs::MetadataExt;

use super::super::send;
use super::*;
use crate::core::bootstrap::archive::{END, Member};
use crate::core::process::Job;
use crate::core::scratch::Scratch;

/// A header, and these contents.
fn member(name: &[u8], kind: u8, link: &[u8], mode: u32, contents: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Member {
        name,
        link,
        kind,
        mode,
        size: contents.len() as u64,
        mtime: 1_000_000_000,
    }
    .write_to(&mut bytes)
    .unwrap();
    bytes.extend_from_slice(contents);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn receive(bytes: &[u8], to: &Path) -> (io::Result<()>, Copied) {
    let mut place = Destination::find(to, false).unwrap();
    let mut copied = Copied::default();
    place.begin(false).unwrap();
    let done = unpack(&mut Cursor::new(bytes), &mut place, &mut copied);
    place.finish();
    (done, copied)
}

fn fill(tree: &Path) {
    let long = "n".repeat(120);
    fs::create_dir_all(tree.join(&long).join(&long)).unwrap();
    fs::write(tree.join(&long).join(&long).join("deep"), vec![7; 100_000]).unwrap();
    fs::create_dir(tree.join("empty")).unwrap();
    fs::write(tree.join("it's \"odd\"\n$HOME"), "odd").unwrap();
    fs::set_permissions(tree.join("it's \"odd\"\n$HOME"), Permissions::from_mode(0o750)).unwrap();
    symlink("empty", tree.join("to folder")).unwrap();
    symlink("/nowhere/at/all", tree.join("dangling")).unwrap();
    symlink(format!("{long}/{long}/deep"), tree.join("long link")).unwrap();
    fs::set_permissions(tree.join("empty"), Permissions::from_mode(0o500)).unwrap();
}

/// Path, mode, contents or target of everything below.
fn listing(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_symlink() {
                format!("-> {:?}", fs::read_link(&path).unwrap())
            } else if meta.is_dir() {
                folders.push(path.clone());
                format!("{:o}", meta.mode())
            } else {
                format!(
                    "{:o} {} {:?}",
                    meta.mode(),
                    meta.mtime(),
                    fs::read(&path).unwrap().len()
                )
            };
            all.push(format!("{:?} {what}", path.strip_prefix(root).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn what_any_tar_has_packed_is_there_again() {
    let scratch = Scratch::new("copy tars");
    let tree = scratch.path("tree");
    fs::create_dir(&tree).unwrap();
    fill(&tree);
    fs::hard_link(tree.join("it's \"odd\"\n$HOME"), tree.join("linked")).unwrap();
    for (number, tar) in [
        &["tar", "--format=gnu"][..],
        &["tar", "--format=pax"],
        &["tar", "--format=posix", "--pax-option=delete=mtime"],
        &["busybox", "tar"],
    ]
    .iter()
    .enumerate()
    {
        let out = scratch.path(&format!("{number}.tar"));
        let tail = ["-cf", out.to_str().unwrap(), "./tree/."];
        Job::new(tar[0])
            .args(&tar[1..])
            .args(tail)
            .dir(scratch.dir())
            .run()
            .unwrap();
        let to = scratch.path(&format!("to-{number}"));
        let (done, copied) = receive(&fs::read(&out).unwrap(), &to);
        done.unwrap();
        assert_eq!(copied.left_out, [""; 0], "{tar:?}");
        assert_eq!(listing(&to), listing(&tree), "{tar:?}");
    }
    // What castra has packed, too; a hard link is a file of its own there.
    let mut bytes = Vec::new();
    send::write(&mut bytes, &[&tree], None, &mut Copied::default()).unwrap();
    let to = scratch.path("to-own");
    receive(&bytes, &to).0.unwrap();
    assert_eq!(listing(&to), listing(&tree));
}

#[test]
fn nothing_gets_out_of_the_destination() {
    let scratch = Scratch::new("copy hostile");
    let outside = scratch.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("kept"), "kept").unwrap();
    let to = scratch.path("to");
    fs::create_dir(&to).unwrap();
    let out = outside.as_os_str().as_bytes();
    let bytes = [
        member(b"t/../../outside/a", b'0', b"", 0o644, b"x"),
        member(b"../outside/b", b'0', b"", 0o644, b"x"),
        member(b"t/link", b'2', out, 0o777, b""),
        member(b"t/link/c", b'0', b"", 0o644, b"x"),
        member(b"t/link/d", b'5', b"", 0o755, b""),
        member(b"t/link/e", b'2', b"x", 0o777, b""),
        member(b"t/hard", b'1', b"t/link/kept", 0o644, b""),
        member(b"t/hard2", b'1', b"../outside/kept", 0o644, b""),
        member(b"t/hard3", b'1', b"t/link", 0o644, b""),
        member(b"t/pipe", b'6', b"", 0o644, b""),
        member(b"t/device", b'4', b"", 0o644, b""),
        member(b"", b'0', b"", 0o644, b"x"),
        // An absolute name is one below the destination.
        member(b"/t/absolute", b'0', b"", 0o6755, b"x"),
        END.to_vec(),
    ]
    .concat();
    let (done, copied) = receive(&bytes, &to);
    done.unwrap();
    assert_eq!(copied.left_out.len(), 11, "{:?}", copied.left_out);
    assert_eq!(listing(&outside).len(), 1);
    assert_eq!(fs::metadata(outside.join("kept")).unwrap().nlink(), 1);
    let mut there: Vec<String> = listing(&to.join("t"));
    there.retain(|line| !line.contains("absolute"));
    assert_eq!(there.len(), 1, "the link alone: {there:?}");
    let mode = fs::metadata(to.join("t/absolute")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755, "it would run as whoever owns it");
}

#[test]
fn a_link_that_is_there_is_replaced_and_not_followed() {
    let scratch = Scratch::new("copy over");
    let to = scratch.path("to");
    fs::create_dir(&to).unwrap();
    fs::write(scratch.path("victim"), "kept").unwrap();
    symlink(scratch.path("victim"), to.join("file")).unwrap();
    let bytes = [member(b"file", b'0', b"", 0o644, b"new"), END.to_vec()].concat();
    receive(&bytes, &to).0.unwrap();
    assert_eq!(fs::read_to_string(scratch.path("victim")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(to.join("file")).unwrap(), "new");
    // But the destination itself is what it leads to: the user has named it.
    symlink(scratch.path("victim"), scratch.path("named")).unwrap();
    receive(&bytes, &scratch.path("named")).0.unwrap();
    assert_eq!(fs::read_to_string(scratch.path("victim")).unwrap(), "new");
}

#[test]
fn garbage_is_no_archive() {
    let scratch = Scratch::new("copy garbage");
    let to = scratch.path("to");
    fs::create_dir(&to).unwrap();
    let whole = [member(b"file", b'0', b"", 0o644, &[7; 2000]), END.to_vec()].concat();
    for length in [0, 100, 512, 600, 2000] {
        assert!(receive(&whole[..length], &to).0.is_err(), "{length}");
    }
    assert_eq!(listing(&to), [""; 0], "nothing half is left");
    let long = [member(b"l", b'L', b"", 0o644, &vec![b'a'; 70_000]), END.to_vec()].concat();
    assert!(receive(&long, &to).0.is_err());
    // Any byte changed, anywhere: an error or not, never a panic.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..20_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let mut bytes = whole[..BLOCK].to_vec();
        bytes[(seed % 512) as usize] = (seed >> 32) as u8;
        let sum: u64 = bytes
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u64::from(*byte)
                }
            })
            .sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let _ = read_head(&mut Cursor::new(&bytes));
    }
    assert_eq!(number(&[0xff; 8]), None);
    assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 5]), Some(5));
    assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(8 << 30));
}

#[test]
fn what_was_not_asked_for_does_not_come() {
    let scratch = Scratch::new("copy unasked");
    let to = scratch.path("to");
    fs::create_dir(&to).unwrap();
    fs::write(to.join("mine"), "mine").unwrap();
    let deep = "d/".repeat(3000);
    let bytes = [
        member(b"./report.txt", b'0', b"", 0o644, b"x"),
        member(b"./.ssh/authorized_keys", b'0', b"", 0o600, b"x"),
        member(b"./.bashrc", b'2', b"/tmp/x", 0o777, b""),
        member(b"./report.txt", b'1', b"./mine", 0o644, b""),
        member(
            b"././@LongLink",
            b'L',
            b"",
            0o644,
            format!("report.txt/{deep}").as_bytes(),
        ),
        member(b"x", b'5', b"", 0o755, b""),
        END.to_vec(),
    ]
    .concat();
    let asked = |what: &str| {
        Destination::find(&to, false)
            .unwrap()
            .asked(&[OsString::from(what)])
    };
    let mut place = asked("/root/report.txt");
    let mut copied = Copied::default();
    assert!(
        place.begin(true).is_err(),
        "no folder without a name was asked for"
    );
    place.begin(false).unwrap();
    unpack(&mut Cursor::new(&bytes), &mut place, &mut copied).unwrap();
    assert_eq!(copied.left_out.len(), 4, "{:?}", copied.left_out);
    let mut names: Vec<_> = fs::read_dir(&to)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["mine", "report.txt"]);
    assert_eq!(fs::metadata(to.join("mine")).unwrap().nlink(), 1);
    // All that is in a folder was.
    let mut place = asked("/root/.");
    place.begin(true).unwrap();
    unpack(&mut Cursor::new(&bytes), &mut place, &mut Copied::default()).unwrap();
    assert!(to.join(".ssh/authorized_keys").is_file());
}
