//! Pure decisions of epagent: typed ids, specs, state machines.
