//! Certificates as the process has them: read at start and whenever it is told to, and shown in status.
//!
//! Time changes them without anybody reading them again, so the next moment at which one becomes another thing
//! (valid, soon to expire, expired) is waited for, and said once: a handshake says nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::life::Life;
use super::{Server, chain, log};
use crate::control::certificates::{CertificateState, CertificateStatus, Certificates, RefusedCertificate};
use crate::control::protocol::{ErrorCode, Response};
use crate::control::server::refusal;
use crate::remark::Remark;
use crate::tls::certificates::{Pair, Store};
use crate::tls::context::Context;
use crate::tls::folder::{self, Folder};
use crate::tls::x509::{UnixSeconds, Validity};

/// A certificate that is valid for less than this is said to expire soon. ACME clients renew a month before the
/// end of three, so one that comes this far has been forgotten.
const SOON_S_MAX: i64 = 21 * 86_400;
/// Those made for days are renewed later: no sooner is it said than in this part of their life.
const SOON_PART: i64 = 4;
/// Longest until the next look: the system's clock may be set meanwhile.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(3_600);

/// The folder, what is in force of it, and what is not.
pub struct Reader {
    context: Arc<Context>,
    folder: Option<Folder>,
    refused: Vec<RefusedCertificate>,
    /// What was said last of each certificate in force.
    said: BTreeMap<String, CertificateState>,
    look_at: Option<Instant>,
}

impl Reader {
    /// Reads the folder for the first time, if there is one.
    pub fn new(context: Arc<Context>, dir: Option<PathBuf>) -> Self {
        let folder = dir.map(|dir| Folder::new(dir, context.provider.clone()));
        let (refused, said, look_at) = Default::default();
        let mut reader = Self { context, folder, refused, said, look_at };
        reader.read();
        reader
    }

    /// Reads the folder and puts what it has in force; what cannot be used leaves what was there before.
    /// False when there is no folder.
    fn read(&mut self) -> bool {
        let Some(folder) = &self.folder else { return false };
        let (store, refusals) = folder.read(&self.context.certificates.store());
        let refused = |refusal: folder::Refusal| RefusedCertificate {
            id: refusal.id,
            reason: chain(&refusal.error),
            kept: refusal.kept,
        };
        self.refused = refusals.into_iter().map(refused).collect();
        self.context.certificates.replace(store);
        self.say();
        true
    }

    /// Whether there is a folder of them, so that clients may speak TLS.
    pub fn is_in_use(&self) -> bool {
        self.folder.is_some()
    }

    pub fn report(&self) -> Certificates {
        let (store, now) = (self.context.certificates.store(), folder::now());
        let in_force = store.pairs().iter().map(|pair| shown(pair, &store, now)).collect();
        Certificates { in_force, refused: self.refused.clone() }
    }

    /// When to look at them again, at the latest.
    pub fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    /// Says of each certificate what time has made of it since.
    pub fn look(&mut self) {
        if self.look_at.is_some_and(|at| at <= Instant::now()) {
            self.say_what_changed();
        }
    }

    /// Says all there is to say, since it was read again.
    fn say(&mut self) {
        for refused in &self.refused {
            let id = if refused.id.is_empty() { "all" } else { &refused.id };
            let kept = if refused.kept { "; what was in force stays" } else { "" };
            log(Remark::error(format!("certificate {id} is refused: {}{kept}", refused.reason))
                .with("certificate", id));
        }
        self.said.clear();
        self.say_what_changed();
        log(format!("{} certificates are in force", self.said.len()));
    }

    fn say_what_changed(&mut self) {
        let (store, now) = (self.context.certificates.store(), folder::now());
        for pair in store.pairs() {
            let state = state_of(pair.validity, now);
            if self.said.insert(pair.id.clone(), state) != Some(state) {
                say_state(pair, state);
            }
        }
        let next = store.pairs().iter().filter_map(|pair| changes_at(pair.validity, now)).min();
        let wait = next.map(|at| Duration::from_secs(at.0.abs_diff(now.0)).min(LOOK_EVERY_MAX));
        self.look_at = wait.map(|wait| Instant::now() + wait);
    }
}

