//! System calls that fail, by a seccomp filter: as RHEL and container runtimes forbid io_uring by configuration (the
//! switch of the kernel would concern the whole machine), and as a disk does whose flush fails.
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
    let mut filter = failing(libc::SYS_io_uring_setup, libc::EPERM);
    // SAFETY: between fork and exec only prctl(2) is called and nothing is allocated.
    unsafe { command.pre_exec(move || install(&mut filter)) };
}

/// Makes every call of `number` fail with `errno` in this thread, until it ends.
pub fn fail_in_this_thread(number: libc::c_long, errno: i32) {
    install(&mut failing(number, errno)).unwrap();
}

type Filter = [libc::sock_filter; 4];

fn failing(number: libc::c_long, errno: i32) -> Filter {
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    [
        op(LOAD_WORD, 0, 0, NUMBER),
        op(JUMP_IF_EQUAL, 0, 1, u32::try_from(number).unwrap()),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap()),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

fn install(filter: &mut Filter) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: prctl(2) with these options reads `program` and the filter it points to, which both live until
    // it returns.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}
