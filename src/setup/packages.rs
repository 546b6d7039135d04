//! The tools that a master target, or who looks after it, needs.

use super::{Call, Change, Error, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "packages",
    about: "the tools for file systems, disks and crashes are there",
    follows_disks: false,
    wanted,
};

/// A package, a program of it, and what that is for.
const PACKAGES: [(&str, &str, &str); 7] = [
    ("xfsprogs", "mkfs.xfs", "makes the file system of a retention disk"),
    ("e2fsprogs", "mkfs.ext4", "makes the file system of a retention disk"),
    ("lvm2", "lvm", "shows what lies on replicated disks"),
    ("lsscsi", "lsscsi", "shows SCSI disks"),
    ("rsync", "rsync", "copies exported points"),
    ("kexec-tools", "kexec", "keeps a dump when the kernel crashes"),
    ("open-vm-tools", "vmtoolsd", "lets VMware shut the machine down in order"),
];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let vendor = host.root.value("/sys/class/dmi/id/sys_vendor").filter(|_| host.is_live());
    let mut missing = Vec::new();
    for (package, program, purpose) in PACKAGES {
        if host.program(program) {
            wanted.evidence(format!("{package}: {program} is there"));
        } else if let Some(vendor) =
            vendor.as_ref().filter(|vendor| package == "open-vm-tools" && !vendor.contains("VMware"))
        {
            wanted.evidence(format!("{package}: not needed on a machine of {vendor}"));
        } else {
            missing.push((package, purpose));
        }
    }
    if missing.is_empty() {
        return Ok(wanted);
    }
    let names: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    let has_dnf = host.program("dnf");
    if host.wishes.install && has_dnf {
        let mut args = vec!["-y", "install"];
        args.extend(&names);
        wanted.prepare.push(Call::new("dnf", &args, "to install what is missing"));
        return Ok(wanted);
    }
    if host.wishes.install {
        return Err(Error::Refused(format!("there is no dnf here; install {} by hand", names.join(", "))));
    }
    let fix = if has_dnf { "mt-agent setup apply --only packages --install" } else { "install it by hand" };
    for (package, purpose) in missing {
        wanted.find(Level::Warn, format!("{package} is missing, which {purpose}"), fix);
    }
    Ok(wanted)
}
