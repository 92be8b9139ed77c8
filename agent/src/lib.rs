//! What the epagent command and epagentd share.
