//! A guest that calls itself by another name than castra.toml: configs of upstream castra have such.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use crate::support::project::{ONE, Project};
use crate::support::until;

/// What the broker answers to this hello.
fn answer(port: u64, hello: &str) -> String {
    let port = u16::try_from(port).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    writeln!(stream, "{hello}").unwrap();
    let mut lines = BufReader::new(stream).lines();
    lines.next().unwrap().unwrap();
    lines.next().unwrap().unwrap()
}

#[test]
fn a_hello_under_the_second_name_is_the_vms() {
    let project = Project::new("second-name", "");
    project.config(&format!(
        "{ONE}bootstrap = {{ script = \"run.sh\", mode = \"skip\" }}\n[[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n"
    ));
    project
        .castra()
        .write("bootstrap.toml", "handshake_identity = \"alpine\"\n");
    project.run(&["up"]).exits(0);
    let port = project.status()["broker"]["port"].as_u64().unwrap();
    assert_eq!(project.vm("web")["reachable"], false);
    assert_eq!(answer(port, "hello vm:alpine"), "ok");
    until("web to be reachable", || project.vm("web")["reachable"] == true);
    assert_eq!(project.vm("db")["reachable"], false);
    let said = answer(port, "hello vm:Alpine capabilities=bus-v1");
    assert!(said.starts_with("ok session="), "{said}");
    // Nobody else's name, and no operand of commands.
    assert!(answer(port, "hello vm:debian").contains("unknown-vm"));
    project.refused(64, &["down", "alpine"]);
    // Told under the VM's name.
    let told = project
        .run(&["events", "--json", "--type", "broker.handshake"])
        .exits(0)
        .objects();
    let names: Vec<&str> = told.iter().filter_map(|event| event["vm"].as_str()).collect();
    assert_eq!(names, ["web", "web", "debian"]);
    project.down();
}
