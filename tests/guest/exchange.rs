//! Disks go by identity: what happens to their names, and what stands behind these, changes nothing.

use std::fs;
use std::path::Path;

use mt_agent::disk::device::{self, Error, OpenDisk, Refusal, TargetOptions};
use mt_agent::disk::discover::{self, Disk, IdSource, Options, Sysroot};
use mt_agent::disk::id::DiskId;

use crate::harness::small;
use crate::lio::{Identity, Lun, Store, Target, discovered, named, settle};
use crate::support::{MACHINE, MIB, Rig, assert_equal, run, tool, wait_for};

/// Two disks of random bytes, of which the first is attached.
struct Two {
    rig: Rig,
    target: Target,
    first: (Store, String),
    second: (Store, String),
    lun: Lun,
}

impl Two {
    fn new() -> Two {
        let rig = Rig::new(&[]);
        let disk = |number| {
            let (identity, path) = (Identity::vmware(number), rig.random(&format!("disk{number}"), 16 * MIB));
            (Store::existing(&path, &identity), identity.canonical())
        };
        let (first, second) = (disk(1), disk(2));
        let target = Target::new();
        let lun = target.attach(0, &first.0);
        Two { first, second, lun, target, rig }
    }

    /// Takes the first disk away and puts the second where it was: its LUN, and its name in /dev.
    fn exchange(&mut self) {
        let name = self.lun.name();
        // Nothing of the first stays: what holds a device keeps its name from being given again.
        self.rig.service.wait_until_idle();
        settle();
        self.lun.detach();
        self.lun = self.target.attach(0, &self.second.0);
        assert_eq!(self.lun.name(), name);
        settle();
    }
}

fn assign(rig: &Rig, disk: &str) {
    let config = rig.service.config();
    run(&["protect", "add", MACHINE, "--config", &config, "--overwrite", "--disk", &format!("d0={disk}")])
        .ok();
}

#[test]
fn an_exchanged_disk_is_not_written_and_one_that_moved_is_found() {
    small().run(|_| {
        let mut disks = Two::new();
        let before = fs::read(disks.rig.path("disk2")).unwrap();
        assign(&disks.rig, &disks.lun.node().display().to_string());
        let recorded = disks.rig.service.recorded(MACHINE, "d0");
        assert_eq!(recorded["id"], disks.first.1.as_str(), "it is kept by its identity");

        disks.exchange();
        let rig = &disks.rig;
        let source = rig.random("source", 16 * MIB);
        rig.send(&[("d0", &source)], &[]).fails(3, &[&format!("no disk here is {}", disks.first.1)]);
        assert!(fs::read(rig.path("disk2")).unwrap() == before, "another disk was written");
        assert_eq!(rig.state("d0"), "empty");

        let moved = disks.target.attach(5, &disks.first.0);
        settle();
        assert_ne!(moved.name(), disks.lun.name());
        rig.send(&[("d0", &source)], &[]).ok();
        rig.synchronized("d0");
        assert_equal(&source, &rig.path("disk1"));
        assert!(fs::read(rig.path("disk2")).unwrap() == before, "another disk was written");
    });
}

fn options() -> Options {
    Options { probe_exclusive: false, ..Options::default() }
}

fn listed(id: &DiskId) -> Disk {
    let disks = discover::discover(&Sysroot::default(), &options()).unwrap();
    disks.into_iter().find(|disk| disk.id.as_ref() == Some(id)).expect("the disk")
}

/// The disk that was found where another one was expected.
#[track_caller]
fn changed(result: Result<OpenDisk, Error>) -> (String, Option<String>) {
    match result {
        Err(Error::Refused { reason: Refusal::Changed { node, found }, .. }) => {
            (node, found.map(|id| id.to_string()))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_disk_exchanged_between_the_listing_and_the_open_is_refused() {
    small().run(|_| {
        let mut disks = Two::new();
        let id: DiskId = disks.first.1.parse().unwrap();
        settle();
        let before = listed(&id);
        device::open_listed(before.clone(), &id, &TargetOptions::default()).unwrap();
        disks.exchange();
        let result = device::open_listed(before.clone(), &id, &TargetOptions::default());
        assert_eq!(changed(result), (before.node.display().to_string(), Some(disks.second.1)));
        assert!(matches!(
            device::inspect(&before),
            Err(Error::Refused { reason: Refusal::Changed { .. }, .. })
        ));
    });
}

/// A LUN that its array maps anew, without a word: udev's database and sysfs say what was there before.
#[test]
fn a_disk_exchanged_behind_the_kernels_back_is_refused() {
    small().run(|_| {
        let rig = Rig::new(&[]);
        // That scsi_debug's host is not the first one: its number is a part of the identity, or is not.
        let _host = Target::new();
        tool("modprobe", &["scsi_debug"]);
        wait_for("the disk", || (discovered().len() == 1).then_some(()));
        settle();
        let (old, new) = ("naa.3333333000000fa0", "naa.33333330000007d0");
        let name = discovered()[0]["name"].as_str().unwrap().to_owned();
        assert_eq!(discovered()[0]["id"], old);
        let node = format!("/dev/{name}");
        assign(&rig, &node);
        let id: DiskId = old.parse().unwrap();
        device::open_target(&id, &TargetOptions::default()).unwrap();

        fs::write("/sys/bus/pseudo/drivers/scsi_debug/vpd_use_hostno", "0").unwrap();
        assert_eq!(named(&discovered(), &name)["id"], old, "the kernel knows better, and this shows nothing");
        let result = device::open_target(&id, &TargetOptions::default());
        assert_eq!(changed(result), (node.clone(), Some(new.to_owned())));
        let file = fs::File::open(&node).unwrap();
        let read = device::read_identity(&file, &Sysroot::default()).unwrap();
        assert_eq!(read, Some((new.parse().unwrap(), IdSource::SgIo)));
        let before = fs::read(&node).unwrap();
        let source = rig.random("source", MIB);
        rig.send(&[("d0", &source)], &[]).fails(3, &[new, "the disks changed meanwhile"]);
        assert!(fs::read(&node).unwrap() == before);
        // Nor is it assigned under a name that is not its own.
        let config = rig.service.config();
        let add =
            ["protect", "add", "db01", "--config", &config, "--overwrite", "--disk", &format!("d0={node}")];
        run(&add).fails(3, &["it is assigned to machine web01"]);
        assert!(Path::new(&node).exists());
    });
}
