//! QEMU's command line as golden files, and what may never be missing from it.

use std::path::PathBuf;

use crate::core::arch::Arch;
use crate::core::config::{DirectKernel, Mount};
use crate::core::golden;
use crate::core::process::show_argv;
use crate::core::root::records::ForwardRecord;
use crate::core::runtime::launch_plan::{Disk, FwCfg};

use super::*;

fn plan() -> LaunchPlan {
    LaunchPlan {
        vm: "web-0".parse().unwrap(),
        dir: "/state/vms/web-0".into(),
        arch: Arch::named("x86_64").unwrap(),
        binary: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        cpus: 1,
        memory_bytes: 256 << 20,
        kernel: None,
        disk: Some(Disk {
            path: "/state/overlays/web-0.qcow2".into(),
            persist: false,
        }),
        seed_dir: None,
        network: PlannedNetwork::User,
        forwards: vec![forward(40022, 22, Protocol::Tcp)],
        fw_cfg: Vec::new(),
        mounts: Vec::new(),
        qemu_args: Vec::new(),
        mode: VmLaunchMode::Daemonize,
    }
}

fn forward(host: u16, guest: u16, protocol: Protocol) -> ForwardRecord {
    ForwardRecord {
        host,
        guest,
        protocol,
    }
}

/// One option a line, for readable diffs.
fn shown(plan: &LaunchPlan) -> String {
    let argv = qemu_argv(plan);
    let mut text = show_argv(plan.binary.as_os_str(), &[]);
    for word in &argv {
        let dashed = word.as_bytes().starts_with(b"-");
        text.push_str(if dashed { "\n  " } else { " " });
        text.push_str(&show_argv(word, &[]));
    }
    text.push('\n');
    text
}

#[test]
fn the_default_guest() {
    let mut plan = plan();
    plan.kernel = Some(DirectKernel {
        kernel: "/home/me/.castra/images/default/vmlinux".into(),
        initrd: Some("/home/me/.castra/images/default/initramfs.cpio".into()),
        cmdline: Some("console=ttyS0 quiet panic=-1".into()),
    });
    plan.fw_cfg = vec![
        FwCfg {
            name: "opt/castra/vm".into(),
            value: FwCfgValue::Text("web-0".into()),
        },
        FwCfg {
            name: "opt/castra/token".into(),
            value: FwCfgValue::File("/state/vms/web-0/seed/token".into()),
        },
    ];
    golden::check("argv/default-guest.txt", &shown(&plan));
}

#[test]
fn the_default_guest_for_aarch64() {
    let mut plan = plan();
    plan.arch = Arch::named("aarch64").unwrap();
    plan.binary = "/usr/bin/qemu-system-aarch64".into();
    plan.kernel = Some(DirectKernel {
        kernel: "/home/me/.castra/images/default/Image".into(),
        initrd: Some("/home/me/.castra/images/default/initramfs.cpio".into()),
        cmdline: Some("console=ttyAMA0 quiet panic=-1".into()),
    });
    golden::check("argv/default-guest-aarch64.txt", &shown(&plan));
}

#[test]
fn a_stock_image_under_kvm() {
    let mut plan = plan();
    plan.accel = Accel::Kvm;
    plan.cpus = 4;
    plan.memory_bytes = (2 << 30) + 4096;
    plan.disk = Some(Disk {
        path: "/state/overlays/web-0.qcow2".into(),
        persist: true,
    });
    plan.seed_dir = Some("/state/vms/web-0/seed/cidata".into());
    plan.forwards = vec![forward(8080, 80, Protocol::Tcp), forward(5353, 53, Protocol::Udp)];
    plan.mounts = vec![
        Mount {
            host: "/home/me/src".into(),
            guest: "/work".into(),
            readonly: true,
        },
        Mount {
            host: "/home/me/out".into(),
            guest: "/out".into(),
            readonly: false,
        },
    ];
    plan.qemu_args = vec!["-rtc".into(), "base=utc".into()];
    golden::check("argv/stock-image-kvm.txt", &shown(&plan));
}

#[test]
fn an_isolated_network() {
    let mut plan = plan();
    plan.network = PlannedNetwork::Isolated {
        broker_pipe: vec!["/opt/my tools/castra".into(), "broker-pipe".into(), "7071".into()],
    };
    golden::check("argv/isolated.txt", &shown(&plan));
}

#[test]
fn commas_are_doubled_where_qemu_reads_a_list_and_nowhere_else() {
    let mut plan = plan();
    plan.disk = Some(Disk {
        path: "/a,b/disk,1.qcow2".into(),
        persist: false,
    });
    plan.seed_dir = Some("/a,b/seed".into());
    plan.mounts = vec![Mount {
        host: "/a,b".into(),
        guest: "/m".into(),
        readonly: false,
    }];
    plan.kernel = Some(DirectKernel {
        kernel: "/a,b/vmlinux".into(),
        initrd: Some("/a,b/initrd".into()),
        cmdline: Some("a=1,2".into()),
    });
    plan.network = PlannedNetwork::Isolated {
        broker_pipe: vec!["/a,b/castra".into()],
    };
    golden::check("argv/commas.txt", &shown(&plan));
}

#[test]
fn no_forward_listens_beyond_the_loopback() {
    let mut plan = plan();
    plan.forwards.push(forward(5353, 53, Protocol::Udp));
    let netdev = qemu_argv(&plan)
        .into_iter()
        .find(|word| word.as_bytes().starts_with(b"user,"))
        .unwrap()
        .into_string()
        .unwrap();
    let forwards: Vec<&str> = netdev
        .split(',')
        .filter(|part| part.contains("hostfwd"))
        .collect();
    assert_eq!(forwards.len(), 2);
    assert!(
        forwards.iter().all(|part| part.contains(":127.0.0.1:")),
        "{netdev}"
    );
}

#[test]
fn paths_that_are_no_text_reach_qemu_unchanged() {
    let mut plan = plan();
    let odd = OsString::from_vec(b"/state/\xff\xfe,x.qcow2".to_vec());
    plan.disk = Some(Disk {
        path: PathBuf::from(odd),
        persist: false,
    });
    let found = qemu_argv(&plan).iter().any(|word| {
        word.as_bytes()
            .windows(10)
            .any(|bytes| bytes == b"\xff\xfe,,x.qcow")
    });
    assert!(found, "the file's name was changed");
}

#[test]
fn one_that_stays_our_child_neither_leaves_nor_opens_its_log_twice() {
    let mut plan = plan();
    plan.mode = VmLaunchMode::Attached;
    let argv = qemu_argv(&plan);
    assert!(
        !argv.iter().any(|word| word == "-daemonize" || word == "-D"),
        "{argv:?}"
    );
    assert!(argv.iter().any(|word| word == "-pidfile"), "{argv:?}");
}
