//! The monitor as others see it: its [`protocol`], its [`record`] of the end, and a [`client`] for runners.

pub mod client;
pub mod protocol;
pub mod record;

pub use client::{Client, ClientError};
