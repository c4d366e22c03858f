//! Groups: several sessions that share a subscription, each message to one of them.
//!
//! Here: who is in a group, whose turn it is. Not here: who may read what (`super::topics`), sending
//! (`super::commit`).
//!
//! A group is identified by its peer, its name and its pattern. The host's groups and the guests'
//! are apart, so that no guest can join one of the host's and take its messages away. A group
//! exists while it has a member, and keeps no messages for later.

use std::collections::BTreeMap;

use crate::core::bus::topic::Pattern;

use super::{ConnId, Peer};

/// Name of a group, and whether it is the host's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    of_host: bool,
    name: String,
}

/// The members in the order in which they joined.
#[derive(Clone, Debug, Default)]
struct Group {
    members: Vec<ConnId>,
    /// Index of the one whose turn it is.
    turn: usize,
}

impl Group {
    /// The next eligible member, beginning with the one whose turn it is.
    fn next(&mut self, is_eligible: &dyn Fn(ConnId) -> bool) -> Option<ConnId> {
        let count = self.members.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let member = self.members[at];
            if is_eligible(member) {
                self.turn = (at + 1) % count;
                return Some(member);
            }
        }
        None
    }
}

/// All groups, by what they are subscribed to.
#[derive(Debug, Default)]
pub struct Groups(BTreeMap<Pattern, BTreeMap<Key, Group>>);

impl Groups {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes a session a member; a second time changes nothing.
    pub fn join(&mut self, conn: ConnId, peer: Peer, name: &str, pattern: &Pattern) {
        let key = Key {
            of_host: peer == Peer::Host,
            name: name.to_owned(),
        };
        let groups = self.0.entry(pattern.clone()).or_default();
        let group = groups.entry(key).or_default();
        if !group.members.contains(&conn) {
            group.members.push(conn);
        }
    }

    /// Takes a session out of the groups of this pattern.
    pub fn leave(&mut self, conn: ConnId, pattern: &Pattern) {
        let Some(groups) = self.0.get_mut(pattern) else {
            return;
        };
        groups.retain(|_, group| {
            if let Some(at) = group.members.iter().position(|member| *member == conn) {
                group.members.remove(at);
                // The member whose turn it was keeps its turn.
                group.turn -= usize::from(at < group.turn);
                group.turn %= group.members.len().max(1);
            }
            !group.members.is_empty()
        });
        if groups.is_empty() {
            self.0.remove(pattern);
        }
    }

    /// The sessions that get one message of this topic: from each group that wants it, the eligible
    /// member whose turn it is. A session that two groups choose is named once.
    pub fn choose(&mut self, topic: &str, is_eligible: &dyn Fn(ConnId) -> bool) -> Vec<ConnId> {
        let mut chosen = Vec::new();
        for (pattern, groups) in &mut self.0 {
            if !pattern.matches(topic) {
                continue;
            }
            chosen.extend(groups.values_mut().filter_map(|group| group.next(is_eligible)));
        }
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    /// Whether a connection is in any group; for tests.
    #[cfg(test)]
    pub fn mentions(&self, conn: ConnId) -> bool {
        let mut all = self.0.values().flat_map(BTreeMap::values);
        all.any(|group| group.members.contains(&conn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_take_turns_and_those_who_leave_are_passed_over() {
        let mut groups = Groups::default();
        let jobs: Pattern = "jobs/*".parse().unwrap();
        for conn in [1, 2, 3, 1] {
            groups.join(ConnId(conn), Peer::Guest, "w", &jobs);
        }
        groups.join(ConnId(9), Peer::Host, "w", &jobs);
        let turn = |groups: &mut Groups, without: u64| -> Vec<u64> {
            let chosen = groups.choose("jobs/a", &|conn| conn.0 != without);
            chosen.into_iter().map(|conn| conn.0).collect()
        };
        // The host's group of that name is another one.
        assert_eq!(turn(&mut groups, 0), [1, 9]);
        assert_eq!(turn(&mut groups, 0), [2, 9]);
        assert_eq!(turn(&mut groups, 3), [1, 9], "who won't do is passed over");
        groups.leave(ConnId(1), &jobs);
        assert_eq!(turn(&mut groups, 0), [2, 9], "whose turn it was keeps it");
        assert_eq!(turn(&mut groups, 0), [3, 9]);
        assert_eq!(turn(&mut groups, 0), [2, 9]);
        assert_eq!(groups.choose("other", &|_| true), []);
        for conn in [2, 3, 9] {
            assert!(groups.mentions(ConnId(conn)));
            groups.leave(ConnId(conn), &jobs);
        }
        assert!(groups.is_empty());
    }
}
