//! Where the identity of one block device is read: sysfs, udev's database, the device itself.
//!
//! sysfs is first. What it has belongs to the device for as long as that is there; an entry of udev's belongs to a
//! device number, which passes to the next disk before udev has heard of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::IdSource;
use super::sysfs::Sysroot;
use super::udev::Properties;
use crate::disk::id::{DiskId, Kind};
use crate::disk::vpd;
use crate::sys::ioctl;

/// By what kind of driver a device is there, which is the beginning of its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::disk) enum Transport {
    /// `sd`: SCSI, and all that the kernel presents as SCSI: SAS, iSCSI, FC, SATA, USB.
    Scsi,
    /// `nvme0n1`.
    Nvme,
    /// `vd`: virtio-blk.
    Virtio,
    /// `xvd`: Xen.
    Xen,
    /// `loop`.
    Loop,
}

impl Transport {
    /// The transport of a whole device, or `None` for what is no disk: ram, zram, dm, md, sr, fd and others.
    pub(in crate::disk) fn of(name: &str) -> Option<Transport> {
        // A path of a multipath namespace, `nvme0c1n1`, is hidden behind `nvme0n1`.
        let native = |rest: &str| rest.split_once('n').is_some_and(|(a, b)| digits(a) && digits(b));
        let letters = |rest: &str| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase());
        let behind = |prefix| name.strip_prefix(prefix);
        if behind("sd").is_some_and(letters) {
            Some(Transport::Scsi)
        } else if behind("nvme").is_some_and(native) {
            Some(Transport::Nvme)
        } else if behind("vd").is_some_and(letters) {
            Some(Transport::Virtio)
        } else if behind("xvd").is_some_and(letters) {
            Some(Transport::Xen)
        } else if behind("loop").is_some_and(digits) {
            Some(Transport::Loop)
        } else {
            None
        }
    }
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// What is known of a device's identity, and of what stands in the way of knowing it.
#[derive(Default, Debug)]
pub(in crate::disk) struct Identity {
    /// The best identity, and where it was read.
    pub(in crate::disk) id: Option<(DiskId, IdSource)>,
    /// The serial of VPD page 0x80, or what the transport has in its place.
    pub(in crate::disk) serial: Option<String>,
    /// Vendor of the INQUIRY data.
    pub(in crate::disk) vendor: Option<String>,
    /// Product of the INQUIRY data.
    pub(in crate::disk) model: Option<String>,
    /// What was passed over.
    pub(in crate::disk) notes: Vec<String>,
    /// Whether VPD page 0x83 is there and breaks the rules, or has a placeholder in the place of a name.
    pub(in crate::disk) damaged: bool,
}

impl Identity {
    /// Keeps the better one; of equally good ones that which was found first.
    fn offer(&mut self, id: Option<DiskId>, source: IdSource) {
        let Some(id) = id else { return };
        if self.id.as_ref().is_none_or(|(best, _)| id.kind() < best.kind()) {
            self.id = Some((id, source));
        }
    }

    /// Offers the kernel's `wwid`, or says why it is none.
    fn offer_wwid(&mut self, wwid: Option<String>) {
        match wwid.map(|wwid| wwid.parse::<DiskId>()) {
            Some(Ok(id)) => self.offer(Some(id), IdSource::Sysfs),
            Some(Err(error)) => self.notes.push(format!("its wwid in sysfs: {error}")),
            None => {}
        }
    }

    /// Whether nothing that is left to read could be preferred. udev knows NAA and EUI-64 designators and
    /// prefers them as we do; it does not know UUID designators and SCSI names, so a lesser identity from there
    /// is only a candidate. What is found must not depend on where it was found.
    fn is_settled(&self) -> bool {
        self.id.as_ref().is_some_and(|(id, _)| id.kind() <= Kind::Eui)
    }
}

/// The identity of `sys/block/<name>` from all sources, each asked only if those before it left something open.
pub(super) fn discover(sysroot: &Sysroot, name: &str, devno: &str, transport: Transport) -> Identity {
    let mut found = Identity::default();
    if transport == Transport::Loop {
        offer_loop(sysroot, name, &mut found);
        return found;
    }
    if offer_sysfs(sysroot, name, transport, &mut found) {
        return found;
    }
    let udev = Properties::read(sysroot, devno);
    found.offer(udev.identity(), IdSource::Udev);
    if transport == Transport::Scsi && !found.is_settled() && sysroot.is_live() {
        // O_NONBLOCK: a device that is not ready is asked all the same, and nothing is spun up.
        let node = Path::new("/dev").join(name.replace('!', "/"));
        if let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(node) {
            offer_inquiry(&file, &mut found);
        }
    }
    if found.serial.is_none() {
        // Last: it has no blanks any more.
        found.serial = udev.get("ID_SCSI_SERIAL").or(udev.get("ID_SERIAL_SHORT")).map(str::to_owned);
    }
    found
}

/// The identity of `sys/block/<name>` as sysfs alone has it.
pub(in crate::disk) fn from_sysfs(sysroot: &Sysroot, name: &str, transport: Transport) -> Identity {
    let mut found = Identity::default();
    match transport {
        Transport::Loop => offer_loop(sysroot, name, &mut found),
        _ => _ = offer_sysfs(sysroot, name, transport, &mut found),
    }
    found
}

fn offer_loop(sysroot: &Sysroot, name: &str, found: &mut Identity) {
    let Some(path) = backing_file(sysroot, name) else { return };
    if path.ends_with(" (deleted)") && !Path::new(&path).exists() {
        found.notes.push("its backing file was deleted; detach it with `losetup -d`".to_owned());
        return;
    }
    match DiskId::loop_file(Path::new(&path)) {
        Some(id) => found.offer(Some(id), IdSource::Loop),
        None => found.notes.push(format!("the name of its backing file cannot be an identity: {path:?}")),
    }
}

