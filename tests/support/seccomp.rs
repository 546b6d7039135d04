//! System calls that fail, by a seccomp filter: as RHEL and container runtimes forbid io_uring by configuration (the
//! switch of the kernel would concern the whole machine), and as a disk does whose flush fails; or calls that do not come back,
//! as with a disk that hangs.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// BPF instructions (linux/bpf_common.h, linux/seccomp.h).
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_FROM: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets of `nr` and of the lower half of `args[3]` in `struct seccomp_data`.
const NUMBER: u32 = 0;
const FOURTH: u32 = 40;

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

/// Makes every pread(2) of the command from an offset in `range` wait for ever: it is told to a listener, which is the command
/// itself and does not listen.
pub fn hang_reads(command: &mut Command, range: Range<u32>) {
    let mut filter = [
        op(LOAD_WORD, 0, 0, NUMBER),
        op(JUMP_IF_EQUAL, 0, 4, u32::try_from(libc::SYS_pread64).unwrap()),
        op(LOAD_WORD, 0, 0, FOURTH),
        op(JUMP_FROM, 0, 2, range.start),
        op(JUMP_FROM, 1, 0, range.end),
        op(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: between fork and exec only system calls are made and nothing is allocated.
    unsafe { command.pre_exec(move || listen(&mut filter)) };
}

fn op(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn failing(number: libc::c_long, errno: i32) -> [libc::sock_filter; 4] {
    [
        op(LOAD_WORD, 0, 0, NUMBER),
        op(JUMP_IF_EQUAL, 0, 1, u32::try_from(number).unwrap()),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap()),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Installs a filter whose listener outlives an exec.
fn listen(filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: prctl(2) with this option reads no memory; seccomp(2) reads `program` and the filter it points to, which both live
    // until it returns; fcntl(2) is given the descriptor that came back.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || {
            let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
            let listener = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
            listener < 0 || libc::fcntl(listener as i32, libc::F_SETFD, 0) != 0
        }
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn install(filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: prctl(2) with these options reads `program` and the filter it points to, which both live until
    // it returns.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}
