//! The tools that a master target, or who looks after it, needs.

use super::{Call, Change, Error, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "packages",
    about: "the tools for file systems, disks and crashes are there",
    follows_disks: false,
    wanted,
};

/// A package, a program of it, and what that is for.
const PACKAGES: [(&str, &str, &str); 8] = [
    ("xfsprogs", "mkfs.xfs", "makes the file system of a retention disk"),
    ("e2fsprogs", "mkfs.ext4", "makes the file system of a retention disk"),
    ("lvm2", "lvm", "shows what lies on replicated disks"),
    ("lsscsi", "lsscsi", "shows SCSI disks"),
    ("rsync", "rsync", "copies exported points"),
    ("kexec-tools", "kexec", "starts the kernel that keeps a dump when this one crashes"),
    // Before Enterprise Linux 10 it is a part of the one before.
    ("kdump-utils", "kdumpctl", "keeps a dump when the kernel crashes"),
    ("open-vm-tools", "vmtoolsd", "lets VMware shut the machine down in order"),
];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let vendor = host.root.value("/sys/class/dmi/id/sys_vendor").filter(|_| host.is_live());
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for (package, program, purpose) in PACKAGES {
        if package == "kdump-utils" && host.os.el().is_none_or(|release| release < 10) {
            continue;
        } else if host.program(program) {
            there.push(package);
        } else if let Some(vendor) =
            vendor.as_ref().filter(|vendor| package == "open-vm-tools" && !vendor.contains("VMware"))
        {
            wanted.evidence(format!("{package}: not needed on a machine of {vendor}"));
        } else {
            missing.push((package, purpose));
        }
    }
    if !there.is_empty() {
        wanted.evidence(format!("there: {}", there.join(", ")));
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
        return Err(Error::refused("there is no dnf here", format!("install {} by hand", names.join(", "))));
    }
    let fix = if has_dnf { "mt-agent setup apply --only packages --install" } else { "install it by hand" };
    let fix = host.once_it_runs(fix);
    for (package, purpose) in missing {
        wanted.find(Level::Warn, format!("{package} is missing, which {purpose}"), &fix);
    }
    Ok(wanted)
}
