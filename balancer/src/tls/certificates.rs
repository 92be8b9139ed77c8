//! Which certificate a client is shown.
//!
//! By the name it asks for: a certificate for exactly that name, else one with a wildcard in place of the
//! first label; of several the one that is valid longest. A client that names nobody, or somebody unknown,
//! is shown the *default*: the pair called `default`, or the only one there is. Without a default it is
//! refused (`unrecognized_name`).
//!
//! An expired certificate is shown all the same: a client that insists will refuse it, one that does not
//! is better served than not. It is said loudly in the log and in status.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::x509::Validity;
use crate::core::secure::{Names, TlsFault};

/// The pair that is shown to clients that name nobody, or somebody unknown.
const DEFAULT: &str = "default";

/// A certificate with its chain and key.
#[derive(Debug)]
pub struct Pair {
    /// What its files are called.
    pub id: String,
    pub names: Arc<Names>,
    pub validity: Validity,
    key: Arc<CertifiedKey>,
}

impl Pair {
    pub fn new(id: String, names: Names, validity: Validity, key: CertifiedKey) -> Self {
        Self { id, names: Arc::new(names), validity, key: Arc::new(key) }
    }
}

/// All pairs in force, and how they are found.
#[derive(Debug, Default)]
pub struct Store {
    pairs: Vec<Arc<Pair>>,
    by_name: HashMap<String, Arc<Pair>>,
    default: Option<Arc<Pair>>,
}

impl Store {
    pub fn new(pairs: Vec<Arc<Pair>>) -> Self {
        let mut by_name: HashMap<String, Arc<Pair>> = HashMap::new();
        for pair in &pairs {
            for name in &pair.names.0 {
                let longest = by_name.entry(name.clone()).or_insert_with(|| pair.clone());
                if pair.validity.not_after > longest.validity.not_after {
                    *longest = pair.clone();
                }
            }
        }
        let only = pairs.first().filter(|_| pairs.len() == 1);
        let default = pairs.iter().find(|pair| pair.id == DEFAULT).or(only).cloned();
        Self { pairs, by_name, default }
    }

    pub fn pairs(&self) -> &[Arc<Pair>] {
        &self.pairs
    }

    /// Whether this is the one for clients that no other is for.
    pub fn is_default(&self, pair: &Pair) -> bool {
        self.default.as_ref().is_some_and(|default| default.id == pair.id)
    }

    /// The pair for a name in lower case, and whether it is for that name.
    fn find(&self, name: Option<&str>) -> Result<(&Arc<Pair>, bool), TlsFault> {
        let wildcard = |name: &str| name.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        let named = name.and_then(|name| {
            self.by_name.get(name).or_else(|| self.by_name.get(&wildcard(name)?)).map(|pair| (pair, true))
        });
        let found = named.or_else(|| self.default.as_ref().map(|pair| (pair, false)));
        let missing = if self.pairs.is_empty() { TlsFault::NoCertificate } else { TlsFault::UnknownName };
        found.ok_or(missing)
    }
}

/// The store that is in force, as rustls asks it. Shared by all threads.
#[derive(Debug, Default)]
pub struct Certificates {
    store: RwLock<Arc<Store>>,
}

impl Certificates {
    pub fn store(&self) -> Arc<Store> {
        // Whoever panicked while holding it had not changed it yet.
        self.store.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Handshakes that begin from now on use this store.
    pub fn replace(&self, store: Store) {
        *self.store.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(store);
    }
}

/// What the client of a handshake asked for, and was shown.
#[derive(Debug, Default)]
pub struct Shown {
    pub server_name: Option<String>,
    pub names: Arc<Names>,
    /// The certificate is not for the name asked for.
    pub by_default: bool,
}

thread_local! {
    /// What the resolver last decided on this thread. rustls gives it nothing of ours to write to, and calls
    /// it from within the call that takes in a ClientHello, on the thread that makes that call.
    static DECIDED: RefCell<Option<Result<Shown, TlsFault>>> = const { RefCell::new(None) };
}

/// What was decided since the last call, if anything: to be asked right after bytes were given to rustls.
pub fn take_decided() -> Option<Result<Shown, TlsFault>> {
    DECIDED.take()
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let store = self.store();
        let server_name = hello.server_name().map(str::to_ascii_lowercase);
        let found = store.find(server_name.as_deref());
        let key = found.ok().map(|(pair, _)| pair.key.clone());
        let decided = found.map(|(pair, matches)| {
            let by_default = server_name.is_some() && !matches;
            Shown { server_name, names: pair.names.clone(), by_default }
        });
        DECIDED.set(Some(decided));
        key
    }
}
