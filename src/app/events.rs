//! `castra events`.

use castra::core::cancel::Cancel;
use castra::core::events::kept::JournalLine;
use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::events::{EventsItem, EventsOptions, EventsOutcome, events};

use super::context::Context;
use super::progress::render;
use super::sentence::sentence;
use super::{find_project, human};
use crate::cli::Raw;

/// Names are padded to this width.
const NAME_COLUMN: usize = 8;

/// Prints the events in the journals, and with `-f` new ones as they come.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    if raw.after.is_some() && raw.run.is_none() {
        return Err(Failure::new(Exit::Usage, "--after needs --run")
            .because("the events of each run are counted from 0")
            .advice("castra events --run ID --after SEQ"));
    }
    let selected = find_project::project(raw)?;
    let options = EventsOptions {
        state: selected.state(),
        types: raw.types.clone(),
        vms: find_project::vms(&selected, raw.vms.clone())?,
        run: raw.run.clone(),
        after: raw.after,
        since: raw.since,
        tail: raw.tail,
        follow: raw.follow,
        // Without `-f` reading ends by itself, and Ctrl-C ends castra at once.
        cancel: match raw.follow {
            true => context.end_on_signals(),
            false => Cancel::new(),
        },
    };
    let outcome = events(&options, |told| {
        match told {
            EventsItem::Event(kept) if context.json => context.out.json_line(&kept.line),
            EventsItem::Event(kept) => {
                let line = in_words(&kept, context);
                context.out.line(line);
            }
            EventsItem::CaughtUp => {
                context.out.flush();
                if options.follow {
                    context.out.look_for_reader();
                }
            }
        }
        context.out.is_open()
    })?;
    context.out.flush();
    say_what_was_missing(context, &outcome);
    if outcome.told == 0 && !context.json && !options.follow {
        context.say("no event matches");
        // `--type bootstrap` isn't a type, but some types begin with it.
        if let Some(start) = options.types.iter().find(|one| !one.contains(['.', '*', '?'])) {
            context.say(&format!(
                "  try: --type '{start}.*' for all types that begin with it"
            ));
        }
    }
    Ok(match options.cancel.is_requested() {
        true => Exit::Interrupted,
        false => Exit::Done,
    })
}

/// On stderr, with `--json` too: nothing but events is on stdout.
fn say_what_was_missing(context: &Context, outcome: &EventsOutcome) {
    if outcome.corrupt > 0 {
        context.warn(&format!(
            "{} skipped",
            human::plural(outcome.corrupt, "invalid line")
        ));
    }
    if outcome.missed {
        context.warn("files were rotated while castra read them: events may be missing");
    }
}

fn in_words(kept: &JournalLine, context: &Context) -> String {
    let words = match kept.event() {
        Some(stamped) => render(&sentence(&stamped.event), context.style, NAME_COLUMN),
        // An event of a later castra: only its type is known.
        None => castra::core::escape::escape_line(&kept.kind, 200),
    };
    let ts = castra::core::escape::escape_line(&kept.ts, 40);
    format!("{}  {words}", context.style.dim(&ts))
}
