//! Decodes the INQUIRY data and the vital product data (VPD) pages by which SCSI disks say who they are.
//!
//! After SPC-5: standard INQUIRY data (6.7.2), the device identification page 0x83 (7.7.6) and the unit serial
//! number page 0x80 (7.7.21). Pure functions over bytes that came from a device and are not trusted: a header
//! that is wrong is an error; a designator that is wrong is passed over with a [`Note`], because the others on
//! the page may be sound.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use std::fmt;

use super::id::{DiskId, Reason, is_no_serial};

/// Why a page cannot be used at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// It ends before its header does.
    #[error("the page has {len} bytes, fewer than its header")]
    Truncated {
        /// How many bytes there are.
        len: usize,
    },
    /// The device answered with another page than it was asked for, as those do that ignore the EVPD bit.
    #[error("page {got:#04x} came in place of page {wanted:#04x}")]
    OtherPage {
        /// The page that was asked for.
        wanted: u8,
        /// The page that came.
        got: u8,
    },
    /// The peripheral qualifier says that no disk is behind this LUN.
    #[error("no device is connected to this logical unit (peripheral qualifier {qualifier})")]
    NotConnected {
        /// The peripheral qualifier, not 0.
        qualifier: u8,
    },
}

/// To what a designator belongs (SPC-5, table 531).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Association {
    /// The disk.
    LogicalUnit,
    /// The port through which it was asked: another one on each path, and shared by all its disks.
    TargetPort,
    /// The array or controller that holds the disk.
    TargetDevice,
    /// The value that is not assigned.
    Reserved,
}

/// How the bytes of a designator are to be read (SPC-5, table 530).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeSet {
    /// Binary.
    Binary,
    /// Printable ASCII.
    Ascii,
    /// UTF-8.
    Utf8,
    /// A value that is not assigned.
    Reserved(u8),
}

/// What a designator says (SPC-5, table 532).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value<'a> {
    /// Type 0: whatever the vendor likes. Nothing makes it unique, so it is no identity.
    VendorSpecific(&'a [u8]),
    /// Type 1: the vendor in 8 ASCII characters, and what the vendor makes unique.
    T10Vendor {
        /// The vendor, with its padding.
        vendor: &'a [u8],
        /// What follows.
        specific: &'a [u8],
    },
    /// Type 2: EUI-64 based, of 8, 12 or 16 bytes.
    Eui64(&'a [u8]),
    /// Type 3: NAA 2, 3 or 5 in 8 bytes, or NAA 6 in 16.
    Naa(Vec<u8>),
    /// Type 4: the number of a port.
    RelativeTargetPort(u16),
    /// Type 5: the number of a group of ports.
    TargetPortGroup(u16),
    /// Type 6: the number of a group of disks.
    LogicalUnitGroup(u16),
    /// Type 7: an MD5 sum that the disk made of what it knows.
    Md5([u8; 16]),
    /// Type 8: a SCSI name string, such as `iqn.…` or `naa.…`, without its padding.
    ScsiName(&'a str),
    /// Type 9: an address in the transport's own terms.
    ProtocolSpecific(&'a [u8]),
    /// Type 0xa: a UUID.
    Uuid([u8; 16]),
    /// A type that is not assigned.
    Unknown(u8),
}

/// One designator that is sound.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Designator<'a> {
    /// To what it belongs.
    pub association: Association,
    /// How its bytes were written.
    pub code_set: CodeSet,
    /// The transport it speaks of (SPC-5, table 486), where it says so.
    pub protocol: Option<u8>,
    /// What it says.
    pub value: Value<'a>,
}

/// A designator that was passed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note {
    /// Where on the page it begins, in bytes.
    pub at: usize,
    /// What is wrong with it.
    pub flaw: Flaw,
}

/// What is wrong with a designator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// It, or its header, reaches past the end of the page.
    PastTheEnd,
    /// The page is shorter than its header says.
    ShortPage,
    /// It has no bytes.
    Empty,
    /// It has more or fewer bytes than its type has.
    Length(usize),
    /// Its NAA digit is none of 2, 3, 5 and 6.
    NaaFormat(u8),
    /// It is text that is not text, or not the name that it says it is.
    Text,
    /// Its code set does not go with its type.
    CodeSet,
    /// The two bytes in front of a UUID do not announce one.
    UuidHeader,
    /// It stands in the place of a name that nobody gave.
    Placeholder,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VPD page 0x83: the designator at byte {} ", self.at)?;
        match self.flaw {
            Flaw::PastTheEnd => write!(f, "reaches past the end of the page"),
            Flaw::ShortPage => write!(f, "is where the page ends, which is shorter than its header says"),
            Flaw::Empty => write!(f, "is empty"),
            Flaw::Length(len) => write!(f, "has {len} bytes, which its type never has"),
            Flaw::NaaFormat(digit) => write!(f, "has an unknown NAA format {digit:x}"),
            Flaw::Text => write!(f, "is not the text that it should be"),
            Flaw::CodeSet => write!(f, "has a code set that does not go with its type"),
            Flaw::UuidHeader => write!(f, "is no UUID of RFC 4122"),
            Flaw::Placeholder => write!(f, "names no disk: it is a placeholder, such as all zeros"),
        }
    }
}

