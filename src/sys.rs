//! All unsafe code of the project, behind safe types. Uses nothing of ours.
#![allow(unsafe_code)]

pub mod aligned;
pub mod clock;
pub mod inherited;
pub mod ioctl;
pub mod ring;
pub mod wake;
pub mod xattr;
