//! What other tools call castra's commands: Vagrant, Lima, Multipass, Docker and compose, libvirt.
//!
//! Here: words that are no commands of castra's, each with the command that does it and, where that isn't
//! plain, what to know first. Not here: words that are merely misspelt (`core::nearest`).

/// What somebody used to another tool types, the command to type instead, and a remark.
pub const HABITS: &[(&str, &str, &str)] = &[
    ("start", "castra up", ""),
    ("launch", "castra up", ""),
    ("boot", "castra up", ""),
    ("create", "castra init", "then castra up"),
    ("new", "castra init", "then castra up"),
    ("stop", "castra down", KEEP),
    ("halt", "castra down", KEEP),
    ("poweroff", "castra down", KEEP),
    ("shutdown", "castra down", KEEP),
    ("kill", "castra down --graceful-wait-secs 0", KEEP),
    ("destroy", "castra down", LOSE),
    ("rm", "castra down", LOSE),
    ("remove", "castra down", LOSE),
    ("delete", "castra down", LOSE),
    ("undefine", "castra down", LOSE),
    ("suspend", "castra down", SUSPEND),
    ("pause", "castra down", SUSPEND),
    ("save", "castra down", SUSPEND),
    ("resume", "castra up", SUSPEND),
    ("reload", "castra restart", "which keeps the disks"),
    ("reboot", "castra restart", "which keeps the disks"),
    (
        "reset",
        "castra restart --discard",
        "which begins with fresh disks",
    ),
    ("ls", "castra status", ""),
    ("ps", "castra status", ""),
    ("list", "castra status", "with --all for every project"),
    ("info", "castra status", ""),
    ("inspect", "castra status --json", ""),
    ("stats", "castra status --watch", ""),
    ("top", "castra status --watch", ""),
    ("global-status", "castra status --all", ""),
    ("shell", "castra ssh VM", ""),
    ("sh", "castra ssh VM", ""),
    ("login", "castra ssh VM", ""),
    ("connect", "castra ssh VM", ""),
    ("enter", "castra ssh VM", ""),
    ("attach", "castra console VM", ""),
    ("serial", "castra console VM", ""),
    (
        "run",
        "castra exec VM -- COMMAND",
        "for a command in a VM that runs; castra up starts VMs",
    ),
    ("provision", "castra bootstrap", ""),
    ("apply", "castra up", ""),
    ("validate", "castra up --plan", ""),
    ("check", "castra up --plan", "or castra doctor for this host"),
    ("plan", "castra up --plan", ""),
    (
        "config",
        "castra up --plan",
        "which checks castra.toml and shows what it means",
    ),
    ("edit", "castra up --plan", "once you have edited castra.toml"),
    ("port", "castra ports", ""),
    ("scp", "castra cp", ""),
    ("copy", "castra cp", ""),
    ("transfer", "castra cp", ""),
    ("upload", "castra cp", ""),
    ("download", "castra cp", ""),
    (
        "mount",
        "castra restart",
        "once castra.toml has it under `mounts` of that VM",
    ),
    ("build", "castra image build", "for the default guest"),
    ("images", "castra image list", ""),
    ("box", "castra image list", ""),
    ("prune", "castra clean --global", ""),
    ("gc", "castra clean --global", ""),
    ("journal", "castra events", ""),
    ("history", "castra report", ""),
    ("projects", "castra workspaces", ""),
    ("publish", "castra bus publish", ""),
    ("subscribe", "castra bus subscribe", ""),
    ("version", "castra --version", ""),
    ("image ls", "castra image list", ""),
    ("bus pub", "castra bus publish", ""),
    ("bus sub", "castra bus subscribe", ""),
    ("bus log", "castra bus tail", ""),
    ("bus logs", "castra bus tail", ""),
    ("harness ls", "castra harness list", ""),
    ("harness start", "castra harness run", ""),
    ("harness exec", "castra harness run", ""),
];

const KEEP: &str = "which discards the disks of VMs without `persist = true`; castra restart keeps them";
const LOSE: &str = "which discards the disks; those of VMs with `persist = true` only with --discard";
const SUSPEND: &str = "castra can't save a running VM; with `persist = true` its disk survives `down`";

/// What to type instead of these words.
pub fn habit(words: &str) -> Option<String> {
    let (_, command, remark) = HABITS
        .iter()
        .find(|(word, _, _)| word.eq_ignore_ascii_case(words))?;
    Some(match *remark {
        "" => (*command).to_owned(),
        remark => format!("{command}; {remark}"),
    })
}
