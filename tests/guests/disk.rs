//! What a default guest's disk keeps, over a restart and over the guest's own reboot; and a guest whose disk is too
//! small for anything.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::eventually;
use crate::support::guest_project::{Project, text};

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
fn what_a_guest_keeps_and_its_own_reboot() {
    let project = Project::with(
        "disk",
        "[[vms]]\nname = \"web\"\n[[vms]]\nname = \"tiny\"\ndisk_size = \"4 MiB\"\n",
    );
    project.expect(0, &["up"]);
    // A disk on which nothing can be kept: it boots all the same, and says what that means.
    project.expect(0, &["exec", "tiny", "--", "true"]);
    let console = project.expect(0, &["logs", "tiny", "--source", "serial"]);
    assert!(console.contains("stays in memory"), "{console}");
    // What fits nowhere says where there is room.
    project.file("large", vec![7; 2 << 20]);
    let fill =
        "cd /root; for f in spare full; do dd if=/dev/zero of=$f bs=1M ${c-count=1}; c=; done; rm spare";
    project.run(&["exec", "tiny", "--", "sh", "-c", fill]);
    let full = project.run(&["cp", "large", "tiny:"]);
    let words = text(&full.stderr);
    assert_eq!(full.status.code(), Some(1), "{words}");
    assert!(
        words.contains("No space left") && words.contains("castra exec tiny -- df -h"),
        "{words}"
    );
    project.expect(0, &["exec", "tiny", "--", "rm", "/root/full"]);
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

    let before = project.vm("web");
    assert_eq!(
        (&before["boots"], &before["last_reset"]),
        (&1.into(), &Value::Null)
    );
    let boot_id = exec(&project, "cat /proc/sys/kernel/random/boot_id");
    project.run(&["exec", "web", "--", "reboot"]);
    eventually("the guest to reboot", || project.vm("web")["boots"] == 2);
    let down = project.vm("web");
    assert_eq!(
        (&down["state"], &down["pid"]),
        (&"running".into(), &before["pid"])
    );
    eventually("it to be reachable again", || {
        project.vm("web")["reachable"] == true
    });
    // The launch's token holds still. Its in-guest service starts with it.
    eventually("its session", || project.vm("web")["bus_session"] == true);
    eventually("its SSH server", || {
        project.run(&["exec", "web", "--", "true"]).status.code() == Some(0)
    });
    assert_ne!(exec(&project, "cat /proc/sys/kernel/random/boot_id"), boot_id);
    all_is_there(&project, "after a reboot");
    let told = project.events(0, &["events", "--type", "vm.lifecycle"]);
    let told: Vec<&Value> = told.iter().filter(|event| event["phase"] == "rebooted").collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((&told[0]["vm"], &told[0]["boots"]), (&"web".into(), &2.into()));
    // `up` leaves it alone.
    project.expect(0, &["up"]);
    assert_eq!(project.vm("web")["pid"], before["pid"]);
    all_is_there(&project, "after up");

    // A panic is no reboot. What is advised then loses nothing.
    project.run(&[
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "sync; (sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &",
    ]);
    eventually("the panic", || project.vm("web")["state"] == "crashed");
    let ended = project.vm("web")["ended"].clone();
    assert_eq!(ended["reason"], "guest-panic");
    assert!(
        ended["last_words"].as_str().unwrap().contains("Kernel panic"),
        "{ended}"
    );
    let refused = project.run(&["exec", "web", "--", "true"]);
    let advice = text(&refused.stderr);
    assert!(advice.contains("castra restart web"), "{advice}");
    project.expect(0, &["restart", "web"]);
    all_is_there(&project, "after a panic");
    project.expect(0, &["down"]);
}

#[test]
fn a_guest_is_known_again_after_a_power_cut_and_with_the_disk_of_an_earlier_castra() {
    let project = Project::with("host-key", "[[vms]]\nname = \"web\"\npersist = true\n");
    project.expect(0, &["up"]);
    // At once: nothing has been written that wasn't asked to be.
    let pid = i32::try_from(project.vm("web")["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    eventually("its end", || project.vm("web")["state"] == "crashed");
    project.expect(0, &["up"]);
    exec(&project, "true");
    // Dropbear's host key is the same 64 bytes behind a head of its own.
    exec(
        &project,
        "cd /var/lib && mkdir dropbear && cd dropbear && \
         { printf '\\0\\0\\0\\13ssh-ed25519\\0\\0\\0\\100'; \
           grep -v -e ----- /etc/ssh/ssh_host_ed25519_key | base64 -d | tail -c +162 | head -c 64; \
         } >dropbear_ed25519_host_key && rm /etc/ssh/ssh_host_*",
    );
    project.expect(0, &["restart", "web"]);
    exec(&project, "test -s /etc/ssh/ssh_host_ed25519_key.pub");
    assert_eq!(
        exec(&project, "stat -c %a /etc/ssh/ssh_host_ed25519_key"),
        "600\n"
    );
    // One that is spoilt is no key, and the guest gets one all the same.
    exec(
        &project,
        "head -c 83 /dev/zero >/var/lib/dropbear/dropbear_ed25519_host_key; rm /etc/ssh/ssh_host_*",
    );
    project.run(&["restart", "web"]);
    let shown = project.run(&["exec", "web", "--", "true"]);
    let words = text(&shown.stderr);
    assert!(words.contains("HOST IDENTIFICATION HAS CHANGED"), "{words}");
    project.expect(0, &["down", "--quiet"]);
}
