//! The wire protocol (being written).

pub mod address;
pub mod enrolment;
pub mod frame;
pub mod message;
pub mod tls;
pub mod token;
pub mod wire;
