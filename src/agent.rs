//! The service: configuration, logging, the instance lock, the control socket, status and metrics.

pub mod config;
pub mod control;
pub mod lock;
pub mod logging;
pub mod metrics;
pub mod status;

#[cfg(test)]
mod tests;
