//! The clock is kept right: recovery points are named by it.

use super::{Call, Change, Error, Host, Level, Wanted};

pub(super) const CHANGE: Change =
    Change { name: "time", about: "the clock is kept right by chrony", follows_disks: false, wanted };

/// Others that do the same; the hypervisor's own tools are none of them.
const OTHERS: [&str; 3] = ["ntpd.service", "systemd-timesyncd.service", "ntpsec.service"];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if let Some(other) = OTHERS.into_iter().find(|unit| host.enabled(unit)) {
        wanted.find(Level::Pass, format!("{other} keeps the clock right"), "");
        return Ok(wanted);
    }
    let unit = ["chronyd.service", "chrony.service"].into_iter().find(|unit| host.unit(unit).is_some());
    let Some(unit) = unit else {
        wanted.find(
            Level::Warn,
            "nothing keeps the clock right: recovery points may be named by a wrong time",
            host.once_it_runs("dnf install chrony, then mt-agent setup apply --only time"),
        );
        return Ok(wanted);
    };
    if host.masked(unit) {
        wanted.find(
            Level::Warn,
            format!("{unit} is masked, and nothing else keeps the clock right"),
            host.once_it_runs(format!("systemctl unmask {unit}, then mt-agent setup apply --only time")),
        );
        return Ok(wanted);
    }
    if host.enabled(unit) && is_running(host, unit) == Some(false) {
        wanted.find(
            Level::Warn,
            format!("{unit} does not run"),
            format!("systemctl restart {unit}; if it ends again, see `systemctl status {unit}`"),
        );
    }
    wanted.files.extend(host.enable(unit, "multi-user.target"));
    let systemd = "/run/systemd/system";
    wanted.calls.push(Call::new("systemctl", &["daemon-reload"], "to read the units again").only_if(systemd));
    if host.root.exists(systemd) {
        // Not after the link was taken away.
        let link = format!("/etc/systemd/system/multi-user.target.wants/{unit}");
        wanted.calls.push(
            Call::new("systemctl", &["start", unit], "to have the clock kept right at once").only_if(&link),
        );
    }
    Ok(wanted)
}

/// Whether a service runs: then it has a control group. Not known of a tree, nor where systemd is not in charge of them.
fn is_running(host: &Host, unit: &str) -> Option<bool> {
    // The second one up to Enterprise Linux 8.
    let slices = ["/sys/fs/cgroup/system.slice", "/sys/fs/cgroup/systemd/system.slice"];
    let slice = slices.into_iter().find(|slice| host.is_live() && host.root.exists(slice))?;
    Some(host.root.exists(format!("{slice}/{unit}")))
}
