use std::sync::Mutex;
use std::thread::JoinHandle;

use super::*;

/// Ample: nothing waits this long unless it is about to fail.
const AMPLE: Duration = Duration::from_secs(30);

/// An output that is looked at later.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

struct Scene {
    guest: UnixStream,
    input: Option<UnixStream>,
    output: Kept,
    cancel: Cancel,
    relay: JoinHandle<Result<BridgeEnd>>,
}

fn start(escape: Option<u8>, quiet: Duration) -> Scene {
    start_writing(escape, quiet, |kept| Box::new(kept))
}

fn start_writing(
    escape: Option<u8>,
    quiet: Duration,
    output: impl FnOnce(Kept) -> Box<dyn Write + Send>,
) -> Scene {
    let (guest, console) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(AMPLE)).unwrap();
    let (input, theirs) = UnixStream::pair().unwrap();
    let kept = Kept::default();
    let cancel = Cancel::new();
    let relay = Bridge {
        input: theirs.into(),
        output: output(kept.clone()),
        escape,
        quiet,
        raw: false,
        cancel: cancel.clone(),
    };
    Scene {
        guest,
        input: Some(input),
        output: kept,
        cancel,
        relay: thread::spawn(move || relay.run(&console)),
    }
}

impl Scene {
    fn types(&self, bytes: &[u8]) {
        self.input.as_ref().unwrap().write_all(bytes).unwrap();
    }

    fn hears(&mut self, count: usize) -> Vec<u8> {
        let mut heard = vec![0; count];
        self.guest.read_exact(&mut heard).unwrap();
        heard
    }

    fn ends(self) -> (BridgeEnd, String) {
        let end = self.relay.join().unwrap().unwrap();
        (end, self.output.text())
    }
}

#[test]
fn the_escape_ends_it_and_isnt_handed_on() {
    let mut scene = start(Some(0x1d), AMPLE);
    scene.types(b"ls\r");
    assert_eq!(scene.hears(3), b"ls\r");
    scene.guest.write_all(b"file\r\n\x1b]0;x\x07\x1b[?25l").unwrap();
    scene.types(b"\x1d");
    let mut rest = Vec::new();
    scene.guest.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    let (end, output) = scene.ends();
    assert_eq!(end, BridgeEnd::Left);
    // What the guest wrote last may not have been read before the end; if it was, it is undone.
    assert!(
        ["", "file\r\n\x1b[?25l\x1b[?25h"].contains(&output.as_str()),
        "{output:?}"
    );
}

#[test]
fn the_guests_end_comes_after_its_last_words() {
    let mut scene = start(Some(0x1d), AMPLE);
    scene.guest.write_all(b"bye\r\n\x1b[31m").unwrap();
    scene.guest.shutdown(Shutdown::Both).unwrap();
    let (end, output) = scene.ends();
    assert_eq!(end, BridgeEnd::Closed);
    assert!(
        output.starts_with("bye\r\n\x1b[31m") && output.contains("\x1b[0m"),
        "{output:?}"
    );
}

#[test]
fn after_the_end_of_a_pipe_the_guest_is_heard_out() {
    let mut scene = start(None, Duration::from_secs(1));
    scene.types(b"uname\n\x1d");
    assert_eq!(
        scene.hears(7),
        b"uname\n\x1d",
        "from a pipe every byte is handed on"
    );
    scene.input = None;
    scene.guest.write_all(b"Linux\r\n").unwrap();
    let (end, output) = scene.ends();
    assert_eq!((end, output.as_str()), (BridgeEnd::InputEnded, "Linux\r\n"));
}

#[test]
fn a_guest_that_takes_nothing_keeps_nobody_from_leaving() {
    let scene = start(Some(0x1d), AMPLE);
    // More than socket and relay hold together.
    let typist = scene.input.as_ref().unwrap().try_clone().unwrap();
    let typing = thread::spawn(move || {
        let mut typist = typist;
        typist.write_all(&[b'x'; 1 << 20]).unwrap();
        typist.write_all(b"\x1d").unwrap();
    });
    typing.join().unwrap();
    assert_eq!(scene.ends().0, BridgeEnd::Left);
}

#[test]
fn a_pipe_waits_for_a_slow_guest() {
    let mut scene = start(None, Duration::from_millis(100));
    let typist = scene.input.take().unwrap();
    let typing = thread::spawn(move || {
        let mut typist = typist;
        for number in 0..200_000_u32 {
            typist.write_all(&number.to_be_bytes()).unwrap();
        }
    });
    for number in 0..200_000_u32 {
        assert_eq!(scene.hears(4), number.to_be_bytes());
    }
    typing.join().unwrap();
    assert_eq!(scene.ends().0, BridgeEnd::InputEnded);
}

/// Takes nothing until it is let go.
struct Stuck(Kept, Arc<Mutex<()>>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _gate = self.1.lock();
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_terminal_that_takes_nothing_doesnt_stall_the_guest() {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap();
    let mut scene = start_writing(Some(0x1d), AMPLE, |kept| Box::new(Stuck(kept, Arc::clone(&gate))));
    scene.guest.set_write_timeout(Some(AMPLE)).unwrap();
    for number in 0..400_000 {
        scene
            .guest
            .write_all(format!("line {number}\r\n").as_bytes())
            .unwrap();
    }
    scene.guest.write_all(b"last\r\n").unwrap();
    scene.guest.shutdown(Shutdown::Both).unwrap();
    drop(closed);
    let (end, output) = scene.ends();
    assert_eq!(end, BridgeEnd::Closed);
    assert!(output.contains("bytes left out") && output.ends_with("line 399999\r\nlast\r\n"));
    assert!(output.len() < BACKLOG + 8 * READ_BYTES, "{}", output.len());
}

/// A pipe whose reader has gone.
struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn it_ends_with_its_reader_and_when_asked() {
    let mut scene = start_writing(Some(0x1d), AMPLE, |_| Box::new(Broken));
    scene.guest.write_all(b"x").unwrap();
    assert_eq!(scene.ends().0, BridgeEnd::ReaderGone);
    let scene = start(Some(0x1d), AMPLE);
    scene.cancel.request();
    assert_eq!(scene.ends().0, BridgeEnd::Cancelled);
}
