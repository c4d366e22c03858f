//! A batch: everything that happened on the bus since the last commit, in order.
//!
//! Here: messages as lines of the log and as deliveries, and the answers that are due once the
//! lines are written. Not here: who may publish what (`super::publishing`), who gets which message
//! (`super::commit`).
//!
//! All messages of a batch are written to the log at once. Their answers and deliveries follow in
//! the order in which the frames came, so a session never sees an effect before its cause.

use std::ops::Range;

use crate::core::broker::frame::{self, Terms, push_number};
use crate::core::bus::topic::Pattern;
use crate::core::name::VmName;

use super::ConnId;

/// A message: where it lies in the batch's buffers.
#[derive(Clone, Debug)]
pub struct Message {
    /// The session that published it; `None`: the broker itself.
    pub conn: Option<ConnId>,
    /// Index into the batch's senders.
    pub sender: usize,
    /// Its number.
    pub seq: u64,
    /// Its topic, in `log`.
    pub topic: Range<usize>,
    /// Its payload, in `log`.
    pub payload: Range<usize>,
    /// Its line with the line end, in `log`.
    pub line: Range<usize>,
    /// Its delivery, in `frames`; empty if nobody was subscribed to anything.
    pub frame: Range<usize>,
    /// Which of the batch's texts holds its id.
    pub text: usize,
    /// Its id, in that text.
    pub id: Range<usize>,
    /// It is addressed to a VM that the project doesn't have.
    pub to_unknown_vm: bool,
}

/// One entry of a batch.
#[derive(Clone, Debug)]
pub enum Op {
    /// A message.
    Message(Message),
    /// An answer, sent when its turn comes.
    Answer {
        /// To whom.
        conn: ConnId,
        /// A frame.
        frame: Vec<u8>,
    },
    /// A subscription begins.
    Subscribe {
        /// Whose.
        conn: ConnId,
        /// To what.
        pattern: Pattern,
        /// What else was asked.
        terms: Terms,
        /// JSON of the id.
        id: String,
    },
    /// A subscription ends.
    Unsubscribe {
        /// Whose.
        conn: ConnId,
        /// To what.
        pattern: Pattern,
        /// JSON of the id.
        id: String,
    },
    /// A session ends here.
    End {
        /// Which.
        conn: ConnId,
        /// Why.
        cause: super::session::CloseReason,
    },
}

/// The parts of a publish that the log holds.
#[derive(Clone, Copy, Debug)]
pub struct PublishFields<'a> {
    /// `,"ts":1763719200000,"vm":"web-0","topic":"`: of a whole burst, so rendered once for it.
    pub head: &'a [u8],
    /// A valid topic.
    pub topic: &'a [u8],
    /// JSON on one line.
    pub payload: &'a [u8],
    /// The topic on which an answer is awaited; empty: none is.
    pub reply: &'a [u8],
}

/// The beginning of every line, up to its number.
const SEQ: &[u8] = b"{\"seq\":";

/// About how many bytes a line has beside topic and payload, and a delivery beside its line. With
/// longer names the buffer grows by a copy.
const LINE_OVERHEAD: usize = 96;
const FRAME_OVERHEAD: usize = 24;

/// See the module.
#[derive(Debug, Default)]
pub struct Batch {
    /// The lines.
    pub log: Vec<u8>,
    /// The same as deliveries.
    pub frames: Vec<u8>,
    /// Texts of bursts, for the ids.
    pub texts: Vec<Vec<u8>>,
    /// Who sent the messages.
    pub senders: Vec<VmName>,
    /// What happened.
    pub ops: Vec<Op>,
    /// A subscription begins in it.
    pub subscribes: bool,
}

/// `,"vm":"web-0","topic":"`: the part of a line that is the same for all messages of a sender.
pub fn sender_fields(sender: &str) -> Vec<u8> {
    // A name holds nothing that JSON would have to escape.
    format!(",\"vm\":\"{sender}\",\"topic\":\"").into_bytes()
}

/// That part with the wall clock before it.
pub fn with_time(head: &[u8], wall_ms: u64) -> Vec<u8> {
    let mut fields = Vec::with_capacity(32 + head.len());
    fields.extend_from_slice(b",\"ts\":");
    push_number(&mut fields, wall_ms);
    fields.extend_from_slice(head);
    fields
}

impl Batch {
    /// Nothing has happened.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// About what it holds in memory, bytes.
    pub fn bytes(&self) -> usize {
        self.log.len() + self.frames.len() + self.ops.len() * size_of::<Op>()
    }

    /// Reserves memory for a whole burst: a buffer that grows bit by bit copies every message
    /// several times.
    pub fn reserve(&mut self, frames: usize, text: usize, deliver: bool) {
        self.ops.reserve(frames);
        self.log.reserve(text + frames * LINE_OVERHEAD);
        if deliver {
            self.frames
                .reserve(text + frames * (LINE_OVERHEAD + FRAME_OVERHEAD));
        }
    }

    /// Index of a sender, which is mostly the last one.
    pub fn sender(&mut self, vm: &VmName) -> usize {
        if self.senders.last() != Some(vm) {
            self.senders.push(vm.clone());
        }
        self.senders.len() - 1
    }

    /// Lays a message out; `deliver`: somebody may be subscribed to it.
    pub fn lay_out(
        &mut self,
        seq: u64,
        fields: PublishFields<'_>,
        deliver: bool,
    ) -> (Range<usize>, Range<usize>, Range<usize>, Range<usize>) {
        let log = &mut self.log;
        let start = log.len();
        log.extend_from_slice(SEQ);
        push_number(log, seq);
        log.extend_from_slice(fields.head);
        let topic = log.len();
        log.extend_from_slice(fields.topic);
        let topic = topic..log.len();
        if !fields.reply.is_empty() {
            log.extend_from_slice(b"\",\"reply\":\"");
            log.extend_from_slice(fields.reply);
        }
        log.extend_from_slice(b"\",\"payload\":");
        let payload = log.len();
        log.extend_from_slice(fields.payload);
        let payload = payload..log.len();
        log.extend_from_slice(b"}\n");
        let line = start..log.len();
        let at = self.frames.len();
        if deliver {
            frame::delivery(&self.log[start..line.end - 1], &mut self.frames);
        }
        (line, topic, payload, at..self.frames.len())
    }
}
