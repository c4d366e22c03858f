//! `castra bus publish`, `request`, `subscribe`, `tail`.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use castra::core::bus::Message;
use castra::core::bus::topic::{BadPattern, Pattern};
use castra::core::escape::escape_line;
use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::bus::{
    BusProject, BusPublishOptions, BusRequestOptions, BusSink, BusSubscribeOptions, BusTailOptions,
    BusTailOutcome, Input, LogOf, Payload, SubscriptionEnd, bus_publish, bus_request, bus_subscribe,
    bus_tail,
};
use castra::core::reporter::wall_clock;
use castra::core::time;

use super::context::Context;
use super::find_project::{self, Selected};
use super::screen::Screen;
use super::style::Style;
use super::{failure, human, up};
use crate::app::output::Output;
use crate::cli::Raw;

/// How many messages `tail` shows without --tail.
const DEFAULT_TAIL: u64 = 50;
/// Longer payloads are cut on a terminal, bytes.
const LIMIT: usize = 4096;
/// Initial width of the columns for sender and topic; longer names widen them.
const VM_COLUMN: usize = 6;
const TOPIC_COLUMN: usize = 9;
/// Longer names don't widen their column.
const WIDEST: usize = 24;

/// The project whose bus is meant, with its config if that can still be read.
pub fn project(raw: &Raw) -> Result<BusProject> {
    Ok(match find_project::project(raw)? {
        Selected::Config(config) => BusProject::from(*config),
        record @ Selected::Record(_) => BusProject {
            state: record.state(),
            config: None,
        },
    })
}

/// Publishes one message, or one for each line of stdin.
pub fn publish(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let (topic, payload) = message(raw)?;
    let options = BusPublishOptions {
        payload: match payload.as_deref() {
            Some("-") => lines(context)?,
            payload => Payload::One(payload.unwrap_or("null").to_owned()),
        },
        project: project(raw)?,
        topic,
        force: raw.force,
        wait: raw.wait,
        cli: Some(up::own_binary()?),
        cancel: context.end_on_signals(),
    };
    let outcome = context.reporting(|reporter| bus_publish(options, reporter))?;
    if let Some(failed) = &outcome.failure {
        context.out.flush();
        context.screen.say(&failure::render(failed, context.err_style));
    }
    Ok(outcome.exit)
}

/// Topic and payload, each as a word or by its flag; a `-` alone is the payload.
fn message(raw: &Raw) -> Result<(Option<String>, Option<String>)> {
    let word = |at: usize| raw.operands.get(at).map(text_of).transpose();
    let (first, second) = (word(0)?, word(1)?);
    let (topic, payload) = match (first, second) {
        (Some(dash), None) if dash == "-" => (None, Some(dash)),
        words => words,
    };
    let twice = |what: &str, flag: &str| {
        Failure::new(Exit::Usage, format!("both {what} and {flag} are given"))
            .because("both say the same thing")
            .advice("leave one out: castra bus publish TOPIC PAYLOAD")
    };
    if let (Some(word), None, None) = (&topic, &payload, &raw.payload) {
        return Err(Failure::new(
            Exit::Usage,
            format!("{word:?} alone could be a topic or a payload"),
        )
        .because("`castra bus publish` takes both")
        .advice(format!(
            "castra bus publish {word} null, or castra bus publish broadcast '\"{word}\"'"
        )));
    }
    let topic = match (topic, &raw.topics[..]) {
        (topic, []) => topic,
        (None, [flag]) => Some(flag.clone()),
        (Some(word), [_, ..]) => return Err(twice(&format!("a topic, {word:?},"), "--topic")),
        (None, [_, another, ..]) => {
            return Err(Failure::new(Exit::Usage, "a message has one topic")
                .because(format!("{another:?} is another")));
        }
    };
    let payload = match (payload, &raw.payload) {
        // `--payload -` and `-` as an operand both mean stdin.
        (Some(word), Some(flag)) if word != *flag => return Err(twice(&format!("`{word}`"), "--payload")),
        (word, flag) => word.or_else(|| flag.clone()),
    };
    Ok((topic, payload))
}

fn text_of(word: &OsString) -> Result<String> {
    word.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            format!("{:?} can't be published", word.to_string_lossy()),
        )
        .because("topics and JSON are UTF-8 text")
    })
}

/// One message for each line of stdin.
fn lines(context: &Context) -> Result<Payload> {
    if io::stdin().is_terminal() {
        context.say("each line is one message, as JSON; Ctrl-D ends");
    }
    let stdin = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| Failure::new(Exit::Io, "can't read stdin").because(error))?;
    Ok(Payload::Lines(Input::from(stdin)))
}

