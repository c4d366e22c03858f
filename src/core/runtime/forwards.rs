//! Host ports for forwards: free ones where the config says 0, exactly the named ones elsewhere.
//!
//! Here: choosing ports, and naming the owner of a port that is in use. Not here: QEMU's own
//! attempt to bind one ([`super::launch`] tries again with other ports if another program was
//! faster).

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};

use crate::core::config::{PortForward, Protocol, with_ssh};
use crate::core::ports::owners::owner_of;
use crate::core::root::paths::castra_home;
use crate::core::root::records::ForwardRecord;

/// How often the kernel is asked for a free port: a try fails only if the kernel offers a port that
/// this run has allocated already.
const TRIES: usize = 64;

/// The ports that one run has allocated to its VMs. Shared by the threads that launch them.
#[derive(Debug, Default)]
pub struct PortAllocator {
    allocated: Mutex<Vec<(Protocol, u16)>>,
}

/// The ports of one VM, bound so that nobody else gets them until [`Reservation::release`].
#[derive(Debug)]
pub struct Reservation {
    forwards: Vec<ForwardRecord>,
    fixed: Vec<u16>,
    held: Vec<HeldSocket>,
}

/// A bound socket that keeps others from using the port.
#[derive(Debug)]
enum HeldSocket {
    Tcp { _socket: TcpListener },
    Udp { _socket: UdpSocket },
}

/// A host port that can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortTaken {
    /// The port; 0: there is no free one at all.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Who has it, where the system tells.
    pub owner: Option<String>,
    /// What the system said.
    pub error: String,
}

impl fmt::Display for PortTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        match (&self.owner, self.port) {
            (_, 0) => write!(f, "no free {protocol} port on 127.0.0.1: {}", self.error),
            (Some(owner), port) => write!(f, "{protocol} port {port} of 127.0.0.1 is in use by {owner}"),
            (None, port) => write!(
                f,
                "{protocol} port {port} of 127.0.0.1 can't be used: {}",
                self.error
            ),
        }
    }
}

impl std::error::Error for PortTaken {}

impl PortTaken {
    /// What to do about it.
    pub fn advice(&self) -> String {
        match self.port {
            0 => "free some ports: `ss -tulpn` lists who uses them".into(),
            port if port < 1024 => {
                format!("use a port from 1024 up instead of {port}, or `host = 0` to have a free one chosen")
            }
            port => format!(
                "stop whoever uses port {port}, or set `host = 0` in that forward, and castra chooses a free port"
            ),
        }
    }
}

impl PortAllocator {
    /// No port is allocated yet.
    pub fn new() -> PortAllocator {
        PortAllocator::default()
    }

    /// Chooses a host port for each wanted forward, and one to the guest's SSH port if none is
    /// wanted. Automatic ports are those of `last_time` if they are still free, so that a VM keeps
    /// its ports when it starts again.
    pub fn reserve(
        &self,
        wanted: &[PortForward],
        last_time: &[ForwardRecord],
    ) -> Result<Reservation, PortTaken> {
        let all = with_ssh(wanted);
        let mut given = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reservation = Reservation {
            forwards: Vec::new(),
            fixed: all
                .iter()
                .map(|forward| forward.host)
                .filter(|port| *port != 0)
                .collect(),
            held: Vec::new(),
        };
        for forward in &all {
            let (port, held) = if forward.host == 0 {
                let last = last_time
                    .iter()
                    .find(|last| last.guest == forward.guest && last.protocol == forward.protocol)
                    .map(|last| last.host)
                    .filter(|port| !reservation.fixed.contains(port));
                choose_free(forward.protocol, last, &given)?
            } else {
                take_fixed(forward.protocol, forward.host, &given)?
            };
            given.push((forward.protocol, port));
            reservation.held.push(held);
            reservation.forwards.push(ForwardRecord {
                host: port,
                guest: forward.guest,
                protocol: forward.protocol,
            });
        }
        Ok(reservation)
    }

    /// Makes the fixed ports of a failed launch available to its next try. Automatic ports stay
    /// allocated, because another program took one of them.
    pub(super) fn release_fixed(&self, reservation: &Reservation) {
        let mut given = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        given.retain(|(protocol, port)| {
            let of_it = |forward: &ForwardRecord| forward.protocol == *protocol && forward.host == *port;
            reservation.is_automatic(*port) || !reservation.forwards.iter().any(of_it)
        });
    }

    /// Makes the ports of a VM that was stopped available again, because the VM will be started
    /// again.
    pub fn forget(&self, forwards: &[ForwardRecord]) {
        let mut given = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        given.retain(|(protocol, port)| {
            !forwards
                .iter()
                .any(|forward| forward.protocol == *protocol && forward.host == *port)
        });
    }

    /// Allocates the ports of a VM that runs already.
    pub fn note_running(&self, forwards: &[ForwardRecord]) {
        let mut given = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        given.extend(forwards.iter().map(|forward| (forward.protocol, forward.host)));
    }
}

impl Reservation {
    /// The forwards, every host port chosen.
    pub fn forwards(&self) -> &[ForwardRecord] {
        &self.forwards
    }

    /// Whether castra chose this port, so that another one will do.
    pub fn is_automatic(&self, port: u16) -> bool {
        !self.fixed.contains(&port)
    }

    /// Closes the sockets, so that QEMU can bind the ports. From now on another program may be
    /// faster.
    pub fn release(&mut self) {
        self.held.clear();
    }
}

