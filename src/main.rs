#![forbid(unsafe_code)]
//! The `castra` command: parse, dispatch, exit code.

mod app;
mod cli;

use std::env;
use std::panic;
use std::process::ExitCode;

use castra::core::failure::Exit;

fn main() -> ExitCode {
    // Setting the logger up costs more than `--help` takes, so only on demand.
    if let Ok(filter) = env::var("CASTRA_LOG") {
        env_logger::Builder::new()
            .parse_filters(&filter)
            .target(env_logger::Target::Pipe(Box::new(app::LogLines)))
            .init();
    }
    panic::set_hook(Box::new(|fault| {
        app::say_if_free(&format!(
            "error: internal error: {fault}\n  try: the same with CASTRA_LOG=debug, and report what it says"
        ));
    }));
    let outcome = panic::catch_unwind(|| app::run(cli::parse(env::args_os().skip(1).collect())));
    ExitCode::from(outcome.unwrap_or(Exit::Internal.code()))
}
