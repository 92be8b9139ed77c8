//! What is said of certificates on the control socket.

use serde::{Deserialize, Serialize};

/// Reads the folder of certificates again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadCertificatesQuery {}

/// Certificates, as the folder was read last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificates {
    pub in_force: Vec<CertificateStatus>,
    /// What of the folder cannot be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedCertificate>,
}

/// A certificate that is shown to clients.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// What its files are called.
    pub id: String,
    /// The host names it is for, wildcards among them.
    pub names: Vec<String>,
    /// In UTC, as RFC 3339 has it.
    pub not_before: String,
    pub not_after: String,
    /// The same in seconds since 1970 began.
    #[serde(default)]
    pub not_after_unix_s: i64,
    pub state: CertificateState,
    /// Shown to clients that name no host, or one that no certificate is for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_default: bool,
}

/// Whether a certificate is valid now. It is shown in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateState {
    #[default]
    Valid,
    /// For less than three weeks more, or less than a quarter of its life where that is shorter.
    ExpiresSoon,
    Expired,
    NotYetValid,
}

/// A pair of files that is not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedCertificate {
    /// What its files are called; empty when it is about the whole folder.
    pub id: String,
    pub reason: String,
    /// What was in force before stays in force.
    pub kept: bool,
}

impl Certificates {
    pub fn is_empty(&self) -> bool {
        self.in_force.is_empty() && self.refused.is_empty()
    }
}
