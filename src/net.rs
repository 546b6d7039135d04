//! The wire protocol (being written).

pub mod frame;
pub mod message;
pub mod wire;
