//! The disk of the retention: a file system on it, and the unit that mounts it.
//!
//! The file system is known by its label: a disk that carries one with it is taken as it is, with all the recovery points
//! that another master target left on it. So an interruption between making it and writing the unit loses nothing either.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Call, Change, Error, File, Host, Level, Wanted};
use crate::disk::device;
use crate::disk::discover::{self, Disk, Role, Sysroot};
use crate::disk::id::DiskId;
use crate::error::{IoError, chain};
use crate::layout::signature;
use crate::storage::ReadAt;
use crate::storage::file::ReadFile;

pub(super) const CHANGE: Change = Change {
    name: "retention",
    about: "recovery points have a file system of their own, which is mounted at boot",
    follows_disks: false,
    wanted,
};

/// As long as a label of XFS may be.
const LABEL: &str = "mt-retention";
const UNITS: &str = "/etc/systemd/system";
const LOOK: &str = "look again with `mt-agent discover-disks --rescan`";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let dir = &host.places.retention_dir;
    let unit = unit_name(dir);
    let path = Path::new(UNITS).join(&unit);
    let Some(id) = &host.wishes.retention_disk else {
        let fstab = host.root.text("/etc/fstab")?.unwrap_or_default();
        let mounted = |line: &str| {
            line.split('#').next().and_then(|line| line.split_whitespace().nth(1)) == dir.to_str()
        };
        if let Some(there) = host.root.read(&path)? {
            wanted.evidence(format!("{} is mounted by {unit}", dir.display()));
            wanted.files.push(File::shared(&path, there));
            wanted.files.extend(host.enable(&unit, "local-fs.target"));
        } else if fstab.lines().any(mounted) {
            wanted.find(Level::Pass, format!("{} is mounted by /etc/fstab", dir.display()), "");
        } else {
            wanted.find(
                Level::Fail,
                format!("{} has no file system of its own: recovery points would fill another one", dir.display()),
                host.once_it_runs(
                    "mt-agent setup apply --only retention --retention-disk DISKID, with one of `mt-agent discover-disks`",
                ),
            );
        }
        return Ok(wanted);
    };
    if !host.is_live() {
        return Err(Error::refused("a retention disk is made on the live host only", "leave --root out"));
    }
    let disk = find(host, id)?;
    let node = disk.node.display().to_string();
    let failed = |op, error| IoError::new(op, &*node, error);
    // As long as it is open, its name goes to no other disk.
    let file = fs::File::open(&disk.node).map_err(|error| failed("open", error))?;
    let found = device::read_identity(&file, &Sysroot::default());
    let found = found.map_err(|error| Error::refused(chain(&error), LOOK))?.map(|(found, _)| found);
    if found.as_ref() != Some(id) {
        return Err(Error::refused(format!("{node} turned out to be another disk than {id}"), LOOK));
    }
    let reader =
        ReadFile::new(file.try_clone().map_err(|error| failed("duplicate", error))?, &*node)?.afresh();
    let there = FileSystem::read(&reader)?;
    let new = match there {
        Some(there) if there.label == LABEL => {
            wanted.evidence(format!("{id} carries a retention file system: it is kept as it is"));
            there
        }
        _ => {
            let content = signature::probe(&reader)?;
            if !content.is_blank() && !host.wishes.overwrite {
                return Err(Error::refused(
                    format!("{id} ({node}) is not empty: {content}"),
                    "give another disk, or --overwrite: then everything on it is lost",
                ));
            }
            wanted.evidence(format!("{id} ({node}, {}): {content}", disk.size));
            let uuid = uuid_for(id);
            let (kind, call) = if host.program("mkfs.xfs") {
                (
                    "xfs",
                    Call::new(
                        "mkfs.xfs",
                        &["-f", "-q", "-L", LABEL, "-m", &format!("uuid={uuid}"), &node],
                        "to make the file system",
                    ),
                )
            } else {
                (
                    "ext4",
                    Call::new(
                        "mkfs.ext4",
                        &["-F", "-q", "-L", LABEL, "-U", &uuid, &node],
                        "to make the file system",
                    ),
                )
            };
            wanted.prepare.push(call);
            FileSystem { kind, uuid, label: LABEL.to_owned() }
        }
    };
    wanted.pinned.push(file);
    let FileSystem { kind, uuid, .. } = new;
    let text = format!(
        "# Written by `mt-agent setup apply`: the retention disk {id}.\n[Unit]\nDescription=Recovery points of mt-agent\n\n[Mount]\n\
         What=/dev/disk/by-uuid/{uuid}\nWhere={}\nType={kind}\nOptions=noatime,nodev,noexec,nosuid\n\n[Install]\n\
         WantedBy=local-fs.target\n",
        // `%` begins a specifier.
        dir.display().to_string().replace('%', "%%")
    );
    wanted.files.push(File::own(&path, text));
    // Wanted, not required: a host whose retention disk is away boots, and the service does not start.
    wanted.files.push(File::link(Path::new(UNITS).join("local-fs.target.wants").join(&unit), &path));
    let systemd = "/run/systemd/system";
    wanted.calls.push(Call::new("systemctl", &["daemon-reload"], "to read the units again").only_if(systemd));
    // Not after the unit was taken away.
    let mount =
        Call::new("systemctl", &["start", "--", &unit], "to mount it").only_if(&path.display().to_string());
    if host.root.exists(systemd) {
        wanted.calls.push(mount);
    }
    Ok(wanted)
}

