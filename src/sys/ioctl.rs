//! The ioctls of block, SCSI and loop devices, and of file systems, as safe functions.
//!
//! Each takes a descriptor that the caller keeps open, and gives what the kernel said as an [`io::Result`]. None
//! of them changes a device; [`freeze`] and [`thaw`] stop the writes to a file system and let them go on.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

mod raw {
    use nix::libc::c_int;

    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_read_bad!(blksszget, 0x1268, c_int);
    nix::ioctl_read_bad!(blkpbszget, 0x127b, u32);
    nix::ioctl_read_bad!(blkroget, 0x125e, c_int);
    nix::ioctl_read_bad!(loop_get_status64, 0x4c05, super::LoopInfo64);
    nix::ioctl_readwrite_bad!(sg_io, 0x2285, super::SgIoHdr);
    nix::ioctl_readwrite!(fifreeze, b'X', 119, c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, c_int);
}

/// The size of a block device in bytes (`BLKGETSIZE64`).
pub fn size(device: &impl AsFd) -> io::Result<u64> {
    // The ioctl is declared with `size_t` but the kernel stores 64 bits.
    let mut bytes = 0u64;
    // SAFETY: the descriptor is open for as long as `device` is borrowed, and the kernel writes 8 bytes to a
    // local that is 8 bytes long.
    unsafe { raw::blkgetsize64(device.as_fd().as_raw_fd(), (&raw mut bytes).cast()) }?;
    Ok(bytes)
}

/// The logical sector size of a block device in bytes (`BLKSSZGET`).
pub fn logical_sector(device: &impl AsFd) -> io::Result<u32> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `int` to a local `int`.
    unsafe { raw::blksszget(device.as_fd().as_raw_fd(), &mut bytes) }?;
    u32::try_from(bytes).map_err(|_| io::Error::other("the kernel gave a negative sector size"))
}

/// The physical sector size of a block device in bytes (`BLKPBSZGET`).
pub fn physical_sector(device: &impl AsFd) -> io::Result<u32> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `unsigned int` to a local of that size.
    unsafe { raw::blkpbszget(device.as_fd().as_raw_fd(), &mut bytes) }?;
    Ok(bytes)
}

/// Whether the kernel holds a block device read-only (`BLKROGET`).
pub fn read_only(device: &impl AsFd) -> io::Result<bool> {
    let mut flag = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `int` to a local `int`.
    unsafe { raw::blkroget(device.as_fd().as_raw_fd(), &mut flag) }?;
    Ok(flag != 0)
}

