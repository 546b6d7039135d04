//! LVM2: a physical volume's label and header, and the text in its metadata areas.
//!
//! The label lies in one of the first four sectors of 512 bytes:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | id | `LABELONE` |
//! | 8 | 8 | sector | which sector this is |
//! | 16 | 4 | crc | of the bytes from 20 to the sector's end |
//! | 20 | 4 | offset | where the header begins |
//! | 24 | 8 | type | `LVM2 001` |
//!
//! The header: the volume's UUID (32 characters), its size (8), then lists of areas, each of them an offset (8) and a size
//! (8), each list ended by an offset of 0: data, metadata. Then, if it is not 0, the version (4) of an extension, flags
//! (4), and the list of areas for boot loaders.
//!
//! A metadata area begins with a sector of its own, and is a ring of text from there on:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | crc | of the bytes from 4 to 512 |
//! | 4 | 16 | magic | |
//! | 20 | 4 | version | 1 |
//! | 24 | 8 | start | where this area begins |
//! | 32 | 8 | size | of this area |
//! | 40 | 24 each | texts | offset in the area (8), size (8), CRC (4), flags (4; bit 0: not kept up to date): the one that is valid, and one that is about to be |
//!
//! All of these checksums are CRC-32s that begin with a number of LVM's own and are not inverted.

pub mod group;
pub mod text;

use super::Error;
use super::fields::Fields;
use super::view::{MAX_READ, View};
use crate::checksum::crc32_raw;
use crate::units::Extent;
use text::Section;

const SECTOR: u64 = 512;
const CRC_SEED: u32 = 0xf597_a6cf;
const MAGIC: &[u8] = b" LVM2 x[5A%r0N*>";
/// What fits the label's sector is fewer.
const MAX_AREAS: usize = 32;
const IGNORED: u32 = 1;
/// What a byte of text takes: that its checksum is verified, and that it is parsed.
const PER_BYTE: u64 = 32;

/// A physical volume.
#[derive(Debug)]
pub struct PhysicalVolume {
    /// As LVM prints it.
    pub uuid: String,
    /// The size that it was made with, in bytes.
    pub size: u64,
    /// Its metadata areas.
    pub metadata_areas: Vec<Extent>,
    /// The areas that it keeps for boot loaders.
    pub boot_areas: Vec<Extent>,
    /// The text of the volume group that it belongs to, as far as it has one.
    pub text: Option<Section>,
    /// Why nothing that it says of free space can be trusted.
    pub flaw: Option<Error>,
}

/// A checksum as LVM computes it.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32_raw(CRC_SEED, bytes)
}

/// The 32 characters of an identifier, in groups as LVM prints them.
fn identifier(fields: Fields<'_>, at: u64) -> Result<String, Error> {
    let bytes = fields.bytes(at, 32)?;
    if !bytes.iter().all(u8::is_ascii_alphanumeric) {
        return Err(fields.corrupt("an identifier with other characters than letters and digits", at));
    }
    let mut characters = bytes.iter().map(|byte| char::from(*byte));
    let groups = [6, 4, 4, 4, 4, 4, 6].map(|len| characters.by_ref().take(len).collect::<String>());
    Ok(groups.join("-"))
}

/// Reads the physical volume, if there is one.
pub fn read(view: &View<'_>) -> Result<Option<PhysicalVolume>, Error> {
    let block = view.read(0, view.size().min(4 * SECTOR))?;
    let fields = block.fields();
    for sector in 0..4u64 {
        let at = sector.saturating_mul(SECTOR);
        let Ok(label) = fields.part(at, SECTOR) else { break };
        if !label.has(0, b"LABELONE") || !label.has(24, b"LVM2 001") {
            continue;
        }
        if label.le64(8)? != sector {
            return Err(label.corrupt("a label that says it lies in another sector", 8));
        }
        if label.le32(16)? != checksum(label.bytes(20, SECTOR.saturating_sub(20))?) {
            return Err(label.corrupt("a label whose checksum does not hold", 16));
        }
        return header(view, label).map(Some);
    }
    Ok(None)
}

