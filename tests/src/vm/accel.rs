//! How a guest's processors run: by the host's own (KVM) where that works, emulated (TCG) where it does not.
//!
//! That `/dev/kvm` exists says little: inside another hypervisor it may be there and not run a stock kernel. So it
//! is tried with the first boot of an image, and what worked is written down beside the image.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::poll::until;

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

    /// Whether qemu gets as far as its control socket with it. Some hypervisors offer KVM and then refuse a register
    /// without which qemu ends.
    pub fn starts(self) -> bool {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-S"]);
        command.args(self.arguments()).args(["-qmp", "stdio"]);
        let started = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(mut child) = started else { return false };
        if let Some(mut control) = child.stdin.take() {
            let _ = control.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#);
            let ended = until(Duration::from_secs(10), || child.try_wait().ok().flatten());
            if ended.is_some_and(|status| status.success()) {
                return true;
            }
        }
        let _ = child.kill();
        let _ = child.wait();
        false
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