fn say_state(pair: &Pair, state: CertificateState) {
    let (id, names) = (&pair.id, pair.names.0.join(", "));
    let (from, until) = (pair.validity.not_before, pair.validity.not_after);
    let remark = match state {
        CertificateState::Valid => return,
        CertificateState::ExpiresSoon => {
            Remark::warning(format!("certificate {id} ({names}) expires soon, at {until}: renew it"))
        }
        CertificateState::Expired => Remark::error(format!(
            "CERTIFICATE {id} ({names}) EXPIRED at {until}: clients that look will refuse it"
        )),
        CertificateState::NotYetValid => {
            Remark::warning(format!("certificate {id} ({names}) is not valid before {from}"))
        }
    };
    log(remark.with("certificate", id));
}

/// How it is now: RFC 5280 §4.1.2.5 counts both dates in.
fn state_of(validity: Validity, now: UnixSeconds) -> CertificateState {
    match now {
        _ if now > validity.not_after => CertificateState::Expired,
        _ if now < validity.not_before => CertificateState::NotYetValid,
        _ if now >= soon(validity) => CertificateState::ExpiresSoon,
        _ => CertificateState::Valid,
    }
}

/// When it will be another thing than now.
fn changes_at(validity: Validity, now: UnixSeconds) -> Option<UnixSeconds> {
    let moments = [validity.not_before, soon(validity), UnixSeconds(validity.not_after.0.saturating_add(1))];
    moments.into_iter().filter(|at| *at > now).min()
}

/// From when on it is said to expire soon.
fn soon(validity: Validity) -> UnixSeconds {
    let life_s = validity.not_after.0.saturating_sub(validity.not_before.0);
    UnixSeconds(validity.not_after.0.saturating_sub(SOON_S_MAX.min(life_s / SOON_PART)))
}

impl Server {
    /// Reads the folder again because somebody asks for it.
    pub(super) fn reload_certificates(&mut self) -> Response {
        match self.certificates.read() {
            true => Response::Certificates(self.certificates.report()),
            false => {
                let why = "there is no folder of certificates (--tls-dir)";
                refusal(ErrorCode::BadRequest, why.to_owned())
            }
        }
    }

    /// A process that ends leaves it to its successor to speak of them.
    pub(super) fn look_at_certificates(&mut self) {
        if matches!(self.life, Life::Serving) {
            self.certificates.look();
        }
    }

    /// When to do so again, at the latest.
    pub(super) fn look_at_certificates_at(&self) -> Option<Instant> {
        self.certificates.look_at().filter(|_| matches!(self.life, Life::Serving))
    }

    /// The same because of a signal.
    pub(super) fn reload_certificates_quietly(&mut self) {
        self.certificates.read();
    }
}

fn shown(pair: &Pair, store: &Store, now: UnixSeconds) -> CertificateStatus {
    CertificateStatus {
        id: pair.id.clone(),
        names: pair.names.0.clone(),
        not_before: pair.validity.not_before.to_string(),
        not_after: pair.validity.not_after.to_string(),
        not_after_unix_s: pair.validity.not_after.0,
        state: state_of(pair.validity, now),
        is_default: store.is_default(pair),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The states that a certificate goes through, and how long after `from` each begins.
    fn life(days: i64) -> Vec<(i64, CertificateState)> {
        let from = 1_800_000_000;
        let validity =
            Validity { not_before: UnixSeconds(from), not_after: UnixSeconds(from + days * 86_400) };
        let mut now = UnixSeconds(from - 86_400);
        let mut states = vec![(-86_400, state_of(validity, now))];
        while let Some(at) = changes_at(validity, now) {
            let before = state_of(validity, UnixSeconds(at.0 - 1));
            assert_eq!(before, states[states.len() - 1].1, "it changed before it was looked at");
            now = at;
            states.push((at.0 - from, state_of(validity, now)));
        }
        states
    }

    #[test]
    fn a_certificate_is_looked_at_whenever_it_becomes_another_thing() {
        use CertificateState::{Expired, ExpiresSoon, NotYetValid, Valid};
        let day = 86_400;
        for (days, soon) in [(90, 69 * day), (365, 344 * day), (6, 4 * day + day / 2)] {
            let end = days * day + 1;
            let states = [(-day, NotYetValid), (0, Valid), (soon, ExpiresSoon), (end, Expired)];
            assert_eq!(life(days), states, "of {days} days");
        }
    }
}
