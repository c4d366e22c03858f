//! Failures as people and scripts see them.
//!
//! Here: the three lines of an error (what, why, what next) and the `command.rejected` object. Not here: where the
//! words come from (`core::failure` and whoever builds one).

use std::time::SystemTime;

use castra::core::escape::escape_line;
use castra::core::events::Event;
use castra::core::events::contract::Stamped;
use castra::core::failure::Failure;
use castra::core::reporter::{COMMAND_LINE, new_run_id, wall_clock};

use super::progress::Trace;
use super::style::Style;

/// Longest line of a failure, in bytes; last words of a guest can be long.
const LIMIT: usize = 2000;

/// `error: …`, `because: …`, `try: …`, without the last line end.
pub fn render(failure: &Failure, style: Style) -> String {
    let mut text = format!("{} {}", style.error("error:"), lines(&failure.what, "  "));
    if let Some(why) = &failure.why {
        text.push_str(&format!("\n  {} {}", style.bold("because:"), lines(why, "    ")));
    }
    if let Some(next) = &failure.next {
        text.push_str(&format!("\n  {} {}", style.bold("try:"), lines(next, "    ")));
    }
    text
}

/// Keeps line breaks, and indents all lines but the first.
fn lines(text: &str, indent: &str) -> String {
    text.trim_end()
        .lines()
        .map(|line| escape_line(line, LIMIT))
        .collect::<Vec<_>>()
        .join(&format!("\n{indent}"))
}

/// The contract line of a refusal, numbered after the operation's events if there were any.
pub fn rejected(command: &str, failure: &Failure, trace: &Trace) -> Stamped {
    let (run, seq, offset_ms) = match &trace.last {
        Some((run, seq, offset_ms)) => (run.clone(), seq + 1, *offset_ms),
        None => (new_run_id(), 0, 0),
    };
    Stamped {
        ts: wall_clock(SystemTime::now()),
        offset_ms,
        seq,
        run,
        event: Event::rejected(command, failure, COMMAND_LINE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use castra::core::failure::Exit;

    #[test]
    fn what_why_and_next_on_lines_of_their_own() {
        let failure = Failure::new(Exit::Failed, "vm `web` did not shake hands within 60 s")
            .because("it booted, but said \x1b[2J\nand then nothing")
            .advice("castra logs web");
        assert_eq!(
            render(&failure, Style::PLAIN),
            "error: vm `web` did not shake hands within 60 s\n  \
             because: it booted, but said \\x1b[2J\n    and then nothing\n  \
             try: castra logs web"
        );
    }

    #[test]
    fn a_refusal_continues_the_run_before_it() {
        let failure = Failure::new(Exit::Busy, "busy");
        let trace = Trace {
            last: Some(("r".into(), 4, 90)),
            rejected: false,
        };
        let stamped = rejected("up", &failure, &trace);
        assert_eq!((stamped.run.as_str(), stamped.seq), ("r", 5));
        assert!(Exit::Busy.is_refusal() && !Exit::Failed.is_refusal() && !Exit::Interrupted.is_refusal());
    }
}
