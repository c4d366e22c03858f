//! What could keep VMs from running well, found before anybody has to ask why.
//!
//! Here: the contract of `castra doctor --json`, and one module for each thing looked at. Not here:
//! what is looked at together (`core::operations::doctor`), or how it is shown (`app::doctor`).
//!
//! Nothing here writes a file, takes a lock or talks to a broker or a QEMU that runs. The programs it
//! starts are asked for their versions and no more, each with a deadline.

pub mod acceleration;
pub mod capacity;
pub mod config_findings;
pub mod images;
pub mod leftovers;
pub mod modes;
pub mod tools;

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::core::escape::escape_line;

/// Name and version of the contract.
pub const SCHEMA: &str = "castra.doctor.v1";

/// What the doctor answers: one object, `schema` first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoctorOutcome {
    /// [`SCHEMA`]; fields are only ever added under this name.
    pub schema: String,
    /// The castra that looked.
    pub version: String,
    /// The worst level of all findings.
    pub verdict: Level,
    /// By area, in a fixed order.
    pub findings: Vec<Finding>,
}

impl DoctorOutcome {
    /// Findings put in order, and their verdict. Their texts may quote guests and file names: from here
    /// on each is one harmless line.
    pub fn of(mut findings: Vec<Finding>) -> DoctorOutcome {
        for finding in &mut findings {
            finding.text = one_line(&finding.text);
            finding.remediation = finding.remediation.as_deref().map(one_line);
        }
        // Stable: within an area they stay in the order in which they were found.
        findings.sort_by_key(|finding| finding.area);
        DoctorOutcome {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            verdict: findings
                .iter()
                .map(|finding| finding.level)
                .max()
                .unwrap_or(Level::Ok),
            findings,
        }
    }

    /// How many findings have this level.
    pub fn count(&self, level: Level) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could, or something is left over.
    Warn,
    /// Something that was asked for can't work.
    Error,
}

impl Level {
    /// The word in JSON and text.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Error => "error",
        }
    }
}

/// What a finding is about, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// KVM, and what guests run under.
    Accelerator,
    /// QEMU and the other programs castra calls.
    Tools,
    /// Memory of the host.
    Memory,
    /// Space on file systems.
    Disk,
    /// Limits of the kernel for this user.
    Limits,
    /// The image cache and the images of the config.
    Images,
    /// castra.toml.
    Config,
    /// Host ports.
    Ports,
    /// What runs, and what is left of what ran.
    State,
    /// Who can reach or read what.
    Security,
}

impl Area {
    /// That of a finding, which the first word of its id says.
    fn of(id: &str) -> Area {
        match id.split('.').next().unwrap_or_default() {
            "accel" | "kvm" => Area::Accelerator,
            "qemu" | "tool" => Area::Tools,
            "memory" => Area::Memory,
            "disk" => Area::Disk,
            "limits" => Area::Limits,
            "image" => Area::Images,
            "config" => Area::Config,
            "ports" => Area::Ports,
            "security" => Area::Security,
            _ => Area::State,
        }
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Area::Accelerator => "accelerator",
            Area::Tools => "tools",
            Area::Memory => "memory",
            Area::Disk => "disk",
            Area::Limits => "limits",
            Area::Images => "images",
            Area::Config => "config",
            Area::Ports => "ports",
            Area::State => "state",
            Area::Security => "security",
        })
    }
}

/// One thing that was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at: stable, and there once for each thing it applies to.
    pub id: String,
    /// What it belongs to.
    pub area: Area,
    /// How bad it is.
    pub level: Level,
    /// What was seen, one line, escaped.
    pub text: String,
    /// What to do about it. There is one wherever the level isn't `ok`.
    pub remediation: Option<String>,
    /// The same as data: an object whose fields depend on the id.
    pub data: Value,
}

impl Finding {
    /// All is well.
    pub fn ok(id: &str, text: impl Into<String>) -> Finding {
        Finding {
            id: id.to_owned(),
            area: Area::of(id),
            level: Level::Ok,
            text: text.into(),
            remediation: None,
            data: json!({}),
        }
    }

    /// It works, but somebody should look.
    pub fn warn(id: &str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            level: Level::Warn,
            remediation: Some(remedy.into()),
            ..Finding::ok(id, text)
        }
    }

    /// It doesn't work.
    pub fn error(id: &str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            level: Level::Error,
            ..Finding::warn(id, text, remedy)
        }
    }

    /// A hint where all is well.
    pub fn hint(mut self, remedy: impl Into<String>) -> Finding {
        self.remediation = Some(remedy.into());
        self
    }

    /// The same as data; an object.
    pub fn data(mut self, data: Value) -> Finding {
        self.data = data;
        self
    }

    /// Puts one more field into the data.
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Finding {
        if let Value::Object(fields) = &mut self.data {
            fields.insert(name.to_owned(), value.into());
        }
        self
    }
}

/// Several lines as one, escaped.
fn one_line(text: &str) -> String {
    /// Long enough for the last words of a guest and a few paths.
    const LIMIT: usize = 2000;
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    escape_line(&lines.join("; "), LIMIT)
}

/// A path as it stands in a finding's data: programs and cached files may have names that are no
/// UTF-8, which JSON can't hold as they are.
fn text_of(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_the_documented_ones() {
        let mut rows = 0;
        for row in include_str!("../../../docs/DOCTOR.md").lines() {
            if let ["", id, area, ..] = row.split('|').map(str::trim).collect::<Vec<_>>()[..]
                && id.starts_with('`')
            {
                assert_eq!(Area::of(id.trim_matches('`')).to_string(), area, "{id}");
                rows += 1;
            }
        }
        assert!(rows > 40, "{rows}");
    }

    #[test]
    fn the_worst_level_is_the_verdict_and_areas_have_their_order() {
        let outcome = DoctorOutcome::of(vec![
            Finding::warn("security.b", "b", "do"),
            Finding::ok("tool.a", "a"),
            Finding::ok("tool.c", "c\x1b[2J\n  d"),
        ]);
        assert_eq!(outcome.findings[1].text, "c\\x1b[2J; d");
        let ids: Vec<&str> = outcome
            .findings
            .iter()
            .map(|finding| finding.id.as_str())
            .collect();
        assert_eq!(ids, ["tool.a", "tool.c", "security.b"]);
        assert_eq!(outcome.verdict, Level::Warn);
        assert_eq!((outcome.count(Level::Ok), outcome.count(Level::Error)), (2, 0));
        assert_eq!(DoctorOutcome::of(Vec::new()).verdict, Level::Ok);
        assert!(Level::Error > Level::Warn && Level::Warn > Level::Ok);
    }
}
