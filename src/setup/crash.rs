//! A kernel that crashes leaves a dump: kdump, and `/var/crash`.

use super::{Call, Change, Error, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "crash",
    about: "a kernel that crashes leaves a dump in /var/crash",
    follows_disks: false,
    wanted,
};

const UNIT: &str = "kdump.service";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    layout(host, &mut wanted)?;
    let reserved = reserved(host)?;
    match &reserved {
        Some(argument) => wanted.evidence(format!("the kernel keeps memory for it: {argument}")),
        None => wanted.find(
            Level::Warn,
            "the kernel keeps no memory for a crash kernel: a crash leaves no dump",
            "kdumpctl reset-crashkernel (EL 8: grubby --update-kernel=ALL --args=crashkernel=auto), then reboot",
        ),
    }
    if host.unit(UNIT).is_none() {
        wanted.find(
            Level::Warn,
            "kdump is not installed: a crash of the kernel leaves no dump",
            "dnf install kexec-tools (EL 10: kdump-utils)",
        );
        return Ok(wanted);
    }
    let dump = dump_dir(host)?;
    if !host.root.exists(&dump) {
        wanted.find(
            Level::Warn,
            format!("{dump} is not there: no dump can be kept"),
            format!("mkdir -p {dump}"),
        );
    }
    if host.masked(UNIT) {
        wanted.find(Level::Warn, format!("{UNIT} is masked"), format!("systemctl unmask {UNIT}"));
    } else if reserved.is_some() {
        // Without that memory the unit fails at every boot, and is better not enabled.
        wanted.files.extend(host.enable(UNIT, "multi-user.target"));
        wanted.calls.push(
            Call::new("systemctl", &["daemon-reload"], "to read the units again")
                .only_if("/run/systemd/system"),
        );
    }
    Ok(wanted)
}

/// The documented layout: `/`, `/var/crash` and `/home` on ext4, and swap. Another one works, and is only told.
fn layout(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let fstab = host.root.text("/etc/fstab")?.unwrap_or_default();
    let entries = fstab.lines().filter_map(|line| {
        let mut fields = line.split('#').next()?.split_whitespace().skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let entries: Vec<(&str, &str)> = entries.collect();
    for place in ["/", "/var/crash", "/home"] {
        match entries.iter().find(|(at, _)| *at == place) {
            Some((_, kind)) => wanted.evidence(format!("{place} is a file system of its own ({kind})")),
            None => wanted.evidence(format!("{place} is no file system of its own")),
        }
    }
    let swap = entries.iter().any(|(_, kind)| *kind == "swap");
    wanted.evidence(if swap { "there is swap" } else { "there is no swap" });
    Ok(())
}

/// The argument by which the kernel keeps memory for the crash kernel.
fn reserved(host: &Host) -> Result<Option<String>, Error> {
    let mut lines = Vec::new();
    if host.is_live() {
        lines.extend(host.root.value("/proc/cmdline"));
    } else {
        lines.extend(host.root.text("/etc/kernel/cmdline")?);
        lines.extend(host.root.text("/etc/default/grub")?.map(|text| {
            let argument = |line: &&str| line.starts_with("GRUB_CMDLINE_LINUX");
            text.lines()
                .filter(argument)
                .map(|line| line.replace(['"', '\''], " "))
                .collect::<Vec<_>>()
                .join("\n")
        }));
        for name in host.root.names("/boot/loader/entries") {
            lines.extend(host.root.text(format!("/boot/loader/entries/{name}"))?);
        }
    }
    let argument = lines.iter().flat_map(|line| line.split_whitespace()).map(|word| {
        // GRUB_CMDLINE_LINUX="crashkernel=…
        word.rsplit_once("LINUX=").map_or(word, |(_, argument)| argument)
    });
    let mut reserved = argument.filter(|word| word.starts_with("crashkernel="));
    Ok(reserved.next().map(str::to_owned))
}

/// `path` of `kdump.conf`.
fn dump_dir(host: &Host) -> Result<String, Error> {
    let config = host.root.text("/etc/kdump.conf")?.unwrap_or_default();
    let path = config.lines().filter_map(|line| line.trim().strip_prefix("path")).find_map(|rest| {
        let path = rest.trim();
        (rest.starts_with(char::is_whitespace) && path.starts_with('/')).then(|| path.to_owned())
    });
    Ok(path.unwrap_or_else(|| "/var/crash".to_owned()))
}
