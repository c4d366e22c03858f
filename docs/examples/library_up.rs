//! castra as a library: plans a project's `up`, or brings it up and takes it down again.
//!
//! ```text
//! cargo run --example library_up -- --plan    --cli target/debug/castra [--config castra.toml]
//! cargo run --example library_up -- --execute --cli target/debug/castra [--config castra.toml]
//! ```
//!
//! `--plan` starts nothing and changes nothing. `--execute` starts the VMs, prints how to reach them
//! and takes them down. `--thread` runs the broker in a thread of this program instead of a process
//! of the castra binary, `--attached` keeps every QEMU a child of this program.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use castra::core::config;
use castra::core::escape::escape_line;
use castra::core::events::contract::Stamped;
use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::{
    self, BrokerLauncher, DownOptions, OperationOutput, ProcessBrokerLauncher, ThreadBrokerLauncher,
    UpOptions, VmLaunchMode, collect_with,
};
use castra::core::reporter::Reporter;
use castra::core::root::paths::castra_home;

/// Prints every event as it happens: its number and the contract's line.
struct Printer;

impl Reporter for Printer {
    fn report(&mut self, event: &Stamped) {
        println!("event {}: {}", event.seq, event.contract_line());
    }
}

/// What was asked for on the command line.
#[derive(Default)]
struct Asked {
    execute: bool,
    plan: bool,
    thread: bool,
    attached: bool,
    cli: Option<PathBuf>,
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    match parse().and_then(|asked| run(&asked)) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) => {
            eprintln!("library_up: {failure}");
            ExitCode::from(failure.exit.code())
        }
    }
}

fn parse() -> Result<Asked> {
    let usage = |why: String| {
        Failure::new(Exit::Usage, why)
            .advice("--plan or --execute, --cli PATH, [--config PATH] [--thread] [--attached]")
    };
    let mut asked = Asked::default();
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        let mut path = || {
            let value = args.next().map(PathBuf::from);
            value.ok_or_else(|| usage(format!("{} needs a path", arg.to_string_lossy())))
        };
        match arg.to_str() {
            Some("--plan") => asked.plan = true,
            Some("--execute") => asked.execute = true,
            Some("--thread") => asked.thread = true,
            Some("--attached") => asked.attached = true,
            Some("--cli") => asked.cli = Some(path()?),
            Some("--config") => asked.config = Some(path()?),
            _ => return Err(usage(format!("unknown argument {}", arg.to_string_lossy()))),
        }
    }
    if asked.plan == asked.execute {
        return Err(usage("either --plan or --execute".to_owned()));
    }
    Ok(asked)
}

fn run(asked: &Asked) -> Result<Exit> {
    let path = asked.config.as_deref().unwrap_or(Path::new("castra.toml"));
    let config = config::load(path).map_err(|failure| match failure.exit {
        Exit::NoInput => failure.advice(
            "run it where a castra.toml is, or name one by --config; `castra init` writes one to start from",
        ),
        _ => failure,
    })?;
    let home = castra_home().ok_or_else(|| Failure::new(Exit::NoInput, "set CASTRA_HOME or HOME"))?;

    // The embedder decides where the broker runs. castra never runs `current_exe` as if it were
    // castra: here that is this example.
    let threads = ThreadBrokerLauncher::new();
    let launcher: Box<dyn BrokerLauncher + '_> = match &asked.cli {
        Some(cli) if !asked.thread => Box::new(ProcessBrokerLauncher { cli: cli.clone() }),
        _ => Box::new(&threads),
    };
    let options = UpOptions {
        plan: asked.plan,
        cli: asked.cli.clone(),
        launch_mode: match asked.attached {
            true => VmLaunchMode::Attached,
            false => VmLaunchMode::Daemonize,
        },
        ..UpOptions::new(config.clone(), home)
    };

    let up = collect_with(&mut Printer, |reporter| {
        operations::up_with_launcher(options, &*launcher, reporter)
    });
    show_diagnostics(&up);
    let outcome = up.value?;
    for plan in &outcome.plans {
        println!("plan {}: {:?}, {}", plan.vm, plan.action, plan.reason);
    }
    for vm in &outcome.vms {
        let ports: Vec<String> = vm
            .forwards
            .iter()
            .map(|forward| format!("127.0.0.1:{} → guest port {}", forward.host, forward.guest))
            .collect();
        println!("vm {}: {}", vm.vm, ports.join(", "));
    }
    if asked.plan {
        return Ok(outcome.exit);
    }

    let down = collect_with(&mut Printer, |reporter| {
        operations::down(DownOptions::of(&config), reporter)
    });
    show_diagnostics(&down);
    // A broker in a thread of ours is ended by us alone; `down` leaves it.
    threads.stop();
    let down = down.value?;
    println!(
        "down: {} VMs, {} bytes freed",
        down.vms.len(),
        down.reclaimed_bytes
    );
    Ok(match outcome.exit {
        Exit::Done => down.exit,
        exit => exit,
    })
}

/// What somebody should look at, apart from the stream. Texts may hold words of a guest.
fn show_diagnostics<T>(output: &OperationOutput<T>) {
    for diagnostic in &output.diagnostics {
        println!("diagnostic: {}", escape_line(&diagnostic.to_string(), 2000));
    }
}
