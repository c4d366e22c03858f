//! Reading one table of a config file: each value by name and type, errors with their place.
//!
//! The tables come from `toml` with the span of every key and value; reading them here, instead of
//! through derived types, lets one run find all mistakes of a file and say what to write instead.
//! A key that nobody asked for is unknown, so the list of known keys can't be out of date.
//!
//! Here: types and ranges of single values. Not here: which keys there are (`settings`, `vms`,
//! `metadata`) and how values depend on each other (`vms`).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::source::{Offset, Source};
use crate::core::nearest::nearest;

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located<T> {
    pub(super) value: T,
    pub(super) at: Offset,
}

impl<T> Located<T> {
    pub(super) fn map<U>(self, f: impl FnOnce(T) -> U) -> Located<U> {
        Located {
            value: f(self.value),
            at: self.at,
        }
    }
}

/// An allowed value and what it stands for.
pub(super) type Choices<T> = [(&'static str, T)];

/// One table; a missing table reads as an empty one.
pub(super) struct Section<'a> {
    pub(super) source: &'a Source,
    /// The table's name, such as `vms.bootstrap`; the root's is empty.
    path: String,
    /// It is an element of an array of tables, written `[[vms]]`.
    repeated: bool,
    /// Where the table begins.
    pub(super) at: Offset,
    table: Option<&'a DeTable<'a>>,
    asked: Vec<&'static str>,
}

impl fmt::Debug for Section<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Section")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl<'a> Section<'a> {
    /// The whole file.
    pub(super) fn root(source: &'a Source, table: &'a DeTable<'a>) -> Section<'a> {
        Section {
            source,
            path: String::new(),
            repeated: false,
            at: 0,
            table: Some(table),
            asked: Vec::new(),
        }
    }

    /// The place of a key's value, if the key is there. The key isn't marked as known by this.
    pub(super) fn place(&self, key: &str) -> Option<Offset> {
        Some(self.table?.get(key)?.span().start)
    }

    /// The places of a list's entries. The key isn't marked as known by this.
    pub(super) fn entry_places(&self, key: &str) -> Vec<Offset> {
        let list = self.table.and_then(|table| table.get(key)?.get_ref().as_array());
        let entries = list.map(|list| list.iter().map(|entry| entry.span().start).collect());
        entries.unwrap_or_default()
    }

    /// A number where a text with a unit is expected. The key isn't marked as known by this.
    pub(super) fn bare_number(&self, key: &str) -> Option<(Offset, String)> {
        let value = self.table?.get(key)?;
        let number = match value.get_ref() {
            DeValue::Integer(number) => number.to_string(),
            DeValue::Float(number) => number.to_string(),
            _ => return None,
        };
        Some((value.span().start, number))
    }

    /// A text.
    pub(super) fn text(&mut self, key: &'static str, example: &str) -> Option<Located<String>> {
        let value = self.take(key)?;
        self.as_text(value, key, example)
    }

    /// A text that isn't empty and holds no control characters: names, paths, commands.
    pub(super) fn line(&mut self, key: &'static str, example: &str) -> Option<Located<String>> {
        let text = self.text(key, example)?;
        if text.value.trim().is_empty() {
            self.wrong(text.at, format!("`{key}` is empty"), key, &quoted(example));
            return None;
        }
        if text.value.chars().any(char::is_control) {
            self.wrong(
                text.at,
                format!("`{key}` holds a control character or a line break"),
                key,
                &quoted(example),
            );
            return None;
        }
        Some(text)
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &'static str) -> Option<Located<bool>> {
        let value = self.take(key)?;
        match value.get_ref() {
            DeValue::Boolean(flag) => Some(Located {
                value: *flag,
                at: value.span().start,
            }),
            other => {
                let meant = match other.as_str().map(str::to_ascii_lowercase).as_deref() {
                    Some("false" | "no" | "off" | "0") => "false",
                    _ => "true",
                };
                self.wrong_type(value, key, "true or false", meant);
                None
            }
        }
    }

    /// A whole number within a range.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
        example: u64,
    ) -> Option<Located<u64>> {
        let value = self.take(key)?;
        let at = value.span().start;
        let example = example.to_string();
        let Some(integer) = value.get_ref().as_integer() else {
            // A number in quotes is read as the number.
            let meant = value
                .get_ref()
                .as_str()
                .and_then(|text| text.trim().parse::<u64>().ok())
                .filter(|number| range.contains(number))
                .map(|number| number.to_string());
            self.wrong_type(value, key, "a whole number", &meant.unwrap_or(example));
            return None;
        };
        match u64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) if range.contains(&number) => Some(Located { value: number, at }),
            _ => {
                let limits = match (*range.start(), *range.end()) {
                    (least, most) if most >= i64::MAX as u64 => format!("at least {least}"),
                    (least, most) => format!("from {least} to {most}"),
                };
                let text = format!("`{key} = {integer}`: it must be {limits}");
                self.wrong(at, text, key, &example);
                None
            }
        }
    }

    /// One of a list of allowed texts, in any case.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, words: &Choices<T>) -> Option<Located<T>> {
        self.choice_or(key, words, &[])
    }

    /// The same with further texts that are accepted but not named in messages.
    pub(super) fn choice_or<T: Copy>(
        &mut self,
        key: &'static str,
        words: &Choices<T>,
        aliases: &Choices<T>,
    ) -> Option<Located<T>> {
        let first = words.first().map_or("", |(word, _)| word);
        let text = self.text(key, first)?;
        let mut all = words.iter().chain(aliases);
        let known = all.find(|(word, _)| word.eq_ignore_ascii_case(text.value.trim()));
        if let Some((_, meaning)) = known {
            return Some(Located {
                value: *meaning,
                at: text.at,
            });
        }
        let list = words.iter().map(|(word, _)| quoted(word)).collect::<Vec<_>>();
        let meant = nearest(&text.value, words.iter().map(|(word, _)| *word)).unwrap_or(first);
        let what = format!(
            "`{key}` can't be {}: it is one of {}",
            shown(&text.value),
            list.join(", ")
        );
        self.wrong(text.at, what, key, &quoted(meant));
        None
    }

    /// A list of texts.
    pub(super) fn texts(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Option<Located<Vec<Located<String>>>> {
        let value = self.take(key)?;
        let example = format!("[{}]", quoted(example));
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(value, key, "a list of strings", &example);
            return None;
        };
        let mut texts = Vec::new();
        for entry in array.iter() {
            match entry.get_ref().as_str() {
                Some(text) => texts.push(Located {
                    value: text.to_owned(),
                    at: entry.span().start,
                }),
                None => self.wrong_type(entry, key, "a list of strings", &example),
            }
        }
        Some(Located {
            value: texts,
            at: value.span().start,
        })
    }

    /// A table of texts, such as `env`; each with the place of its key.
    pub(super) fn text_table(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> BTreeMap<String, Located<String>> {
        let mut texts = BTreeMap::new();
        let Some(value) = self.take(key) else {
            return texts;
        };
        let Some(table) = value.get_ref().as_table() else {
            self.wrong_type(value, key, "a table of strings", example);
            return texts;
        };
        for (name, entry) in table.iter() {
            match entry.get_ref() {
                DeValue::String(text) => {
                    texts.insert(
                        name.get_ref().to_string(),
                        Located {
                            value: text.to_string(),
                            at: name.span().start,
                        },
                    );
                }
                other => self.source.error(
                    entry.span().start,
                    format!(
                        "`{}` in `{key}` is {}, it must be a string",
                        name.get_ref(),
                        kind(other)
                    ),
                    match other {
                        DeValue::Integer(number) => format!("write it in quotes: \"{number}\""),
                        DeValue::Boolean(flag) => format!("write it in quotes: \"{flag}\""),
                        _ => "write it in quotes".to_owned(),
                    },
                ),
            }
        }
        texts
    }

    /// A table in this one.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        let value = self.take(key);
        let path = self.below(key);
        let table = value.and_then(|value| {
            let table = value.get_ref().as_table();
            if table.is_none() {
                self.source.error(
                    value.span().start,
                    format!("`{key}` is {}, it must be a table", kind(value.get_ref())),
                    format!("write `[{path}]` and its keys below it"),
                );
            }
            table
        });
        Section {
            source: self.source,
            path,
            repeated: false,
            at: value.map_or(self.at, |value| value.span().start),
            table,
            asked: Vec::new(),
        }
    }

    /// A list of tables in this one; `None` if the key isn't there.
    pub(super) fn sections(&mut self, key: &'static str) -> Option<Located<Vec<Section<'a>>>> {
        let value = self.take(key)?;
        let path = self.below(key);
        let array = match value.get_ref() {
            DeValue::Array(array) => array,
            other => {
                self.source.error(
                    value.span().start,
                    format!("`{key}` is {}, it must be a list of tables", kind(other)),
                    format!("write `[[{path}]]` with two brackets, once for each"),
                );
                return None;
            }
        };
        let mut sections = Vec::new();
        for entry in array.iter() {
            match entry.get_ref().as_table() {
                Some(table) => sections.push(Section {
                    source: self.source,
                    path: path.clone(),
                    repeated: true,
                    at: entry.span().start,
                    table: Some(table),
                    asked: Vec::new(),
                }),
                None => self.source.error(
                    entry.span().start,
                    format!("`{key}` holds {}, it must hold tables", kind(entry.get_ref())),
                    format!("write `[[{path}]]` and its keys below it, once for each"),
                ),
            }
        }
        Some(Located {
            value: sections,
            at: value.span().start,
        })
    }

    /// A required key is missing: the error is placed at an unknown key that resembles it, if there
    /// is one. Warnings aren't shown beside errors, so the error names that key.
    pub(super) fn missing(&self, key: &str, text: &str, fix: &str) {
        let table = self.table.iter().flat_map(|table| table.iter());
        let mut unknown = table.filter(|(name, _)| !self.asked.contains(&&**name.get_ref()));
        let meant = unknown.find(|(name, _)| meant_as(name.get_ref(), [key].into_iter()).is_some());
        match meant {
            Some((name, _)) => self.source.error(
                name.span().start,
                format!("{text}: {} is no key", key_shown(name.get_ref())),
                format!("did you mean `{key}`?"),
            ),
            None => self.source.error(self.at, text, fix),
        }
    }

    /// Marks a key as known and ignores its value: for old keys without a meaning.
    pub(super) fn ignore(&mut self, key: &'static str) -> Option<Offset> {
        let table = self.table?;
        let (name, _) = table.get_key_value(key)?;
        self.asked.push(key);
        Some(name.span().start)
    }

    /// Warns of every unknown key.
    pub(super) fn finish(self) {
        let Some(table) = self.table else { return };
        for (name, _) in table.iter() {
            let key: &str = name.get_ref();
            if self.asked.contains(&key) {
                continue;
            }
            let place = match (self.path.as_str(), self.repeated) {
                ("", _) => String::new(),
                (path, false) => format!(" in [{path}]"),
                (path, true) => format!(" in [[{path}]]"),
            };
            let fix = match meant_as(key, self.asked.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => match KEY_SECTIONS.iter().find(|(known, _)| *known == key) {
                    Some((_, place)) => format!("it belongs under {place}; here it is ignored"),
                    None => "it is ignored".to_owned(),
                },
            };
            self.source.warn(
                name.span().start,
                format!("unknown key {}{place}", key_shown(key)),
                fix,
            );
        }
    }

    /// An error about this key's value, with what to write instead.
    pub(super) fn wrong(&self, at: Offset, text: impl Into<String>, key: &str, instead: &str) {
        self.source.error(at, text, format!("write `{key} = {instead}`"));
    }

    fn take(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        if !self.asked.contains(&key) {
            self.asked.push(key);
            #[cfg(test)]
            self.source.note_key(&self.path, key);
        }
        self.table?.get(key)
    }

    fn as_text(&self, value: &Spanned<DeValue<'_>>, key: &str, example: &str) -> Option<Located<String>> {
        if let Some(text) = value.get_ref().as_str() {
            return Some(Located {
                value: text.to_owned(),
                at: value.span().start,
            });
        }
        self.wrong_type(value, key, "a string", &quoted(example));
        None
    }

    fn wrong_type(&self, value: &Spanned<DeValue<'_>>, key: &str, wanted: &str, instead: &str) {
        let text = format!("`{key}` is {}, it must be {wanted}", kind(value.get_ref()));
        self.wrong(value.span().start, text, key, instead);
    }

    fn below(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }
}

