//! The drivers of the disks that may be attached later, loaded at boot.

use super::{Call, Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "kernel-modules",
    about: "the drivers of virtual disks are loaded at boot",
    follows_disks: false,
    wanted,
};

/// VMware's paravirtual and LSI Logic adapters, KVM's, the SCSI pass-through, and the file system of old SUSE roots.
const MODULES: [&str; 5] = ["vmw_pvscsi", "mptspi", "virtio_scsi", "sg", "reiserfs"];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    // The live host's own kernel; of a tree any may be booted.
    let kernels = match host.root.value("/proc/sys/kernel/osrelease").filter(|_| host.is_live()) {
        Some(kernel) => vec![kernel],
        None => host.root.names("/lib/modules"),
    };
    let mut has = Vec::new();
    for kernel in &kernels {
        let dir = format!("/lib/modules/{kernel}");
        let loadable = host.root.text(format!("{dir}/modules.dep"))?;
        let builtin = host.root.text(format!("{dir}/modules.builtin"))?.unwrap_or_default();
        // A directory that a removed kernel left has no list.
        if let Some(loadable) = loadable {
            has.push((kernel, names(&loadable), names(&builtin)));
        }
    }
    if has.is_empty() {
        wanted.find(
            Level::Warn,
            "no kernel modules are installed: what its kernel can drive is not known",
            "install the kernel of the host, then apply this again",
        );
        return Ok(wanted);
    }
    let mut listed = Vec::new();
    for module in MODULES {
        // systemd-modules-load fails where one is missing.
        let lacking: Vec<&str> = has
            .iter()
            .filter(|(_, loadable, builtin)| !loadable.iter().chain(builtin).any(|name| name == module))
            .map(|(kernel, ..)| kernel.as_str())
            .collect();
        if lacking.is_empty() {
            listed.push(module);
        } else {
            wanted.evidence(format!("{module} is not there for kernel {}", lacking.join(", ")));
        }
    }
    if listed.is_empty() {
        wanted.evidence("none of them is there for every kernel");
        return Ok(wanted);
    }
    wanted.evidence(format!("there: {}", listed.join(", ")));
    let text = format!("# Written by `mt-agent setup apply`.\n{}\n", listed.join("\n"));
    wanted.files.push(File::own("/etc/modules-load.d/mt-agent.conf", text));
    let mut args = vec!["-a"];
    args.extend(&listed);
    wanted.calls.push(Call::new("modprobe", &args, "to load them now"));
    Ok(wanted)
}

/// The names in `modules.dep` or `modules.builtin`, as the kernel writes them.
fn names(list: &str) -> Vec<String> {
    let file = |line: &str| {
        let path = line.split(':').next()?;
        let name = path.rsplit('/').next()?.split(".ko").next()?;
        (!name.is_empty()).then(|| name.replace('-', "_"))
    };
    list.lines().filter_map(file).collect()
}
