//! Guests: which ones the project expects, which ones shook hands, and whether that is recent
//! enough.
//!
//! Here: the table made of `guests.json`, tokens, the freshness window, when a record is due.
//! Not here: connections (`broker::state`), the files themselves (`broker::effects`).

use std::collections::BTreeMap;

use crate::core::config::AuthMode;
use crate::core::id::BootId;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::records::GuestsRecord;
use crate::core::time::of_unix_ms;

use super::protocol::{DeclineReason, Hello};
use crate::core::root::handshake_record::HandshakeRecord;

/// How often one record is written: at once when nothing was written before, then at most four
/// times a second.
pub const RECORD_EVERY_MS: u64 = 250;

/// How many guests are remembered while names aren't checked. A project with more guests has a
/// `guests.json`; without one any local program could make endless files.
pub const MAX_UNLISTED: usize = 1024;

/// One VM of `guests.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedGuest {
    /// Its name, as the config spells it.
    pub name: VmName,
    /// Another name that it may use.
    pub second_name: Option<VmName>,
    /// When it was launched, in this host boot; older handshakes don't count.
    pub launched_boottime_ms: Option<u64>,
    /// SHA-256 of its token.
    pub token_sha256: Option<[u8; 32]>,
    /// castra hasn't launched it, and doesn't expect anybody else to.
    pub closed: bool,
}

/// `guests.json` as the broker uses it: by name, without case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestTable {
    by_name: BTreeMap<String, ListedGuest>,
    /// From second names to names.
    by_second_name: BTreeMap<String, String>,
}

impl GuestTable {
    /// The table of a record; `Err` names the guest whose token hash is no hash.
    pub fn from_record(record: &GuestsRecord, boot_id: &BootId) -> Result<GuestTable, String> {
        let mut table = GuestTable::default();
        for guest in &record.guests {
            let token_sha256 = match &guest.token_sha256 {
                Some(text) => {
                    Some(unhex(text).ok_or_else(|| format!("{}: its token_sha256 is invalid", guest.name))?)
                }
                None => None,
            };
            let listed = ListedGuest {
                name: guest.name.clone(),
                second_name: guest.second_name.clone(),
                launched_boottime_ms: guest
                    .launched_boottime_ms
                    .filter(|_| guest.boot_id.as_ref() == Some(boot_id)),
                token_sha256,
                closed: guest.closed,
            };
            if let Some(second) = &listed.second_name {
                table.by_second_name.insert(second.key(), guest.name.key());
            }
            table.by_name.insert(guest.name.key(), listed);
        }
        Ok(table)
    }

    /// The VM of this name, else the one that has it as second name.
    pub fn find_by_any_name(&self, key: &str) -> Option<&ListedGuest> {
        self.get(key).or_else(|| self.get(self.by_second_name.get(key)?))
    }

    /// Notes that a VM's guest has rebooted: older handshakes count no more than those of an
    /// earlier launch.
    pub fn note_reboot(&mut self, key: &str, boottime_ms: u64) {
        if let Some(listed) = self.by_name.get_mut(key) {
            listed.launched_boottime_ms = listed.launched_boottime_ms.map(|then| then.max(boottime_ms));
        }
    }

    /// The VM of this name, compared without case.
    pub fn get(&self, key: &str) -> Option<&ListedGuest> {
        self.by_name.get(key)
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Compares all bytes, so that the time taken doesn't show where they differ.
fn equal_in_constant_time(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b))) == 0
}

/// Whether this hello may speak for its name.
pub fn admit(table: Option<&GuestTable>, auth: AuthMode, hello: &Hello) -> Result<(), DeclineReason> {
    if hello.vm.is_reserved() {
        return Err(DeclineReason::ReservedIdentity);
    }
    let Some(table) = table else {
        // Names aren't checked and no guest has a token, so a required token admits nobody.
        return match auth {
            AuthMode::Token => Err(DeclineReason::BadToken),
            AuthMode::Auto | AuthMode::Open => Ok(()),
        };
    };
    let listed = table
        .find_by_any_name(&hello.vm.key())
        .ok_or(DeclineReason::UnknownVm)?;
    let shown = match (&listed.token_sha256, &hello.token_sha256) {
        (Some(stored), Some(presented)) => equal_in_constant_time(stored, presented),
        _ => false,
    };
    let enough = match auth {
        AuthMode::Open => true,
        AuthMode::Auto => shown || listed.token_sha256.is_none(),
        AuthMode::Token => shown,
    };
    if enough {
        Ok(())
    } else {
        Err(DeclineReason::BadToken)
    }
}

