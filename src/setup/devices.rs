//! The host's block devices as sysfs shows them: which stands on which, what is mounted where, and which of them are disks
//! that are assigned.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Error, Host};
use crate::disk::discover::roles::{self, FileSystem};
use crate::disk::discover::{self, Disk, Options, Sysroot};
use crate::disk::id::DiskId;
use crate::name::Name;

const AGAIN: &str = "mend that, then run this again";

/// Deeper than partitions, arrays, encryption and volumes are ever stacked.
const DEEPEST: usize = 32;

/// The block devices of a host. They are called by their kernel names, which are good until the next boot only.
pub(super) struct Devices<'a> {
    host: &'a Host,
    /// All of them, partitions too.
    pub names: Vec<String>,
    disks: Vec<Disk>,
    assigned: BTreeMap<DiskId, (Name, Name)>,
    mounts: Vec<FileSystem>,
}

impl<'a> Devices<'a> {
    /// Looks at all of them. `None` in a tree that is not a running host, where nothing is known of them.
    ///
    /// # Errors
    /// Where it is not known what is assigned, or what is mounted.
    pub fn read(host: &'a Host) -> Result<Option<Devices<'a>>, Error> {
        let names = host.root.names("/sys/class/block");
        if names.is_empty() {
            return Ok(None);
        }
        let sysroot = Sysroot::new(host.root.at(Path::new("/")));
        let options = Options { include_loop: true, probe_exclusive: false, ..Options::default() };
        let disks = discover::discover(&sysroot, &options).map_err(|error| match error {
            discover::Error::Io(error) => Error::Io(error),
            discover::Error::Refused(why) => Error::refused(why, AGAIN),
        })?;
        let mut devices = Devices { host, names, disks, assigned: host.assigned()?, mounts: Vec::new() };
        let numbers: Vec<String> =
            devices.names.iter().filter_map(|name| devices.value(name, "dev")).collect();
        devices.mounts = roles::file_systems(&sysroot, &numbers).map_err(|why| Error::refused(why, AGAIN))?;
        Ok(Some(devices))
    }

    /// An attribute of a device.
    pub fn value(&self, name: &str, attribute: &str) -> Option<String> {
        self.host.root.value(format!("/sys/class/block/{name}/{attribute}"))
    }

    /// The names in a directory of a device: `slaves`, `holders`.
    pub fn list(&self, name: &str, directory: &str) -> Vec<String> {
        self.host.root.names(format!("/sys/class/block/{name}/{directory}"))
    }

    /// A property in udev's database.
    pub fn property(&self, name: &str, key: &str) -> Option<String> {
        let number = self.value(name, "dev")?;
        let properties = self.host.root.value(format!("/run/udev/data/b{number}"))?;
        let prefix = format!("E:{key}=");
        properties.lines().find_map(|line| line.strip_prefix(&prefix)).map(str::to_owned)
    }

    /// The path of its node.
    pub fn node(name: &str) -> String {
        format!("/dev/{}", name.replace('!', "/"))
    }

    /// Device mapper's identifier, which begins with whose it is: `LVM-`, `mpath-`, `CRYPT-`.
    pub fn dm_uuid(&self, name: &str) -> Option<String> {
        self.value(name, "dm/uuid")
    }

    /// The number of a partition.
    pub fn partition(&self, name: &str) -> Option<u32> {
        self.value(name, "partition")?.parse().ok()
    }

    /// The device itself and, of a partition, the disk that it is on.
    pub fn whole(&self, name: &str) -> String {
        let parent = || {
            let real = self.host.root.real(Path::new(&format!("/sys/class/block/{name}"))).ok()?;
            Some(real.parent()?.file_name()?.to_str()?.to_owned())
        };
        match self.partition(name) {
            Some(_) => parent().unwrap_or_else(|| name.to_owned()),
            None => name.to_owned(),
        }
    }

    /// The device and everything that it stands on.
    pub fn below(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![(name.to_owned(), 0)];
        while let Some((name, depth)) = left.pop() {
            let next = self.list(&name, "slaves").into_iter().chain([self.whole(&name)]);
            if depth < DEEPEST && found.insert(name.clone()) {
                left.extend(next.map(|name| (name, depth + 1)));
            }
        }
        found
    }

    /// The disk with this name, by whichever of its paths.
    pub fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.name == name || disk.paths.iter().any(|path| path == name))
    }

    /// The disk with this identity.
    pub fn disk_of(&self, id: &DiskId) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.id.as_ref() == Some(id))
    }

    /// The assigned disk below a device, if there is one.
    pub fn assigned_below(&self, name: &str) -> Option<&DiskId> {
        let below = self.below(name);
        let ids = below.iter().filter_map(|name| self.disk(name)?.id.as_ref());
        ids.into_iter().find(|id| self.assigned.contains_key(id))
    }

    /// What is assigned.
    pub fn assigned(&self) -> &BTreeMap<DiskId, (Name, Name)> {
        &self.assigned
    }

    /// The device that is mounted here.
    pub fn mounted(&self, point: &str) -> Option<&str> {
        // Of several on one point, the last one is seen.
        let at = |system: &&FileSystem| system.points.iter().any(|at| at == Path::new(point));
        let number = &self.mounts.iter().rev().find(at)?.devno;
        self.names.iter().find(|name| self.value(name, "dev").as_ref() == Some(number)).map(String::as_str)
    }
}
