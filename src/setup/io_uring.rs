//! Who may use io_uring: the service's group, and nobody else.
//!
//! Enterprise Linux 9 and 10 come with `kernel.io_uring_disabled = 2`: nobody may, not even root. 1 lets in the processes of
//! one group, 0 everyone. Without io_uring the agent writes by threads, which is slower.

use super::{Call, Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "io-uring",
    about: "the service may use io_uring, and nobody else is let in by that",
    follows_disks: false,
    wanted,
};

const PATH: &str = "/etc/sysctl.d/60-mt-agent-io-uring.conf";
const GROUP: &str = "mt-agent";
const THREADS: &str = "the agent writes by threads (`engine = \"threads\"`), which needs nothing";
/// What a ring is to SELinux. No more than that: its commands, its polling thread and others' credentials are not used.
const ANONYMOUS: &str = "{ create getattr ioctl map read write }";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let live = host.root.value("/proc/sys/kernel/io_uring_disabled").filter(|_| host.is_live());
    match (live.as_deref(), host.os.el()) {
        (Some("0"), _) => {
            wanted.find(Level::Pass, "kernel.io_uring_disabled is 0: everyone may use io_uring", "");
            return Ok(wanted);
        }
        (Some(value), _) => wanted.evidence(format!("kernel.io_uring_disabled is {value}")),
        (None, _) if host.is_live() => {
            // Before Linux 6.6 there is no such switch.
            wanted.find(
                Level::Pass,
                format!("this kernel has no switch for io_uring; where it has no io_uring, {THREADS}"),
                "",
            );
            return Ok(wanted);
        }
        (None, Some(9..)) => {
            wanted.evidence("Enterprise Linux 9 and later come with kernel.io_uring_disabled = 2")
        }
        (None, Some(_)) => {
            wanted.find(Level::Pass, format!("the kernel of this release has no io_uring: {THREADS}"), "");
            return Ok(wanted);
        }
        (None, None) => {
            wanted.find(Level::Pass, "not Enterprise Linux: its kernel lets everyone use io_uring", "");
            return Ok(wanted);
        }
    }
    let Some(group) = host.group(GROUP)? else {
        return Err(Error::refused(
            format!("there is no group {GROUP}, which io_uring is to be given to"),
            format!("install the RPM of mt-agent, which makes it; until then {THREADS}"),
        ));
    };
    wanted.evidence(format!("group {GROUP} is {group}"));
    // -1 where nobody's is set.
    let set = host.root.value("/proc/sys/kernel/io_uring_group").filter(|_| live.as_deref() == Some("1"));
    if let Some(other) = set.and_then(|set| set.parse::<u32>().ok()).filter(|other| *other != group) {
        let ours = host.root.text(PATH)?.unwrap_or_default();
        if ours.lines().any(|line| line == format!("kernel.io_uring_group = {other}")) {
            wanted.evidence(format!("group {GROUP} was {other}"));
        } else if host.members(other)?.iter().any(|member| member == GROUP) {
            wanted.find(Level::Pass, format!("group {other} may use io_uring, and {GROUP} is in it"), "");
            return Ok(wanted);
        } else {
            // The kernel knows one group only.
            return Err(Error::refused(
                format!("group {other} may use io_uring, and nobody of it might any more"),
                format!(
                    "usermod --append --groups {other} {GROUP}, then restart the service; until then {THREADS}"
                ),
            ));
        }
    }
    if host
        .root
        .text("/etc/selinux/config")?
        .is_some_and(|config| config.lines().any(|line| line.trim() == "SELINUX=enforcing"))
    {
        wanted.evidence(format!(
            "SELinux is enforcing: a confined service also needs {ANONYMOUS} on anonymous inodes of its own, which the policy \
             module of mt-agent gives it; without that {THREADS}"
        ));
    }
    let text = format!(
        "# Written by `mt-agent setup apply`: io_uring is for the service of mt-agent alone.\n\
         kernel.io_uring_group = {group}\nkernel.io_uring_disabled = 1\n"
    );
    wanted.files.push(File::own(PATH, text));
    wanted.calls.push(Call::new("sysctl", &["-p", PATH], "to have it at once").only_if(PATH));
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_module_gives_what_is_said_to_be_needed() {
        let module = include_str!("../../packaging/selinux/mt-agent.te");
        let rule = format!("allow mt_agent_t self:anon_inode {ANONYMOUS};");
        assert!(module.lines().any(|line| line.trim() == rule), "{rule}");
    }
}