fn bind(protocol: Protocol, port: u16) -> io::Result<(u16, HeldSocket)> {
    let address = (Ipv4Addr::LOCALHOST, port);
    Ok(match protocol {
        Protocol::Tcp => {
            let socket = TcpListener::bind(address)?;
            (socket.local_addr()?.port(), HeldSocket::Tcp { _socket: socket })
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(address)?;
            (socket.local_addr()?.port(), HeldSocket::Udp { _socket: socket })
        }
    })
}

fn choose_free(
    protocol: Protocol,
    last: Option<u16>,
    given: &[(Protocol, u16)],
) -> Result<(u16, HeldSocket), PortTaken> {
    let free = |port: u16| !given.contains(&(protocol, port));
    if let Some(bound) = last
        .filter(|port| free(*port))
        .and_then(|port| bind(protocol, port).ok())
    {
        return Ok(bound);
    }
    let mut in_the_way = Vec::new();
    let mut error = "all offered ones are given away".to_owned();
    for _ in 0..TRIES {
        match bind(protocol, 0) {
            Ok((port, held)) if free(port) => return Ok((port, held)),
            // Kept, so that the kernel offers another one.
            Ok((_, held)) => in_the_way.push(held),
            Err(refused) => error = refused.to_string(),
        }
    }
    Err(PortTaken {
        port: 0,
        protocol,
        owner: None,
        error,
    })
}

fn take_fixed(
    protocol: Protocol,
    port: u16,
    given: &[(Protocol, u16)],
) -> Result<(u16, HeldSocket), PortTaken> {
    let taken = |owner: Option<String>, error: String| PortTaken {
        port,
        protocol,
        owner,
        error,
    };
    if given.contains(&(protocol, port)) {
        return Err(taken(
            Some("another VM of this project".into()),
            "given twice".into(),
        ));
    }
    bind(protocol, port).map_err(|error| {
        let owner = (error.kind() == io::ErrorKind::AddrInUse)
            .then(|| owner_of(protocol, port, castra_home().as_deref()))
            .flatten()
            .map(|owner| owner.to_string());
        taken(owner, error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::root::records::ssh_port;

    fn wanted(host: u16, guest: u16) -> PortForward {
        PortForward {
            host,
            guest,
            protocol: Protocol::Tcp,
        }
    }

    #[test]
    fn there_is_always_one_to_ssh_and_only_one() {
        let ports = PortAllocator::new();
        let none = ports.reserve(&[], &[]).unwrap();
        assert_eq!(none.forwards().len(), 1);
        assert_eq!(none.forwards()[0].guest, 22);
        assert_ne!(none.forwards()[0].host, 0);
        let one = ports.reserve(&[wanted(0, 22), wanted(0, 80)], &[]).unwrap();
        assert_eq!(one.forwards().len(), 2);
        let udp = PortForward {
            protocol: Protocol::Udp,
            ..wanted(0, 22)
        };
        let both = ports.reserve(&[udp], &[]).unwrap();
        let tcp = both.forwards().iter().find(|one| one.protocol == Protocol::Tcp);
        assert_eq!(both.forwards().len(), 2);
        assert_eq!(
            ssh_port(both.forwards()),
            Some(tcp.unwrap().host),
            "not the UDP one"
        );
    }

    #[test]
    fn no_port_is_given_twice_in_a_run() {
        let ports = PortAllocator::new();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            // The port is released at once: only the run's list of allocated ports keeps VMs apart.
            let mut reservation = ports.reserve(&[wanted(0, 80)], &[]).unwrap();
            reservation.release();
            for forward in reservation.forwards() {
                assert!(seen.insert(forward.host), "{} came twice", forward.host);
            }
        }
    }

    #[test]
    fn a_port_in_use_names_its_user() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let taken = PortAllocator::new()
            .reserve(&[wanted(port, 80)], &[])
            .unwrap_err();
        assert_eq!(taken.port, port);
        let text = taken.to_string();
        assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
        assert!(taken.advice().contains("host = 0"));
    }

    #[test]
    fn a_fixed_port_is_held_until_let_go() {
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let ports = PortAllocator::new();
        let mut reservation = ports.reserve(&[wanted(free, 80)], &[]).unwrap();
        assert!(!reservation.is_automatic(free));
        assert!(reservation.is_automatic(reservation.forwards()[1].host));
        assert!(
            TcpListener::bind(("127.0.0.1", free)).is_err(),
            "somebody could take it"
        );
        reservation.release();
        TcpListener::bind(("127.0.0.1", free)).unwrap();
        let twice = ports.reserve(&[wanted(free, 80)], &[]).unwrap_err().to_string();
        assert!(twice.contains("another VM of this project"), "{twice}");
    }

    #[test]
    fn last_times_ports_come_back_where_they_are_free() {
        let first = PortAllocator::new().reserve(&[wanted(0, 80)], &[]).unwrap();
        let last = first.forwards().to_vec();
        drop(first);
        let again = PortAllocator::new().reserve(&[wanted(0, 80)], &last).unwrap();
        assert_eq!(again.forwards(), last);
        // `again` holds these ports, so others are chosen.
        let other = PortAllocator::new().reserve(&[wanted(0, 80)], &last).unwrap();
        assert!(
            other
                .forwards()
                .iter()
                .all(|forward| last.iter().all(|old| old.host != forward.host))
        );
    }

    #[test]
    fn ports_of_running_vms_are_not_offered() {
        let ports = PortAllocator::new();
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        ports.note_running(&[ForwardRecord {
            host: free,
            guest: 22,
            protocol: Protocol::Tcp,
        }]);
        assert!(ports.reserve(&[wanted(free, 80)], &[]).is_err());
    }
}
