//! udev's database, `run/udev/data`: one file a device, one fact a line.
//!
//! It is read here, and not through libudev, because libudev reads it of the running machine only, and needs the
//! rest of udev to be there. The lines that matter have kept their form since udev 165: `E:KEY=value`.

use std::collections::HashMap;

use super::sysfs::Sysroot;
use crate::disk::id::{DiskId, is_no_serial};

/// The properties that udev stored of one device.
#[derive(Default, Debug)]
pub(super) struct Properties(HashMap<String, String>);

impl Properties {
    /// The properties of the block device with this number (`8:0`); none where udev has none.
    pub(super) fn read(sysroot: &Sysroot, devno: &str) -> Properties {
        let text = sysroot.bytes(format!("run/udev/data/b{devno}")).unwrap_or_default();
        Properties::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Properties {
        let facts = text.lines().filter_map(|line| line.strip_prefix("E:")?.split_once('='));
        Properties(facts.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The best identity among them.
    ///
    /// `ID_WWN` is not looked at for SCSI: it is cut to 8 bytes. `ID_SERIAL` is an identity where `scsi_id`
    /// wrote it, with its type digit; `ata_id` puts model and serial there, which is the T10 designator by which
    /// libata presents the disk; for other buses it is a serial like any other.
    pub(super) fn identity(&self) -> Option<DiskId> {
        let mut found: Vec<DiskId> = Vec::new();
        let mut take = |text: String| found.extend(text.parse::<DiskId>());
        if let Some(wwn) = self.get("ID_WWN_WITH_EXTENSION") {
            take(wwn.to_owned());
        }
        for key in ["NAA_REGEXT", "NAA_REG", "NAA_EXT", "NAA_LOCAL"] {
            // Written by sg_inq where `55-scsi-sg3_id.rules` are in use.
            if let Some(naa) = self.get(&format!("SCSI_IDENT_LUN_{key}")) {
                take(format!("naa.{naa}"));
            }
        }
        // NVMe: the kernel's wwid, whole.
        if let Some(wwid) = self.get("ID_WWN").filter(|wwn| !wwn.starts_with("0x")) {
            take(wwid.to_owned());
        }
        let ata = self.get("ID_ATA").is_some();
        // Behind vendor and model a serial that is not there, or that nobody gave, does not show any more.
        let given = |serial: &str| match self.get("ID_SERIAL_SHORT") {
            Some(short) => !is_no_serial(short.as_bytes()),
            // The digits of a page 0x83 of before SPC-3 are in `ID_SERIAL` alone.
            None => !ata && !serial.starts_with('S'),
        };
        if let Some(serial) = self.get("ID_SERIAL").filter(|serial| given(serial)) {
            if ata {
                take(format!("ata-{serial}"));
            } else if self.get("ID_SCSI").is_some() && !serial.starts_with('0') {
                // Type 0 is vendor specific: QEMU puts the drive's name there, which says where the disk is
                // plugged in, and not which disk it is.
                take(format!("scsi-{serial}"));
            }
        }
        found.into_iter().min_by_key(DiskId::kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> Option<String> {
        Properties::parse(text).identity().map(|id| id.to_string())
    }

    #[test]
    fn the_whole_wwn_is_taken_and_the_cut_one_is_not() {
        let cut = "I:123\nE:ID_SCSI=1\nE:ID_WWN=0x6000c2939d1a4b0f\n";
        assert_eq!(identity(cut), None);
        let whole = format!("{cut}E:ID_WWN_WITH_EXTENSION=0x6000c2939d1a4b0f8e2d7c6b5a493827\n");
        assert_eq!(identity(&whole).as_deref(), Some("naa.6000c2939d1a4b0f8e2d7c6b5a493827"));
        let serial = format!("{cut}E:ID_SERIAL=36000c2939d1a4b0f8e2d7c6b5a493827\n");
        assert_eq!(identity(&serial).as_deref(), Some("naa.6000c2939d1a4b0f8e2d7c6b5a493827"));
    }

    #[test]
    fn each_bus_has_its_serial() {
        let ata = "E:ID_ATA=1\nE:ID_SERIAL=QEMU_HARDDISK_QM1\nE:ID_SERIAL_SHORT=QM1\nE:ID_BUS=ata\n";
        assert_eq!(identity(ata).as_deref(), Some("t10.ATA_QEMU_HARDDISK_QM1"));
        let ata = format!("{ata}E:ID_WWN_WITH_EXTENSION=0x5000c500a1b2c3d4\n");
        assert_eq!(identity(&ata).as_deref(), Some("naa.5000c500a1b2c3d4"));
        assert_eq!(
            identity("E:ID_SERIAL=Samsung_980\nE:ID_WWN=eui.0025385b71b0a1c2\n").as_deref(),
            Some("eui.0025385b71b0a1c2")
        );
        assert_eq!(
            identity("E:ID_SCSI=1\nE:ID_SERIAL=SQEMU_QEMU_HARDDISK_d7\nE:ID_SERIAL_SHORT=d7\n").as_deref(),
            Some("serial.QEMU_QEMU_HARDDISK_d7")
        );
        assert_eq!(identity("E:ID_SCSI=1\nE:ID_SERIAL=0QEMU_QEMU_HARDDISK_drive-scsi0-0-0-0\n"), None);
        for bus in ["ID_SCSI=1\nE:ID_SERIAL=SACME_disk_0000", "ID_ATA=1\nE:ID_SERIAL=ACME_disk_0000"] {
            assert!(identity(&format!("E:{bus}\nE:ID_SERIAL_SHORT=1000\n")).is_some());
            assert_eq!(identity(&format!("E:{bus}\nE:ID_SERIAL_SHORT=0000\n")), None);
        }
        // As scsi_id and ata_id write it where there are only blanks.
        for bus in ["ID_SCSI=1\nE:ID_SERIAL=SACME_disk", "ID_ATA=1\nE:ID_SERIAL=ACME_disk"] {
            for short in ["", "E:ID_SERIAL_SHORT=\n"] {
                assert_eq!(identity(&format!("E:{bus}\n{short}")), None);
            }
        }
        // As scsi_id writes it of a page 0x83 of before SPC-3.
        assert_eq!(
            identity("E:ID_SCSI=1\nE:ID_SERIAL=35000c500a1b2c3d4\nE:ID_SERIAL_SHORT=\n").as_deref(),
            Some("naa.5000c500a1b2c3d4")
        );
        assert_eq!(identity(""), None);
        assert_eq!(identity("E:\nE:=\nE:ID_WWN_WITH_EXTENSION=\nnonsense\0"), None);
    }
}
