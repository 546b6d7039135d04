//! The identity of a disk, and every way in which people and tools write it.
//!
//! One disk has many spellings and one [`DiskId`]. The canonical text is a prefix and a value:
//!
//! | canonical | what it is | also read |
//! |---|---|---|
//! | `naa.6000c29…` | NAA designator: 16 hex digits (NAA 2, 3, 5) or 32 (NAA 6) | `0x…`, `wwn-0x…`, `3…`, `scsi-3…`, `6000C293-9d1a-…`, `60 00 C2 93 …-…` |
//! | `eui.0025385…` | EUI-64 of 8, 12 or 16 bytes, NVMe's NGUID too | `2…`, `scsi-2…`, `nvme-eui.…`, `wwn-eui.…` |
//! | `uuid.1efe…-…` | UUID designator, NVMe's UUID | `nvme-uuid.…`, the bare UUID unless it begins with 6 |
//! | `name.iqn…` | SCSI name string that is none of those above | `iqn.…`, `scsi-8…` |
//! | `t10.ATA_…` | T10 vendor designator | `scsi-1…`, `ata-…` |
//! | `nvme.15ad-…` | made by the kernel from vendor, serial and model of an NVMe controller | `nvme-nvme.…` |
//! | `serial.QEMU_…` | vendor, model and serial of page 0x80 | `scsi-S…`, `scsi-0…` |
//! | `virtio.abc` | the serial that a hypervisor gave a virtio disk | `virtio-…` |
//! | `loop:/img` | a loop device's backing file | |
//!
//! All of them may stand behind `/dev/disk/by-id/`. Hexadecimal values and prefixes are read in any case. Text
//! values keep their case; runs of white space, and characters that udev would not have in a file name, become
//! `_`, so that what the kernel shows and what udev shows are one value.
//!
//! A bare group of 32 digits that begins with 6 is an NAA designator, since that is how VMware writes it. A UUID
//! that begins with 6 needs its `uuid.`.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What sort of identity it is, best first: of all that a disk says of itself, the least is its identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// NAA 6 (IEEE registered extended), 16 bytes.
    NaaExtended,
    /// NAA 2, 3 or 5, 8 bytes.
    Naa,
    /// EUI-64 in 8, 12 or 16 bytes.
    Eui,
    /// A UUID of RFC 4122.
    Uuid,
    /// A SCSI name string.
    Name,
    /// A T10 vendor designator.
    T10,
    /// What the kernel puts together for an NVMe namespace that has no identity of its own.
    Nvme,
    /// Vendor, model and serial.
    Serial,
    /// The serial of a virtio disk.
    Virtio,
    /// The path of a loop device's backing file.
    Loop,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Kind::NaaExtended | Kind::Naa => "naa.",
            Kind::Eui => "eui.",
            Kind::Uuid => "uuid.",
            Kind::Name => "name.",
            Kind::T10 => "t10.",
            Kind::Nvme => "nvme.",
            Kind::Serial => "serial.",
            Kind::Virtio => "virtio.",
            Kind::Loop => "loop:",
        }
    }
}

/// The identity of a disk. Equal values are the same disk, however they were spelled.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId {
    kind: Kind,
    /// The canonical text behind the prefix.
    value: String,
}

/// The longest text that is looked at: `PATH_MAX` and room for a prefix.
const LONGEST: usize = 4096 + 64;

impl DiskId {
    /// An NAA designator of SPC-5, 7.7.6.6: 8 bytes that begin with 2, 3 or 5, or 16 that begin with 6, and that are no
    /// placeholder: something must follow that digit, and in an NAA 5 its maker's, which is neither all zeros nor all ones.
    pub fn naa(bytes: &[u8]) -> Option<DiskId> {
        let kind = naa_kind(bytes)?;
        let value = hex(bytes);
        let name = value.get(if value.starts_with('5') { 7.. } else { 1.. })?;
        (!is_placeholder(name)).then_some(DiskId { kind, value })
    }

    /// An EUI-64 based designator of SPC-5, 7.7.6.5: 8, 12 or 16 bytes that are neither all zeros nor all ones.
    pub fn eui(bytes: &[u8]) -> Option<DiskId> {
        let value = hex(bytes);
        let sound = matches!(bytes.len(), 8 | 12 | 16) && !is_placeholder(&value);
        sound.then_some(DiskId { kind: Kind::Eui, value })
    }

