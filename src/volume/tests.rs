use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::*;
use crate::storage::Geometry;
use crate::storage::device::{Device, EngineChoice};
use crate::storage::fault::{self, FaultDisk};
use crate::sys::aligned::PAGE;

fn start(storage: Box<dyn Storage>, size: u64) -> (Volume, Receiver<Event>) {
    let (sender, events) = channel();
    let arena = Arena::new(1 << 20).unwrap();
    let events_of = Box::new(move |event| drop(sender.send(event)));
    (Volume::start("test", storage, size, arena, events_of).unwrap(), events)
}

fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    let mut buffer = volume.arena().alloc_blocking(bytes.len());
    buffer.copy_from_slice(bytes);
    volume.write(offset, buffer, bytes.len() as u64).unwrap();
}

/// The cost of what was written until the flush, or the fault.
fn until_flushed(events: &Receiver<Event>) -> Result<u64, Fault> {
    let mut written = 0;
    loop {
        match events.recv().expect("the volume answers every flush") {
            Event::Written { cost, .. } => written += cost,
            Event::Paused | Event::Resumed => {}
            Event::Flushed { .. } => return Ok(written),
            Event::Faulted(fault) => return Err(fault),
        }
    }
}

#[test]
fn what_was_flushed_survives_a_power_cut_and_the_flush_comes_after_the_writes() {
    let disk = FaultDisk::new(vec![7; 64 << 10], 512);
    let (volume, events) = start(Box::new(disk.open().unwrap()), 64 << 10);
    write(&volume, 0, &[1; 4096]);
    write(&volume, 8192, &[2; 512]);
    volume.zero(Extent::new(4096, 4096).unwrap(), 4096).unwrap();
    volume.flush();
    assert_eq!(until_flushed(&events).unwrap(), 4096 + 512 + 4096);
    let log = disk.log();
    assert_eq!(log.len(), 4);
    assert_eq!(log[3], fault::Event::Flush);
    let after = disk.after_power_cut(log.len(), |_, _| false).disk;
    assert_eq!(after, disk.bytes());
    assert_eq!((after[0], after[4096], after[8192], after[8704]), (1, 0, 2, 7));
    let before = disk.after_power_cut(3, |_, _| false).disk;
    assert!(before.iter().all(|&byte| byte == 7), "without its flush nothing is promised");
}

#[test]
fn the_last_of_two_overlapping_writes_stays() {
    // The fault disk completes what is in flight together in reverse order.
    let disk = FaultDisk::new(vec![0; 64 << 10], 512);
    let (volume, events) = start(Box::new(disk.open().unwrap()), 64 << 10);
    for round in 1..=50u8 {
        write(&volume, 512, &[round; 2048]);
        write(&volume, 1024, &[100 + round; 512]);
        volume.flush();
        until_flushed(&events).unwrap();
        let bytes = disk.bytes();
        assert_eq!((bytes[512], bytes[1024], bytes[1536]), (round, 100 + round, round));
    }
}

#[test]
fn an_error_of_any_request_faults_the_volume_for_good() {
    // A scripted run makes six requests: two writes, a read and a write for the odd tail, a zero, a flush.
    let script = |volume: &Volume| {
        write(volume, 0, &[1; 4096]);
        write(volume, 8192, &[2; 4096]);
        write(volume, 16384, &[3; 100]);
        volume.zero(Extent::new(32768, 4096).unwrap(), 4096).unwrap();
        volume.flush();
    };
    for nth in 0..6 {
        for errno in [libc::EIO, libc::ENOSPC] {
            let disk = FaultDisk::new(vec![7; 64 << 10], 512);
            disk.fail_nth(nth, errno);
            let (volume, events) = start(Box::new(disk.open().unwrap()), 64 << 10);
            script(&volume);
            let fault = until_flushed(&events).expect_err("the failure is reported");
            assert_eq!(fault.0.source.raw_os_error(), Some(errno), "request {nth}");
            let requests = disk.log().len();
            script(&volume);
            assert!(events.recv().is_err(), "a faulted volume answers nothing more");
            assert_eq!(disk.log().len(), requests, "and does no more I/O");
        }
    }
    let disk = FaultDisk::new(vec![7; 64 << 10], 512);
    disk.fail_nth(6, libc::EIO);
    let (volume, events) = start(Box::new(disk.open().unwrap()), 64 << 10);
    script(&volume);
    until_flushed(&events).expect("the script has six requests, no more");
}

