//! Why a session with a broker couldn't be opened, or ended.
//!
//! Here: the errors that code distinguishes, each with its message. Not here: what can be done
//! about them (`core::operations::bus`).

use std::fmt;
use std::path::PathBuf;

/// Why a session couldn't be opened, or ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusError {
    /// No process listens at the socket.
    NoBroker(PathBuf),
    /// The socket can't be used.
    Socket(PathBuf, String),
    /// The process that listens there isn't a broker, or speaks another protocol.
    Stranger(String),
    /// The broker accepted the hello but has no bus.
    NoBus,
    /// The broker declined the hello, for this reason.
    Declined(String),
    /// Something didn't come in time; the text says what.
    TimedOut(&'static str),
    /// The broker closed the session in an orderly way, for this reason.
    Closed(String),
    /// The session ended without a reason.
    Ended,
    /// The broker sent an invalid frame.
    Garbled(String),
    /// The broker refused a request, for this reason.
    Refused(String),
    /// The connection failed.
    Broken(String),
    /// Not a valid topic: see [`Topic`](super::topic::Topic).
    BadTopic(String),
    /// The payload is not valid JSON; the text says what is wrong.
    BadPayload(String),
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BusError::NoBroker(path) => write!(f, "no broker listens at {}", path.display()),
            BusError::Socket(path, why) => write!(f, "{} can't be used: {why}", path.display()),
            BusError::Stranger(why) => write!(
                f,
                "the process that listens there isn't a broker of this castra: {why}"
            ),
            BusError::NoBus => write!(f, "the broker is an earlier castra's and has no bus"),
            BusError::Declined(reason) => write!(f, "the broker declined the hello: {reason}"),
            BusError::TimedOut(what) => write!(f, "the broker gave no {what} in time"),
            BusError::Closed(reason) => write!(f, "the broker closed the session: {reason}"),
            BusError::Ended => write!(f, "the broker ended the session and gave no reason"),
            BusError::Garbled(why) => write!(f, "castra can't understand the broker: {why}"),
            BusError::Refused(reason) => write!(f, "the broker refused: {reason}"),
            BusError::Broken(why) => write!(f, "the connection to the broker failed: {why}"),
            BusError::BadTopic(topic) => write!(f, "{topic:?} isn't a valid topic"),
            BusError::BadPayload(why) => write!(f, "the payload isn't valid JSON: {why}"),
        }
    }
}

impl std::error::Error for BusError {}
