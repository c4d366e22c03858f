//! What `status` says of bootstraps that were skipped.

use crate::support::project::{ONE, Project};

#[test]
fn a_skipped_bootstrap_hides_no_earlier_one() {
    let script = "[vms.bootstrap]\nmode = \"auto\"\nscript = \"run.sh\"\nhandshake_timeout_secs = 1\n";
    let project = Project::new("skip", &format!("{ONE}{script}"));
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    assert_eq!(
        project.vm("web")["bootstrap"]["status"],
        "skipped",
        "the first of this launch"
    );
    project.run(&["bootstrap"]).exits(1);
    let failed = project.vm("web")["bootstrap"].clone();
    assert_eq!(failed["status"], "failed");
    let skipped = project.run(&["up", "--bootstrap", "skip"]).exits(0);
    skipped.prints("bootstrap skipped");
    assert_eq!(project.vm("web")["bootstrap"], failed);
    // A new launch knows of no bootstrap.
    project.run(&["down"]).exits(0);
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    assert_eq!(project.vm("web")["bootstrap"]["status"], "skipped");
    project.down();
}