#[test]
fn what_lies_outside_is_refused_and_nothing_behind_the_source_is_touched() {
    let disk = FaultDisk::new(vec![7; 64 << 10], 4096);
    let size = 10_001;
    let (volume, events) = start(Box::new(disk.open().unwrap()), size);
    let end = Extent::new(size, 1).unwrap();
    assert_eq!(volume.check(end), Err(OutOfRange { extent: end, size }));
    let buffer = volume.arena().alloc_blocking(2);
    assert!(volume.write(size - 1, buffer, 2).is_err());
    assert!(volume.zero(Extent::new(0, size + 1).unwrap(), 1).is_err());
    write(&volume, 8192, &[1; 10_001 - 8192]);
    volume.zero(Extent::new(1, 5000).unwrap(), 1).unwrap();
    volume.flush();
    until_flushed(&events).unwrap();
    let bytes = disk.bytes();
    assert_eq!((bytes[0], bytes[1], bytes[5000], bytes[5001]), (7, 0, 0, 7));
    assert_eq!((bytes[10_000], bytes[10_001]), (1, 7));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Flush,
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let write = (0..size, 1..20_000usize, any::<u8>()).prop_map(|(at, len, byte)| Step::Write(at, len, byte));
    let zero = (0..size, 1..40_000u64).prop_map(|(at, len)| Step::Zero(at, len));
    // Mostly whole sectors, as senders send them; the odd ones too.
    let sectors =
        (0..size / 512, 1..40usize, any::<u8>()).prop_map(|(at, n, b)| Step::Write(at * 512, n * 512, b));
    prop::collection::vec(prop_oneof![3 => sectors, 2 => write, 2 => zero, 1 => Just(Step::Flush)], 1..60)
}

fn run_model(storage: Box<dyn Storage>, model: &mut [u8], size: u64, steps: &[Step]) {
    let (volume, events) = start(storage, size);
    for step in steps {
        match *step {
            Step::Write(at, len, byte) => {
                let len = len.min((size - at) as usize);
                model[at as usize..at as usize + len].fill(byte);
                write(&volume, at, &vec![byte; len]);
            }
            Step::Zero(at, len) => {
                let len = len.min(size - at);
                model[at as usize..(at + len) as usize].fill(0);
                volume.zero(Extent::new(at, len).unwrap(), 1).unwrap();
            }
            Step::Flush => {
                volume.flush();
                until_flushed(&events).unwrap();
            }
        }
    }
    volume.flush();
    until_flushed(&events).unwrap();
    volume.close();
}

const SIZE: u64 = 200_001;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_fault_disk_equals_the_model(steps in steps(SIZE), block in prop_oneof![Just(512u32), Just(4096)]) {
        let device = SIZE.next_multiple_of(4096) as usize + 8192;
        let mut model = vec![7; device];
        let disk = FaultDisk::new(model.clone(), block);
        run_model(Box::new(disk.open().unwrap()), &mut model, SIZE, &steps);
        prop_assert!(disk.bytes() == model);
    }
}

/// The same on a real file through both engines. (Loop devices: `tests/replicate.rs`.)
fn engine_equals_the_model(choice: EngineChoice, name: &str) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(40));
    runner
        .run(&(steps(SIZE),), |(steps,)| {
            let device = SIZE.next_multiple_of(4096) as usize + 8192;
            let mut model = vec![7; device];
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&model, 0).unwrap();
            let geometry = Geometry { size: device as u64, block: 512 };
            let arena = Arena::new(1 << 20).unwrap();
            let (storage, engine) =
                Device::new(file.try_clone().unwrap(), "file", geometry, choice, 8, &arena).unwrap();
            prop_assert_eq!(engine.name.as_str(), name);
            run_model(Box::new(storage), &mut model, SIZE, &steps);
            prop_assert!(content(&file) == model);
            Ok(())
        })
        .unwrap();
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn io_uring_equals_the_model() {
    engine_equals_the_model(EngineChoice::IoUring, "io-uring");
}

#[test]
fn threads_equal_the_model() {
    engine_equals_the_model(EngineChoice::Threads, "threads");
}

#[test]
fn a_full_device_faults_with_its_reason() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    for choice in [EngineChoice::IoUring, EngineChoice::Threads] {
        let arena = Arena::new(PAGE).unwrap();
        let geometry = Geometry { size: 1 << 20, block: 512 };
        let (storage, _) =
            Device::new(full.try_clone().unwrap(), "/dev/full", geometry, choice, 8, &arena).unwrap();
        let (volume, events) = start(Box::new(storage), 1 << 20);
        write(&volume, 0, &[1; 512]);
        volume.flush();
        let fault = until_flushed(&events).unwrap_err();
        assert_eq!(fault.0.to_string(), "write /dev/full at byte 0");
        assert_eq!(fault.0.source.raw_os_error(), Some(libc::ENOSPC));
    }
}
