//! What the columns of the table mean.
//!
//! Here: the words. Not here: the table (`super`).

/// One paragraph a column. `window`: the freshness window in words.
pub fn paragraphs(window: &str) -> Vec<String> {
    vec![
        "STATE      starting: QEMU is being launched; running: QEMU runs; paused: QEMU runs, but not its guest; \
         stopping: it was asked to stop and still runs; stopped: it was shut down, or never started; \
         crashed: it ended unexpectedly; external: you started it yourself"
            .to_owned(),
        format!(
            "BROKER     reachable: the guest's last proof of life is at most {window} old; waiting: it is older, or \
             there is none; offline: no broker runs"
        ),
        "AGE        age of the guest's last proof of life: an accepted hello, or any frame of an open session. It \
         keeps growing while the guest, the VM or the broker is down. -: none since this launch"
            .to_owned(),
        "UPTIME     time since QEMU was launched".to_owned(),
        "FORWARDS   8080→80: port 8080 of 127.0.0.1 leads to the guest's port 80".to_owned(),
        "BOOTSTRAP  how the last bootstrap ended, and how long it took; no-op: the script found nothing to \
         change"
            .to_owned(),
        "BUS        session: the guest has an open session; subscribed: it also has a subscription".to_owned(),
        "PUBLISH    time since its last message; HEARTBEAT: since its last heartbeat".to_owned(),
    ]
}
