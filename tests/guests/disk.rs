//! What a default guest's disk keeps, over a restart; and a guest whose disk is too
//! small for anything.

use crate::guest_project::Project;

/// Everything that is kept, besides /var.
const KEPT: [&str; 7] = ["/root", "/etc", "/home", "/srv", "/opt", "/usr/local/bin", "/var"];

fn exec(project: &Project, command: &str) -> String {
    project.expect(0, &["exec", "web", "--", "sh", "-c", command])
}

fn all_is_there(project: &Project, when: &str) {
    for dir in KEPT {
        assert_eq!(
            exec(project, &format!("cat {dir}/kept")),
            format!("{dir}\n"),
            "{when}"
        );
    }
    assert_eq!(exec(project, "cat /root/copied"), "by cp\n", "{when}");
    let hosts = exec(project, "cat /etc/hosts");
    assert!(
        hosts.contains("10.9.9.9\tdb") && hosts.contains("127.0.1.1\tweb\n"),
        "{hosts}"
    );
    assert!(!hosts.contains("elsewhere"), "{when}: {hosts}");
    assert_eq!(exec(project, "hostname"), "web\n");
}

#[test]
fn what_a_guest_keeps() {
    let project = Project::with(
        "disk",
        "[[vms]]\nname = \"web\"\n[[vms]]\nname = \"tiny\"\ndisk_size = \"4 MiB\"\n",
    );
    project.expect(0, &["up"]);
    // A disk on which nothing can be kept: it boots all the same, and says what that means.
    project.expect(0, &["exec", "tiny", "--", "true"]);
    let console = project.expect(0, &["logs", "tiny", "--source", "serial"]);
    assert!(console.contains("stays in memory"), "{console}");
    project.expect(0, &["down", "tiny", "--quiet"]);

    for dir in KEPT {
        exec(&project, &format!("echo {dir} >{dir}/kept"));
    }
    project.file("copied", "by cp\n");
    project.expect(0, &["cp", "copied", "web:"]);
    // A hosts file of the guest's own, with the line of a guest that was called otherwise.
    exec(
        &project,
        "printf '127.0.0.1\\tlocalhost\\n127.0.1.1\\telsewhere\\n10.9.9.9\\tdb\\n' >/etc/hosts; \
         echo 'ssh-ed25519 AAAA own' >/root/.ssh/authorized_keys; cat /etc/ssh/ssh_host_ed25519_key.pub >/var/hostkey",
    );
    project.expect(0, &["restart", "web"]);
    all_is_there(&project, "after a restart");
    // The guest's own keys stay its own; castra's is that of the launch. The host's is the same.
    assert_eq!(
        exec(&project, "cat /root/.ssh/authorized_keys"),
        "ssh-ed25519 AAAA own\n"
    );
    exec(&project, "cmp /etc/ssh/ssh_host_ed25519_key.pub /var/hostkey");

    project.expect(0, &["down"]);
}
