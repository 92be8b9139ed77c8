//! The agent's state in SQLite, with sealed secrets.