    /// A UUID that is neither the nil UUID nor all ones.
    pub fn uuid(bytes: &[u8; 16]) -> Option<DiskId> {
        let mut value = hex(bytes);
        if is_placeholder(&value) {
            return None;
        }
        for at in [20, 16, 12, 8] {
            value.insert(at, '-');
        }
        Some(DiskId { kind: Kind::Uuid, value })
    }

    /// A SCSI name string (SPC-5, 7.7.6.11). One that holds an NAA, EUI-64 or UUID name is that name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn name(text: &str) -> Result<DiskId, Reason> {
        let text = text.trim();
        if let Some((prefix, value)) = text.split_once('.') {
            match prefix.to_ascii_lowercase().as_str() {
                "naa" => return naa_digits(value),
                "eui" => return eui_digits(value),
                "uuid" => return uuid_digits(value),
                _ => {}
            }
        }
        // What was dropped from the text may have hidden such a name from the look above; a broken one is none.
        let id = DiskId::text(Kind::Name, text).ok_or(Reason::NoValue)?;
        let prefix = id.value.split_once('.').map(|(prefix, _)| prefix.to_ascii_lowercase());
        match prefix.as_deref() {
            Some("naa" | "eui" | "uuid") => Err(Reason::NoValue),
            _ => Ok(id),
        }
    }

    /// A T10 vendor designator: the vendor and what follows it, as text.
    pub fn t10(text: &str) -> Option<DiskId> {
        DiskId::text(Kind::T10, text)
    }

    /// A serial of VPD page 0x80, which is unique only together with its vendor and model.
    pub fn serial(vendor: &str, model: &str, serial: &str) -> Option<DiskId> {
        let serial = given_serial(serial)?;
        DiskId::text(Kind::Serial, &format!("{vendor} {model} {serial}"))
    }

    /// The serial that a hypervisor gave a virtio disk.
    pub fn virtio(serial: &str) -> Option<DiskId> {
        DiskId::text(Kind::Virtio, &given_serial(serial)?)
    }

    /// The backing file of a loop device: an absolute path. Only the text is looked at, symbolic links are not
    /// followed.
    pub fn loop_file(path: &Path) -> Option<DiskId> {
        let mut clean = PathBuf::from("/");
        for component in path.components() {
            match component {
                Component::Normal(part) => clean.push(part),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        let value = clean.to_str()?.to_owned();
        // White space at the end would not come back from the canonical text.
        let sound = path.is_absolute()
            && value.len() > 1
            && value.trim_end() == value
            && !value.chars().any(char::is_control);
        sound.then_some(DiskId { kind: Kind::Loop, value })
    }

    /// The path behind `loop:`.
    pub fn backing_file(&self) -> Option<&Path> {
        (self.kind == Kind::Loop).then(|| Path::new(&self.value))
    }

    /// What sort of identity it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it is unique only if whoever chose it took care: a serial, not a world-wide name. Whoever
    /// assigns a disk by such an identity is told so.
    pub fn is_weak(&self) -> bool {
        matches!(self.kind, Kind::Nvme | Kind::Serial | Kind::Virtio)
    }

    fn text(kind: Kind, text: &str) -> Option<DiskId> {
        let value = file_name_text(text);
        // A longer one could not be read back.
        if value.len().saturating_add(kind.prefix().len()) > LONGEST {
            return None;
        }
        value.chars().any(|c| c != '_').then_some(DiskId { kind, value })
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}{}", self.kind.prefix(), self.value))
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for DiskId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DiskId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DiskId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a text is no identity of a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{given}` is no disk identity: {reason}")]
pub struct ParseError {
    /// What was given, cut where it is long.
    pub given: String,
    /// What is wrong with it.
    pub reason: Reason,
}

/// What is wrong with a text that should be an identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Nothing was given.
    #[error("it is empty")]
    Empty,
    /// Longer than any identity.
    #[error("it is longer than any identity")]
    TooLong,
    /// A name under `/dev`, which changes from boot to boot.
    #[error(
        "it is a device name, which may be another disk after the next boot; `mt-agent discover-disks` shows its identity"
    )]
    DeviceName,
    /// A link to a partition.
    #[error("it names a partition; give the disk, without `-partN`")]
    Partition,
    /// Eight bytes of an NAA 6 name.
    #[error(
        "it is the first half of an NAA 6 name (udev's ID_WWN); give all 32 digits (ID_WWN_WITH_EXTENSION)"
    )]
    HalfName,
    /// Not as many digits, or not the first digit, that an NAA name has.
    #[error("an NAA name has 16 digits and begins with 2, 3 or 5, or has 32 and begins with 6")]
    Naa,
    /// A name that nobody gave.
    #[error("it is a placeholder, all zeros or all f, which tells no disk from another")]
    Placeholder,
    /// Not as many digits as an EUI-64 has.
    #[error("an EUI-64 name has 16, 24 or 32 hexadecimal digits")]
    Eui,
    /// Not a UUID.
    #[error("a UUID has 32 hexadecimal digits")]
    Uuid,
    /// A prefix with nothing behind it, or only with zeros.
    #[error("there is nothing behind its prefix that tells one disk from another")]
    NoValue,
    /// A loop identity without an absolute path.
    #[error(
        "behind `loop:` there must be the absolute path of a file, without `..` and without white space at its end"
    )]
    LoopPath,
    /// A by-id link that is made from the model and the serial of an NVMe disk.
    #[error(
        "this link has no namespace identity in it; take the one that begins with `nvme-eui.` or `nvme-uuid.`"
    )]
    NvmeModel,
    /// None of the forms that are known.
    #[error(
        "it has none of the known forms, such as naa.6000c29…, 0x…, wwn-0x…, scsi-3…, eui.…, uuid.…, loop:/path"
    )]
    Form,
}

impl FromStr for DiskId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<DiskId, ParseError> {
        spelled(text.trim()).map_err(|reason| ParseError { given: text.chars().take(80).collect(), reason })
    }
}

fn spelled(text: &str) -> Result<DiskId, Reason> {
    if text.is_empty() {
        return Err(Reason::Empty);
    }
    if text.len() > LONGEST {
        return Err(Reason::TooLong);
    }
    if let Some(path) = after(text, "loop:") {
        return DiskId::loop_file(Path::new(path)).ok_or(Reason::LoopPath);
    }
    if let Some(link) = text.strip_prefix("/dev/disk/by-id/").or_else(|| text.strip_prefix("disk/by-id/")) {
        return link_name(link).unwrap_or(Err(Reason::Form));
    }
    if let Some(wwid) = text.strip_prefix("/dev/mapper/") {
        // multipath names its maps by WWID unless `user_friendly_names` is on.
        return if wwid.len() > 16 {
            typed(wwid).map_err(|_| Reason::DeviceName)
        } else {
            Err(Reason::DeviceName)
        };
    }
    if text.starts_with('/') {
        return Err(Reason::DeviceName);
    }
    if let Some(id) = dotted(text).or_else(|| link_name(text)) {
        return id;
    }
    if let Some(digits) = after(text, "0x") {
        return naa_digits(digits);
    }
    bare(text)
}

/// The canonical forms, which are the kernel's `wwid` forms too.
fn dotted(text: &str) -> Option<Result<DiskId, Reason>> {
    let (prefix, value) = text.split_once('.')?;
    Some(match prefix.to_ascii_lowercase().as_str() {
        "naa" => naa_digits(value),
        "eui" => eui_digits(value),
        "uuid" => uuid_digits(value),
        "name" => DiskId::name(value),
        "iqn" => DiskId::name(text),
        "t10" => DiskId::t10(value).ok_or(Reason::NoValue),
        "nvme" => DiskId::text(Kind::Nvme, &value.to_ascii_lowercase()).ok_or(Reason::NoValue),
        "serial" => DiskId::text(Kind::Serial, value).ok_or(Reason::NoValue),
        "virtio" => DiskId::virtio(value).ok_or(Reason::NoValue),
        _ => return None,
    })
}

/// The names of the links in `/dev/disk/by-id`, and multipath's.
fn link_name(text: &str) -> Option<Result<DiskId, Reason>> {
    let prefixes = ["wwn-", "scsi-", "dm-uuid-mpath-", "mpath-", "ata-", "virtio-", "nvme-"];
    let (prefix, rest) = prefixes.into_iter().find_map(|prefix| Some((prefix, after(text, prefix)?)))?;
    if rest.rsplit_once("-part").is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    {
        return Some(Err(Reason::Partition));
    }
    Some(match prefix {
        "wwn-" => match after(rest, "0x") {
            Some(digits) => naa_digits(digits),
            None => dotted(rest).unwrap_or(Err(Reason::Form)),
        },
        "ata-" => DiskId::t10(&format!("ATA {rest}")).ok_or(Reason::NoValue),
        "virtio-" => DiskId::virtio(rest).ok_or(Reason::NoValue),
        "nvme-" => match rest.split_once('.').map(|(kind, _)| kind.to_ascii_lowercase()).as_deref() {
            Some("eui" | "uuid" | "nvme") => dotted(rest).unwrap_or(Err(Reason::Form)),
            _ => Err(Reason::NvmeModel),
        },
        _ => typed(rest),
    })
}

/// udev's and multipath's form: the designator type as one character, then the designator.
fn typed(text: &str) -> Result<DiskId, Reason> {
    let mut characters = text.chars();
    let kind = characters.next().ok_or(Reason::NoValue)?;
    let value = characters.as_str();
    match kind {
        '3' => naa_digits(value),
        '2' => eui_digits(value),
        '8' => DiskId::name(value),
        '1' => DiskId::t10(value).ok_or(Reason::NoValue),
        // A vendor-specific designator, which udev puts behind vendor and model, as it does with the serial.
        '0' | 'S' => DiskId::text(Kind::Serial, value).ok_or(Reason::NoValue),
        _ => Err(Reason::Form),
    }
}

/// Digits without a prefix, with or without separators.
fn bare(text: &str) -> Result<DiskId, Reason> {
    if text.bytes().all(|b| b.is_ascii_hexdigit()) && matches!(text.len(), 17 | 25 | 33) {
        return typed(text);
    }
    let bytes = bytes_of(text).ok_or(Reason::Form)?;
    match (bytes.len(), bytes.first().map(|b| b >> 4)) {
        (16, Some(6)) | (8, _) => naa_digits(text),
        (16, _) if has_uuid_dashes(text) => uuid_digits(text),
        (16, _) => Err(Reason::Naa),
        _ => Err(Reason::Form),
    }
}

fn naa_digits(text: &str) -> Result<DiskId, Reason> {
    let bytes = bytes_of(text).ok_or(Reason::Naa)?;
    match (bytes.len(), bytes.first()) {
        (8, Some(0x60..=0x6f)) => Err(Reason::HalfName),
        _ if naa_kind(&bytes).is_none() => Err(Reason::Naa),
        _ => DiskId::naa(&bytes).ok_or(Reason::Placeholder),
    }
}

fn naa_kind(bytes: &[u8]) -> Option<Kind> {
    match (bytes.first()? >> 4, bytes.len()) {
        (2 | 3 | 5, 8) => Some(Kind::Naa),
        (6, 16) => Some(Kind::NaaExtended),
        _ => None,
    }
}

/// Whether digits stand in the place of a name that nobody gave, and are the same on all disks of their kind.
fn is_placeholder(digits: &str) -> bool {
    digits.bytes().all(|digit| digit == b'0') || digits.bytes().all(|digit| digit == b'f')
}

/// Whether a serial stands in the place of one that nobody gave. udev writes `_` for a blank.
pub(super) fn is_no_serial(serial: &[u8]) -> bool {
    serial.iter().all(|b| matches!(b, b'0' | b' ' | b'-' | b'_' | 0))
}

/// A serial as an identity holds it. It is looked at in that form: what is dropped or replaced there tells no disk from
/// another, and the identity's text, read again, has nothing else.
fn given_serial(serial: &str) -> Option<String> {
    let serial = file_name_text(serial);
    (!is_no_serial(serial.as_bytes())).then_some(serial)
}

fn eui_digits(text: &str) -> Result<DiskId, Reason> {
    let bytes = bytes_of(text).filter(|bytes| matches!(bytes.len(), 8 | 12 | 16)).ok_or(Reason::Eui)?;
    DiskId::eui(&bytes).ok_or(Reason::Placeholder)
}

fn uuid_digits(text: &str) -> Result<DiskId, Reason> {
    let bytes = bytes_of(text).ok_or(Reason::Uuid)?;
    let bytes = bytes.as_slice().try_into().map_err(|_| Reason::Uuid)?;
    DiskId::uuid(bytes).ok_or(Reason::Placeholder)
}

fn has_uuid_dashes(text: &str) -> bool {
    text.split('-').map(str::len).eq([8, 4, 4, 4, 12])
}

/// `text` behind `prefix`, which may be in any case.
fn after<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let (head, rest) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// The bytes of a text of pairs of hexadecimal digits in any case; between pairs there may be one space, dash or
/// colon.
fn bytes_of(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [high, low, tail @ ..] = rest {
        bytes.push((digit(*high)? << 4) | digit(*low)?);
        rest = match tail {
            [b' ' | b'-' | b':', tail @ ..] if !tail.is_empty() => tail,
            tail => tail,
        };
    }
    (rest.is_empty() && !bytes.is_empty()).then_some(bytes)
}

fn digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        _ = write!(text, "{byte:02x}");
        text
    })
}

/// Text as udev would have it in a file name: trimmed, a run of white space as one `_`, and `_` for what is
/// neither a letter, a digit, one of `#+-.:=@_`, nor beyond ASCII.
fn file_name_text(text: &str) -> String {
    let white = |c: char| c.is_ascii_whitespace() || c == '\0';
    let mut value = String::new();
    for word in text.split(white).filter(|word| !word.is_empty()) {
        if !value.is_empty() {
            value.push('_');
        }
        value.extend(word.chars().map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '#' | '+' | '-' | '.' | ':' | '=' | '@' | '_' => c,
            _ if !c.is_ascii() && !c.is_control() && !c.is_whitespace() => c,
            _ => '_',
        }));
    }
    value
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(text: &str) -> DiskId {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    fn reason(text: &str) -> Reason {
        text.parse::<DiskId>().map(|id| panic!("{text} was taken for {id}")).unwrap_err().reason
    }

    #[test]
    fn the_spellings_of_a_vmware_disk_are_one_value() {
        let disk = id("naa.6000c2939d1a4b0f8e2d7c6b5a493827");
        for spelling in [
            "NAA.6000C2939D1A4B0F8E2D7C6B5A493827",
            "0x6000c2939d1a4b0f8e2d7c6b5a493827",
            "wwn-0x6000c2939d1a4b0f8e2d7c6b5a493827",
            "36000c2939d1a4b0f8e2d7c6b5a493827",
            "scsi-36000c2939d1a4b0f8e2d7c6b5a493827",
            "/dev/disk/by-id/scsi-36000c2939d1a4b0f8e2d7c6b5a493827",
            "/dev/disk/by-id/wwn-0x6000c2939d1a4b0f8e2d7c6b5a493827",
            "/dev/disk/by-id/dm-uuid-mpath-36000c2939d1a4b0f8e2d7c6b5a493827",
            "/dev/mapper/36000c2939d1a4b0f8e2d7c6b5a493827",
            "6000C293-9d1a-4b0f-8e2d-7c6b5a493827",
            "60 00 C2 93 9d 1a 4b 0f-8e 2d 7c 6b 5a 49 38 27",
            "  6000c2939d1a4b0f8e2d7c6b5a493827\n",
        ] {
            assert_eq!(id(spelling), disk, "{spelling}");
        }
        assert_eq!(disk.to_string(), "naa.6000c2939d1a4b0f8e2d7c6b5a493827");
        assert_eq!(serde_json::to_string(&disk).unwrap(), "\"naa.6000c2939d1a4b0f8e2d7c6b5a493827\"");
        assert_eq!(serde_json::from_str::<DiskId>("\"36000C2939d1a4b0f8e2d7c6b5a493827\"").unwrap(), disk);
    }

    #[test]
    fn what_the_kernel_and_udev_write_for_text_is_one_value() {
        let kernel = id("t10.ATA     QEMU HARDDISK                           QM00001             ");
        assert_eq!(kernel, id("scsi-1ATA_QEMU_HARDDISK_QM00001"));
        assert_eq!(kernel, id("ata-QEMU_HARDDISK_QM00001"));
        assert_eq!(kernel.to_string(), "t10.ATA_QEMU_HARDDISK_QM00001");
        let serial = DiskId::serial("QEMU", "QEMU HARDDISK", "disk7").unwrap();
        assert_eq!(serial, id("scsi-SQEMU_QEMU_HARDDISK_disk7"));
        assert_eq!(serial, id("/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_disk7"));
        assert!(serial.is_weak() && !kernel.is_weak());
        assert_eq!(id("scsi-8iqn.2003-01.org.x:t1,L,0x01"), id("iqn.2003-01.org.x:t1_L_0x01"));
        assert_eq!(id("scsi-8naa.5000C500A1B2C3D4"), id("wwn-0x5000c500a1b2c3d4"));
    }

    #[test]
    fn nvme_virtio_and_loop_have_their_forms() {
        assert_eq!(id("nvme-eui.0025385B71B0A1C2").to_string(), "eui.0025385b71b0a1c2");
        assert_eq!(id("wwn-eui.6479a7ffff000001000c2999f2a3b4c5").kind(), Kind::Eui);
        let uuid = id("uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01");
        assert_eq!(id("1EFE0EC1-6b2e-4b77-9d61-2d2f4a4a9b01"), uuid);
        assert_eq!(id("nvme-uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01"), uuid);
        assert_eq!(id("virtio-target-1"), id("virtio.target-1"));
        assert_eq!(id("loop:/srv//images/./a b.img").to_string(), "loop:/srv/images/a b.img");
        assert_eq!(id("loop:/a").backing_file(), Some(Path::new("/a")));
    }

    #[test]
    fn what_is_no_identity_is_refused_with_its_reason() {
        assert_eq!(reason(""), Reason::Empty);
        assert_eq!(reason("/dev/sdb"), Reason::DeviceName);
        assert_eq!(reason("/dev/mapper/mpatha"), Reason::DeviceName);
        assert_eq!(reason("wwn-0x6000c2939d1a4b0f"), Reason::HalfName);
        assert_eq!(reason("6000c2939d1a4b0f"), Reason::HalfName);
        assert_eq!(reason("/dev/disk/by-id/wwn-0x5000c500a1b2c3d4-part1"), Reason::Partition);
        assert_eq!(reason("naa.7000c2939d1a4b0f"), Reason::Naa);
        assert_eq!(reason("naa.50"), Reason::Naa);
        assert_eq!(reason("naa.5000c500a1b2c3dg"), Reason::Naa);
        assert_eq!(reason("scsi-8naa.50"), Reason::Naa);
        assert_eq!(reason("eui.00"), Reason::Eui);
        assert_eq!(reason("eui.0000000000000000"), Reason::Placeholder);
        assert_eq!(reason("eui.FFFFFFFFFFFFFFFF"), Reason::Placeholder);
        assert_eq!(reason("uuid.ffffffff-ffff-ffff-ffff-ffffffffffff"), Reason::Placeholder);
        assert_eq!(reason("virtio.0000"), Reason::NoValue);
        assert_eq!(reason("uuid.1234"), Reason::Uuid);
        assert_eq!(reason("t10.   "), Reason::NoValue);
        assert_eq!(reason("loop:img"), Reason::LoopPath);
        assert_eq!(reason("scsi-8\0naa.t"), Reason::NoValue);
        assert_eq!(reason("loop:/a/../b"), Reason::LoopPath);
        assert_eq!(reason("loop:/a b /."), Reason::LoopPath);
        assert_eq!(reason("nvme-Samsung_SSD_980_S649"), Reason::NvmeModel);
        assert_eq!(reason("sdb"), Reason::Form);
        assert_eq!(reason(&"6".repeat(5000)), Reason::TooLong);
    }

    #[test]
    fn a_name_that_nobody_gave_is_none() {
        for digits in [
            "2000000000000000",
            "2fffffffffffffff",
            "3000000000000000",
            "5000000000000000",
            "5fffffffffffffff",
            // A maker, and nothing of the disk.
            "5000c50000000000",
            "5000c50fffffffff",
            "60000000000000000000000000000000",
            "6fffffffffffffffffffffffffffffff",
        ] {
            for spelling in [format!("naa.{digits}"), format!("wwn-0x{digits}"), format!("scsi-3{digits}")] {
                assert_eq!(reason(&spelling), Reason::Placeholder, "{spelling}");
            }
            assert_eq!(DiskId::name(&format!("naa.{digits}")), Err(Reason::Placeholder));
        }
        // What somebody chose, however simple, is one: the first of a maker, scsi_debug's, tgt's.
        for digits in [
            "5000c50000000001",
            "5000000000000001",
            "3333333000000fa0",
            "2222222000002000",
            "5555555555555555",
            "60000000000000000e00000000010001",
            "6000c290000000000000000000000000",
        ] {
            assert_eq!(id(&format!("naa.{digits}")).to_string(), format!("naa.{digits}"));
        }
        for serial in ["", "   ", "0000", "00 00", "----", "0-0", "__", "/\0-/", "\u{7}"] {
            assert_eq!((DiskId::serial("V", "M", serial), DiskId::virtio(serial)), (None, None), "{serial}");
        }
        for serial in ["1", "2000", "0123456789ABCDEF", "FFFF"] {
            assert!(DiskId::serial("V", "M", serial).is_some() && DiskId::virtio(serial).is_some());
        }
    }

    #[test]
    fn the_preference_is_the_order() {
        assert!(id("naa.6000c2939d1a4b0f8e2d7c6b5a493827") < id("naa.5000c500a1b2c3d4"));
        assert!(id("naa.5000c500a1b2c3d4") < id("eui.0025385b71b0a1c2"));
        assert!(id("t10.ATA_X") < id("serial.ATA_X"));
    }

    fn spellings(bytes: &[u8]) -> Vec<String> {
        let digits = hex(bytes);
        let pairs: Vec<&str> = (0..bytes.len()).map(|at| &digits[2 * at..2 * at + 2]).collect();
        let (left, right) = pairs.split_at(bytes.len() / 2);
        let mut all = vec![
            format!("naa.{digits}"),
            format!("0x{digits}"),
            format!("wwn-0x{digits}"),
            format!("3{digits}"),
            format!("scsi-3{digits}"),
            format!("mpath-3{digits}"),
            digits.clone(),
            pairs.join(":"),
            format!("{}-{}", left.join(" "), right.join(" ")),
        ];
        if bytes.len() == 16 {
            let d = &digits;
            all.push(format!("{}-{}-{}-{}-{}", &d[..8], &d[8..12], &d[12..16], &d[16..20], &d[20..]));
        }
        let links: Vec<String> =
            [2, 4].iter().map(|&at| &all[at]).map(|link| format!("/dev/disk/by-id/{link}")).collect();
        all.extend(links);
        all
    }

    proptest! {
        #[test]
        fn every_spelling_of_a_disk_gives_the_same_value(
            extended: bool,
            first in prop::sample::select(vec![0x20u8, 0x30, 0x50]),
            mut bytes: [u8; 16],
            cases: u64,
        ) {
            let bytes = if extended {
                bytes[0] = 0x60 | bytes[0] & 0x0f;
                &bytes[..]
            } else {
                bytes[0] = first | bytes[0] & 0x0f;
                &bytes[..8]
            };
            let disk = DiskId::naa(bytes).unwrap();
            for spelling in spellings(bytes) {
                // Any case: each letter by one bit, but for the path, which is a file name.
                let (path, name) = spelling.split_at(spelling.rfind('/').map_or(0, |at| at + 1));
                let name: String = name.chars().enumerate().map(|(at, c)| {
                    if cases >> (at % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c }
                }).collect();
                let spelling = format!("{path}{name}");
                prop_assert_eq!(spelling.parse::<DiskId>(), Ok(disk.clone()), "{}", spelling);
            }
        }

        #[test]
        fn the_canonical_text_is_read_back(text in "\\PC*") {
            if let Ok(disk) = text.parse::<DiskId>() {
                prop_assert_eq!(disk.to_string().parse::<DiskId>(), Ok(disk));
            }
        }

        #[test]
        fn prefixed_text_is_read_back(prefix in prop::sample::select(vec![
            "naa.", "eui.", "uuid.", "name.", "t10.", "nvme.", "serial.", "virtio.", "loop:/", "scsi-", "scsi-8",
            "ata-", "wwn-", "nvme-", "mpath-", "0x", "/dev/disk/by-id/", "iqn."]), text in "[ -~]{0,40}") {
            if let Ok(disk) = format!("{prefix}{text}").parse::<DiskId>() {
                prop_assert_eq!(disk.to_string().parse::<DiskId>(), Ok(disk));
            }
        }
    }
}
