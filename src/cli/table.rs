//! The one table of commands and flags.
//!
//! Here: every word castra understands, with what it says about itself. Parser, help, man page,
//! completions and docs/CLI.md all read it, so they can't disagree. Not here: how any of them
//! does that. This file is long because it is flat.

use std::ffi::OsString;

use super::raw::{ColorChoice, Raw};

mod flags;
pub mod other_tools;
mod per_command;
pub mod reference;
pub use flags::FLAGS;

/// Every command, hidden ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Init,
    Up,
    Down,
    Restart,
    Clean,
    Bootstrap,
    Status,
    Wait,
    Ports,
    Ssh,
    Exec,
    Cp,
    SshConfig,
    Console,
    Logs,
    Events,
    Report,
    ImageBuild,
    ImageList,
    ImagePath,
    Workspaces,
    Doctor,
    BusPublish,
    BusRequest,
    BusSubscribe,
    BusTail,
    BusBench,
    Broker,
    HarnessRun,
    HarnessRelay,
    HarnessList,
    HarnessShow,
    HarnessUsage,
    Completions,
    Man,
    BrokerPipe,
    ExecFeed,
    VmNames,
}

/// A shell that completions can be written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Where `logs` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogSource {
    /// The guest's console.
    Serial,
    /// QEMU's own messages.
    Qemu,
    /// The last bootstrap.
    Bootstrap,
    /// `[host-broker]` lines.
    Broker,
    /// What was published on the bus.
    Bus,
}

/// Pages of `castra man` that are no command's.
const MAN_PAGES: &[&str] = &["castra.toml", "security"];

/// How a shell can help to type a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complete {
    /// It can't.
    Nothing,
    /// A file or directory.
    Path,
    /// A VM of the project.
    VmName,
    /// An agent that castra knows.
    Agent,
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// How often an operand may stand there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Exactly once.
    One,
    /// Once or not at all.
    Optional,
    /// Any number of times, none included.
    Any,
    /// Any number of times, at least once; one more operand may follow.
    Many,
    /// Everything that follows, at least one word.
    Rest,
    /// Everything that follows, if anything.
    OptionalRest,
}

/// A word of a command line that is no flag.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub placeholder: &'static str,
    pub arity: Arity,
    pub complete: Complete,
}

impl Operand {
    const fn new(placeholder: &'static str, arity: Arity, complete: Complete) -> Operand {
        Operand {
            placeholder,
            arity,
            complete,
        }
    }

    /// As usage lines show it.
    pub fn usage(&self) -> String {
        match self.arity {
            Arity::One => self.placeholder.to_owned(),
            Arity::Optional => format!("[{}]", self.placeholder),
            Arity::Any => format!("[{}…]", self.placeholder),
            Arity::Many => format!("{}…", self.placeholder),
            Arity::Rest => format!("-- {}…", self.placeholder),
            Arity::OptionalRest => format!("[-- {}…]", self.placeholder),
        }
    }
}

/// The heading under which a command is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    Fleet,
    Guests,
    Looking,
    Bus,
    Agents,
    Parts,
    /// Not listed: castra and shells call it, people don't.
    Hidden,
}

impl Section {
    /// Those with a heading, in the order of the help.
    pub const LISTED: [Section; 6] = [
        Section::Fleet,
        Section::Guests,
        Section::Looking,
        Section::Bus,
        Section::Agents,
        Section::Parts,
    ];

    pub fn heading(self) -> &'static str {
        match self {
            Section::Fleet => "Bring VMs up and down",
            Section::Guests => "Work in a guest",
            Section::Looking => "See what goes on",
            Section::Bus => "Messages between host and guests",
            Section::Agents => "Let an agent work",
            Section::Parts => "Parts and helpers",
            Section::Hidden => "",
        }
    }
}

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct CommandRow {
    pub command: Command,
    /// What is typed: one word, or group and word.
    pub words: &'static str,
    pub section: Section,
    pub operands: &'static [Operand],
    /// One line, for lists and completions.
    pub brief: &'static str,
    /// Paragraphs, separated by empty lines, for `--help` and the man page.
    pub manual: &'static str,
    pub examples: &'static [&'static str],
}

impl CommandRow {
    /// Its flags as it explains them, without the global ones.
    pub fn flags(&self) -> impl Iterator<Item = Flag> + use<> {
        let command = self.command;
        FLAGS
            .iter()
            .filter(move |flag| matches!(flag.scope, Scope::Only(commands) if commands.contains(&command)))
            .map(move |flag| flag.of(command))
    }

    /// The usage line, without `castra`'s global flags.
    pub fn usage(&self) -> String {
        let mut text = format!("castra {}", self.words);
        if self.flags().next().is_some() {
            text.push_str(" [FLAGS]");
        }
        for operand in self.operands {
            text.push(' ');
            text.push_str(&operand.usage());
        }
        text
    }
}

impl Command {
    /// Its row.
    pub fn row(self) -> &'static CommandRow {
        COMMANDS
            .iter()
            .find(|row| row.command == self)
            .expect("a test holds that every command has a row")
    }
}