/// Page 0x83: all that a disk says of its identity.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identification<'a> {
    /// The sound designators in the order of the page.
    pub designators: Vec<Designator<'a>>,
    /// What was passed over.
    pub notes: Vec<Note>,
}

impl Identification<'_> {
    /// The best identity on the page: of the designators of the logical unit, the one whose
    /// [`Kind`](super::id::Kind) comes first, and of those the first on the page.
    pub fn identity(&self) -> Option<DiskId> {
        self.designators
            .iter()
            .filter(|designator| designator.association == Association::LogicalUnit)
            .filter_map(Designator::identity)
            .min_by_key(DiskId::kind)
    }
}

impl Designator<'_> {
    fn identity(&self) -> Option<DiskId> {
        match &self.value {
            Value::Naa(bytes) => DiskId::naa(bytes),
            Value::Eui64(bytes) => DiskId::eui(bytes),
            Value::Uuid(bytes) => DiskId::uuid(bytes),
            Value::ScsiName(name) => DiskId::name(name).ok(),
            Value::T10Vendor { vendor, specific } => {
                // A vendor without anything behind it is the same on all of its disks, and so is an ATA disk's model (its 40
                // bytes come first) without a serial.
                let serial = match (*vendor, specific.split_at_checked(40)) {
                    (b"ATA     ", Some((_, serial))) => serial,
                    _ => specific,
                };
                if is_no_serial(serial) {
                    return None;
                }
                DiskId::t10(std::str::from_utf8(&[*vendor, *specific].concat()).ok()?)
            }
            _ => None,
        }
    }
}

/// The bytes behind a VPD page's 4-byte header: as many as it announces, or as many as there are.
fn body(page: &[u8], wanted: u8) -> Result<(&[u8], bool), Error> {
    let [peripheral, code, high, low, rest @ ..] = page else {
        return Err(Error::Truncated { len: page.len() });
    };
    if *code != wanted {
        return Err(Error::OtherPage { wanted, got: *code });
    }
    match peripheral >> 5 {
        0 => {}
        qualifier => return Err(Error::NotConnected { qualifier }),
    }
    let announced = usize::from(u16::from_be_bytes([*high, *low]));
    match rest.get(..announced) {
        Some(body) => Ok((body, true)),
        None => Ok((rest, false)),
    }
}

/// Decodes page 0x83, header and all.
///
/// A designator whose length reaches past the end hides where the next one begins, so the page ends there; any
/// other flaw costs only the designator that has it.
pub fn parse_identification(page: &[u8]) -> Result<Identification<'_>, Error> {
    let (mut rest, whole) = body(page, 0x83)?;
    let mut found = Identification::default();
    let offset = |rest: &[u8]| page.len().saturating_sub(rest.len());
    // What lies behind the announced end is not the page's.
    let behind = page.len().saturating_sub(4).saturating_sub(rest.len());
    while !rest.is_empty() {
        let at = offset(rest).saturating_sub(behind);
        let next = match rest {
            [codes, types, _, len, tail @ ..] => {
                tail.split_at_checked(usize::from(*len)).map(|split| (*codes, *types, split))
            }
            _ => None,
        };
        let Some((codes, types, (bytes, tail))) = next else {
            let flaw = if whole { Flaw::PastTheEnd } else { Flaw::ShortPage };
            found.notes.push(Note { at, flaw });
            return Ok(found);
        };
        match designator(codes, types, bytes) {
            Ok(designator) => found.designators.push(designator),
            Err(flaw) => found.notes.push(Note { at, flaw }),
        }
        rest = tail;
    }
    if !whole {
        found.notes.push(Note { at: page.len(), flaw: Flaw::ShortPage });
    }
    Ok(found)
}