/// Asks, and prints the first answer.
pub fn request(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let words = raw.operands.iter().map(text_of).collect::<Result<Vec<_>>>()?;
    let project = project(raw)?;
    let topic = words.first().cloned().unwrap_or_default();
    let usual = BusRequestOptions::new(project, topic);
    let options = BusRequestOptions {
        payload: words.get(1).cloned().unwrap_or_else(|| usual.payload.clone()),
        timeout: raw.time_limit.unwrap_or(usual.timeout),
        force: raw.force,
        wait: raw.wait,
        cli: Some(up::own_binary()?),
        cancel: context.end_on_signals(),
        ..usual
    };
    let outcome = bus_request(options, &mut context.people_reporter())?;
    context.out.json_line(match context.json {
        true => outcome.answer.to_json(),
        false => outcome.answer.payload.get().to_owned(),
    });
    Ok(Exit::Done)
}

/// Prints messages as they come.
pub fn subscribe(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let words: Vec<String> = raw
        .operands
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let options = BusSubscribeOptions {
        topics: patterns(&words)?,
        project: project(raw)?,
        from: raw.from,
        last: raw.last_values,
        group: match &raw.shared_by {
            None => None,
            Some(name) => Some(name.parse().map_err(|_| {
                Failure::new(Exit::Usage, format!("{name:?} isn't a valid group name"))
                    .because("it has 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit")
            })?),
        },
        count: raw.count,
        wait: raw.wait,
        cli: Some(up::own_binary()?),
        cancel: context.end_on_signals(),
    };
    let mut reporter = context.people_reporter();
    let mut printer = Printer::new(context);
    printer.subscription = Some(words.join(" "));
    let outcome = bus_subscribe(options, &mut printer, &mut reporter);
    let (subscribed, err_style) = (printer.is_subscribed, printer.err_style);
    let outcome = match outcome {
        Ok(outcome) => outcome,
        // With --json too, stdout has nothing but messages: a session that ends is not a refusal.
        Err(failed) if subscribed => {
            context.screen.say(&failure::render(&failed, err_style));
            return Ok(failed.exit);
        }
        Err(failed) => return Err(failed),
    };
    Ok(match outcome.end {
        SubscriptionEnd::Count | SubscriptionEnd::SinkClosed => Exit::Done,
        SubscriptionEnd::Cancelled => Exit::Interrupted,
    })
}

/// Prints what the logs hold.
pub fn tail(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = find_project::project(raw)?;
    let log = match (&raw.vms[..], raw.shared) {
        ([], _) => LogOf::Bus,
        ([_], true) => {
            return Err(Failure::new(Exit::Usage, "both --vm and --shared are given")
                .because("one is a sender's log, the other that of the whole bus")
                .advice("leave one out"));
        }
        ([name], false) => LogOf::Sender(sender(&selected, name)?),
        _ => {
            return Err(Failure::new(Exit::Usage, "more than one --vm is given")
                .because("each sender has a log of its own")
                .advice("without --vm all senders are shown, in order"));
        }
    };
    let options = BusTailOptions {
        state: selected.state(),
        log,
        topics: patterns(&raw.topics)?,
        last: Some(raw.tail.map_or(DEFAULT_TAIL, |lines| lines as u64)),
        follow: follows(raw)?,
        cancel: context.end_on_signals(),
    };
    let outcome = bus_tail(&options, &mut Printer::new(context))?;
    say_what_was_missing(context, &outcome);
    if outcome.messages == 0 && !context.json && !options.follow {
        context.say("no message matches");
    }
    Ok(match options.cancel.is_requested() {
        true => Exit::Interrupted,
        false => Exit::Done,
    })
}

/// `tail` follows by default.
fn follows(raw: &Raw) -> Result<bool> {
    match (raw.follow, raw.no_follow) {
        (true, true) => Err(
            Failure::new(Exit::Usage, "both --follow and --no-follow are given")
                .because("one waits for more, the other ends")
                .advice("leave one out; without either it follows"),
        ),
        (_, no_follow) => Ok(!no_follow),
    }
}

/// `host` and `broker` are senders too.
fn sender(selected: &Selected, name: &str) -> Result<String> {
    match ["host", "broker"]
        .into_iter()
        .find(|word| word.eq_ignore_ascii_case(name))
    {
        Some(word) => Ok(word.to_owned()),
        None => find_project::vm(selected, name).map(String::from),
    }
}

