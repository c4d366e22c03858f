//! Topics: who is subscribed to what, and who may read what (docs/PROTOCOL.md).
//!
//! Here: the index of subscriptions, and access. Not here: the grammar of topics
//! (`core::bus::topic`), subscriptions that several sessions share (`super::groups`), when a
//! subscription begins or ends (`super::commit`).

use std::collections::BTreeMap;

use crate::core::bus::topic::Pattern;
use crate::core::name::VmName;

use super::groups::Groups;
use super::{ConnId, Peer};

/// The prefix under which only the broker publishes.
pub const BROKER_PREFIX: &str = "castra/";

/// The prefix of messages to one VM.
pub const VM_PREFIX: &str = "vm:";

/// Who reads: a VM, or the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Its door.
    pub peer: Peer,
    /// Its name in lower case.
    pub key: String,
    /// Its second name in lower case, if it has one: messages to that name are for it, too.
    pub second: Option<String>,
}

impl Reader {
    /// Whether it may get a message of this topic. The host reads all; messages to or about one VM
    /// go to no other VM.
    pub fn may_read(&self, topic: &str) -> bool {
        let name = if let Some(rest) = topic.strip_prefix(VM_PREFIX) {
            name_in(rest)
        } else if topic.starts_with(BROKER_PREFIX) {
            topic.rsplit('/').next().unwrap_or_default()
        } else {
            return true;
        };
        let is_second = |second: &String| name.eq_ignore_ascii_case(second);
        self.peer == Peer::Host || name.eq_ignore_ascii_case(&self.key) || self.second.iter().any(is_second)
    }

    /// Whether it may subscribe to this. Anybody may subscribe to a pattern with `*`: it matches
    /// only what the session may read.
    pub fn may_subscribe(&self, pattern: &Pattern) -> bool {
        pattern.is_prefix() || pattern.has_inner_wildcard() || self.may_read(pattern.as_str())
    }

    /// Whether messages of this topic reach nobody but this reader and the host.
    pub fn owns(&self, topic: &str) -> bool {
        topic
            .strip_prefix(VM_PREFIX)
            .is_some_and(|rest| name_in(rest).eq_ignore_ascii_case(&self.key))
    }
}

/// The VM's name in what follows `vm:`; a slash ends it.
pub fn name_in(rest: &str) -> &str {
    rest.split_once('/').map_or(rest, |(name, _)| name)
}

/// Whether a topic that begins with `vm:` names a VM.
pub fn names_vm(topic: &str) -> bool {
    topic
        .strip_prefix(VM_PREFIX)
        .is_none_or(|rest| name_in(rest).parse::<VmName>().is_ok())
}

type Subscribers = BTreeMap<ConnId, u64>;

/// Subscriptions by topic, each with the first number wanted. To find the subscribers of a topic
/// takes one lookup for the topic, one for each length of prefix, and one comparison for each
/// pattern with a `*` in the middle, of which a session may have few.
#[derive(Debug, Default)]
pub struct Index {
    exact: BTreeMap<String, Subscribers>,
    prefixes: BTreeMap<String, Subscribers>,
    lengths: BTreeMap<usize, usize>,
    wildcards: BTreeMap<Pattern, Subscribers>,
    /// Sessions that share a subscription.
    pub groups: Groups,
}

impl Index {
    /// Whether nobody is subscribed to anything.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty()
            && self.prefixes.is_empty()
            && self.wildcards.is_empty()
            && self.groups.is_empty()
    }

    /// Adds a subscription, or changes its first number.
    pub fn insert(&mut self, conn: ConnId, pattern: &Pattern, first: u64) {
        if pattern.has_inner_wildcard() {
            let subscribers = self.wildcards.entry(pattern.clone()).or_default();
            subscribers.insert(conn, first);
            return;
        }
        if !pattern.is_prefix() {
            self.exact
                .entry(pattern.as_str().to_owned())
                .or_default()
                .insert(conn, first);
            return;
        }
        let prefix = pattern.stem();
        let subscribers = self.prefixes.entry(prefix.to_owned()).or_insert_with(|| {
            *self.lengths.entry(prefix.len()).or_default() += 1;
            Subscribers::new()
        });
        subscribers.insert(conn, first);
    }

    /// Takes a subscription away.
    pub fn remove(&mut self, conn: ConnId, pattern: &Pattern) {
        self.groups.leave(conn, pattern);
        if let Some(subscribers) = self.wildcards.get_mut(pattern) {
            subscribers.remove(&conn);
            if subscribers.is_empty() {
                self.wildcards.remove(pattern);
            }
            return;
        }
        let stem = pattern.stem();
        let map = if pattern.is_prefix() {
            &mut self.prefixes
        } else {
            &mut self.exact
        };
        let Some(subscribers) = map.get_mut(stem) else {
            return;
        };
        subscribers.remove(&conn);
        if !subscribers.is_empty() {
            return;
        }
        map.remove(stem);
        if pattern.is_prefix()
            && let Some(count) = self.lengths.get_mut(&stem.len())
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&stem.len());
            }
        }
    }

    /// The subscribers of this topic, each once, with the first number that it wants.
    pub fn matching(&self, topic: &str) -> Subscribers {
        let mut found = self.exact.get(topic).cloned().unwrap_or_default();
        for length in self.lengths.keys() {
            let Some(subscribers) = topic.get(..*length).and_then(|stem| self.prefixes.get(stem)) else {
                continue;
            };
            add(&mut found, subscribers);
        }
        for (pattern, subscribers) in &self.wildcards {
            if pattern.matches(topic) {
                add(&mut found, subscribers);
            }
        }
        found
    }

    /// Whether anything is left of this connection; for tests.
    #[cfg(test)]
    pub fn mentions(&self, conn: ConnId) -> bool {
        let plain = self.exact.values().chain(self.prefixes.values());
        let mut all = plain.chain(self.wildcards.values());
        all.any(|subscribers| subscribers.contains_key(&conn)) || self.groups.mentions(conn)
    }
}