/// Makes the file system on which the file lies whole on its device, and keeps all writers waiting until [`thaw`]
/// (`FIFREEZE`). `EBUSY` where it is frozen, `EOPNOTSUPP` where it has no such thing.
pub fn freeze(file: &impl AsFd) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open, and the kernel does not look at the argument of this request, which is a local `int`
    // all the same.
    unsafe { raw::fifreeze(file.as_fd().as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// Lets the writers of a frozen file system go on (`FITHAW`). `EINVAL` where it is not frozen.
pub fn thaw(file: &impl AsFd) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: as for `freeze`.
    unsafe { raw::fithaw(file.as_fd().as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[doc(hidden)]
#[derive(Debug)]
pub struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; 64],
    lo_crypt_name: [u8; 64],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// What a loop device stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoopStatus {
    /// `st_dev` of the backing file.
    pub device: u64,
    /// `st_ino` of the backing file.
    pub inode: u64,
    /// `st_rdev` of the backing file where that is a block device; else 0.
    pub rdevice: u64,
    /// Where in the file the device begins, in bytes.
    pub offset: u64,
    /// How many bytes of the file the device covers; 0 means all.
    pub size_limit: u64,
}

/// What a loop device stands on (`LOOP_GET_STATUS64`). `ENXIO` where it stands on nothing, `ENOTTY` or `EINVAL`
/// where the device is no loop device.
///
/// The file name in this structure is not given back: `losetup` writes it, it ends after 63 bytes, and nothing
/// keeps it true. Device and inode are the kernel's.
pub fn loop_status(device: &impl AsFd) -> io::Result<LoopStatus> {
    // SAFETY: `LoopInfo64` is plain integers and arrays of them, for which all zeros is a value.
    let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel writes a `loop_info64`, which has this very layout. A driver
    // that is no loop driver knows no such number and writes nothing.
    unsafe { raw::loop_get_status64(device.as_fd().as_raw_fd(), &mut info) }?;
    Ok(LoopStatus {
        device: info.lo_device,
        inode: info.lo_inode,
        rdevice: info.lo_rdevice,
        offset: info.lo_offset,
        size_limit: info.lo_sizelimit,
    })
}

/// `struct sg_io_hdr` of `scsi/sg.h`.
#[repr(C)]
#[doc(hidden)]
#[derive(Debug)]
pub struct SgIoHdr {
    interface_id: libc::c_int,
    dxfer_direction: libc::c_int,
    cmd_len: libc::c_uchar,
    mx_sb_len: libc::c_uchar,
    iovec_count: libc::c_ushort,
    dxfer_len: libc::c_uint,
    dxferp: *mut libc::c_void,
    cmdp: *mut libc::c_uchar,
    sbp: *mut libc::c_uchar,
    timeout: libc::c_uint,
    flags: libc::c_uint,
    pack_id: libc::c_int,
    usr_ptr: *mut libc::c_void,
    status: libc::c_uchar,
    masked_status: libc::c_uchar,
    msg_status: libc::c_uchar,
    sb_len_wr: libc::c_uchar,
    host_status: libc::c_ushort,
    driver_status: libc::c_ushort,
    resid: libc::c_int,
    duration: libc::c_uint,
    info: libc::c_uint,
}

const SG_DXFER_FROM_DEV: libc::c_int = -3;
const GOOD: u8 = 0x00;
const CHECK_CONDITION: u8 = 0x02;
const ILLEGAL_REQUEST: u8 = 0x05;
/// A disk that answers no INQUIRY for this long will not serve as a target either.
const INQUIRY_TIMEOUT_MS: u32 = 10_000;

/// Sends a SCSI INQUIRY (SPC-5, 6.7) by `SG_IO`: for the standard data, or for a VPD page with the EVPD bit.
///
/// Gives the bytes that came, or `None` where the disk has no such page or the device speaks no SCSI at all
/// (`ENOTTY` and its like). An error is a transport that failed, a status that is not GOOD, or a descriptor that
/// may not send commands.
pub fn inquiry(device: &impl AsFd, page: Option<u8>) -> io::Result<Option<Vec<u8>>> {
    // Old targets fail where they are asked for more than they have, so the first question is a small one, as
    // the kernel's own is; a page that is longer is asked for again.
    let first = match inquiry_of(device, page, 252)? {
        Some(bytes) => bytes,
        None => return Ok(None),
    };
    let whole = match (page, first.get(2..4)) {
        (Some(_), Some(len)) => u16::from_be_bytes([len[0], len[1]]).saturating_add(4),
        _ => 0,
    };
    if usize::from(whole) > first.len()
        && first.len() == 252
        && let Some(bytes) = inquiry_of(device, page, whole)?
    {
        return Ok(Some(bytes));
    }
    Ok(Some(first))
}

fn inquiry_of(device: &impl AsFd, page: Option<u8>, len: u16) -> io::Result<Option<Vec<u8>>> {
    let mut data = vec![0u8; usize::from(len)];
    let mut sense = [0u8; 64];
    let [high, low] = len.to_be_bytes();
    let mut command = [0x12, u8::from(page.is_some()), page.unwrap_or(0), high, low, 0];
    // SAFETY: `SgIoHdr` is integers and raw pointers, for which all zeros (null) is a value.
    let mut header: SgIoHdr = unsafe { std::mem::zeroed() };
    header.interface_id = i32::from(b'S');
    header.dxfer_direction = SG_DXFER_FROM_DEV;
    header.cmd_len = command.len() as u8;
    header.mx_sb_len = sense.len() as u8;
    header.dxfer_len = u32::from(len);
    header.dxferp = data.as_mut_ptr().cast();
    header.cmdp = command.as_mut_ptr();
    header.sbp = sense.as_mut_ptr();
    header.timeout = INQUIRY_TIMEOUT_MS;
    // SAFETY: the descriptor is open. `SgIoHdr` has the layout of `sg_io_hdr`, and its three pointers are to
    // locals that live to the end of this function and are as long as the lengths beside them say. SG_IO is
    // synchronous: nothing is written after it returns.
    match unsafe { raw::sg_io(device.as_fd().as_raw_fd(), &mut header) } {
        Ok(_) => {}
        Err(Errno::ENOTTY | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::ENXIO) => {
            return Ok(None);
        }
        Err(errno) => return Err(errno.into()),
    }
    match header.status {
        GOOD if header.host_status == 0 && header.driver_status & 0x0f == 0 => {}
        CHECK_CONDITION
            if sense_key(&sense[..usize::from(header.sb_len_wr).min(64)]) == Some(ILLEGAL_REQUEST) =>
        {
            return Ok(None);
        }
        _ => {
            return Err(io::Error::other(format!(
                "the disk refused the INQUIRY: SCSI status {:#04x}, host status {:#06x}, driver status {:#06x}",
                header.status, header.host_status, header.driver_status
            )));
        }
    }
    let missing = usize::try_from(header.resid).unwrap_or(0).min(data.len());
    data.truncate(data.len() - missing);
    Ok(Some(data))
}

/// The sense key of fixed (70h, 71h) or descriptor (72h, 73h) format sense data (SPC-5, 4.4).
fn sense_key(sense: &[u8]) -> Option<u8> {
    match sense.first()? & 0x7f {
        0x70 | 0x71 => Some(sense.get(2)? & 0x0f),
        0x72 | 0x73 => Some(sense.get(1)? & 0x0f),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_structures_are_as_long_as_the_kernel_s() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        #[cfg(target_pointer_width = "64")]
        assert_eq!(size_of::<SgIoHdr>(), 88);
    }

    #[test]
    fn a_file_is_no_block_device_and_says_so() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(size(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(loop_status(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(inquiry(&file, Some(0x83)).unwrap(), None);
    }

    #[test]
    fn the_sense_key_is_found_in_both_formats() {
        assert_eq!(sense_key(&[0x70, 0, 0x05, 0]), Some(5));
        assert_eq!(sense_key(&[0x72, 0x05, 0x24, 0]), Some(5));
        assert_eq!(sense_key(&[0x70]), None);
        assert_eq!(sense_key(&[]), None);
    }
}
