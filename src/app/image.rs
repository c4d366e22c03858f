//! `castra image build`, `list`, `path`.

use castra::core::cancel::Cancel;
use castra::core::failure::{Exit, Result};
use castra::core::images::default_guest::GuestKind;
use castra::core::operations::image::{ImageAction, ImageOptions, ImageOutcome, image};
use castra::core::reporter::Silent;

use super::context::Context;
use super::{find_project, human};
use crate::cli::Raw;

pub fn build(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = ImageOptions {
        home: find_project::home()?,
        action: ImageAction::Build {
            force: raw.force,
            arch: raw.arch.unwrap_or_default(),
            kind: GuestKind::with_mounts(raw.mounts),
        },
        cancel: context.cancel_on_signals(),
    };
    let outcome = context.reporting(|reporter| image(options, reporter))?;
    if let ImageOutcome::Build {
        guest,
        built,
        bytes,
        duration_ms,
    } = outcome
        && !context.json
        && !context.quiet
    {
        let size = human::bytes(bytes);
        context.out.line(if built {
            format!(
                "default guest built in {}: {} ({size})",
                human::duration(duration_ms),
                guest.dir.display()
            )
        } else {
            format!("default guest is already built: {} ({size})", guest.dir.display())
        });
    }
    Ok(Exit::Done)
}

pub fn list(context: &mut Context) -> Result<Exit> {
    let outcome = look(ImageAction::List)?;
    if context.json {
        context.out.json(&outcome);
        return Ok(Exit::Done);
    }
    if let ImageOutcome::List { dir, images } = outcome {
        for image in &images {
            let arch = image.arch.as_ref().map(|arch| format!(" ({arch})"));
            context.out.line(format!(
                "{:<10}  {:<24}  {}",
                human::bytes(image.bytes),
                format!("{}{}", image.kind.as_str(), arch.unwrap_or_default()),
                dir.join(&image.name).display()
            ));
        }
        context.out.flush();
        if images.is_empty() {
            context.say(&format!(
                "no image in {} yet; `castra image build` makes the default guest",
                dir.display()
            ));
        }
    }
    Ok(Exit::Done)
}

/// Prints the default guest's place; exit code 1 if it isn't there.
pub fn path(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let arch = raw.arch.unwrap_or_default();
    let outcome = look(ImageAction::Path {
        arch,
        kind: GuestKind::with_mounts(raw.mounts),
    })?;
    let ImageOutcome::Path { dir, present } = &outcome else {
        return Ok(Exit::Done);
    };
    if context.json {
        context.out.json(&outcome);
    } else {
        context.out.data(format!("{}\n", dir.display()));
        context.out.flush();
    }
    if *present {
        return Ok(Exit::Done);
    }
    context.say(&format!(
        "it isn't built yet; `castra image build{}{}` builds it",
        if raw.mounts { " --mounts" } else { "" },
        arch.suffix(" --arch ")
    ));
    Ok(Exit::Failed)
}

fn look(action: ImageAction) -> Result<ImageOutcome> {
    let options = ImageOptions {
        home: find_project::home()?,
        action,
        cancel: Cancel::new(),
    };
    image(options, &mut Silent)
}
