//! Why there is no session with a broker, or none any more.
//!
//! Here: the errors that code branches on, each with its words. Not here: what can be done about
//! them (`core::operations::bus`).

use std::fmt;
use std::path::PathBuf;

/// Why there is no session, or none any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusError {
    /// Nobody listens at the socket.
    NoBroker(PathBuf),
    /// The socket can't be used.
    Socket(PathBuf, String),
    /// Who listens there is no broker, or one that we don't understand.
    Stranger(String),
    /// The broker took the hello and has no bus to offer.
    NoBus,
    /// The broker declined the hello, for this reason.
    Declined(String),
    /// It didn't come in time; the text says what.
    TimedOut(&'static str),
    /// The broker closed the session in order, for this reason.
    Closed(String),
    /// The session ended without a word.
    Ended,
    /// The broker said what can't be understood.
    Garbled(String),
    /// The broker refused a request, for this reason.
    Refused(String),
    /// The connection failed.
    Broken(String),
    /// No topic: see [`Topic`](super::topic::Topic).
    BadTopic(String),
    /// The payload is no JSON; the text says what is wrong.
    BadPayload(String),
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BusError::NoBroker(path) => write!(f, "no broker listens at {}", path.display()),
            BusError::Socket(path, why) => write!(f, "{} can't be used: {why}", path.display()),
            BusError::Stranger(why) => write!(f, "who listens there is no broker of this castra: {why}"),
            BusError::NoBus => write!(f, "the broker has no bus: it is of an earlier castra"),
            BusError::Declined(reason) => write!(f, "the broker declined the hello: {reason}"),
            BusError::TimedOut(what) => write!(f, "the broker gave no {what} in time"),
            BusError::Closed(reason) => write!(f, "the broker closed the session: {reason}"),
            BusError::Ended => write!(f, "the broker ended the session without a word"),
            BusError::Garbled(why) => write!(f, "the broker can't be understood: {why}"),
            BusError::Refused(reason) => write!(f, "the broker refused: {reason}"),
            BusError::Broken(why) => write!(f, "the connection to the broker failed: {why}"),
            BusError::BadTopic(topic) => write!(f, "{topic:?} isn't a valid topic"),
            BusError::BadPayload(why) => write!(f, "the payload isn't valid JSON: {why}"),
        }
    }
}

impl std::error::Error for BusError {}
