//! Message types between the epagent processes.
