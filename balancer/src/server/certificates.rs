//! Certificates as the process has them: read at start and whenever it is told to, and shown in status.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Server, chain, log};
use crate::control::certificates::{CertificateState, CertificateStatus, Certificates, RefusedCertificate};
use crate::control::protocol::{ErrorCode, Response};
use crate::control::server::refusal;
use crate::tls::certificates::{Pair, Store};
use crate::tls::context::Context;
use crate::tls::folder::{self, Folder};
use crate::tls::x509::UnixSeconds;

/// A certificate that is valid for no longer than this is said to expire soon. ACME clients renew a month
/// before the end, so one that comes this far has been forgotten.
const SOON_S: i64 = 21 * 86_400;

/// The folder, what is in force of it, and what is not.
pub struct Reader {
    context: Arc<Context>,
    folder: Option<Folder>,
    refused: Vec<RefusedCertificate>,
}

impl Reader {
    /// Reads the folder for the first time, if there is one.
    pub fn new(context: Arc<Context>, dir: Option<PathBuf>) -> Self {
        let folder = dir.map(|dir| Folder::new(dir, context.provider.clone()));
        let mut reader = Self { context, folder, refused: Vec::new() };
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

    pub fn report(&self) -> Certificates {
        let (store, now) = (self.context.certificates.store(), folder::now());
        let in_force = store.pairs().iter().map(|pair| shown(pair, &store, now)).collect();
        Certificates { in_force, refused: self.refused.clone() }
    }

    fn say(&self) {
        let report = self.report();
        for refused in &report.refused {
            let id = if refused.id.is_empty() { "all" } else { &refused.id };
            let kept = if refused.kept { "; what was in force stays" } else { "" };
            log(&format!("certificate {id} is refused: {}{kept}", refused.reason));
        }
        for CertificateStatus { id, names, not_before, not_after, state, .. } in &report.in_force {
            let names = names.join(", ");
            match state {
                CertificateState::Valid => {}
                CertificateState::ExpiresSoon => {
                    log(&format!("certificate {id} ({names}) expires soon, at {not_after}: renew it"));
                }
                CertificateState::Expired => log(&format!(
                    "CERTIFICATE {id} ({names}) EXPIRED at {not_after}: clients that look will refuse it"
                )),
                CertificateState::NotYetValid => {
                    log(&format!("certificate {id} ({names}) is not valid before {not_before}"));
                }
            }
        }
        log(&format!("{} certificates are in force", report.in_force.len()));
    }
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

    /// The same because of a signal.
    pub(super) fn reload_certificates_quietly(&mut self) {
        self.certificates.read();
    }
}

fn shown(pair: &Pair, store: &Store, now: UnixSeconds) -> CertificateStatus {
    let (from, until) = (pair.validity.not_before, pair.validity.not_after);
    CertificateStatus {
        id: pair.id.clone(),
        names: pair.names.0.clone(),
        not_before: from.to_string(),
        not_after: until.to_string(),
        state: match now {
            _ if now > until => CertificateState::Expired,
            _ if now < from => CertificateState::NotYetValid,
            _ if until.0 - now.0 < SOON_S => CertificateState::ExpiresSoon,
            _ => CertificateState::Valid,
        },
        is_default: store.is_default(pair),
    }
}
