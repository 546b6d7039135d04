//! VPD pages.
