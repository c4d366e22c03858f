//! A real OpenSSH server in the place of a guest: one `sshd -i` per connection, on a listener of
//! the test's own, so that no port is fixed and every connection can be cut.

use std::fs;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// A server that lives as long as this value.
pub struct Sshd {
    port: u16,
    running: Arc<AtomicBool>,
    served: Arc<Mutex<Vec<Served>>>,
    thread: Option<JoinHandle<()>>,
}

struct Served {
    stream: TcpStream,
    /// Reaps its sshd; the connection ends with that, though we hold the socket too.
    reaper: JoinHandle<()>,
}

/// The PATH of a guest.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Sshd {
    /// A server with files in `dir` that accepts the keys in `authorized`.
    pub fn start(dir: &Path, authorized: &Path) -> Sshd {
        Sshd::start_with(dir, authorized, PATH, "")
    }

    /// Likewise, with this PATH and more variables for its sessions: `A="1" B="2"`.
    pub fn start_with(dir: &Path, authorized: &Path, path: &str, variables: &str) -> Sshd {
        let program = find_sshd();
        fs::create_dir_all(dir).unwrap();
        let host_key = dir.join("host_key");
        keygen(&host_key);
        // Run by root, sshd insists on this directory; the package's service makes it at boot.
        let separation = Path::new("/run/sshd");
        if nix::unistd::geteuid().is_root() && !separation.exists() {
            fs::create_dir_all(separation).unwrap();
        }
        let config = dir.join("sshd_config");
        let text = format!(
            "Subsystem sftp internal-sftp\nHostKey \"{}\"\nAuthorizedKeysFile \"{}\"\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nUseDNS no\nPrintMotd no\nPrintLastLog no\n\
             LogLevel ERROR\nMaxStartups 100\nSetEnv PATH=\"{path}\" HOME=\"{}\" CASTRA_ROOT=\"{}\" {variables}\n",
            host_key.display(),
            authorized.display().to_string().replace('%', "%%"),
            // No start-up files of whoever runs the tests; and what is for all of a guest stays in here too.
            dir.display(),
            dir.join("root").display(),
        );
        fs::write(&config, text).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let running = Arc::new(AtomicBool::new(true));
        let served = Arc::new(Mutex::new(Vec::new()));
        let thread = {
            let (running, served) = (Arc::clone(&running), Arc::clone(&served));
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if !running.load(Ordering::SeqCst) {
                        return;
                    }
                    let stream = stream.unwrap();
                    let socket: OwnedFd = stream.try_clone().unwrap().into();
                    let mut child = Command::new(&program)
                        .args(["-i", "-e", "-f"])
                        .arg(&config)
                        .stdin(Stdio::from(socket.try_clone().unwrap()))
                        .stdout(Stdio::from(socket))
                        .stderr(Stdio::null())
                        .spawn()
                        .unwrap();
                    let held = stream.try_clone().unwrap();
                    let reaper = thread::spawn(move || {
                        let _ = child.wait();
                        let _ = held.shutdown(Shutdown::Both);
                    });
                    served.lock().unwrap().push(Served { stream, reaper });
                }
            })
        };
        Sshd {
            port,
            running,
            served,
            thread: Some(thread),
        }
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A bootstrap.toml that leads a bootstrap here, and to this directory.
    pub fn metadata(&self, remote: &Path) -> String {
        format!(
            "remote_dir = \"{}\"\n[ssh]\nuser = \"{}\"\nport = {}\n",
            remote.display(),
            login(),
            self.port
        )
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.served.lock().unwrap().len()
    }

    /// Cuts every connection, as a network that breaks.
    pub fn cut(&self) {
        for served in self.served.lock().unwrap().iter() {
            let _ = served.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.running.store(false, Ordering::SeqCst);
        // Wakes the listener, which then sees that it is over.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.thread.take().unwrap().join();
        self.cut();
        for served in self.served.lock().unwrap().drain(..) {
            let _ = served.reaper.join();
        }
    }
}

/// Whoever runs the tests.
pub fn login() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    user.unwrap().unwrap().name
}

/// Makes a key pair without a passphrase.
pub fn keygen(path: &Path) {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()
        .unwrap();
    assert!(made.success());
}

fn find_sshd() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|dir: PathBuf| dir.join("sshd"))
        .find(|program| program.exists())
        .expect("sshd is needed: install the package openssh-server")
}
