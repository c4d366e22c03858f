//! QEMU's command line, decided from a launch plan alone.
//!
//! Here: one function per feature, in the order a reader of `ps` meets them; golden files show the
//! whole of it. Not here: starting it ([`super::launch`]).
//!
//! QEMU reads most arguments as `key=value,…`: there a comma in a path is doubled (`option`). `-kernel`,
//! `-initrd` and `-append` are taken as they are. (A multiboot kernel's `-initrd` is a list with commas;
//! castra boots none.)
//!
//! QEMU runs in `vms/<vm>` and opens what is named relative to it before it leaves that directory:
//! `-daemonize` changes to `/`. What may be opened later, such as the files behind the seed's
//! FAT disk, needs absolute paths.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::core::config::Protocol;
use crate::core::events::Accel;
use crate::core::process::shell_quote;
use crate::core::root::paths::vm_file;

use super::launch_plan::{
    FwCfgValue, ISOLATED_BROKER, ISOLATED_BROKER_PORT, LaunchPlan, PlannedNetwork, VmLaunchMode, mount_tag,
};

/// QEMU's arguments, without the program.
pub fn qemu_argv(plan: &LaunchPlan) -> Vec<OsString> {
    [
        name_args(plan),
        machine_args(plan),
        kernel_args(plan),
        disk_args(plan),
        seed_args(plan),
        network_args(plan),
        entropy_args(),
        fw_cfg_args(plan),
        mount_args(plan),
        console_args(),
        qmp_args(),
        panic_args(),
        process_args(plan),
        plan.qemu_args.iter().map(OsString::from).collect(),
    ]
    .concat()
}

/// `argument` with the commas in its value doubled, as QEMU wants them.
fn option(parts: &[&dyn AsRef<OsStr>]) -> OsString {
    let mut whole = OsString::new();
    for (index, part) in parts.iter().enumerate() {
        if index % 2 == 0 {
            whole.push(part.as_ref());
        } else {
            whole.push(comma_doubled(part.as_ref()));
        }
    }
    whole
}

fn comma_doubled(value: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(value.len());
    for byte in value.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn name_args(plan: &LaunchPlan) -> Vec<OsString> {
    words(&["-name", plan.vm.as_str()])
}

/// The machine: nothing that wasn't asked for, which quickens the start and leaves less to attack.
fn machine_args(plan: &LaunchPlan) -> Vec<OsString> {
    let mut args = words(&["-nodefaults", "-no-user-config", "-display", "none"]);
    args.extend(words(&["-machine", plan.arch.machine]));
    args.extend(match plan.accel {
        Accel::Kvm => words(&["-accel", "kvm", "-cpu", "host"]),
        // One thread per virtual CPU.
        Accel::Tcg => {
            let tcg = format!("tcg,thread=multi,tb-size={}", code_cache_mib(plan.memory_bytes));
            words(&["-accel", &tcg, "-cpu", plan.arch.tcg_cpu])
        }
    });
    args.extend(words(&["-smp", &plan.cpus.to_string()]));
    args.extend(words(&["-m", &memory(plan.memory_bytes)]));
    args
}

/// How much translated code QEMU may keep, MiB. Left to itself it takes up to 1 GiB per guest in the
/// long run, whatever the guest's own size. The default guest's boot fills less than 64 MiB; below
/// 32 the cache is emptied again and again.
fn code_cache_mib(memory_bytes: u64) -> u64 {
    (memory_bytes / 2 / (1 << 20)).clamp(64, 512)
}

/// Memory in MiB if that is exact.
fn memory(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes.is_multiple_of(MIB) {
        format!("{}M", bytes / MIB)
    } else {
        format!("{bytes}B")
    }
}

fn kernel_args(plan: &LaunchPlan) -> Vec<OsString> {
    let Some(boot) = &plan.kernel else {
        return Vec::new();
    };
    let mut args: Vec<OsString> = vec!["-kernel".into(), boot.kernel.clone().into()];
    if let Some(initrd) = &boot.initrd {
        args.extend(["-initrd".into(), initrd.clone().into()]);
    }
    if let Some(cmdline) = &boot.cmdline {
        args.extend(["-append".into(), cmdline.into()]);
    }
    args
}

fn disk_args(plan: &LaunchPlan) -> Vec<OsString> {
    let Some(disk) = &plan.disk else {
        return Vec::new();
    };
    let no_flush = if disk.persist { "" } else { ",cache.no-flush=on" };
    vec![
        "-blockdev".into(),
        option(&[
            &"driver=qcow2,node-name=disk0,discard=unmap,file.driver=file,file.filename=",
            &disk.path,
            &no_flush,
        ]),
        "-device".into(),
        // A kernel given by `-kernel` has the first place in the boot order.
        "virtio-blk-pci,drive=disk0,bootindex=1".into(),
    ]
}

/// The seed as a FAT disk that QEMU makes up from a directory: no tool is needed on the host.
fn seed_args(plan: &LaunchPlan) -> Vec<OsString> {
    let Some(dir) = &plan.seed_dir else {
        return Vec::new();
    };
    vec![
        "-blockdev".into(),
        option(&[&"driver=vvfat,node-name=seed,label=cidata,read-only=on,dir=", dir]),
        "-device".into(),
        "virtio-blk-pci,drive=seed".into(),
    ]
}

fn network_args(plan: &LaunchPlan) -> Vec<OsString> {
    let mut netdev = OsString::from(format!("user,id=net0,ipv6=off,hostname={}", plan.vm));
    if let PlannedNetwork::Isolated { broker_pipe } = &plan.network {
        netdev.push(",restrict=on,guestfwd=");
        // libslirp splits the command as a shell would, but runs it without one.
        let command: Vec<String> = broker_pipe
            .iter()
            .map(|word| shell_quote(&word.to_string_lossy()))
            .collect();
        netdev.push(comma_doubled(OsStr::new(&format!(
            "tcp:{ISOLATED_BROKER}:{ISOLATED_BROKER_PORT}-cmd:{}",
            command.join(" ")
        ))));
    }
    for forward in &plan.forwards {
        let protocol = match forward.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        // Loopback only: without an address QEMU would listen on every interface of the host.
        netdev.push(format!(
            ",hostfwd={protocol}:127.0.0.1:{}-:{}",
            forward.host, forward.guest
        ));
    }
    vec![
        "-netdev".into(),
        netdev,
        "-device".into(),
        // No option ROM: nobody boots from this network.
        "virtio-net-pci,netdev=net0,romfile=".into(),
    ]
}

/// Entropy of the host, so that sshd's first keys don't wait for any.
fn entropy_args() -> Vec<OsString> {
    words(&["-device", "virtio-rng-pci"])
}

fn fw_cfg_args(plan: &LaunchPlan) -> Vec<OsString> {
    let item = |item: &super::launch_plan::FwCfg| -> [OsString; 2] {
        let value = match &item.value {
            FwCfgValue::Text(text) => option(&[&"name=", &item.name, &",string=", text]),
            FwCfgValue::File(path) => option(&[&"name=", &item.name, &",file=", path]),
        };
        ["-fw_cfg".into(), value]
    };
    plan.fw_cfg.iter().flat_map(item).collect()
}

fn mount_args(plan: &LaunchPlan) -> Vec<OsString> {
    let mut args = Vec::new();
    for (index, mount) in plan.mounts.iter().enumerate() {
        let tag = mount_tag(index);
        let readonly = if mount.readonly { ",readonly=on" } else { "" };
        args.extend([
            "-fsdev".into(),
            option(&[
                &"local,security_model=none,multidevs=remap,id=",
                &tag,
                &",path=",
                &mount.host,
                &readonly,
            ]),
            "-device".into(),
            format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}").into(),
        ]);
    }
    args
}