/// The file behind a loop device, or `None` where it has none.
pub(in crate::disk) fn backing_file(sysroot: &Sysroot, name: &str) -> Option<String> {
    let bytes = sysroot.bytes(format!("sys/block/{name}/loop/backing_file"))?;
    // Only the newline is sysfs's; a blank may be the file's.
    let text = String::from_utf8_lossy(&bytes);
    let path = text.strip_suffix('\n').unwrap_or(&text);
    (!path.is_empty()).then(|| path.to_owned())
}

/// The identity of the disk under a multipath map by the map's own name, `mpath-` and what `scsi_id` said of a path.
/// For a map without paths: to ask it would mean to wait for one.
pub(super) fn of_map(sysroot: &Sysroot, name: &str) -> Identity {
    let mut found = Identity::default();
    let uuid = sysroot.text(format!("sys/block/{name}/dm/uuid")).unwrap_or_default();
    let id = uuid.strip_prefix("mpath-").and_then(|wwid| format!("scsi-{wwid}").parse().ok());
    found.offer(id, IdSource::Sysfs);
    found
}

/// Gives whether the kernel knows what the device says of itself, so that nobody else need be asked.
fn offer_sysfs(sysroot: &Sysroot, name: &str, transport: Transport, found: &mut Identity) -> bool {
    let device = format!("sys/block/{name}/device");
    match transport {
        Transport::Scsi => {
            if let Some(data) = sysroot.bytes(format!("{device}/inquiry"))
                && let Ok(inquiry) = vpd::parse_inquiry(&data)
            {
                (found.vendor, found.model) = (Some(inquiry.vendor), Some(inquiry.product));
            } else {
                found.vendor = sysroot.text(format!("{device}/vendor"));
                found.model = sysroot.text(format!("{device}/model"));
            }
            let page = sysroot.bytes(format!("{device}/vpd_pg83")).filter(|page| !page.is_empty());
            let knows = page.is_some();
            match page {
                Some(page) => offer_page_83(&page, IdSource::Sysfs, found),
                None => found.offer_wwid(sysroot.text(format!("{device}/wwid"))),
            }
            let page = sysroot.bytes(format!("{device}/vpd_pg80")).unwrap_or_default();
            offer_page_80(&page, IdSource::Sysfs, found);
            knows
        }
        Transport::Nvme => {
            found.model = sysroot.text(format!("{device}/model"));
            found.serial = sysroot.text(format!("{device}/serial"));
            found.offer_wwid(sysroot.text(format!("sys/block/{name}/wwid")));
            found.id.is_some()
        }
        Transport::Virtio => {
            found.serial = sysroot.text(format!("sys/block/{name}/serial"));
            found.offer(found.serial.as_deref().and_then(DiskId::virtio), IdSource::Sysfs);
            found.id.is_some()
        }
        Transport::Xen | Transport::Loop => false,
    }
}

fn offer_page_83(page: &[u8], source: IdSource, found: &mut Identity) {
    match vpd::parse_identification(page) {
        Ok(identification) => {
            found.offer(identification.identity(), source);
            found.damaged |= !identification.notes.is_empty();
            found.notes.extend(identification.notes.iter().map(ToString::to_string));
        }
        Err(error) => {
            found.damaged = true;
            found.notes.push(format!("VPD page 0x83: {error}"));
        }
    }
}

fn offer_page_80(page: &[u8], source: IdSource, found: &mut Identity) {
    let Ok(Some(serial)) = vpd::parse_serial(page) else { return };
    let vendor = found.vendor.as_deref().unwrap_or_default();
    let model = found.model.as_deref().unwrap_or_default();
    let id = DiskId::serial(vendor, model, serial);
    found.serial.get_or_insert_with(|| serial.to_owned());
    found.offer(id, source);
}

/// Asks the device itself by INQUIRY, and gives whether it answered for page 0x83.
pub(in crate::disk) fn offer_inquiry(file: &File, found: &mut Identity) -> bool {
    let page = match ioctl::inquiry(file, Some(0x83)) {
        Ok(page) => page,
        Err(error) => {
            found.notes.push(format!("INQUIRY: {error}"));
            return false;
        }
    };
    let answered = page.is_some();
    if let Some(page) = page {
        offer_page_83(&page, IdSource::SgIo, found);
    }
    if (found.id.is_none() || found.serial.is_none())
        && let Ok(Some(page)) = ioctl::inquiry(file, Some(0x80))
    {
        if found.model.is_none()
            && let Ok(Some(data)) = ioctl::inquiry(file, None)
            && let Ok(inquiry) = vpd::parse_inquiry(&data)
        {
            (found.vendor, found.model) = (Some(inquiry.vendor), Some(inquiry.product));
        }
        offer_page_80(&page, IdSource::SgIo, found);
    }
    answered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_disks_are_disks() {
        assert_eq!(Transport::of("sdaa"), Some(Transport::Scsi));
        assert_eq!(Transport::of("vda"), Some(Transport::Virtio));
        assert_eq!(Transport::of("xvdb"), Some(Transport::Xen));
        assert_eq!(Transport::of("nvme0n1"), Some(Transport::Nvme));
        assert_eq!(Transport::of("loop7"), Some(Transport::Loop));
        for other in
            ["ram0", "zram0", "dm-0", "md127", "sr0", "fd0", "nvme0c0n1", "sda1", "nbd0", "loop", "sd"]
        {
            assert_eq!(Transport::of(other), None, "{other}");
        }
    }
}
