//! Ctrl-C, SIGTERM and SIGHUP while an operation runs.
//!
//! Here: turning signals into requests to stop. Not here: what stops, and how (`core`).

use castra::core::cancel::Cancel;

use super::screen::Screen;

/// From now on the first signal asks to stop in order, the second to stop at once. Without
/// handlers (the system refused) signals end castra as they end any program.
pub fn cancel_on_signals(screen: &Screen) -> Cancel {
    let cancel = Cancel::new();
    let (raised, screen) = (cancel.clone(), screen.clone());
    let installed = ctrlc::set_handler(move || {
        raised.request();
        match raised.requests() {
            1 => screen.say("stopping in order; once more stops at once"),
            2 => screen.say("stopping at once"),
            _ => {}
        }
    });
    if let Err(error) = installed {
        log::warn!("no signal handlers: {error}");
    }
    cancel
}
