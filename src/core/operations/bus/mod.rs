//! `bus publish`, `request`, `subscribe`, `tail`, `bench`: the host as a client of a project's bus.
//!
//! Here: what they share: which project's bus, opening a session with its broker, the receiver of messages,
//! and what a failed session means for people. Not here: the protocol (`core::bus`), or text for a terminal
//! (`app`).

mod bench;
mod payload;
mod publish;
mod publisher;
mod request;
mod stdin_lines;
mod subscribe;
mod tail;
mod workload;

use std::time::{Duration, Instant};

use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::bus::{BusError, Client, Message};
use crate::core::cancel::Cancel;
use crate::core::config::{BusConfig, Config};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::lines::journal::Rotation;
use crate::core::operations::run;
use crate::core::root::alive::any_vm_runs;
use crate::core::root::paths::StateRoot;

pub use bench::{
    BusBenchOptions, BusBenchOutcome, LatencyMicros, Load, Measured, bus_bench, bus_bench_with_launcher,
};
pub use publish::{
    BusPublishOptions, BusPublishOutcome, NotPublished, Payload, bus_publish, bus_publish_with_launcher,
};
pub use request::{BusRequestOptions, BusRequestOutcome, bus_request, bus_request_with_launcher};
pub use stdin_lines::Input;
pub use subscribe::{
    BusSubscribeOptions, BusSubscribeOutcome, SubscriptionEnd, bus_subscribe, bus_subscribe_with_launcher,
};
pub use tail::{BusTailOptions, BusTailOutcome, LogOf, bus_tail};

/// How long the broker may take to answer: to connect, to ack.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks for a broker, for a request to stop, for a reader that has gone.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Whose bus.
#[derive(Clone, Debug)]
pub struct BusProject {
    /// Where the broker's socket and the logs are.
    pub state: StateRoot,
    /// Its config, where there still is one: without it no broker can be started.
    pub config: Option<Box<Config>>,
}

impl From<Config> for BusProject {
    fn from(config: Config) -> BusProject {
        BusProject {
            state: config.state.clone(),
            config: Some(Box::new(config)),
        }
    }
}

impl BusProject {
    fn bus(&self) -> BusConfig {
        self.config
            .as_ref()
            .map(|config| config.bus.clone())
            .unwrap_or_default()
    }

    fn rotation(&self) -> Rotation {
        self.bus().rotation
    }
}

/// Gets the messages, and says when it has enough. Implemented by embedders and by `app`; any
/// `FnMut(&Message)` is one.
pub trait BusSink {
    /// The broker has taken every subscription; `last` is the number of the last message so far.
    fn subscribed(&mut self, _last: Option<u64>) {}

    /// One message, in order.
    fn message(&mut self, message: &Message);

    /// These are no longer in the log.
    fn gap(&mut self, _from: u64, _to: u64) {}

    /// There is no more for now: buffered output is due.
    fn caught_up(&mut self) {}

    /// Whether anybody still wants more; asked after each message and several times a second.
    fn is_open(&mut self) -> bool {
        true
    }
}

impl<F: FnMut(&Message)> BusSink for F {
    fn message(&mut self, message: &Message) {
        self(message);
    }
}

/// How to get a session.
struct BrokerAccess<'a> {
    /// How a missing broker is started when a VM of the project runs.
    broker: &'a dyn BrokerLauncher,
    /// How long a broker that can't be started yet is waited for.
    wait: Option<Duration>,
    cancel: &'a Cancel,
}

