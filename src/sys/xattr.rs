//! Extended attributes of an open file: SELinux labels, access lists.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

/// The kernel's own limits (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const LONGEST: usize = 64 << 10;

/// The attributes that a file has; none where its file system has no such thing.
pub fn list(file: &impl AsFd) -> io::Result<Vec<CString>> {
    let mut names = vec![0u8; LONGEST];
    // SAFETY: the descriptor is open, and the kernel writes at most as many bytes as the buffer that is given has.
    let len = unsafe { libc::flistxattr(file.as_fd().as_raw_fd(), names.as_mut_ptr().cast(), names.len()) };
    let len = match usize::try_from(len) {
        Ok(len) => len,
        Err(_) => {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(Vec::new()) } else { Err(error) };
        }
    };
    names.truncate(len);
    // Each name ends with a zero.
    Ok(names
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .filter_map(|name| CString::new(name).ok())
        .collect())
}

/// The value of an attribute.
pub fn get(file: &impl AsFd, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; LONGEST];
    // SAFETY: the descriptor is open, the name ends with a zero, and the kernel writes at most as many bytes as the
    // buffer that is given has.
    let len = unsafe {
        libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    value.truncate(len);
    Ok(value)
}

/// Gives an attribute a value, in place of any that it has.
pub fn set(file: &impl AsFd, name: &CStr, value: &[u8]) -> io::Result<()> {
    let data = if value.is_empty() { ptr::null() } else { value.as_ptr().cast() };
    // SAFETY: the descriptor is open, the name ends with a zero, and the kernel reads as many bytes as the value has.
    let done = unsafe { libc::fsetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), data, value.len(), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_listed_and_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = c"user.mt-agent";
        match set(file.as_file(), name, b"value") {
            // tmpfs has had them since Linux 6.6 only.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                assert_eq!(list(file.as_file()).unwrap(), Vec::<CString>::new());
            }
            set => {
                set.unwrap();
                assert!(list(file.as_file()).unwrap().contains(&name.to_owned()));
                assert_eq!(get(file.as_file(), name).unwrap(), b"value");
                self::set(file.as_file(), name, b"").unwrap();
                assert_eq!(get(file.as_file(), name).unwrap(), b"");
            }
        }
        get(file.as_file(), c"user.none").unwrap_err();
    }
}