/// What other tools call these keys.
const FOREIGN_KEYS: [(&str, &str); 24] = [
    ("box", "base_image"),
    ("cmd", "cmdline"),
    ("cores", "cpus"),
    ("cpu", "cpus"),
    ("disk", "disk_size"),
    ("environment", "env"),
    ("forward", "port_forwards"),
    ("forwarded_ports", "port_forwards"),
    ("image", "base_image"),
    ("machine", "vms"),
    ("machines", "vms"),
    ("mem", "memory"),
    ("ports", "port_forwards"),
    ("provision", "bootstrap"),
    ("ram", "memory"),
    ("replicas", "count"),
    ("services", "vms"),
    ("share", "mounts"),
    ("shares", "mounts"),
    ("smp", "cpus"),
    ("storage", "disk_size"),
    ("synced_folders", "mounts"),
    ("vcpus", "cpus"),
    ("volumes", "mounts"),
];

/// The tables of keys that are often written into another table, `[bootstrap]` or `[qemu]` for
/// example.
const KEY_SECTIONS: [(&str, &str); 14] = [
    ("base_image", "[[vms]]"),
    ("cmdline", "[[vms]]"),
    ("count", "[[vms]]"),
    ("cpus", "[[vms]]"),
    ("disk_size", "[[vms]]"),
    ("memory", "[[vms]]"),
    ("network", "[[vms]]"),
    ("payload", "[vms.bootstrap]"),
    ("persist", "[[vms]]"),
    ("qemu_args", "[[vms]]"),
    ("script", "[vms.bootstrap]"),
    ("user_data", "[[vms]]"),
    ("verify_command", "[vms.bootstrap]"),
    ("verify_path", "[vms.bootstrap]"),
];

/// The known key that an unknown one stands for: the nearest in spelling, or the one of which
/// another tool uses that name.
fn meant_as<'k>(key: &str, known: impl Iterator<Item = &'k str> + Clone) -> Option<&'k str> {
    nearest(key, known.clone()).or_else(|| {
        let (_, meant) = FOREIGN_KEYS
            .iter()
            .find(|(habit, _)| habit.eq_ignore_ascii_case(key))?;
        known.into_iter().find(|known| known == meant)
    })
}

/// A value as it would be written in the file.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.escape_debug().to_string().replace("\\'", "'"))
}

/// A user's value in a message: quoted, escaped and of bounded length.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 60;
    if text.chars().count() <= MOST {
        return quoted(text);
    }
    let start: String = text.chars().take(MOST).collect();
    quoted(&format!("{start}…"))
}

fn key_shown(key: &str) -> String {
    let bare =
        !key.is_empty() && key.len() <= 60 && key.chars().all(|c| c.is_alphanumeric() || "_-".contains(c));
    if bare { format!("`{key}`") } else { shown(key) }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a decimal number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