impl BrokerAccess<'_> {
    /// Fails if there can't be a session. Touches nothing.
    fn check(&self, project: &BusProject) -> Result<()> {
        let somebody = host::lock_holder(&project.state.broker_pid()) != Holder::Nobody;
        if self.wait.is_some() || somebody || (project.config.is_some() && any_vm_runs(&project.state)) {
            return Ok(());
        }
        Err(no_broker(project))
    }

    /// A session with the project's broker.
    fn session(&self, project: &BusProject, tell: &mut dyn FnMut(Event)) -> Result<Client> {
        let socket = project.state.broker_sock();
        let until = Instant::now() + self.wait.unwrap_or_default();
        // A broker that is being started isn't missing.
        let soon = Instant::now() + ANSWER_LIMIT.max(self.wait.unwrap_or_default());
        loop {
            let error = match Client::connect(&socket, ANSWER_LIMIT) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            let mut give_up_at = until;
            match &error {
                BusError::NoBroker(_) => match self.start(project, tell)? {
                    Started::Yes => continue,
                    Started::BySomebody => give_up_at = soon,
                    Started::No => {}
                },
                // The broker is stopping or starting.
                BusError::Ended | BusError::Declined(_) | BusError::Broken(_) => {}
                _ => return Err(failed("no session with the broker", project, &error)),
            }
            if Instant::now() >= give_up_at {
                return Err(match error {
                    BusError::NoBroker(_) => no_broker(project),
                    _ => failed("no session with the broker", project, &error),
                });
            }
            if self.cancel.pause(POLL_INTERVAL.min(Duration::from_millis(20))) {
                return Err(interrupted());
            }
        }
    }

    fn start(&self, project: &BusProject, tell: &mut dyn FnMut(Event)) -> Result<Started> {
        if host::lock_holder(&project.state.broker_pid()) != Holder::Nobody {
            return Ok(Started::BySomebody);
        }
        let Some(config) = project.config.as_deref().filter(|_| any_vm_runs(&project.state)) else {
            return Ok(Started::No);
        };
        // Under the project's lock, as everybody who starts one: a `down` under way must not find
        // a new broker behind it. Whoever holds it starts the broker itself, or takes the last VM
        // away.
        let Ok(_lock) = run::lock_project(&config.project, &config.state, "castra bus") else {
            return Ok(Started::BySomebody);
        };
        if !any_vm_runs(&project.state) {
            return Ok(Started::No);
        }
        let broker = launcher::ensure_broker(config, self.broker, ANSWER_LIMIT, self.cancel)?;
        if broker.started {
            let text = format!(
                "started the broker on 127.0.0.1:{} (pid {})",
                broker.port, broker.pid
            );
            tell(Event::message(Severity::Info, None, text));
        }
        Ok(Started::Yes)
    }
}

enum Started {
    Yes,
    BySomebody,
    No,
}

fn no_broker(project: &BusProject) -> Failure {
    let failure = Failure::new(Exit::Failed, "no broker runs in this project");
    if host::lock_holder(&project.state.broker_pid()) != Holder::Nobody {
        return Failure::new(Exit::Failed, "the broker doesn't listen")
            .because("it is being started or stopped")
            .advice("try again, or wait for it by --wait 30s");
    }
    match &project.config {
        None if any_vm_runs(&project.state) => {
            return failure
                .because("VMs run, but castra.toml, which says how to start a broker, is gone")
                .advice("give the new place of castra.toml by --config");
        }
        // Another command works on the project, which starts a broker or takes the last VM down.
        Some(config) if any_vm_runs(&project.state) => {
            if let Err(busy) = run::check_project_free(config) {
                return busy;
            }
        }
        _ => {}
    }
    failure
        .because("no VM runs either, so castra starts none")
        .advice(
            "`castra up` starts both, `castra up --broker-only` the broker alone; --wait 30s waits for one",
        )
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, "interrupted")
}

/// A failed session in words, with what can be done.
fn failed(what: &str, project: &BusProject, error: &BusError) -> Failure {
    let failure = Failure::new(Exit::Failed, what).because(error);
    let log = format!(
        "`castra logs --source broker` says more ({})",
        project.state.broker_log().display()
    );
    match error {
        BusError::NoBroker(_) => no_broker(project),
        BusError::Socket(..) => failure.advice("only the project's owner can use the socket: run castra as that user"),
        BusError::NoBus | BusError::Stranger(_) => {
            failure.advice("end the broker's process (`castra status` names it), and `castra up` starts a broker of this version; the VMs keep running")
        }
        BusError::Declined(reason) if reason == "session-limit" => {
            failure.advice("end another `castra bus subscribe`, or raise `max_connections` under [broker]")
        }
        BusError::Closed(reason) if reason == "idle" => failure.advice(
            "the broker heard nothing from this command for `session_idle_secs`: the command was suspended, or nobody reads its output",
        ),
        BusError::Closed(reason) if reason == "protocol-error" => failure.advice(
            "the broker may have been started with another `max_frame_bytes` under [bus]: end its process (`castra status` \
             names it), and `castra up` starts a broker with the config as it is now; the VMs keep running",
        ),
        BusError::Ended => failure.advice(format!(
            "the broker was killed, or it cut this session off for reading too slowly (slow-consumer): {log}"
        )),
        BusError::Refused(reason) => failure.advice(refusal(reason).map_or(log, str::to_owned)),
        _ => failure.advice(log),
    }
}

/// What a refused request means, where the word alone doesn't tell.
fn refusal(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "malformed" => "a payload may be nested 120 deep, and half a surrogate pair isn't allowed",
        "rate-limit" => "`publishes_per_sec_per_vm` under [bus] allows fewer messages",
        "storage-error" => "the log of the bus can't be written: is the disk full?",
        "subscription-limit" => "`subscriptions_per_session` under [bus] allows no more",
        "forbidden" => "topics that begin with castra/ are the broker's own",
        _ => return None,
    })
}
