//! `castra events`.

use castra::core::failure::{Exit, Result};
use castra::core::operations::events::{EventsOptions, Kept, events};

use super::context::Context;
use super::progress::render;
use super::select;
use super::sentence::sentence;
use crate::cli::Raw;

/// Names are padded to this width.
const NAME_COLUMN: usize = 8;

/// Prints what the journals hold.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = EventsOptions {
        state: select::project(raw)?.state(),
        types: raw.types.clone(),
        vms: raw.vms.clone(),
    };
    let mut printed = 0;
    events(&options, |kept| {
        printed += 1;
        if context.json {
            context.out.line(&kept.line);
        } else {
            let line = in_words(&kept, context);
            context.out.line(line);
        }
        context.out.is_open()
    })?;
    context.out.flush();
    if printed == 0 && !context.json {
        context.say("no such event has been kept here");
    }
    Ok(Exit::Done)
}

fn in_words(kept: &Kept, context: &Context) -> String {
    let words = match &kept.event {
        Some(stamped) => render(&sentence(&stamped.event), context.style, NAME_COLUMN),
        // Of a later castra: the name is all we can say.
        None => castra::core::escape::escape_line(&kept.kind, 200),
    };
    format!("{}  {words}", context.style.faint(&kept.ts))
}