fn header(view: &View<'_>, label: Fields<'_>) -> Result<PhysicalVolume, Error> {
    let mut at = u64::from(label.le32(20)?);
    let uuid = identifier(label, at)?;
    let size = label.le64(at.saturating_add(32))?;
    if size == 0 || size > view.size() {
        return Err(label.corrupt("a physical volume larger than its place", at.saturating_add(32)));
    }
    at = at.saturating_add(40);
    areas(label, &mut at, view.size())?;
    let metadata_areas = areas(label, &mut at, view.size())?;
    let mut boot_areas = Vec::new();
    if label.le32(at)? != 0 {
        at = at.saturating_add(8);
        boot_areas = areas(label, &mut at, view.size())?;
    }
    let mut volume = PhysicalVolume { uuid, size, metadata_areas, boot_areas, text: None, flaw: None };
    let mut text: Option<Vec<u8>> = None;
    let mut differ = false;
    for area in &volume.metadata_areas {
        match (metadata(view, *area), &text) {
            (Ok(Some(found)), Some(known)) => differ |= found != *known,
            (Ok(found), None) => text = found,
            (Ok(None), _) => {}
            (Err(why), _) => _ = volume.flaw.get_or_insert(why),
        }
    }
    match text {
        None => {}
        Some(_) if differ => {
            volume.flaw = Some(Error::unsupported("two metadata areas with different texts"));
        }
        Some(text) => match text::parse_within(&text, view.memory()) {
            Ok((section, memory)) => {
                view.keep(memory);
                volume.text = Some(section);
            }
            Err(why) => _ = volume.flaw.get_or_insert(why),
        },
    }
    Ok(volume)
}

/// Reads a list of areas and goes behind its end.
fn areas(label: Fields<'_>, at: &mut u64, size: u64) -> Result<Vec<Extent>, Error> {
    let mut areas = Vec::new();
    while areas.len() <= MAX_AREAS {
        let (offset, len) = (label.le64(*at)?, label.le64(at.saturating_add(8))?);
        let place = *at;
        *at = at.saturating_add(16);
        if offset == 0 {
            return Ok(areas);
        }
        // An area of data goes to the end where it has no length.
        let len = if len == 0 { size.saturating_sub(offset) } else { len };
        let area = Extent::new(offset, len).filter(|area| area.end() <= size);
        areas
            .push(area.ok_or_else(|| label.corrupt("an area beyond the end of the physical volume", place))?);
    }
    Err(label.corrupt("more areas than a label has room for", *at))
}

/// The text that is valid in an area, if there is one.
fn metadata(view: &View<'_>, area: Extent) -> Result<Option<Vec<u8>>, Error> {
    let block = view.read(area.offset(), SECTOR)?;
    let header = block.fields();
    if header.le32(0)? != checksum(header.bytes(4, SECTOR.saturating_sub(4))?) {
        return Err(header.corrupt("a metadata header whose checksum does not hold", 0));
    }
    if !header.has(4, MAGIC) {
        return Err(header.corrupt("a metadata header without its magic", 4));
    }
    if header.le32(20)? != 1 {
        return Err(header.corrupt("a metadata header of another version", 20));
    }
    if header.le64(24)? != area.offset() || header.le64(32)? != area.len() {
        return Err(header.corrupt("a metadata header of another area", 24));
    }
    let (offset, len) = (header.le64(40)?, header.le64(48)?);
    if offset == 0 || header.le32(60)? & IGNORED != 0 {
        return Ok(None);
    }
    if header.le64(64)? != 0 {
        return Err(Error::unsupported("metadata that was about to be replaced"));
    }
    let ring = area.len().saturating_sub(SECTOR);
    if offset < SECTOR || offset >= area.len() || len == 0 || len > ring.min(MAX_READ) {
        return Err(header.corrupt("a text that does not lie in its area", 40));
    }
    view.spend(len.saturating_mul(PER_BYTE))?;
    let first = len.min(area.len().saturating_sub(offset));
    let mut text = view.read(area.offset().saturating_add(offset), first)?.bytes().to_vec();
    if first < len {
        let rest = view.read(area.offset().saturating_add(SECTOR), len.saturating_sub(first))?;
        text.extend(rest.bytes());
    }
    if checksum(&text) != header.le32(56)? {
        return Err(header.corrupt("a text whose checksum does not hold", 56));
    }
    Ok(Some(text))
}
