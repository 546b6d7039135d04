//! Hints at what the virtual machine itself must not be: on a snapshot, or a clone.

use super::{Change, Error, Host, Level, Wanted};
use crate::disk::discover::{self, Role, Sysroot};

pub(super) const CHANGE: Change = Change {
    name: "snapshots",
    about: "the virtual machine is no clone, and runs on no snapshot",
    follows_disks: false,
    wanted,
};

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    wanted.evidence(
        "a snapshot cannot be seen from inside the virtual machine: take none of it, nor of a master target in use, since disks \
         with snapshots are refused when they are attached or handed back",
    );
    if !host.is_live() {
        wanted.find(
            Level::Pass,
            "whether the virtual machine is a clone is seen on the running host only",
            "",
        );
        return Ok(wanted);
    }
    let (assigned, unread) = match host.assigned() {
        Ok(assigned) => {
            (assigned.into_iter().map(|(id, (machine, _))| (id, machine.to_string())).collect(), Vec::new())
        }
        Err(error) => (Default::default(), vec![error.to_string()]),
    };
    let retention = Some(host.places.retention_dir.clone());
    let options =
        discover::Options { assigned, unread, retention, probe_exclusive: false, ..Default::default() };
    let disks = match discover::discover(&Sysroot::default(), &options) {
        Ok(disks) => disks,
        Err(error) => {
            wanted.evidence(format!("the disks cannot be listed: {error}"));
            return Ok(wanted);
        }
    };
    for disk in &disks {
        match disk.role {
            Role::Clone => wanted.find(
                Level::Fail,
                format!("{}: {}", disk.name, disk.evidence.join("; ")),
                "detach the one that is the copy, or give it another UUID in the virtual machine's settings",
            ),
            // An assigned disk that this host boots from or mounts: it came with the clone of another machine.
            Role::System | Role::InUse
                if disk.id.as_ref().is_some_and(|id| options.assigned.contains_key(id)) =>
            {
                wanted.find(
                    Level::Fail,
                    format!(
                        "{} is assigned to a machine and in use here: {}",
                        disk.name,
                        disk.evidence.join("; ")
                    ),
                    "take it away with `mt-agent protect remove`, or detach it",
                )
            }
            _ => {}
        }
    }
    if wanted.findings.is_empty() {
        wanted.find(
            Level::Pass,
            format!("none of {} disks shares its identity with another one", disks.len()),
            "",
        );
    }
    Ok(wanted)
}