/// The console, logged by QEMU whether or not somebody is attached.
fn console_args() -> Vec<OsString> {
    let chardev = format!(
        "socket,id=serial,path={},server=on,wait=off,logfile={}",
        vm_file::SERIAL_SOCK,
        vm_file::SERIAL_LOG
    );
    words(&["-chardev", &chardev, "-serial", "chardev:serial"])
}

/// QMP; QEMU's messages are logged, so that castra learns how a VM ended without watching it.
fn qmp_args() -> Vec<OsString> {
    let chardev = format!(
        "socket,id=qmp,path={},server=on,wait=off,logfile={}",
        vm_file::QMP_SOCK,
        vm_file::QMP_LOG
    );
    words(&["-chardev", &chardev, "-mon", "chardev=qmp,mode=control"])
}

/// With this device a kernel reports a panic, and QEMU ends as `guest-panic`; without it a panic under
/// `panic=-1` looks like a reboot. It comes last, so that no other device changes its place on the bus.
fn panic_args() -> Vec<OsString> {
    words(&["-device", "pvpanic-pci"])
}

/// How QEMU lives as a process. The sandbox forbids what neither `-daemonize` (which forks and
/// leaves its session after the filter is in force) nor the program behind an isolated network's
/// `guestfwd` needs: with `spawn=deny` QEMU 7.2 dies of SIGSYS, with `elevateprivileges=deny` it
/// can't start.
///
/// An attached QEMU writes to its stderr, which is `qemu.log` already. `-D` would open that file a second
/// time, without appending, and the two would overwrite each other.
///
/// The pid file has its whole path: by it a QEMU whose state root is gone is known to be castra's
/// ([`super::lost`]).
fn process_args(plan: &LaunchPlan) -> Vec<OsString> {
    let mut args = words(&["-sandbox", "on,obsolete=deny,resourcecontrol=deny", "-pidfile"]);
    args.push(plan.dir.join(vm_file::QEMU_PID).into());
    if plan.mode == VmLaunchMode::Daemonize {
        args.extend(words(&["-D", vm_file::QEMU_LOG, "-daemonize"]));
    }
    args
}

#[cfg(test)]
#[path = "qemu_tests.rs"]
mod tests;
