//! Guests with a real systemd, and a client that does to a driver what Nomad does.

pub mod advisories;
pub mod bench;
pub mod demo;
pub mod guest;
pub mod leaks;
pub mod nomad;
pub mod pages;
pub mod transcript;
