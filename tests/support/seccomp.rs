//! What RHEL and container runtimes do by configuration: io_uring_setup(2) fails with EPERM, for one process and its
//! children. The switch of the kernel would concern the whole machine.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// BPF instructions (linux/bpf_common.h, linux/seccomp.h).
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Offset of `nr` in `struct seccomp_data`.
const NUMBER: u32 = 0;

/// Makes the command run without io_uring.
pub fn forbid_io_uring(command: &mut Command) {
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let setup = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let eperm = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let mut filter = [
        op(LOAD_WORD, 0, 0, NUMBER),
        op(JUMP_IF_EQUAL, 0, 1, setup),
        op(RETURN, 0, 0, eperm),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: prctl(2) with these options reads `program` and the filter it points to, which both live until
        // it returns.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec only prctl(2) is called and nothing is allocated.
    unsafe { command.pre_exec(install) };
}