fn designator(codes: u8, types: u8, bytes: &[u8]) -> Result<Designator<'_>, Flaw> {
    if bytes.is_empty() {
        return Err(Flaw::Empty);
    }
    let association = match types >> 4 & 0b11 {
        0 => Association::LogicalUnit,
        1 => Association::TargetPort,
        2 => Association::TargetDevice,
        _ => Association::Reserved,
    };
    let code_set = match codes & 0x0f {
        1 => CodeSet::Binary,
        2 => CodeSet::Ascii,
        3 => CodeSet::Utf8,
        other => CodeSet::Reserved(other),
    };
    let value = match types & 0x0f {
        0x0 => Value::VendorSpecific(bytes),
        0x1 => t10_vendor(bytes)?,
        0x2 => match (code_set, bytes.len()) {
            (CodeSet::Binary, 8 | 12 | 16) => Value::Eui64(bytes),
            (CodeSet::Binary, len) => return Err(Flaw::Length(len)),
            _ => return Err(Flaw::CodeSet),
        },
        0x3 => naa(code_set, bytes)?,
        0x4 => Value::RelativeTargetPort(number(bytes)?),
        0x5 => Value::TargetPortGroup(number(bytes)?),
        0x6 => Value::LogicalUnitGroup(number(bytes)?),
        0x7 => Value::Md5(bytes.try_into().map_err(|_| Flaw::Length(bytes.len()))?),
        0x8 => {
            if !matches!(code_set, CodeSet::Ascii | CodeSet::Utf8) {
                return Err(Flaw::CodeSet);
            }
            Value::ScsiName(text(bytes)?)
        }
        0x9 => Value::ProtocolSpecific(bytes),
        0xa => match bytes {
            // The first nibble says that a UUID of RFC 4122 follows, the second byte is reserved.
            [0x10..=0x1f, _, uuid @ ..] => {
                Value::Uuid(uuid.try_into().map_err(|_| Flaw::Length(bytes.len()))?)
            }
            _ => return Err(Flaw::UuidHeader),
        },
        other => Value::Unknown(other),
    };
    let protocol = (types & 0x80 != 0).then_some(codes >> 4);
    let designator = Designator { association, code_set, protocol, value };
    let flaw = match &designator.value {
        Value::Naa(_) | Value::Eui64(_) | Value::Uuid(_) => {
            designator.identity().is_none().then_some(Flaw::Placeholder)
        }
        // Only here the digits of such a name have not been looked at yet.
        Value::ScsiName(name) => DiskId::name(name).err().map(|reason| match reason {
            Reason::Placeholder | Reason::NoValue => Flaw::Placeholder,
            _ => Flaw::Text,
        }),
        _ => None,
    };
    match flaw {
        Some(flaw) if association == Association::LogicalUnit => Err(flaw),
        _ => Ok(designator),
    }
}

fn t10_vendor(bytes: &[u8]) -> Result<Value<'_>, Flaw> {
    let (vendor, specific) = bytes.split_at_checked(8).ok_or(Flaw::Length(bytes.len()))?;
    // Only the vendor is ASCII by the letter; what follows is taken for an identity where it is text.
    if !vendor.iter().all(|b| matches!(b, b' '..=b'~')) {
        return Err(Flaw::Text);
    }
    Ok(Value::T10Vendor { vendor, specific })
}

/// An NAA designator. Some arrays write it in ASCII digits, against the letter, and udev reads that too.
fn naa(code_set: CodeSet, bytes: &[u8]) -> Result<Value<'static>, Flaw> {
    let bytes = match code_set {
        CodeSet::Binary => bytes.to_vec(),
        CodeSet::Ascii => ascii_digits(bytes).ok_or(Flaw::Text)?,
        _ => return Err(Flaw::CodeSet),
    };
    match (bytes.first().map(|b| b >> 4), bytes.len()) {
        (Some(2 | 3 | 5), 8) | (Some(6), 16) => Ok(Value::Naa(bytes)),
        (Some(2 | 3 | 5 | 6), len) => Err(Flaw::Length(len)),
        (Some(format), _) => Err(Flaw::NaaFormat(format)),
        (None, _) => Err(Flaw::Empty),
    }
}

fn ascii_digits(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some((digit(*high)? << 4) | digit(*low)?)).collect()
}

fn number(bytes: &[u8]) -> Result<u16, Flaw> {
    match bytes {
        // The first two are obsolete or reserved.
        [_, _, high, low] => Ok(u16::from_be_bytes([*high, *low])),
        _ => Err(Flaw::Length(bytes.len())),
    }
}

