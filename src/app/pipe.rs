//! `castra pipe PORT`, hidden: stdin and stdout joined to a port of this host's loopback.
//!
//! QEMU runs it for each connection of an isolated guest to the broker's address (`guestfwd` with
//! `-cmd:`). The guest's half-close is passed on; when the broker closes, the process ends, so a
//! guest can't hold more of them than the broker holds connections.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::thread;

use castra::core::failure::{Exit, Failure, Result};

use crate::cli::Raw;

/// Copies both ways until the far end closes.
pub fn run(raw: &Raw) -> Result<Exit> {
    let word = raw.operands[0].to_string_lossy().into_owned();
    let port: u16 = word.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("{word:?} is no port")).because("ports are 1 to 65535")
    })?;
    let failed = |error| Failure::new(Exit::Io, format!("can't reach 127.0.0.1:{port}")).because(error);
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(failed)?;
    socket.set_nodelay(true).map_err(failed)?;
    let to_socket = socket.try_clone().map_err(failed)?;
    // Straight to the descriptors: std's stdin and stdout buffer by lines.
    let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(failed)?);
    thread::Builder::new()
        .name("pipe out".to_owned())
        .spawn(move || {
            let _ = io::copy(&mut stdin, &mut &to_socket);
            let _ = to_socket.shutdown(Shutdown::Write);
        })
        .map_err(failed)?;
    // The other thread may still wait for the guest; the end of the process ends it.
    let _ = io::copy(&mut &socket, &mut stdout);
    Ok(Exit::Done)
}
