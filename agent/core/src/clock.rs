//! Two clocks, and which of them measures.
//!
//! The *wall clock* says when something happened: to people, and to those who look after a restart. Somebody may set
//! it. The *steady clock* (CLOCK_BOOTTIME, clock_gettime(2)) says how long something takes: nobody sets it, it goes on
//! while the machine sleeps, and it begins at 0 with each boot.
//!
//! What is recorded is wall time. What is waited for (drains, deadlines, waits before a restart) is measured by the
//! steady clock, from the moment at which this process first saw it, and is not recorded: after a restart of the agent
//! it begins anew, since nothing is held against an instance for the time in which nobody looked.
//!
//! Where an age from before that counts, the recorded time is turned into a steady one, once, at the first look
//! ([`Moment::when`]). A clock that is set afterwards changes nothing. One that was set while nobody looked, or a
//! reboot in between, can err once, within bounds: what seems to lie ahead has just begun, and nothing is older than
//! the machine has been up. No boot id is needed for that.

/// What both clocks show, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Since 1970.
    pub wall_ms: u64,
    /// Since the machine was started.
    pub steady_ms: u64,
}

impl Moment {
    /// What the steady clock showed at a recorded time.
    pub fn when(self, recorded_wall_ms: u64) -> u64 {
        self.steady_ms.saturating_sub(self.wall_ms.saturating_sub(recorded_wall_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_time_is_neither_in_the_future_nor_before_the_boot() {
        let now = Moment { wall_ms: 1_000_000, steady_ms: 5_000 };
        assert_eq!(now.when(999_000), 4_000);
        assert_eq!(now.when(1_000_001), 5_000, "the clock was set back since");
        assert_eq!(now.when(17), 0, "the clock was set forward since, or the machine was started anew");
    }
}
