//! The manifest of an app.
