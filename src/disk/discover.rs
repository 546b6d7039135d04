//! Finds the disks of this machine, their identities and their roles.

use std::path::PathBuf;

use serde::Serialize;

use super::id::DiskId;
use crate::units::ByteLen;

/// One disk as discovery sees it. Several paths of one LUN are one disk.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// The identity, if the disk has one.
    pub id: Option<DiskId>,
    /// Where the identity was read.
    pub id_source: Option<IdSource>,
    /// The kernel's name, without `/dev/`: `sda`. It changes between boots and is for showing only.
    pub name: String,
    /// The device node.
    pub node: PathBuf,
    /// Device number as the kernel writes it, `8:0`.
    pub devno: String,
    /// Host, channel, target and LUN, `2:0:1:0`, of a SCSI disk.
    pub hctl: Option<String>,
    /// Size in bytes.
    pub size: ByteLen,
    /// The logical sector size in bytes.
    pub logical_sector: u32,
    /// The physical sector size in bytes.
    pub physical_sector: u32,
    /// Vendor of the INQUIRY data, trimmed.
    pub vendor: Option<String>,
    /// Model of the INQUIRY data, trimmed.
    pub model: Option<String>,
    /// Serial of VPD page 0x80.
    pub serial: Option<String>,
    /// Whether the kernel holds the disk read-only.
    pub read_only: bool,
    /// The kernel names of all paths of this disk, its own included.
    pub paths: Vec<String>,
    /// What the disk is used for.
    pub role: Role,
    /// Why it has that role, one fact a line: `sda2 is mounted on /boot`.
    pub evidence: Vec<String>,
    /// What is wrong with it, and what to do.
    pub problems: Vec<String>,
}

/// Where an identity was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdSource {
    /// udev's database.
    Udev,
    /// sysfs: the VPD pages or `wwid` that the kernel read.
    Sysfs,
    /// An INQUIRY sent to the device.
    SgIo,
    /// The backing file of a loop device.
    Loop,
}

/// What a disk is used for, and so whether it may be a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Carries /, /boot, swap or a mount of this host.
    System,
    /// Held by something: dm, md, a mount, an exclusive opener.
    InUse,
    /// Carries the retention file system.
    Retention,
    /// Assigned to a machine.
    Assigned,
    /// Shares its identity with another disk that is not another path to it.
    Clone,
    /// Has no identity.
    NoUuid,
    /// Nothing speaks against it.
    Free,
}
