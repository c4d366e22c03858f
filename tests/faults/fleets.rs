//! Whole fleets: replicas, disks that persist, and what one VM's slowness means for the others.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::project::{ONE, Project, TWO, is_phase};

#[test]
fn a_role_names_its_replicas() {
    let vms = "[[vms]]\nname = \"api\"\ncount = 2\nkernel = \"vmlinuz\"\n[[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n";
    let project = Project::new("roles", vms);
    let phases = |args: &[&str], phase: &str| {
        let events = project.run(&[args, &["--json"]].concat()).exits(0).objects();
        let told = events.iter().filter(|event| is_phase(event, phase));
        let mut names: Vec<String> = told
            .map(|event| event["vm"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names.join(" ")
    };
    assert_eq!(phases(&["up", "API"], "launched"), "api-0 api-1");
    assert_eq!(
        phases(&["up", "db", "--bootstrap", "db=skip,api=skip"], "launched"),
        "db"
    );
    assert_eq!(phases(&["restart", "api", "api-0"], "launched"), "api-0 api-1");
    let plan = project
        .run(&[
            "up",
            "api",
            "--plan",
            "--json",
            "--bootstrap",
            "api=auto,api-1=skip",
        ])
        .exits(0);
    let modes: Vec<Value> = plan
        .objects()
        .iter()
        .filter(|event| event["type"] == "bootstrap.planned")
        .map(|event| event["mode"].clone())
        .collect();
    assert_eq!(modes, ["auto", "skip"]);
    let blocks = project.run(&["ssh-config", "api"]).exits(0).stdout;
    assert_eq!(blocks.matches("Host api-").count(), 2, "{blocks}");
    let logs = project
        .run(&["logs", "api", "--source", "serial"])
        .exits(0)
        .stdout;
    assert!(
        logs.contains("api-0") && logs.contains("api-1") && !logs.contains("db"),
        "{logs}"
    );
    let events = project
        .run(&["events", "--vm", "api", "--json"])
        .exits(0)
        .objects();
    assert!(
        events.iter().any(|event| event["vm"] == "api-1") && events.iter().all(|event| event["vm"] != "db")
    );
    for command in [
        &["exec", "api", "--", "true"][..],
        &["ssh", "api"],
        &["console", "api"],
        &["cp", "api:/x", "."],
    ] {
        let ran = project.run(command).exits(64);
        ran.tells("2 VMs").tells("api-0, api-1");
    }
    assert_eq!(
        project.run(&["vm-names"]).exits(0).stdout,
        "api\napi-0\napi-1\ndb\n"
    );
    assert_eq!(phases(&["down", "api"], "shutdown-complete"), "api-0 api-1");
    project.run(&["down", "apis"]).exits(64);
    // What the config has lost is known by its own record.
    project.run(&["up", "api"]).exits(0);
    project.config("[[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n");
    assert_eq!(phases(&["down", "api"], "shutdown-complete"), "api-0 api-1");
    project.run(&["down"]).exits(0);
}

#[test]
fn each_replica_is_what_its_instance_says_and_only_the_missing_are_started() {
    let project = Project::new(
        "replicas",
        "[[vms]]\nname = \"api\"\ncount = 3\nkernel = \"vmlinuz\"\nmemory = \"128 MiB\"\n\
         [[vms.instances]]\nid = \"api-1\"\ncpus = 2\nmemory = \"192 MiB\"\nqemu_args = [\"-fake\", \"console=second\"]\n\
         [[vms.instances.port_forwards]]\nhost = 0\nguest = 8080\n\
         [[vms.instances]]\nid = \"api-2\"\npersist = true\n",
    );
    project.run(&["up", "api-0"]).exits(0);
    let first = project.pid("api-0");
    let events = project.run(&["up", "--json"]).exits(0).objects();
    let launched: Vec<&str> = events
        .iter()
        .filter(|event| is_phase(event, "launched"))
        .map(|event| event["vm"].as_str().unwrap())
        .collect();
    assert!(
        launched.len() == 2 && !launched.contains(&"api-0"),
        "{launched:?}"
    );
    assert_eq!(project.pid("api-0"), first);

    let mib = |vm: &str| project.vm(vm)["memory_bytes"].as_u64().unwrap() >> 20;
    assert_eq!([mib("api-0"), mib("api-1"), mib("api-2")], [128, 192, 128]);
    let guests_ports = |vm: &str| -> Vec<u64> {
        let forwards = project.vm(vm)["forwards"].clone();
        let forwards = forwards.as_array().unwrap().iter();
        forwards
            .map(|forward| forward["guest"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(guests_ports("api-0"), [22]);
    assert_eq!(guests_ports("api-1").len(), 2);
    // What status tells is what QEMU was told.
    let argv = fs::read(format!("/proc/{}/cmdline", project.pid("api-1"))).unwrap();
    let argv = String::from_utf8_lossy(&argv).replace('\0', " ");
    for words in ["-smp 2 ", "-m 192M ", "-:8080", "-:22"] {
        assert!(argv.contains(words), "no {words:?} in {argv}");
    }
    let console = fs::read_to_string(project.state("vms/api-1/serial.log")).unwrap();
    assert!(console.contains("second"), "{console}");

    project.run(&["down"]).exits(0);
    let overlays: Vec<_> = fs::read_dir(project.state("overlays"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(overlays.len(), 1, "{overlays:?}");
    project.run(&["down", "--discard"]).exits(0);
    project.assert_nothing_left();
}

#[test]
fn a_persistent_disk_stays_until_it_is_discarded() {
    let project = Project::new("persistent", &format!("{ONE}persist = true\n"));
    let disk = project.state("overlays/web.qcow2");
    let inode = || fs::metadata(&disk).unwrap().ino();
    project.run(&["up"]).exits(0);
    let first = inode();
    let down = project.run(&["down", "--json"]).exits(0).objects();
    assert!(
        !down.iter().any(|event| is_phase(event, "overlay-discarded")),
        "{down:#?}"
    );
    let up = project.run(&["up", "--json"]).exits(0).objects();
    let prepared = up
        .iter()
        .find(|event| is_phase(event, "overlay-prepared"))
        .unwrap();
    assert_eq!((&prepared["reused"], inode()), (&true.into(), first));
    // Also after a crash, which gives no disposable disk a second life.
    kill(
        Pid::from_raw(i32::try_from(project.pid("web")).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    project.run(&["down"]).exits(0);
    assert_eq!(inode(), first);

    // One that doesn't run any more can be discarded too, and only once.
    let discarded = project.run(&["down", "--discard", "--json"]).exits(0).objects();
    let gone = discarded
        .iter()
        .find(|event| is_phase(event, "overlay-discarded"))
        .unwrap();
    assert!(gone["reclaimed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(discarded.last().unwrap()["bytes"], gone["reclaimed_bytes"]);
    assert!(!disk.exists());
    let again = project.run(&["down", "--discard", "--json"]).exits(0).objects();
    assert!(
        !again.iter().any(|event| is_phase(event, "overlay-discarded")),
        "{again:#?}"
    );
    project.run(&["up"]).exits(0);
    project.run(&["down", "--discard"]).exits(0);
    project.assert_nothing_left();
}

#[test]
fn a_slow_vm_delays_no_other_on_its_way_down() {
    let vms = TWO.replacen(
        "kernel",
        "qemu_args = [\"-fake\", \"ignore-powerdown\"]\nkernel",
        1,
    );
    let project = Project::new("slow-down", &vms);
    project.run(&["up"]).exits(0);
    let web = i32::try_from(project.pid("web")).unwrap();
    let mut down = project.begin("", &["down", "--graceful-wait-secs", "600"]);
    down.until("the other one's end", |event| {
        event["vm"] == "db" && is_phase(event, "overlay-discarded")
    });
    assert_eq!(project.vm("web")["state"], "stopping");
    kill(Pid::from_raw(web), Signal::SIGKILL).unwrap();
    assert_eq!(down.end().0, Some(0));
    project.assert_nothing_left();
}
