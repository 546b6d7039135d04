//! The same operations as the ring's, by plain system calls on a small pool of threads: for kernels without
//! io_uring, or where it is forbidden (`kernel.io_uring_disabled` is 2 by default on RHEL 9 and 10).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::ring::{Done, FILES, Op};
use crate::sys::wake::EventFd;

/// How many system calls run at once for one device.
const THREADS: usize = 4;

/// An operation on a file.
type Job = (u64, Arc<File>, Op);

/// A pool of threads for the files of one volume.
#[derive(Debug)]
pub(super) struct Pool {
    files: [Option<Arc<File>>; FILES],
    /// `None` only while dropping: closing it ends the threads.
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    wake: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(file: File) -> io::Result<Pool> {
        let (jobs, queue) = channel::<Job>();
        let (finished, done) = channel();
        let wake = Arc::new(EventFd::new()?);
        let queue = Arc::new(Mutex::new(queue));
        let worker = || {
            let (queue, finished, wake) = (queue.clone(), finished.clone(), wake.clone());
            move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((tag, file, mut op)) = job else { return };
                    let result = perform(&file, &mut op);
                    // The receiver goes away only after the threads were joined.
                    if finished.send(Done { tag, op, result }).is_err() {
                        return;
                    }
                    wake.wake();
                }
            }
        };
        let threads = (0..THREADS)
            .map(|n| std::thread::Builder::new().name(format!("io-{n}")).spawn(worker()))
            .collect::<io::Result<_>>()?;
        Ok(Pool { files: [Some(Arc::new(file)), None], jobs: Some(jobs), done, wake, threads })
    }

    pub(super) fn set_second(&mut self, file: File) {
        self.files[1] = Some(Arc::new(file));
    }

    pub(super) fn push(&mut self, tag: u64, file: usize, op: Op) {
        let file = self.files[file].clone().expect("a file that was given");
        let jobs = self.jobs.as_ref().expect("open until dropped");
        jobs.send((tag, file, op)).expect("the threads hold the other end until the queue is closed");
    }

    pub(super) fn wait(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // Cleared before the queue is emptied: what finishes in between is found by the next wait.
        self.wake.clear();
        done.extend(self.done.try_iter());
        Ok(())
    }

    pub(super) fn waker(&self) -> Arc<EventFd> {
        self.wake.clone()
    }
}

fn perform(file: &File, op: &mut Op) -> io::Result<u32> {
    let moved = |n: usize| u32::try_from(n).map_err(io::Error::other);
    match op {
        Op::Read { offset, buffer, skip } => moved(file.read_at(&mut buffer[*skip..], *offset)?),
        Op::Write { offset, buffer, skip } => moved(file.write_at(&buffer[*skip..], *offset)?),
        Op::Fallocate { mode, offset, len } => {
            let range = |n: u64| i64::try_from(n).map_err(io::Error::other);
            fallocate(file, FallocateFlags::from_bits_retain(*mode), range(*offset)?, range(*len)?)?;
            Ok(0)
        }
        Op::Sync => file.sync_data().map(|()| 0),
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on stderr; there is nothing to add while dropping.
            thread.join().ok();
        }
    }
}
