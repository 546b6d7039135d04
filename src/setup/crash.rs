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
    let release = host.os.el();
    match (&reserved, host.is_live()) {
        (Some(argument), true) => wanted.evidence(format!("the kernel keeps memory for it: {argument}")),
        (Some(argument), false) => wanted.evidence(format!("its kernels are to keep memory for it: {argument}")),
        (None, is_live) => wanted.find(
            Level::Warn,
            if is_live {
                "the kernel keeps no memory for a crash kernel: a crash leaves no dump"
            } else {
                "nothing in this image has its kernels keep memory for a crash kernel: a crash would leave no dump"
            },
            host.once_it_runs(if release.is_some_and(|release| release < 9) {
                "grubby --update-kernel=ALL --args=crashkernel=auto, then reboot"
            } else {
                "kdumpctl reset-crashkernel --kernel=ALL, then reboot"
            }),
        ),
    }
    if host.unit(UNIT).is_none() {
        let package =
            if release.is_some_and(|release| release >= 10) { "kdump-utils" } else { "kexec-tools" };
        wanted.find(
            Level::Warn,
            "kdump is not installed: a crash of the kernel leaves no dump",
            host.once_it_runs(format!("dnf install {package}")),
        );
        return Ok(wanted);
    }
    match dump_dir(host)? {
        Dump::Elsewhere(target) => wanted.evidence(format!("kdump keeps its dumps on `{target}`")),
        Dump::Here(dir) if host.root.exists(&dir) => wanted.evidence(format!("{dir} is there")),
        // With the label of its place, where there are labels.
        Dump::Here(dir) if host.is_live() => wanted.prepare.push(Call::new(
            "mkdir",
            &["-p", "-Z", "--", &dir],
            &format!("to have {dir}, where kdump keeps its dumps"),
        )),
        Dump::Here(dir) => wanted.find(
            Level::Warn,
            format!("{dir} is not there: no dump can be kept"),
            host.once_it_runs("mt-agent setup apply --only crash"),
        ),
    }
    if host.masked(UNIT) {
        wanted.find(
            Level::Warn,
            format!("{UNIT} is masked"),
            host.once_it_runs(format!("systemctl unmask {UNIT}")),
        );
    } else if reserved.is_some() {
        // Without that memory the unit fails at every boot, and is better not enabled.
        wanted.files.extend(host.enable(UNIT, "multi-user.target"));
        wanted.calls.push(
            Call::new("systemctl", &["daemon-reload"], "to read the units again")
                .only_if("/run/systemd/system"),
        );
        // It makes an initial RAM disk when it starts for the first time: that is left for the next boot.
        wanted.reboot = true;
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
        // `kernelopts=…` of Enterprise Linux 8.
        lines.extend(host.root.text("/boot/grub2/grubenv")?);
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

/// Where kdump keeps its dumps.
enum Dump {
    /// In a directory of this host.
    Here(String),
    /// On a device or a host of its own, in which `path` is looked for then.
    Elsewhere(String),
}

/// What `kdump.conf` says of that.
fn dump_dir(host: &Host) -> Result<Dump, Error> {
    const TARGETS: [&str; 11] =
        ["raw", "nfs", "nfs4", "ssh", "ext2", "ext3", "ext4", "xfs", "btrfs", "minix", "virtiofs"];
    let config = host.root.text("/etc/kdump.conf")?.unwrap_or_default();
    let mut dir = "/var/crash".to_owned();
    for line in config.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        if TARGETS.contains(&key) {
            return Ok(Dump::Elsewhere(format!("{key} {value}")));
        }
        if key == "path" && value.starts_with('/') {
            dir = value.to_owned();
        }
    }
    Ok(Dump::Here(dir))
}