/// On stderr, with `--json` too: nothing but messages is on stdout.
fn say_what_was_missing(context: &Context, outcome: &BusTailOutcome) {
    if outcome.corrupt > 0 {
        let lines = human::plural(outcome.corrupt, "invalid line");
        context.warn(&format!("{lines} skipped"));
    }
    if outcome.lost > 0 {
        context.warn("the log was rotated faster than it was read: messages may be missing");
    }
}

fn patterns(words: &[String]) -> Result<Vec<Pattern>> {
    words
        .iter()
        .map(|word| {
            word.parse().map_err(|BadPattern(word)| {
                Failure::new(Exit::Usage, format!("{word:?} isn't a valid topic"))
                    .because(
                        "a topic has 1 to 128 of A-Z a-z 0-9 . _ : / -, and may end in `*` for any rest; alone \
                         between slashes a `*` is any one segment",
                    )
                    .advice("castra bus subscribe broadcast, 'ci/*' or '*'")
            })
        })
        .collect()
}

/// Messages on stdout, one a line.
struct Printer<'c> {
    out: &'c mut Output,
    screen: Screen,
    style: Style,
    err_style: Style,
    json: bool,
    quiet: bool,
    /// The subscribed topics, for people.
    subscription: Option<String>,
    is_subscribed: bool,
    vm_column: usize,
    topic_column: usize,
}

impl Printer<'_> {
    fn new(context: &mut Context) -> Printer<'_> {
        Printer {
            screen: context.screen,
            style: context.style,
            err_style: context.err_style,
            json: context.json,
            quiet: context.quiet,
            out: &mut context.out,
            subscription: None,
            is_subscribed: false,
            vm_column: VM_COLUMN,
            topic_column: TOPIC_COLUMN,
        }
    }

    fn in_words(&mut self, message: &Message) -> String {
        let vm = escape_line(&message.vm, LIMIT);
        let topic = escape_line(&message.topic, LIMIT);
        self.vm_column = self.vm_column.max(vm.len()).min(WIDEST);
        self.topic_column = self.topic_column.max(topic.len()).min(WIDEST);
        let reply = match &message.reply {
            Some(reply) => format!("  answer to {}", escape_line(reply, LIMIT)),
            None => String::new(),
        };
        format!(
            "{}  {}  {}  {}{}",
            self.style.dim(&time_of_day(message.ts)),
            self.style.bold(&format!("{vm:<0$}", self.vm_column)),
            self.style.success(&format!("{topic:<0$}", self.topic_column)),
            escape_line(message.payload.get(), LIMIT),
            self.style.dim(&reply)
        )
    }
}

impl BusSink for Printer<'_> {
    fn subscribed(&mut self, last: Option<u64>) {
        self.is_subscribed = true;
        if let Some(topics) = self.subscription.as_ref().filter(|_| !self.quiet) {
            let so_far = match last {
                None | Some(0) => "no message so far".to_owned(),
                Some(last) => format!("the last number so far is {last}"),
            };
            self.screen
                .say(&format!("subscribed to {topics}; {so_far}; Ctrl-C ends"));
        }
    }

    fn message(&mut self, message: &Message) {
        if !self.json {
            let line = self.in_words(message);
            self.out.line(line);
        } else {
            self.out.json_line(message.to_json());
        }
    }

    fn gap(&mut self, from: u64, to: u64) {
        if self.json {
            self.out
                .json_line(format!("{{\"gap\":{{\"from\":{from},\"to\":{to}}}}}"));
        }
        self.out.flush();
        let warning = self.err_style.warning("warning:");
        self.screen.say(&format!(
            "{warning} rotation has removed messages {from} to {to} from the log"
        ));
    }

    fn caught_up(&mut self) {
        self.out.flush();
        self.out.look_for_reader();
    }

    fn is_open(&mut self) -> bool {
        self.out.is_open()
    }
}

/// `HH:MM:SS.mmm`, UTC.
fn time_of_day(ts: u64) -> String {
    let clock = wall_clock(time::of_unix_ms(ts));
    clock.get(11..23).unwrap_or(&clock).to_owned()
}

#[cfg(test)]
mod tests {
    use super::time_of_day;

    #[test]
    fn times_of_day() {
        assert_eq!(time_of_day(0), "00:00:00.000");
        assert_eq!(time_of_day(1_763_719_200_123), "10:00:00.123");
        assert_eq!(time_of_day(u64::MAX), "23:59:59.999");
    }
}
