//! The processors that guests may have: one table of all that depends on them.
//!
//! Here: names, QEMU's machine, the console, the test guest's program, what a guest lacks. Not here:
//! what is made of it (`core::runtime`, `core::images`); the packages of the default guest, which
//! `scripts/build-guest.sh` lists by the same names.

use std::env::consts;

/// One architecture.
#[derive(Debug, PartialEq, Eq)]
pub struct Arch {
    /// Its name in castra.toml, in the image cache and in the name of QEMU's binary.
    pub name: &'static str,
    /// Debian's name for it, in the names of packages and images.
    pub debian: &'static str,
    /// The packages that have its QEMU and qemu-img, by distribution.
    pub qemu_packages: &'static str,
    /// QEMU's machine type.
    pub machine: &'static str,
    /// The processor that TCG emulates.
    pub tcg_cpu: &'static str,
    /// The first serial port, as kernels call it.
    pub console: &'static str,
    /// The file name of the default guest's kernel.
    pub kernel_file: &'static str,
    /// Kernel modules that KVM with hardware support needs; none: it is part of the kernel.
    pub kvm_modules: &'static [&'static str],
    /// The program of the accelerator's test guest; `None`: castra has none.
    pub probe: Option<ProbeProgram>,
    /// Its default guest can mount directories of the host (9p).
    pub mounts: bool,
    /// The guest's kernel has a driver for the machine's power button.
    pub power_button: bool,
}

/// A program that prints [`PROBE_TEXT`] and ends.
#[derive(Debug, PartialEq, Eq)]
pub struct ProbeProgram {
    /// `e_machine` of its ELF header.
    pub elf_machine: u16,
    /// `write(1, PROBE_TEXT)`, then `exit(0)`. The text follows the code.
    pub code: &'static [u8],
}

/// What the test guest prints. The code in the table has its length.
pub const PROBE_TEXT: &str = "castra-probe: user space runs\n";
const _: () = assert!(PROBE_TEXT.len() == 30);

/// The architectures that castra knows.
pub static KNOWN: [Arch; 2] = [
    Arch {
        name: "x86_64",
        debian: "amd64",
        qemu_packages: "`apt install qemu-system-x86 qemu-utils` (Debian, Ubuntu), \
                        `dnf install qemu-system-x86 qemu-img` (Fedora), `pacman -S qemu-base` (Arch)",
        machine: "q35",
        // It has everything the translator can do: images built for x86-64-v2 and later don't start on
        // QEMU's default model.
        tcg_cpu: "max",
        console: "ttyS0",
        // An ELF kernel, which QEMU boots by PVH.
        kernel_file: "vmlinux",
        kvm_modules: &["kvm_intel", "kvm_amd"],
        probe: Some(ProbeProgram {
            elf_machine: 62,
            code: b"\xb8\x01\x00\x00\x00\
                    \xbf\x01\x00\x00\x00\
                    \x48\x8d\x35\x10\x00\x00\x00\
                    \xba\x1e\x00\x00\x00\
                    \x0f\x05\
                    \x31\xff\
                    \xb8\x3c\x00\x00\x00\
                    \x0f\x05",
        }),
        mounts: true,
        power_button: true,
    },
    Arch {
        name: "aarch64",
        debian: "arm64",
        qemu_packages: "`apt install qemu-system-arm qemu-utils` (Debian, Ubuntu), \
                        `dnf install qemu-system-aarch64 qemu-img` (Fedora), `pacman -S qemu-system-aarch64 qemu-img` (Arch)",
        machine: "virt",
        // `max` authenticates pointers, which is slow to emulate.
        tcg_cpu: "cortex-a72",
        console: "ttyAMA0",
        kernel_file: "Image",
        kvm_modules: &[],
        probe: Some(ProbeProgram {
            elf_machine: 183,
            code: b"\x08\x08\x80\xd2\
                    \x20\x00\x80\xd2\
                    \xc1\x00\x00\x10\
                    \xc2\x03\x80\xd2\
                    \x01\x00\x00\xd4\
                    \xa8\x0b\x80\xd2\
                    \x00\x00\x80\xd2\
                    \x01\x00\x00\xd4",
        }),
        // Debian's cloud kernel has no 9p, and under a device tree no driver for the power button.
        mounts: false,
        power_button: false,
    },
];

/// A host of any other architecture: its VMs need an image or a kernel of their own.
static OTHER: Arch = Arch {
    name: match consts::ARCH.as_bytes() {
        b"powerpc64" => "ppc64",
        _ => consts::ARCH,
    },
    debian: consts::ARCH,
    qemu_packages: "the package that holds the system emulator for this architecture, and the one with qemu-img",
    machine: "virt",
    tcg_cpu: "max",
    console: "ttyS0",
    kernel_file: "vmlinux",
    kvm_modules: &[],
    probe: None,
    mounts: true,
    power_button: true,
};

impl Arch {
    /// This host's.
    pub fn host() -> &'static Arch {
        Arch::named(consts::ARCH).unwrap_or(&OTHER)
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<&'static Arch> {
        KNOWN.iter().find(|arch| arch.name == name)
    }

    /// Its name behind these words where it isn't the host's; nothing where it is.
    pub fn suffix(&self, words: &str) -> String {
        match self.is_foreign() {
            true => format!("{words}{}", self.name),
            false => String::new(),
        }
    }

    /// It isn't the host's: TCG is the only accelerator.
    pub fn is_foreign(&self) -> bool {
        self != Arch::host()
    }
}

impl Default for &'static Arch {
    fn default() -> Self {
        Arch::host()
    }
}
