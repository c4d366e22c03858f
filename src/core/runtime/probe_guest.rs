//! The smallest guest that proves an accelerator: one static program in an initramfs.
//!
//! Here: its bytes. Not here: booting it ([`super::probe`]), the program's code (`core::arch`). Any Linux kernel of the architecture
//! boots it; that its line appears means that the kernel came all the way up and ran a program in
//! user space, which is where kernels on doubtful hosts stop short.

use crate::core::arch::{Arch, PROBE_TEXT, ProbeProgram};

/// The initramfs; `None` where castra has no such program for the architecture.
pub fn initramfs(arch: &Arch) -> Option<Vec<u8>> {
    let mut archive = Archive::default();
    archive.add("dev", 0o040_755, (0, 0), &[]);
    // Kernels open it for the first program.
    archive.add("dev/console", 0o020_600, (5, 1), &[]);
    archive.add("init", 0o100_755, (0, 0), &executable(arch.probe.as_ref()?));
    archive.add("TRAILER!!!", 0, (0, 0), &[]);
    Some(archive.bytes)
}

/// The program as a file. It prints its text and exits: the kernel panics, reboots under `panic=-1`,
/// and QEMU ends.
fn executable(program: &ProbeProgram) -> Vec<u8> {
    const LOAD_AT: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code = [program.code, PROBE_TEXT.as_bytes()].concat();
    let size = HEADERS + u64::try_from(code.len()).expect("the program is short");
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little endian, System V
    // An executable.
    elf.extend(
        [2u16, program.elf_machine]
            .iter()
            .flat_map(|half| half.to_le_bytes()),
    );
    elf.extend(1u32.to_le_bytes());
    // Entry, program headers, no section headers.
    elf.extend(
        [LOAD_AT + HEADERS, 64, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    elf.extend(0u32.to_le_bytes());
    // Sizes and counts of the headers: this one, one program header, no sections.
    elf.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1u32, 5].iter().flat_map(|word| word.to_le_bytes())); // load, readable and executable
    let segment = [0, LOAD_AT, LOAD_AT, size, size, 0x1000];
    elf.extend(segment.iter().flat_map(|word: &u64| word.to_le_bytes()));
    elf.extend(code);
    elf
}

/// A cpio archive in the format kernels unpack (newc).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let length = |bytes: usize| u32::try_from(bytes).expect("the archive is small");
        self.bytes.extend(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device of the file, device it is, name, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            length(data.len()),
            0,
            0,
            device.0,
            device.1,
            length(name.len() + 1),
            0,
        ];
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::process::Job;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_program_runs_on_this_host_too() {
        let arch = Arch::host();
        let Some(archive) = initramfs(arch) else {
            return; // There is none for this architecture.
        };
        assert_eq!(archive.len() % 4, 0);
        let scratch = Scratch::new("probe-guest");
        let path = scratch.path("init");
        std::fs::write(&path, executable(arch.probe.as_ref().unwrap())).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let ended = Job::new(&path).run().unwrap();
        assert_eq!(ended.stdout, PROBE_TEXT.as_bytes());
    }
}
