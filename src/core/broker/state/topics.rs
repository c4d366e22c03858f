//! Topics: who is subscribed to what, and who may read what (DESIGN §6).
//!
//! Here: the index of live and past subscriptions, access. Not here: the grammar of topics
//! (`core::bus::topic`), when a subscription begins or ends (`super::settle`).

use std::collections::BTreeMap;

use crate::core::bus::topic::Pattern;
use crate::core::name::VmName;

use super::{ConnId, Plane};

/// What the broker alone publishes under.
pub const OWN: &str = "castra/";

/// Messages to one VM.
pub const TO_VM: &str = "vm:";

/// Who reads: a VM, or the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Its door.
    pub plane: Plane,
    /// Its name in lower case.
    pub key: String,
}

impl Reader {
    /// Whether a message of this topic may reach it. The host reads all; what is for or about
    /// one VM is nobody else's.
    pub fn may_read(&self, topic: &str) -> bool {
        let name = if let Some(name) = topic.strip_prefix(TO_VM) {
            name
        } else if topic.starts_with(OWN) {
            topic.rsplit('/').next().unwrap_or_default()
        } else {
            return true;
        };
        self.plane == Plane::Host || name.eq_ignore_ascii_case(&self.key)
    }

    /// Whether it may ask for this at all. A prefix may be asked for by anybody: it matches what
    /// its session may read.
    pub fn may_ask(&self, pattern: &Pattern) -> bool {
        pattern.is_prefix() || self.may_read(pattern.as_str())
    }
}

/// Whether a topic that begins with `vm:` names a VM.
pub fn names_vm(topic: &str) -> bool {
    topic
        .strip_prefix(TO_VM)
        .is_none_or(|name| name.parse::<VmName>().is_ok())
}

type Subscribers = BTreeMap<ConnId, u64>;

/// Subscriptions by topic, each with the first number wanted. Finding the subscribers of a topic
/// takes one look for the topic and one for each length that a prefix has, however many
/// subscriptions there are.
#[derive(Debug, Default)]
pub struct Index {
    exact: BTreeMap<String, Subscribers>,
    prefixes: BTreeMap<String, Subscribers>,
    lengths: BTreeMap<usize, usize>,
}

impl Index {
    /// Nobody is subscribed to anything.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty()
    }

    /// Adds a subscription, or changes its first number.
    pub fn insert(&mut self, conn: ConnId, pattern: &Pattern, first: u64) {
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

    /// Who is subscribed to this topic, each once, with the first number it wants of it.
    pub fn matching(&self, topic: &str) -> Subscribers {
        let mut found = self.exact.get(topic).cloned().unwrap_or_default();
        for length in self.lengths.keys() {
            let Some(subscribers) = topic.get(..*length).and_then(|stem| self.prefixes.get(stem)) else {
                continue;
            };
            for (conn, first) in subscribers {
                found
                    .entry(*conn)
                    .and_modify(|known| *known = (*known).min(*first))
                    .or_insert(*first);
            }
        }
        found
    }

    /// Whether anything is left of this connection; for tests.
    #[cfg(test)]
    pub fn mentions(&self, conn: ConnId) -> bool {
        let mut all = self.exact.values().chain(self.prefixes.values());
        all.any(|subscribers| subscribers.contains_key(&conn))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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
        assert_eq!(found(&index, "a/b"), [(1, 4), (2, 0)]);
        assert_eq!(found(&index, "a/b/c"), [(1, 4), (2, 0), (3, 0)]);
        assert_eq!(found(&index, "z"), [(1, 6)]);
        index.remove(ConnId(1), &pattern("a/*"));
        assert_eq!(found(&index, "a/b"), [(1, 6), (2, 0)]);
        for (conn, text) in [
            (1, "a/b"),
            (1, "*"),
            (2, "a/*"),
            (3, "a/b/c"),
            (3, "never"),
            (4, "a/*"),
        ] {
            index.remove(ConnId(conn), &pattern(text));
        }
        assert!(index.is_empty() && index.lengths.is_empty());
    }

    #[test]
    fn what_is_for_one_vm_is_nobody_elses() {
        let web = Reader {
            plane: Plane::Guest,
            key: "web-0".into(),
        };
        let host = Reader {
            plane: Plane::Host,
            key: "host".into(),
        };
        for (topic, expected) in [
            ("broadcast", true),
            ("vm:web-0", true),
            ("vm:Web-0", true),
            ("vm:db", false),
            ("castra/handshake/web-0", true),
            ("castra/session/db", false),
            ("castra/", false),
            ("ci/castra/x", true),
        ] {
            assert_eq!(web.may_read(topic), expected, "{topic}");
            assert!(host.may_read(topic));
        }
        assert!(web.may_ask(&pattern("castra/*")) && web.may_ask(&pattern("vm:*")));
        assert!(!web.may_ask(&pattern("vm:db")) && web.may_ask(&pattern("x")));
        assert!(names_vm("vm:a") && names_vm("x/y") && !names_vm("vm:") && !names_vm("vm:a/b"));
    }
}
