//! End-to-end suites of epagent and their harness.