/// Which commands take a flag.
#[derive(Clone, Copy, Debug)]
pub enum Scope {
    /// All, before or after the command.
    Global,
    /// These.
    Only(&'static [Command]),
}

/// Why a value was refused: what is expected instead.
#[derive(Debug, PartialEq, Eq)]
pub struct BadValue(pub String);

/// One flag.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    pub long: &'static str,
    pub short: Option<char>,
    /// Placeholder such as `SECS`; `None` makes it a switch.
    pub value: Option<&'static str>,
    pub scope: Scope,
    /// One line, for `-h` and completions.
    pub brief: &'static str,
    /// Paragraphs, for `--help` and the man page; empty if the brief says all.
    pub manual: &'static str,
    pub complete: Complete,
    pub apply: fn(&mut Raw, OsString) -> Result<(), BadValue>,
}

impl Flag {
    pub fn takes(&self, command: Option<Command>) -> bool {
        match self.scope {
            Scope::Global => true,
            Scope::Only(commands) => command.is_some_and(|command| commands.contains(&command)),
        }
    }

    /// `-q, --quiet` or `--config PATH`.
    pub fn usage(&self) -> String {
        let mut text = self.short.map(|short| format!("-{short}, ")).unwrap_or_default();
        text.push_str("--");
        text.push_str(self.long);
        if let Some(placeholder) = self.value {
            text.push(' ');
            text.push_str(placeholder);
        }
        text
    }
}

/// Words that stand before others, with what they are about.
pub const GROUPS: &[(&str, &str)] = &[
    (
        "image",
        "castra's default guest, for VMs without an image of their own",
    ),
    ("harness", "a coding agent that works with the VMs"),
    ("bus", "messages between host and guests, ordered and logged"),
];

const VM: Operand = Operand::new("VM", Arity::One, Complete::VmName);
const ONLY_VM: Operand = Operand::new("VM", Arity::Optional, Complete::VmName);
const VMS: Operand = Operand::new("VM", Arity::Any, Complete::VmName);

/// The shells, as `completions` takes them.
pub const SHELLS: &[&str] = &["bash", "zsh", "fish"];