/// Text that is ended or padded by NULs or blanks.
fn text(bytes: &[u8]) -> Result<&str, Flaw> {
    let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(bytes).map_err(|_| Flaw::Text)?.trim();
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(Flaw::Text);
    }
    Ok(text)
}

/// Decodes page 0x80: the serial without its padding, or `None` where there is none that can be shown.
pub fn parse_serial(page: &[u8]) -> Result<Option<&str>, Error> {
    let (bytes, _) = body(page, 0x80)?;
    Ok(text(bytes).ok())
}

/// What the standard INQUIRY data say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inquiry {
    /// The peripheral device type: 0 is a disk.
    pub device_type: u8,
    /// The T10 vendor, trimmed.
    pub vendor: String,
    /// The product, trimmed.
    pub product: String,
    /// The revision, trimmed.
    pub revision: String,
}

/// Decodes standard INQUIRY data. What does not print is shown as `?`.
pub fn parse_inquiry(data: &[u8]) -> Result<Inquiry, Error> {
    let field = |from: usize, to: usize| {
        let bytes = data.get(from..to).ok_or(Error::Truncated { len: data.len() })?;
        let shown: String = bytes
            .iter()
            .map(|&b| match b {
                b' '..=b'~' => char::from(b),
                0 => ' ',
                _ => '?',
            })
            .collect();
        Ok(shown.trim().to_owned())
    };
    let first = *data.first().ok_or(Error::Truncated { len: 0 })?;
    Ok(Inquiry {
        device_type: first & 0x1f,
        vendor: field(8, 16)?,
        product: field(16, 32)?,
        revision: field(32, 36)?,
    })
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(designators: &[(u8, u8, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (codes, types, bytes) in designators {
            body.extend([*codes, *types, 0, bytes.len() as u8]);
            body.extend(*bytes);
        }
        let mut page = vec![0, 0x83];
        page.extend((body.len() as u16).to_be_bytes());
        page.extend(body);
        page
    }

    const NAA6: [u8; 16] =
        [0x60, 0x00, 0xc2, 0x93, 0x9d, 0x1a, 0x4b, 0x0f, 0x8e, 0x2d, 0x7c, 0x6b, 0x5a, 0x49, 0x38, 0x27];
    const NAA5: [u8; 8] = [0x50, 0x00, 0xc5, 0x00, 0xa1, 0xb2, 0xc3, 0xd4];
    const UUID: [u8; 18] = [
        0x10, 0, 0x1e, 0xfe, 0x0e, 0xc1, 0x6b, 0x2e, 0x4b, 0x77, 0x9d, 0x61, 0x2d, 0x2f, 0x4a, 0x4a, 0x9b,
        0x01,
    ];

    fn identity(designators: &[(u8, u8, &[u8])]) -> Option<String> {
        parse_identification(&page(designators)).unwrap().identity().map(|id| id.to_string())
    }

    #[test]
    fn each_designator_gives_its_identity_and_the_best_one_wins() {
        let all: [(u8, u8, &[u8]); 9] = [
            (2, 0, b"vendor's own"),
            (2, 1, b"ACME    disk 0001"),
            (3, 8, b"iqn.2003-01.org.x:t1\0\0\0\0"),
            (1, 0xa, &UUID),
            (1, 2, &[0, 0x25, 0x38, 0x5b, 0x71, 0xb0, 0xa1, 0xc2]),
            (1, 3, &NAA5),
            (1, 3, &NAA6),
            (1, 7, &[7; 16]),
            (1, 6, &[0, 0, 0, 9]),
        ];
        let expected = [
            None,
            Some("t10.ACME_disk_0001"),
            Some("name.iqn.2003-01.org.x:t1"),
            Some("uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01"),
            Some("eui.0025385b71b0a1c2"),
            Some("naa.5000c500a1b2c3d4"),
            Some("naa.6000c2939d1a4b0f8e2d7c6b5a493827"),
            None,
            None,
        ];
        for (one, expected) in all.iter().zip(expected) {
            assert_eq!(identity(&[*one]).as_deref(), expected);
        }
        // Each best one so far beats all before it, on whichever side of them it stands.
        for upto in 2..=7 {
            assert_eq!(identity(&all[..upto]).as_deref(), expected[upto - 1]);
            let mut turned = all[..upto].to_vec();
            turned.reverse();
            assert_eq!(identity(&turned).as_deref(), expected[upto - 1]);
        }
        assert_eq!(parse_identification(&page(&all)).unwrap().designators.len(), 9);
    }

    #[test]
    fn eui_64_has_three_lengths_and_naa_may_be_in_digits() {
        for len in [8, 12, 16] {
            assert_eq!(identity(&[(1, 2, &[0xab; 16][..len])]), Some(format!("eui.{}", "ab".repeat(len))));
        }
        assert_eq!(identity(&[(2, 3, b"5000C500A1B2C3D4")]).as_deref(), Some("naa.5000c500a1b2c3d4"));
        assert_eq!(identity(&[(3, 8, b"naa.5000C500A1B2C3D4")]).as_deref(), Some("naa.5000c500a1b2c3d4"));
    }

    #[test]
    fn what_belongs_to_a_port_or_to_the_array_is_never_the_disk_s_identity() {
        for association in [0x90, 0xa0, 0xb0, 0x10, 0x20, 0x30] {
            let page = page(&[(0x61, association | 3, &NAA5)]);
            let found = parse_identification(&page).unwrap();
            assert_eq!(found.designators.len(), 1);
            assert_ne!(found.designators[0].association, Association::LogicalUnit);
            assert_eq!(found.identity(), None);
        }
        assert_eq!(identity(&[(0x61, 0x93, &NAA6), (1, 3, &NAA5)]).as_deref(), Some("naa.5000c500a1b2c3d4"));
    }

    /// As libata makes it.
    fn ata(serial: &str) -> String {
        format!("{:<8}{:<40}{serial:<20}", "ATA", "QEMU HARDDISK")
    }

    #[test]
    fn hostile_designators_are_passed_over_with_a_note() {
        let cases: [(u8, u8, &[u8], Flaw); 26] = [
            (1, 3, &[0x50, 0, 0, 0, 0, 0, 0, 0], Flaw::Placeholder),
            (1, 3, &[0x50, 0, 0xc5, 0, 0, 0, 0, 0], Flaw::Placeholder),
            (1, 2, &[0xff; 8], Flaw::Placeholder),
            (1, 0xa, &[0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], Flaw::Placeholder),
            (3, 8, b"naa.5000000000000000", Flaw::Placeholder),
            (3, 8, b"eui.0000000000000000", Flaw::Placeholder),
            (3, 8, b"____", Flaw::Placeholder),
            (3, 8, b"naa.5000", Flaw::Text),
            (3, 8, b"naa.5000C500A1B2C3Dx", Flaw::Text),
            (3, 8, b"naa.6000C2939D1A4B0F", Flaw::Text),
            (3, 8, b"uuid.1efe0ec1-6b2e", Flaw::Text),
            (1, 3, &[], Flaw::Empty),
            (1, 3, &NAA6[..8], Flaw::Length(8)),
            (1, 3, &NAA6[..15], Flaw::Length(15)),
            (1, 3, &[0x60; 20], Flaw::Length(20)),
            (1, 3, &[0x50; 16], Flaw::Length(16)),
            (1, 3, &[0x40; 8], Flaw::NaaFormat(4)),
            (3, 3, &NAA5, Flaw::CodeSet),
            (2, 3, b"5000C500A1B2C3D", Flaw::Text),
            (1, 2, &[1; 9], Flaw::Length(9)),
            (2, 2, &[1; 8], Flaw::CodeSet),
            (1, 4, &[1; 3], Flaw::Length(3)),
            (1, 7, &[1; 15], Flaw::Length(15)),
            (3, 8, &[0xff; 4], Flaw::Text),
            (2, 1, b"short", Flaw::Length(5)),
            (1, 0xa, &[0x20; 18], Flaw::UuidHeader),
        ];
        for (codes, types, bytes, flaw) in cases {
            let page = page(&[(codes, types, bytes), (1, 3, &NAA5)]);
            let found = parse_identification(&page).unwrap();
            assert_eq!(found.notes, [Note { at: 4, flaw }], "{codes:x} {types:x} {bytes:x?}");
            assert_eq!(found.identity(), DiskId::naa(&NAA5), "the sound one behind it is found all the same");
        }
        // All zeros name nothing.
        assert_eq!(identity(&[(1, 2, &[0; 8])]), None);
        for t10 in ["ACME            ".to_owned(), "ACME    0000-0000".to_owned(), ata("00000000"), ata("")] {
            assert_eq!(identity(&[(2, 1, t10.as_bytes())]), None, "{t10}");
        }
        assert_eq!(identity(&[(2, 1, ata("QM0").as_bytes())]).as_deref(), Some("t10.ATA_QEMU_HARDDISK_QM0"));
        // A port's does not speak of the disk.
        let port = page(&[(0x61, 0x93, &[0x50, 0, 0, 0, 0, 0, 0, 0]), (1, 3, &NAA5)]);
        assert_eq!(parse_identification(&port).unwrap().notes, []);
    }

    #[test]
    fn a_designator_that_reaches_into_the_next_or_past_the_end_ends_the_page() {
        let mut bytes = page(&[(1, 3, &NAA5), (1, 3, &NAA6)]);
        // The second one claims one byte more than there is.
        bytes[19] = 17;
        let found = parse_identification(&bytes).unwrap();
        assert_eq!(found.notes, [Note { at: 16, flaw: Flaw::PastTheEnd }]);
        assert_eq!(found.identity(), DiskId::naa(&NAA5));
        // Nor may it take bytes from behind the page.
        bytes.extend([0; 64]);
        assert_eq!(parse_identification(&bytes).unwrap().notes, [Note { at: 16, flaw: Flaw::PastTheEnd }]);
        // The first one overlaps the header of the second: its length is wrong, and what follows is not taken
        // for a designator, since its end is not one's beginning.
        let mut bytes = page(&[(1, 3, &NAA5), (1, 3, &NAA6)]);
        bytes[7] = 10;
        assert_eq!(parse_identification(&bytes).unwrap().identity(), None);
    }

    #[test]
    fn a_page_that_is_cut_gives_what_came_and_says_so() {
        let bytes = page(&[(1, 3, &NAA5), (1, 3, &NAA6)]);
        let found = parse_identification(&bytes[..20]).unwrap();
        assert_eq!(found.identity(), DiskId::naa(&NAA5));
        assert_eq!(found.notes, [Note { at: 16, flaw: Flaw::ShortPage }]);
        let found = parse_identification(&bytes[..16]).unwrap();
        assert_eq!(found.notes, [Note { at: 16, flaw: Flaw::ShortPage }]);
    }

    #[test]
    fn a_wrong_header_is_an_error() {
        assert_eq!(parse_identification(&[0, 0x83]), Err(Error::Truncated { len: 2 }));
        assert_eq!(
            parse_identification(&[0, 0, 2, 2, 31, 0]),
            Err(Error::OtherPage { wanted: 0x83, got: 0 }),
            "standard data from a device that ignores EVPD"
        );
        assert_eq!(parse_identification(&[0x7f, 0x83, 0, 0]), Err(Error::NotConnected { qualifier: 3 }));
        assert_eq!(parse_serial(&[0, 0x80, 0, 6, b' ', b'A', b'1', b' ', 0, 0]), Ok(Some("A1")));
        assert_eq!(parse_serial(&[0, 0x80, 0, 4, 32, 32, 32, 32]), Ok(None));
        assert_eq!(parse_serial(&[0, 0x83, 0, 0]), Err(Error::OtherPage { wanted: 0x80, got: 0x83 }));
    }

    #[test]
    fn standard_data_give_vendor_and_product() {
        let mut data = vec![0u8, 0, 6, 2, 31, 0, 0, 0];
        data.extend(b"VMware  Virtual disk    2.0 ");
        let inquiry = parse_inquiry(&data).unwrap();
        assert_eq!((inquiry.vendor.as_str(), inquiry.product.as_str()), ("VMware", "Virtual disk"));
        assert_eq!(inquiry.revision, "2.0");
        assert_eq!(parse_inquiry(&data[..30]), Err(Error::Truncated { len: 30 }));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            _ = parse_identification(&bytes).map(|found| found.identity());
            _ = parse_serial(&bytes);
            _ = parse_inquiry(&bytes);
        }

        #[test]
        fn no_designators_make_it_panic(bodies: Vec<(u8, u8, Vec<u8>)>, cut: u16, more: u8) {
            let parts: Vec<_> = bodies.iter().map(|(c, t, b)| (*c, *t, &b[..b.len().min(255)])).collect();
            let mut bytes = page(&parts);
            bytes[3] = bytes[3].wrapping_add(more);
            bytes.truncate(usize::from(cut).max(4));
            if let Ok(found) = parse_identification(&bytes) {
                for note in &found.notes {
                    prop_assert!((4..=bytes.len()).contains(&note.at));
                }
                // Whatever comes out is an identity that can be written down and read again.
                if let Some(id) = found.identity() {
                    prop_assert_eq!(id.to_string().parse::<DiskId>(), Ok(id));
                }
            }
        }
    }
}
