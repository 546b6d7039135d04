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
    if host
        .root
        .text("/etc/selinux/config")?
        .is_some_and(|config| config.lines().any(|line| line.trim() == "SELINUX=enforcing"))
    {
        wanted.evidence(
            "SELinux is enforcing: a confined service also needs the permission `io_uring { cmd }` and anonymous inodes of \
             class `[io_uring]`, which the policy module of mt-agent has",
        );
    }
    let text = format!(
        "# Written by `mt-agent setup apply`: io_uring is for the service of mt-agent alone.\n\
         kernel.io_uring_group = {group}\nkernel.io_uring_disabled = 1\n"
    );
    wanted.files.push(File::own(PATH, text));
    wanted.calls.push(Call::new("sysctl", &["-p", PATH], "to have it at once").only_if(PATH));
    Ok(wanted)
}