/// The disk, which must be one that may be taken.
fn find(host: &Host, id: &DiskId) -> Result<Disk, Error> {
    let options = discover::Options {
        include_loop: id.backing_file().is_some(),
        assigned: host.assigned()?.into_iter().map(|(id, (machine, _))| (id, machine.to_string())).collect(),
        retention: Some(host.places.retention_dir.clone()),
        ..discover::Options::default()
    };
    let disks = discover::discover(&Sysroot::default(), &options)
        .map_err(|error| Error::refused(chain(&error), LOOK))?;
    let mut same = disks.into_iter().filter(|disk| disk.id.as_ref() == Some(id));
    let disk = same.next().ok_or_else(|| {
        let fix = "attach it, then look with `mt-agent discover-disks --rescan`";
        Error::refused(format!("no disk here is {id}"), fix)
    })?;
    match disk.role {
        Role::Free | Role::Retention if !disk.read_only && same.next().is_none() => Ok(disk),
        role => Err(Error::refused(
            format!(
                "{id} ({}) cannot carry the retention: its role is {}{}: {}",
                disk.node.display(),
                role.as_str(),
                if disk.read_only { ", it is read-only" } else { "" },
                if disk.evidence.is_empty() { &disk.problems } else { &disk.evidence }.join("; ")
            ),
            "give another one of `mt-agent discover-disks`",
        )),
    }
}

/// A file system, as its superblock names it.
struct FileSystem {
    kind: &'static str,
    uuid: String,
    label: String,
}

impl FileSystem {
    /// An XFS or ext4, if there is one that was made to its end.
    fn read(disk: &impl ReadAt) -> Result<Option<FileSystem>, Error> {
        let mut head = [0; 4096];
        if disk.size() < head.len() as u64 {
            return Ok(None);
        }
        disk.read_at(0, &mut head)?;
        Ok(FileSystem::parse(&head))
    }

    fn parse(head: &[u8; 4096]) -> Option<FileSystem> {
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
        };
        let parts = |kind, uuid: &[u8], label: &[u8]| {
            Some(FileSystem { kind, uuid: dashed(uuid.try_into().ok()?), label: text(label) })
        };
        // sb_inprogress is 1 until mkfs.xfs is done.
        if head.starts_with(b"XFSB") && head.get(126) == Some(&0) {
            return parts("xfs", head.get(32..48)?, head.get(108..120)?);
        }
        if head.get(1024 + 0x38..1024 + 0x3a) == Some(&[0x53, 0xef][..]) {
            return parts("ext4", head.get(1024 + 0x68..1024 + 0x78)?, head.get(1024 + 0x78..1024 + 0x88)?);
        }
        None
    }
}

fn dashed(bytes: [u8; 16]) -> String {
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [20, 16, 12, 8].into_iter().for_each(|at| text.insert(at, '-'));
    text
}

/// The UUID of a retention file system is made from the disk's identity, so that making it again gives the same unit.
fn uuid_for(id: &DiskId) -> String {
    let digest = Sha256::digest(format!("mt-agent retention {id}"));
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(digest).for_each(|(byte, from)| *byte = from);
    // RFC 9562: version 8, of one's own making.
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    dashed(bytes)
}

/// The name of the unit that mounts `dir`, as `systemd-escape --path` writes it.
fn unit_name(dir: &Path) -> String {
    let mut name = String::new();
    for part in dir.components().filter(|part| matches!(part, std::path::Component::Normal(_))) {
        if !name.is_empty() {
            name.push('-');
        }
        for &byte in part.as_os_str().as_bytes() {
            let plain = byte.is_ascii_alphanumeric()
                || matches!(byte, b':' | b'_')
                || (byte == b'.' && !name.is_empty());
            if plain { name.push(char::from(byte)) } else { name.push_str(&format!("\\x{byte:02x}")) }
        }
    }
    if name.is_empty() { "-.mount".to_owned() } else { name + ".mount" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_named_as_systemd_names_them() {
        for dir in ["/var/lib/mt-agent/retention", "/", "/.hidden/a b", "/x/.y:_z", "/ü"] {
            let name = unit_name(Path::new(dir));
            match std::process::Command::new("systemd-escape")
                .args(["--path", "--suffix=mount", dir])
                .output()
            {
                Ok(output) => assert_eq!(name, String::from_utf8_lossy(&output.stdout).trim(), "{dir}"),
                Err(_) if dir == "/" => println!("SKIPPED: there is no systemd-escape to compare with"),
                Err(_) => {}
            }
        }
        assert_eq!(
            unit_name(Path::new("/var/lib/mt-agent/retention")),
            "var-lib-mt\\x2dagent-retention.mount"
        );
    }

    #[test]
    fn a_file_system_that_was_not_made_to_its_end_is_none() {
        let mut head = [0; 4096];
        head[..4].copy_from_slice(b"XFSB");
        head[32..48].copy_from_slice(&[0xab; 16]);
        head[108..120].copy_from_slice(b"mt-retention");
        let found = FileSystem::parse(&head).unwrap();
        assert_eq!((found.kind, &*found.label), ("xfs", LABEL));
        assert_eq!(found.uuid, "abababab-abab-abab-abab-abababababab");
        head[126] = 1;
        assert!(FileSystem::parse(&head).is_none());
    }
}