/// The commands, in the order of the help.
pub const COMMANDS: &[CommandRow] = &[
    CommandRow {
        command: Command::Init,
        words: "init",
        section: Section::Fleet,
        operands: &[],
        brief: "write a castra.toml to start from",
        manual: "Writes a castra.toml with one VM that boots castra's default guest, ready for `castra up`. \
                 An existing file is left alone unless --force is given.",
        examples: &[
            "castra init",
            "castra init --project-name demo --output demo/castra.toml",
        ],
    },
    CommandRow {
        command: Command::Up,
        words: "up",
        section: Section::Fleet,
        operands: &[VMS],
        brief: "start VMs, wait until they are reachable, and bootstrap them",
        manual: "Starts the VMs of the project, or the named ones, and a broker if none runs. The name of a \
                 role stands for all its VMs, here and wherever VMs are named. Each VM is then bootstrapped \
                 as its mode says; a VM with mode `skip` is only started. VMs that are running already are \
                 not started again, but they are bootstrapped. The first `up` builds the default guest if a \
                 VM needs it.\n\n\
                 Progress goes to stderr; --json prints events to stdout instead. A VM that fails doesn't \
                 stop the others; the exit code is 1 if any VM failed. Ctrl-C ends launches and bootstraps \
                 under way, and leaves running VMs running. A second Ctrl-C stops at once.",
        examples: &[
            "castra up",
            "castra up web-0 --bootstrap always",
            "castra up --bootstrap skip,db=always",
            "castra up --json | jq -c 'select(.type == \"bootstrap.step\")'",
        ],
    },
    CommandRow {
        command: Command::Down,
        words: "down",
        section: Section::Fleet,
        operands: &[VMS],
        brief: "shut VMs down and discard their overlays",
        manual: "Asks each guest to power off. If it doesn't in time, castra sends its QEMU SIGTERM, and then \
                 SIGKILL; each step has a deadline. Overlays are removed, except those of VMs with `persist = \
                 true`. When no VM of the project is left, the broker is stopped. A bootstrap under way ends as \
                 failed.",
        examples: &[
            "castra down",
            "castra down web-0 --graceful-wait-secs 60",
            "castra down --discard",
        ],
    },
    CommandRow {
        command: Command::Restart,
        words: "restart",
        section: Section::Fleet,
        operands: &[VMS],
        brief: "shut VMs down and start them again, with their disks",
        manual: "Shuts down the VMs of the project, or the named ones, as `castra down` does, and starts and \
                 bootstraps them as `castra up` does, with the settings that castra.toml has now; VMs that aren't \
                 running are just started. Each VM keeps its disk, with `persist` or without, like a machine that \
                 is switched off and on; --discard gives it a fresh disk. The broker keeps running on its port. A \
                 bootstrap \
                 under way ends as failed.\n\n\
                 castra checks what it can before it stops anything; if it finds a mistake, all VMs stay as they \
                 are. A VM that fails doesn't stop the others; the exit code is 1 if any VM failed. After Ctrl-C \
                 no further VM is stopped, and a VM that is being stopped isn't started again.",
        examples: &[
            "castra restart",
            "castra restart web-0 --bootstrap always",
            "castra restart db --discard",
        ],
    },
    CommandRow {
        command: Command::Clean,
        words: "clean",
        section: Section::Fleet,
        operands: &[],
        brief: "remove what is left of projects that don't run",
        manual: "Removes the state of the project, or with --global of every project: disks, logs, records, keys. \
                 If a VM or the broker of the project is running, castra refuses with exit code 75; --global \
                 skips that project, and the exit code is 1.\n\n\
                 Disks of VMs with `persist = true` stay, and so does what their next start needs; --force \
                 removes them too. castra removes only files that it made, which it knows by place and name; \
                 anything else below the state root stays and is listed. Links are never followed. castra.toml \
                 stays.\n\n\
                 --global also forgets projects whose state is gone, and empties the image cache, unless a \
                 remaining project may need it.",
        examples: &[
            "castra clean --dry-run",
            "castra clean --no-logs",
            "castra clean --global",
        ],
    },
    CommandRow {
        command: Command::Bootstrap,
        words: "bootstrap",
        section: Section::Fleet,
        operands: &[VMS],
        brief: "bootstrap running VMs again",
        manual: "Bootstraps the running VMs, or the named ones, and starts none. castra starts the broker if none runs.",
        examples: &["castra bootstrap web-0", "castra bootstrap --plan"],
    },
    CommandRow {
        command: Command::Ssh,
        words: "ssh",
        section: Section::Guests,
        operands: &[
            ONLY_VM,
            Operand::new("COMMAND", Arity::OptionalRest, Complete::Nothing),
        ],
        brief: "open a shell in a VM, or run a command there",
        manual: "Runs `ssh` with the user, port, key and options that castra knows for this VM. As with \
                 `ssh`, the guest's shell gets the words of the command joined by spaces. Otherwise the \
                 command runs as with `castra exec`.\n\n\
                 You can leave out the name if the project has only one VM. The name of a role means its VM, \
                 if it has only one.",
        examples: &["castra ssh", "castra ssh web-0", "castra ssh web-0 -- uname -a"],
    },
    CommandRow {
        command: Command::Exec,
        words: "exec",
        section: Section::Guests,
        operands: &[VM, Operand::new("COMMAND", Arity::Rest, Complete::Nothing)],
        brief: "run a command in a VM, without a terminal",
        manual: "Runs a command like `castra ssh VM -- COMMAND`, but never with a terminal: stdin and stdout \
                 pass through byte for byte, and ssh asks no questions. Each argument reaches the command \
                 unchanged, and all of them together may have any length.\n\n\
                 The exit code is the command's, 128 + signal if a signal ended it, 255 if there was no \
                 connection or the VM doesn't run. castra gives up if the server sends nothing for a minute. \
                 If castra ends first, by Ctrl-C, `timeout` or kill, the command and everything in its \
                 session get SIGTERM within a few seconds, and then SIGKILL. If the command ends by itself, \
                 the processes that it has put into the background keep running.",
        examples: &[
            "castra exec db -- cat /etc/os-release",
            "tar c . | castra exec db -- tar x -C /srv",
        ],
    },
    CommandRow {
        command: Command::Cp,
        words: "cp",
        section: Section::Guests,
        operands: &[
            Operand::new("SRC", Arity::Many, Complete::Path),
            Operand::new("DST", Arity::One, Complete::Path),
        ],
        brief: "copy files into or out of a VM",
        manual: "One side is vm:path, the other a path on this machine; several sources go into one \
                 directory. A path in the VM that doesn't begin with `/` starts in the user's home there. \
                 castra copies directories with all their contents, and keeps modes and times. A word with a \
                 colon before any slash is vm:path: write `./a:b` for such a file on this machine. A source \
                 in the VM may have wildcards, in quotes; a backslash makes a wildcard an ordinary \
                 character.\n\n\
                 Links stay links, whatever they lead to; but if a source itself is a link, castra copies its \
                 target. castra leaves out sockets, pipes and devices, and lists them. It replaces existing \
                 files, and never writes through a link below the destination. Files from a VM lose their \
                 set-user-id bit.\n\n\
                 The guest needs `sh` and `tar`. The exit code is 0 if everything was copied; 1 if something \
                 was not, and castra says what is missing; 255 if there was no connection or the VM doesn't \
                 run.",
        examples: &[
            "castra cp site/ notes.txt web-0:/srv/",
            "castra cp 'web-0:/var/log/*.log' logs/",
        ],
    },
    CommandRow {
        command: Command::SshConfig,
        words: "ssh-config",
        section: Section::Guests,
        operands: &[VMS],
        brief: "print an ssh_config for running VMs",
        manual: "Prints one `Host` block for each running VM, or for the named ones, with the user, port, key \
                 and options that castra itself uses: for `ssh -F`, rsync, editors and other programs that \
                 speak SSH. Ports change with every launch, so print it again after `castra up`. `Host *` of \
                 your own config applies too, except settings that would lead to another VM, use a proxy, or \
                 forward your agent. With --json it prints one object per VM.",
        examples: &[
            "castra ssh-config >.castra-ssh && rsync -e 'ssh -F .castra-ssh' -a site/ web-0:/srv/",
            "castra ssh-config --prefix demo- >~/.ssh/castra    # `Include castra` at the top of ~/.ssh/config",
        ],
    },
    CommandRow {
        command: Command::Console,
        words: "console",
        section: Section::Guests,
        operands: &[ONLY_VM],
        brief: "attach to the serial console of a VM",
        manual: "Shows the last lines of the guest's serial console and attaches the terminal to it. You can \
                 leave out the name if the project has only one VM. Every key goes to the guest; Ctrl-] \
                 leaves the console, and the VM keeps running. The default guest has a root shell there. If \
                 the VM ends, so does the command, with exit code 0. Only one console can be attached at a \
                 time; a second one is refused with exit code 75.\n\n\
                 If stdin is a pipe, castra sends all of it, Ctrl-] included, and ends when the input has \
                 ended and the guest has printed nothing for 2 s.\n\n\
                 The guest's colours and cursor movements reach the terminal. castra leaves out sequences \
                 that set titles or the clipboard, make the terminal answer, or do anything else but draw, \
                 unless --raw is given. A slow terminal doesn't hold up the guest: castra drops the oldest \
                 output beyond 1 MiB and says so. But don't suspend the command (SIGSTOP): the guest's \
                 console would wait for it.\n\n\
                 If your window isn't 80x24, use `castra ssh`, or set the size in the guest with `stty rows R \
                 cols C`.",
        examples: &["castra console web", "echo 'dmesg | tail' | castra console web"],
    },
    CommandRow {
        command: Command::Status,
        words: "status",
        section: Section::Looking,
        operands: &[],
        brief: "show which VMs run and which are reachable",
        manual: "Reads locks and a few files; it asks no other process, changes nothing and can't hang. \
                 Scripts may run it every 2 s.\n\n\
                 STATE is starting (QEMU is being launched), running, paused (QEMU runs, but not its guest), \
                 stopping (asked to stop, still running), stopped (shut down, or never started), crashed \
                 (ended unexpectedly) or external (you started it yourself, without castra, and the broker \
                 accepted its hello). BROKER is offline (no broker runs), waiting (the guest gave no proof of \
                 life lately) or reachable. AGE is the age of the guest's last proof of life, which is an \
                 accepted hello or any frame of an open session; `-` if there was none since this launch. AGE \
                 keeps growing while the guest, the VM or the broker is down.\n\n\
                 A VM is reachable exactly while that age is within the freshness window \
                 ([broker].freshness_secs, 45 s unless set), the broker runs, and QEMU runs its guest or the \
                 VM is external. If the broker is younger than 0.4 s, one caller at a time may wait for it, \
                 so that a restart of the broker doesn't look like an outage.\n\n\
                 With --json it prints one object, `schema` castra.status.v1; ages and durations are \
                 milliseconds, memory is bytes. `project`, `workspace`, `config_path` and `state_root` say \
                 which project; `broker` has `state` (running, offline), `pid`, `port`; `accel` is kvm or \
                 tcg; `reachable` says whether any VM is, `all_reachable` whether every one is; \
                 `last_handshake_vm` and `last_handshake_age_ms` are those with the newest proof of life; \
                 then `freshness_window_ms`, and `vms` with, for each:\n\n\
                 `name`, `role`, `state`, `pid`, `cpus`, `memory_bytes`, `uptime_ms`; `broker` (offline, \
                 waiting, reachable), `reachable`, `last_handshake_age_ms` as above; `capabilities` of its \
                 last accepted hello; `bus_session` and `bus_subscribed`; `last_publish_age_ms` and \
                 `last_heartbeat_age_ms`; `last_acked_seq`, the number of its last `ack`; `guest_metrics`, \
                 the payload of its last heartbeat; `forwards` (`host`, `guest`, `protocol`) and `ssh` \
                 (`user`, `host`, `port`, `identity`, `options`) while it runs; `bootstrap` (`status`, \
                 `noop`, `duration_ms`) of its last launch; `ended` (`reason`, `at`, `last_words`; for a \
                 crash also `qemu_words` and `remediation`) after the launch has ended; `paused` (`reason`, \
                 `at`, `detail`, `remediation`) while it is paused; `boots`, the number of boots of this \
                 launch; `last_reset`, the time of the last reset; `stale_config`, the settings that have \
                 changed in castra.toml and that `castra restart` applies; `lost`, what happened to the state \
                 root of a VM that `castra down` has to end. A value that castra doesn't know is null. \
                 `castra man 7 status` says more.",
        examples: &[
            "castra status",
            "castra status --json | jq .all_reachable",
            "castra status --all",
        ],
    },
    CommandRow {
        command: Command::Wait,
        words: "wait",
        section: Section::Looking,
        operands: &[VMS],
        brief: "wait until VMs are reachable, bootstrapped or stopped",
        manual: "Waits for all VMs of the project, or the named ones; a role names all its replicas. It \
                 starts and changes nothing. It uses the same evidence as `castra status` and checks it four \
                 times a second. Without --for it waits until the VMs are reachable.\n\n\
                 The exit code is 0 once all VMs are in that state; 1 as soon as one of them can't get there \
                 any more, because it crashed, stopped while castra waited, is paused for good, or its \
                 bootstrap failed; and 124 when the time of --timeout is over. castra also waits for a VM \
                 that doesn't run yet, because another command may start it.",
        examples: &[
            "castra wait",
            "castra wait web db-0 --for bootstrapped --timeout 10m",
            "castra wait --for stopped && echo all are down",
        ],
    },
    CommandRow {
        command: Command::Ports,
        words: "ports",
        section: Section::Looking,
        operands: &[],
        brief: "show which host ports are wanted, in use or in conflict",
        manual: "Lists the port of the broker and the forwards of every VM. It binds no port and changes \
                 nothing.\n\n\
                 STATE is active (a running VM uses the port), declared (castra.toml asks for it, and it is \
                 free), conflicting (a VM of one of your projects or another program uses it; castra names \
                 which) or broker-reserved (it belongs to a broker; while VMs run, it stays reserved even if \
                 the broker is down, because the guests know it). PORT is `auto` if castra will choose a free \
                 port. `castra up` refuses to start VMs whose ports conflict.\n\n\
                 With --json it prints one object, `schema` castra.ports.v1: `project`, `workspace`, \
                 `config_path`, `state_root`, `conflicts` (a count), and `ports` with, for each: `vm` (null: \
                 the broker), `port` (null: chosen at launch), `guest`, `protocol`, `state`, `pid`, `owner` \
                 (who else has it: `kind` vm, broker or process, with `vm`, `project`, `workspace`, `pid` or \
                 `name`) and `also_declared_by`, the idle VMs of other projects that want the same port.",
        examples: &[
            "castra ports",
            "castra ports --active --all",
            "castra ports --json | jq .conflicts",
        ],
    },
    CommandRow {
        command: Command::Logs,
        words: "logs",
        section: Section::Looking,
        operands: &[VMS],
        brief: "show the logs of VMs, broker and bus",
        manual: "Prints the last lines of each log: serial (the guest's console), qemu (QEMU's messages), \
                 bootstrap (steps and output of the last bootstrap), broker, and bus (the published \
                 messages). Without names it prints the logs of all VMs, of the broker and of the whole bus; \
                 with names it prints the logs of these VMs and what they published. Each line begins with \
                 its VM and source. Control characters of a guest are shown as text, so the terminal doesn't \
                 obey them.\n\n\
                 --follow prints new lines as they come, across restarts of VMs and rotation of files. \
                 --since leaves out older lines; logs whose lines have no time (serial, qemu, bootstrap) show \
                 what was written since then.\n\n\
                 With --json it prints one object per line: `ts` (RFC 3339, null if the line has no time), \
                 `source`, `vm` (null: the broker or the host) and `line`, with no escapes but JSON's; of the \
                 bus it is the line of bus.log.",
        examples: &[
            "castra logs web-0",
            "castra logs -f --source serial --tail 0",
            "castra logs --source broker --since 10m",
        ],
    },
    CommandRow {
        command: Command::Events,
        words: "events",
        section: Section::Looking,
        operands: &[],
        brief: "show what castra and the broker have reported",
        manual: "Reads the journals of your commands and of the broker, merged by time. --json prints each \
                 event as it was recorded. castra skips invalid lines, which a killed writer leaves; stderr \
                 says at the end how many.",
        examples: &[
            "castra events --type 'bootstrap.*' --vm web-0",
            "castra events --follow --since 10m",
            "castra events --json | jq -r .type",
        ],
    },
    CommandRow {
        command: Command::Doctor,
        words: "doctor",
        section: Section::Looking,
        operands: &[],
        brief: "look for what keeps VMs from running well",
        manual: "Checks KVM, QEMU and the other programs castra calls, memory, disk space, limits, images, \
                 ports, what earlier runs left behind, and who else can reach or read castra's files. It \
                 needs no castra.toml; if there is one, it checks its VMs and ports too, and with --all those \
                 of every project. It writes no file and changes nothing.\n\n\
                 Each line is ok, warn or error; the line below it says what to do. The exit code is 1 if any \
                 line is an error, otherwise 0. --quiet leaves out the lines that are ok.\n\n\
                 With --json it prints one object, `schema` castra.doctor.v1: `version`, `verdict` (the worst \
                 level) and `findings`, each with `id`, `area`, `level`, `text`, `remediation` and `data`. \
                 The ids are stable; `castra man 7 doctor` lists them.",
        examples: &[
            "castra doctor",
            "castra doctor --all --quiet",
            "castra doctor --json | jq -r '.findings[] | select(.level != \"ok\") | .id'",
        ],
    },
    CommandRow {
        command: Command::Report,
        words: "report",
        section: Section::Looking,
        operands: &[VMS],
        brief: "show the last runs: timelines, failures, traffic on the bus",
        manual: "Shows what the last runs of `up`, `down`, `restart` and `bootstrap` did with each VM: every \
                 phase, the end of the log if a VM failed, and the traffic on the bus meanwhile. If you name \
                 VMs, it shows only these VMs and the runs about them.\n\n\
                 --html writes the same as one page for a browser, with a timeline of each run. The page \
                 fetches nothing and runs no script. It contains output of scripts and guests, so only you \
                 can read the file.\n\n\
                 With --json it prints one object, `schema` castra.report.v1; `castra man 7 report` lists its \
                 fields.",
        examples: &[
            "castra report",
            "castra report --html report.html",
            "castra report web-0 --last 20",
            "castra report --since 1day --json | jq '.runs[] | [.command, .outcome, .duration_ms]'",
        ],
    },
    CommandRow {
        command: Command::Workspaces,
        words: "workspaces",
        section: Section::Looking,
        operands: &[],
        brief: "list the projects castra knows, wherever they are",
        manual: "Lists every project that has state under CASTRA_HOME, with the id that --workspace takes and the \
                 number of its running VMs.",
        examples: &["castra workspaces", "castra --workspace demo-1a2b3c4d down"],
    },
    CommandRow {
        command: Command::BusPublish,
        words: "bus publish",
        section: Section::Bus,
        operands: &[
            Operand::new("TOPIC", Arity::Optional, Complete::Nothing),
            Operand::new("PAYLOAD", Arity::Optional, Complete::Nothing),
        ],
        brief: "publish a message on the bus, and wait until it is logged",
        manual: "Publishes one message as `host` and returns when the broker has acknowledged it: the message \
                 is then in the log of the bus and on its way to every subscriber. Without an ack within 5 s \
                 the exit code is 1. A payload is any JSON; it is null if only flags are given. A JSON string \
                 needs its own quotes inside the shell's. Without a topic the message goes to `broadcast`. \
                 castra refuses a topic vm:NAME if the project has no VM of that name (exit code 64).\n\n\
                 With `-` as the payload, or alone, every line of stdin is the JSON of one message, and many \
                 are in flight at once; empty lines are ignored. If lines are too long or not valid JSON, \
                 castra lists their numbers, publishes the others, and ends with exit code 1. If it ends \
                 early, it says which lines were acknowledged and where to continue.\n\n\
                 If no broker runs but a VM of the project does, castra starts one. With --json it prints its events; \
                 a `message` with `data` has `topic`, `acked`, `first_seq` and `last_seq`.",
        examples: &[
            "castra bus publish ci/build '{\"state\": \"ready\"}'",
            "castra bus publish vm:web-0 '\"reload\"'",
            "castra bus publish --payload 7",
            "jq -c '.[]' jobs.json | castra bus publish ci/jobs -",
        ],
    },
    CommandRow {
        command: Command::BusRequest,
        words: "bus request",
        section: Section::Bus,
        operands: &[
            Operand::new("TOPIC", Arity::One, Complete::Nothing),
            Operand::new("PAYLOAD", Arity::Optional, Complete::Nothing),
        ],
        brief: "ask something on the bus, and print the first answer",
        manual: "Publishes one message that names a topic for answers, which only the host can read, and \
                 waits for the first answer. A guest answers with `castra-bus reply`; any client answers by \
                 publishing on the topic in the message's `reply`. Prints the payload of the first answer, \
                 with --json the whole message as `castra bus subscribe --json` prints it. If no answer comes \
                 in time, the exit code is 1. Give the payload as for `castra bus publish`.",
        examples: &[
            "castra bus request vm:web-0 '\"uptime\"'",
            "castra bus request time/now --timeout 30s --json | jq .payload",
        ],
    },
    CommandRow {
        command: Command::BusSubscribe,
        words: "bus subscribe",
        section: Section::Bus,
        operands: &[Operand::new("TOPIC", Arity::Many, Complete::Nothing)],
        brief: "print messages as they come, or from a given number on",
        manual: "Subscribes at the broker and prints each message, until Ctrl-C, until --count messages have \
                 come, or until the reader of its output goes away. A topic that ends in `*` means all topics \
                 with that beginning, and `*` alone every topic; between two slashes a `*` stands for one \
                 segment, as in 'sensor/*/state'. Quote it, or the shell expands it. Messages come in the \
                 order of their numbers and none is left out. If rotation has removed some from the log, \
                 stderr says which, and --json prints a line {\"gap\":{\"from\":…,\"to\":…}}.\n\n\
                 When the broker ends the session (it cuts off a reader that is too slow), castra says why \
                 and which --from continues, and ends with exit code 1. If no broker runs but a VM of the \
                 project does, castra starts one. Times are UTC. With --json it prints one object per line: `seq`, `ts` \
                 (milliseconds since 1970), `vm` (the sender; `host` is the host), `topic`, `reply` if the \
                 sender awaits an answer, `payload`.",
        examples: &[
            "castra bus subscribe broadcast vm:web-0",
            "castra bus subscribe 'sensor/*/state' --last",
            "castra bus subscribe 'jobs/*' --group builders --json",
            "castra bus subscribe 'ci/*' --json | jq -c .payload",
            "castra bus subscribe '*' --from 1 --count 10",
            "castra bus subscribe 'sensor/*' --json | mosquitto_pub -l -t castra",
        ],
    },
    CommandRow {
        command: Command::BusTail,
        words: "bus tail",
        section: Section::Bus,
        operands: &[],
        brief: "print the last messages from the logs, and follow them",
        manual: "Prints the last messages and then new ones, until Ctrl-C; with --no-follow it ends after the \
                 last ones. Reads the log of the bus, or with --vm the log of that VM's messages, rotated \
                 files included. It reads only files, so it works even if no broker runs. castra skips \
                 invalid lines; stderr says how many. The output has the form of `castra bus subscribe`.",
        examples: &[
            "castra bus tail",
            "castra bus tail --no-follow --vm web-0 --tail 5",
            "castra bus tail --no-follow --topic 'ci/*' --tail 1 --json | jq .payload",
        ],
    },
    CommandRow {
        command: Command::BusBench,
        words: "bus bench",
        section: Section::Bus,
        operands: &[],
        brief: "measure latency and throughput of this broker",
        manual: "Publishes messages one by one (publish to ack, and publish to a subscriber), then with many \
                 in flight, then reads those again from the log. No phase takes more than 20 s. The messages \
                 are real ones, on a topic bench/… of their own: they stay in the log of the bus and count \
                 towards its rotation, so a million of them may push older messages out.\n\n\
                 `sync` under [bus] sets what an ack promises. Load generator and broker share this machine.",
        examples: &[
            "castra bus bench",
            "castra bus bench --messages 200000 --publishers 8 --json | jq .throughput",
        ],
    },
    CommandRow {
        command: Command::ImageBuild,
        words: "image build",
        section: Section::Parts,
        operands: &[],
        brief: "build the default guest now",
        manual: "Builds castra's default guest, which VMs without an image boot, from your distribution's own \
                 packages and without root. `castra up` does this when a VM needs it. If the small kernel \
                 can't mount directories of the host (Debian's can't), VMs with mounts need a second guest: \
                 --mounts builds that one.",
        examples: &["castra image build", "castra image build --mounts"],
    },
    CommandRow {
        command: Command::ImageList,
        words: "image list",
        section: Section::Parts,
        operands: &[],
        brief: "list the images in the cache",
        manual: "Lists the files under images/ in CASTRA_HOME, with their sizes.",
        examples: &["castra image list"],
    },
    CommandRow {
        command: Command::ImagePath,
        words: "image path",
        section: Section::Parts,
        operands: &[],
        brief: "print the directory of the default guest",
        manual: "Prints the directory of the built default guest; exit code 1 if it isn't built.",
        examples: &["castra image path"],
    },
    CommandRow {
        command: Command::Broker,
        words: "broker",
        section: Section::Parts,
        operands: &[],
        brief: "run the project's broker in the foreground",
        manual: "Listens on 127.0.0.1 for guests and on broker.sock under the state root for the host, until \
                 SIGTERM or Ctrl-C. `castra up` starts the broker in the background; run it yourself to watch \
                 it. A project never has more than one broker.",
        examples: &["castra broker"],
    },
    CommandRow {
        command: Command::HarnessRun,
        words: "harness run",
        section: Section::Agents,
        operands: &[Operand::new("PROMPT", Arity::Rest, Complete::Nothing)],
        brief: "let Codex work with the VMs, and report what it does as events",
        manual: "Runs `codex exec --json` with the prompt. Before the prompt castra adds which VMs are \
                 running, how to reach each of them, and how they were bootstrapped. It reports what Codex \
                 says and does as events: its messages, its commands with their exit code and the end of \
                 their output, and the tokens it used.\n\n\
                 The exit code is 0 if the last turn was completed, otherwise 1, and 130 after Ctrl-C; \
                 `verdict` in the closing `summary` says complete, failed, incomplete or timed out. castra \
                 also ends every process that Codex started. castra keeps the lines of Codex in logs/harness/ \
                 under the state root. `castra man 7 harness` says more.",
        examples: &[
            "castra harness run -- find out why the web server in web-0 answers 502",
            "castra harness run --timeout 30m --json -- run the tests in every VM | jq -r .type",
            "castra harness run --resume 01a1fc64-62e2-74c2-8c4a-903e855a2f3b -- now fix it",
            "castra harness run --in web-0 --cwd /srv -- port this to musl",
        ],
    },
    CommandRow {
        command: Command::HarnessRelay,
        words: "harness relay",
        section: Section::Agents,
        operands: &[Operand::new("FILE", Arity::Optional, Complete::Path)],
        brief: "turn a recorded or piped stream of Codex into events",
        manual: "Reads what `codex exec --json` printed, from a file, or from stdin if FILE is `-` or \
                 missing. In a project castra keeps transcript and events like `castra harness run`, unless \
                 --no-record is given; without a project it keeps nothing. The exit code is 0 if the last \
                 turn was completed, otherwise 1.",
        examples: &[
            "castra harness relay codex.jsonl --json",
            "codex exec --json 'say hello' </dev/null | castra harness relay",
        ],
    },
    CommandRow {
        command: Command::HarnessList,
        words: "harness list",
        section: Section::Agents,
        operands: &[],
        brief: "list the threads of agents in this project",
        manual: "Lists every thread that has a transcript in this project, the latest one last, with its turns, \
                 its tokens and the verdict of its last process.",
        examples: &[
            "castra harness list",
            "castra harness list --json | jq '.threads[-1].thread'",
        ],
    },
    CommandRow {
        command: Command::HarnessShow,
        words: "harness show",
        section: Section::Agents,
        operands: &[Operand::new("THREAD", Arity::One, Complete::Nothing)],
        brief: "show what was said and done in a thread",
        manual: "The beginning of the thread's id is enough. --json prints the agent's lines as they were \
                 kept, each as `line` of an object; lines that aren't JSON are strings.",
        examples: &["castra harness show 01a1fc64"],
    },
    CommandRow {
        command: Command::HarnessUsage,
        words: "harness usage",
        section: Section::Agents,
        operands: &[],
        brief: "add up tokens and VM time, by thread and by day",
        manual: "Shows tokens by thread and by day (UTC), the time that agents ran, and the time that VMs ran \
                 (the sum over all VMs; for a thread, while its processes ran). The VM time comes from the \
                 journal and goes back as far as the journal does.",
        examples: &["castra harness usage", "castra harness usage --json | jq .total"],
    },
    CommandRow {
        command: Command::Completions,
        words: "completions",
        section: Section::Parts,
        operands: &[Operand::new("SHELL", Arity::One, Complete::OneOf(SHELLS))],
        brief: "print the completions for a shell",
        manual: "Prints a script for bash, zsh or fish.",
        examples: &["castra completions bash > ~/.local/share/bash-completion/completions/castra"],
    },
    CommandRow {
        command: Command::Man,
        words: "man",
        section: Section::Parts,
        operands: &[Operand::new("PAGE", Arity::Any, Complete::OneOf(MAN_PAGES))],
        brief: "show the man page, that of a command or of castra.toml",
        manual: "Without a name it shows castra(1). A command's words name its page: `castra man bus tail`. \
                 Further pages are castra.toml(5), castra-doctor(7), castra-harness(7), castra-report(7), \
                 castra-security(7) and castra-status(7). As with man, a section number may stand before the \
                 name: `castra man 7 status` is not the page of the command `status`.\n\n\
                 On a terminal man(1) shows the page, if the system has it; elsewhere castra prints it in \
                 roff. With --dir it writes all pages into a directory, as `make install` does.",
        examples: &[
            "castra man castra.toml",
            "castra man bus tail",
            "castra man 7 security",
        ],
    },
    CommandRow {
        command: Command::BrokerPipe,
        words: "broker-pipe",
        section: Section::Hidden,
        operands: &[Operand::new("PORT", Arity::One, Complete::Nothing)],
        brief: "join stdin and stdout to a port on localhost",
        manual: "QEMU runs it for each connection of an isolated guest to the broker's address.",
        examples: &[],
    },
    CommandRow {
        command: Command::ExecFeed,
        words: "exec-feed",
        section: Section::Hidden,
        operands: &[
            Operand::new("HOW", Arity::One, Complete::OneOf(&["argv", "line"])),
            Operand::new("COMMAND", Arity::Rest, Complete::Nothing),
        ],
        brief: "print the words of a command, quoted, and then stdin",
        manual: "`castra exec` and `castra ssh` use its output as the stdin of a command that is too long for a \
                 command line.",
        examples: &[],
    },
    CommandRow {
        command: Command::VmNames,
        words: "vm-names",
        section: Section::Hidden,
        operands: &[],
        brief: "print the names of the project's VMs, for completions",
        manual: "One name per line; nothing if there is no config.",
        examples: &[],
    },
];

/// The row of a command, by its words.
pub fn by_words(words: &str) -> Option<&'static CommandRow> {
    COMMANDS.iter().find(|row| row.words == words)
}

/// The value of `--color`.
pub fn color_choice(text: &str) -> Option<ColorChoice> {
    match text {
        "auto" => Some(ColorChoice::Auto),
        "always" => Some(ColorChoice::Always),
        "never" => Some(ColorChoice::Never),
        _ => None,
    }
}