/// Whether this hello shows the token of its VM's launch, also where no token is required.
pub fn shows_token(table: Option<&GuestTable>, hello: &Hello) -> bool {
    let listed = table.and_then(|table| table.get(&hello.vm.key()));
    match (
        listed.and_then(|listed| listed.token_sha256.as_ref()),
        &hello.token_sha256,
    ) {
        (Some(stored), Some(presented)) => equal_in_constant_time(stored, presented),
        _ => false,
    }
}

/// A guest that has shaken hands.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its record, perhaps not written yet.
    pub record: HandshakeRecord,
    /// It is within the freshness window, and that was reported.
    pub fresh: bool,
    /// When its record was last written; `None`: there is none on disk.
    pub written_ms: Option<u64>,
    /// The record on disk is older than `record`.
    pub dirty: bool,
    /// Wall clock of the newest proof of life; the record gets it as text when it is written.
    pub heard_wall_ms: u64,
}

impl Guest {
    /// The complete record.
    pub fn record_to_write(&self) -> HandshakeRecord {
        HandshakeRecord {
            heard_at: wall_clock(of_unix_ms(self.heard_wall_ms)),
            ..self.record.clone()
        }
    }

    /// Age of the newest proof of life.
    pub fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.record.heard_boottime_ms)
    }

    /// When its record may be written again.
    pub fn writable_at(&self) -> u64 {
        self.written_ms.map_or(0, |at| at + RECORD_EVERY_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::broker::protocol::parse_hello;
    use crate::core::host;
    use crate::core::root::records::GuestRecord;
    use sha2::{Digest, Sha256};

    fn table() -> GuestTable {
        let guest = |name: &str, token: Option<&str>| GuestRecord {
            closed: false,
            name: name.parse().unwrap(),
            second_name: (name == "db").then(|| "Alpine".parse().unwrap()),
            launch_id: None,
            launched_boottime_ms: Some(7),
            boot_id: Some("this".into()),
            token_sha256: token.map(|token| host::hex(&Sha256::digest(token))),
        };
        let record = GuestsRecord {
            guests: vec![guest("Web-0", Some("secret")), guest("db", None)],
        };
        GuestTable::from_record(&record, &"this".into()).unwrap()
    }

    #[test]
    fn who_may_come() {
        use AuthMode::{Auto, Open, Token};
        let cases = [
            ("hello vm:web-0 token=secret", Auto, "ok"),
            ("hello vm:WEB-0 token=secret", Token, "ok"),
            ("hello vm:web-0 token=wrong", Auto, "bad-token"),
            ("hello vm:web-0 token=", Auto, "bad-token"),
            ("hello vm:web-0", Auto, "bad-token"),
            ("hello vm:web-0", Open, "ok"),
            ("hello vm:web-0 token=wrong", Open, "ok"),
            ("hello vm:db", Auto, "ok"),
            ("hello vm:db token=any", Auto, "ok"),
            ("hello vm:db", Token, "bad-token"),
            ("hello vm:db token=any", Token, "bad-token"),
            ("hello vm:alpine", Auto, "ok"),
            ("hello vm:ALPINE", Token, "bad-token"),
            ("hello vm:evil", Open, "unknown-vm"),
            ("hello vm:host", Open, "reserved-identity"),
            ("hello vm:Castra", Auto, "reserved-identity"),
        ];
        for (line, auth, expected) in cases {
            let hello = parse_hello(line.as_bytes()).unwrap();
            let said = match admit(Some(&table()), auth, &hello) {
                Ok(()) => "ok".to_owned(),
                Err(reason) => reason.to_string(),
            };
            assert_eq!(said, expected, "{line} under {auth:?}");
        }
        let stranger = parse_hello(b"hello vm:evil").unwrap();
        assert_eq!(admit(None, Auto, &stranger), Ok(()));
        assert_eq!(admit(None, Token, &stranger), Err(DeclineReason::BadToken));
        let host = parse_hello(b"hello vm:host").unwrap();
        assert_eq!(admit(None, Open, &host), Err(DeclineReason::ReservedIdentity));
    }

    #[test]
    fn a_launch_of_another_boot_has_no_time_here() {
        let mut record = GuestsRecord::default();
        record.guests.push(GuestRecord {
            closed: false,
            name: "a".parse().unwrap(),
            second_name: None,
            launch_id: None,
            launched_boottime_ms: Some(7),
            boot_id: Some("other".into()),
            token_sha256: None,
        });
        let table = GuestTable::from_record(&record, &"this".into()).unwrap();
        assert_eq!(table.get("a").unwrap().launched_boottime_ms, None);
        record.guests[0].token_sha256 = Some("short".into());
        assert!(GuestTable::from_record(&record, &"this".into()).is_err());
    }
}