fn add(found: &mut Subscribers, more: &Subscribers) {
    for (conn, first) in more {
        found
            .entry(*conn)
            .and_modify(|known| *known = (*known).min(*first))
            .or_insert(*first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    #[test]
    fn who_is_subscribed_is_found_once() {
        let mut index = Index::default();
        for (conn, text, first) in [
            (1, "a/b", 9),
            (1, "a/*", 4),
            (1, "*", 6),
            (2, "a/*", 0),
            (3, "a/b/c", 0),
            (4, "a/*/c", 7),
            (5, "*/b*", 3),
        ] {
            index.insert(ConnId(conn), &pattern(text), first);
        }
        let found = |index: &Index, topic: &str| -> Vec<(u64, u64)> {
            index
                .matching(topic)
                .into_iter()
                .map(|(conn, first)| (conn.0, first))
                .collect()
        };
        assert_eq!(found(&index, "a/b"), [(1, 4), (2, 0), (5, 3)]);
        assert_eq!(found(&index, "a/b/c"), [(1, 4), (2, 0), (3, 0), (4, 7), (5, 3)]);
        assert_eq!(found(&index, "z"), [(1, 6)]);
        index.remove(ConnId(1), &pattern("a/*"));
        assert_eq!(found(&index, "a/b"), [(1, 6), (2, 0), (5, 3)]);
        for (conn, text) in [
            (1, "a/b"),
            (1, "*"),
            (2, "a/*"),
            (3, "a/b/c"),
            (3, "never"),
            (4, "a/*"),
            (4, "a/*/c"),
            (5, "*/b*"),
        ] {
            index.remove(ConnId(conn), &pattern(text));
        }
        assert!(index.is_empty() && index.lengths.is_empty());
    }

    #[test]
    fn what_is_for_one_vm_is_nobody_elses() {
        let web = Reader {
            peer: Peer::Guest,
            key: "web-0".into(),
            second: Some("alpine".into()),
        };
        let host = Reader {
            peer: Peer::Host,
            key: "host".into(),
            second: None,
        };
        for (topic, expected) in [
            ("broadcast", true),
            ("vm:web-0", true),
            ("vm:Web-0", true),
            ("vm:Alpine", true),
            ("vm:db", false),
            ("vm:web-0/reply/1", true),
            ("vm:db/reply/1", false),
            ("vm:db/web-0", false),
            ("castra/handshake/web-0", true),
            ("castra/session/db", false),
            ("castra/", false),
            ("ci/castra/x", true),
        ] {
            assert_eq!(web.may_read(topic), expected, "{topic}");
            assert!(host.may_read(topic));
        }
        assert!(web.may_subscribe(&pattern("castra/*")) && web.may_subscribe(&pattern("vm:*")));
        assert!(web.may_subscribe(&pattern("castra/*/db")) && web.may_subscribe(&pattern("*/db")));
        assert!(!web.may_subscribe(&pattern("vm:db")) && web.may_subscribe(&pattern("x")));
        assert!(!web.may_subscribe(&pattern("vm:db/reply/1")));
        assert!(web.owns("vm:web-0") && web.owns("vm:WEB-0/x") && !web.owns("vm:web-01") && !web.owns("x"));
        assert!(names_vm("vm:a") && names_vm("x/y") && names_vm("vm:a/b"));
        assert!(!names_vm("vm:") && !names_vm("vm:/a") && !names_vm("vm:-/a"));
    }
}
