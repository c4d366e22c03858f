//! What a flag that several commands share means to each of them.
//!
//! Here: brief and manual by command, where those of the flag's row would tell of other commands. Not
//! here: the rows (`super::flags`).

use super::{Command, Flag};

/// In the row of a flag that each of its commands explains here.
pub(super) const BY_COMMAND: &str = "";

/// What one flag says of itself to these commands.
struct Own {
    long: &'static str,
    commands: &'static [Command],
    brief: &'static str,
    manual: &'static str,
}

const fn own(
    long: &'static str,
    commands: &'static [Command],
    brief: &'static str,
    manual: &'static str,
) -> Own {
    Own {
        long,
        commands,
        brief,
        manual,
    }
}

const OWN: &[Own] = &[
    own("force", &[Command::Init], "overwrite an existing castra.toml", ""),
    own(
        "force",
        &[Command::ImageBuild],
        "build it again even if it is already built",
        "",
    ),
    own(
        "force",
        &[Command::Up, Command::Restart],
        "start even if memory is short",
        "The host may then swap, or kill a VM.",
    ),
    own(
        "force",
        &[Command::Clean],
        "also remove persistent disks",
        "Everything that guests with `persist = true` have written is lost.",
    ),
    own(
        "force",
        &[Command::BusPublish, Command::BusRequest],
        "publish even to a VM that the project doesn't have",
        "Without it castra refuses a topic vm:NAME of an unknown VM, because no VM would ever read the message.",
    ),
    own(
        "mounts",
        &[Command::ImageBuild],
        "build the default guest for VMs with mounts",
        "",
    ),
    own(
        "mounts",
        &[Command::ImagePath],
        "print the path of the default guest for VMs with mounts",
        "",
    ),
    own(
        "plan",
        &[Command::Up],
        "show what would be done, and change nothing",
        "Checks everything that `up` checks (images, kernels, disks, mounts, seeds, scripts, ports, memory, tools) and \
         shows each VM as it would be launched and bootstrapped. The exit code is 1 if `up` would refuse to start. \
         Writes no file.",
    ),
    own(
        "plan",
        &[Command::Bootstrap],
        "show what would be done, and change nothing",
        "Checks everything that `bootstrap` checks and prints each VM's bootstrap plan. Writes no file.",
    ),
    own(
        "discard",
        &[Command::Down],
        "also discard persistent disks",
        "Everything that guests with `persist = true` have written is lost.",
    ),
    own(
        "discard",
        &[Command::Restart],
        "start with fresh disks",
        "Everything that the guests have written is lost, even with `persist = true`.",
    ),
    own("all", &[Command::Doctor], "check every project castra knows", ""),
    own(
        "verbose",
        &[Command::Up, Command::Down, Command::Restart, Command::Bootstrap],
        "print every step",
        "Without it castra prints a few lines for each VM: launched, reachable, bootstrapped, the output of its script, \
         and errors.",
    ),
    own(
        "verbose",
        &[Command::Ports],
        "show processes, and which projects want the same port",
        "",
    ),
    own(
        "tail",
        &[Command::Logs],
        "show only the last N lines of each log",
        "The default is 50 lines, or all lines with --since.",
    ),
    own(
        "tail",
        &[Command::Events],
        "show only the last N events",
        "Of those that match the other flags. The default is all.",
    ),
    own(
        "tail",
        &[Command::BusTail],
        "show only the last N messages",
        "Of those that match the other flags. The default is 50.",
    ),
    own(
        "follow",
        &[Command::Logs, Command::Events],
        "keep printing what is added",
        "With --tail 0 you see only what comes from now on. It ends with Ctrl-C, or when the reader of its output goes \
         away.",
    ),
    own(
        "follow",
        &[Command::BusTail],
        "keep printing what is added, which is the default",
        "With --tail 0 you see only what comes from now on. It ends with Ctrl-C, or when the reader of its output goes \
         away.",
    ),
    own(
        "vm",
        &[Command::Events],
        "show only events about this VM",
        "May be given several times.",
    ),
    own(
        "vm",
        &[Command::BusTail],
        "show only what this VM has published",
        "`host` and `broker` work too.",
    ),
    own(
        "since",
        &[Command::Report],
        "show only newer runs: 10m ago, or 2026-11-21T10:00:00Z",
        "A time span such as 90s, 10m, 2h or 1day, or a time in RFC 3339 form, with Z or an offset such as +02:00.",
    ),
    own(
        "timeout",
        &[Command::HarnessRun],
        "end Codex after this long (default: never)",
        "Seconds, or a time such as 90s, 30m or 2h; 0 is never. Codex gets SIGTERM, then SIGKILL.",
    ),
    own(
        "timeout",
        &[Command::Wait],
        "give up after this long (default: 5m)",
        "Seconds, or a time such as 90s, 30m or 2h; 0 checks once. The exit code is then 124.",
    ),
    own(
        "topic",
        &[Command::BusPublish],
        "the topic of the message (default: broadcast)",
        "1 to 128 of A-Z a-z 0-9 . _ : / -, here or as the first word. vm:NAME reaches only that VM.",
    ),
    own(
        "topic",
        &[Command::BusTail],
        "show only messages on this topic",
        "May be given several times, with `*` as `castra bus subscribe` takes it.",
    ),
];

impl Flag {
    /// The flag as this command explains it.
    pub fn of(&self, command: Command) -> Flag {
        let own = OWN
            .iter()
            .find(|own| own.long == self.long && own.commands.contains(&command));
        match own {
            Some(own) => Flag {
                brief: own.brief,
                manual: own.manual,
                ..*self
            },
            None => *self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{COMMANDS, FLAGS};
    use super::*;

    #[test]
    fn each_belongs_to_a_flag_that_its_commands_take() {
        for own in OWN {
            let flag = FLAGS.iter().find(|flag| flag.long == own.long);
            let flag = flag.unwrap_or_else(|| panic!("there is no --{}", own.long));
            for command in own.commands {
                assert!(flag.takes(Some(*command)), "--{} of {command:?}", own.long);
                assert_eq!(
                    flag.of(*command).brief,
                    own.brief,
                    "--{} is there twice",
                    own.long
                );
            }
            assert!(
                own.brief.len() <= 79 && !own.brief.ends_with('.'),
                "{}",
                own.brief
            );
        }
    }

    #[test]
    fn every_command_says_what_each_of_its_flags_does() {
        for row in COMMANDS {
            for flag in row.flags() {
                assert!(
                    !flag.brief.is_empty(),
                    "`{}` says nothing of --{}",
                    row.words,
                    flag.long
                );
            }
        }
    }

    /// Whoever reads one command's help is not told of another's.
    #[test]
    fn no_flag_explains_another_commands_use() {
        for row in COMMANDS {
            for flag in row.flags() {
                let text = format!("{} {}", flag.brief, flag.manual);
                for other in COMMANDS.iter().filter(|other| other.command != row.command) {
                    let shares = FLAGS
                        .iter()
                        .any(|shared| shared.long == flag.long && shared.takes(Some(other.command)));
                    assert!(
                        !shares || !text.contains(&format!("`{}`", other.words)),
                        "--{} of `{}` tells of `{}`: {text}",
                        flag.long,
                        row.words,
                        other.words
                    );
                }
            }
        }
    }
}
