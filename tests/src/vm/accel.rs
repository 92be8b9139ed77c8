//! How a guest's processors run: by the host's own (KVM) where that works, emulated (TCG) where it does not.
//!
//! That `/dev/kvm` exists says little: inside another hypervisor it may be there and not run a stock kernel. So it
//! is tried with the first boot of an image, and what worked is written down beside the image.

use std::time::Duration;

/// How many times longer an emulated guest takes for the same work, with a neighbour on the same processors.
const TCG_SLOWNESS: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    Kvm,
    Tcg,
}

impl Accel {
    /// What to try, the best first. `EPAGENT_VM_ACCEL` fixes it.
    pub fn candidates() -> Vec<Self> {
        match std::env::var("EPAGENT_VM_ACCEL").as_deref() {
            Ok(name) => {
                vec![Self::parse(name).unwrap_or_else(|| panic!("EPAGENT_VM_ACCEL={name}: kvm or tcg"))]
            }
            Err(_) if std::path::Path::new("/dev/kvm").exists() => vec![Self::Kvm, Self::Tcg],
            Err(_) => vec![Self::Tcg],
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "kvm" => Some(Self::Kvm),
            "tcg" => Some(Self::Tcg),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host,migratable=on"],
            // Nothing wider than SSE4: what libraries choose for wide registers is emulated element by element.
            Self::Tcg => &[
                "-accel",
                "tcg,thread=multi,tb-size=256",
                "-cpu",
                "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand",
            ],
        }
    }

    /// A deadline for work in the guest that takes up to `native` on the host.
    pub fn scaled(self, native: Duration) -> Duration {
        match self {
            Self::Kvm => native,
            Self::Tcg => native * TCG_SLOWNESS,
        }
    }

    /// Longest time of one boot until the guest's agent greets.
    pub fn boot_deadline(self) -> Duration {
        match self {
            Self::Kvm => Duration::from_secs(40),
            Self::Tcg => Duration::from_secs(240),
        }
    }
}
