//! The host that is set up: its files, what system it is, and what it is to be set up for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::tree::Root;
use super::{Error, File};
use crate::disk::id::DiskId;
use crate::name::Name;
use crate::protection::Store;

/// Where the agent keeps things, in the host's own paths.
#[derive(Clone, Debug)]
pub struct Places {
    /// Its state; the records of the changes lie beside it.
    pub state_dir: PathBuf,
    /// The retention, with the protections.
    pub retention_dir: PathBuf,
    /// The port for the data.
    pub port: u16,
}

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// The disk that shall carry the retention.
    pub retention_disk: Option<DiskId>,
    /// Whether it may be one that is not empty.
    pub overwrite: bool,
    /// Whether packages that are missing are installed.
    pub install: bool,
    /// The configuration that was named.
    pub config: Option<PathBuf>,
}

/// The host that is set up.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its root directory.
    pub root: Root,
    /// What system it is.
    pub os: Os,
    /// Where the agent keeps things.
    pub places: Places,
    /// What the user asked for.
    pub wishes: Wishes,
}

/// What `/etc/os-release` says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Os {
    /// The distribution: `centos`.
    pub id: String,
    /// Those that it is like.
    pub like: Vec<String>,
    /// The first number of its version.
    pub major: Option<u32>,
}

impl Os {
    /// The release of Enterprise Linux, where it is one: CentOS, Red Hat, Rocky, Alma, Oracle.
    pub fn el(&self) -> Option<u32> {
        let is_el = matches!(self.id.as_str(), "rhel" | "centos" | "rocky" | "almalinux" | "ol")
            || self.like.iter().any(|like| like == "rhel");
        self.major.filter(|_| is_el)
    }

    fn parse(text: &str) -> Os {
        let mut os = Os::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches(['"', '\'']);
            match key.trim() {
                "ID" => os.id = value.to_owned(),
                "ID_LIKE" => os.like = value.split_whitespace().map(str::to_owned).collect(),
                "VERSION_ID" => os.major = value.split('.').next().and_then(|major| major.parse().ok()),
                _ => {}
            }
        }
        os
    }
}

impl Host {
    /// The host whose root directory is `root`.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn open(root: &Path, places: Places, wishes: Wishes) -> Result<Host, Error> {
        let root = Root::open(root)?;
        let release = match root.text("/etc/os-release")? {
            Some(text) => Some(text),
            None => root.text("/usr/lib/os-release")?,
        };
        Ok(Host { root, os: Os::parse(&release.unwrap_or_default()), places, wishes })
    }

    /// Whether this is the machine on which the program runs.
    pub fn is_live(&self) -> bool {
        self.root.is_live()
    }

    /// What to call in order to do this to the same host.
    pub fn command(&self, what: &str) -> String {
        let root = if self.is_live() { String::new() } else { format!(" --root {}", self.root.shown()) };
        let config = self.wishes.config.iter().map(|path| format!(" --config {}", path.display()));
        format!("mt-agent setup {what}{root}{}", config.collect::<String>())
    }

    /// What to do on a running host, where it may have to be started first.
    pub fn once_it_runs(&self, what: impl Into<String>) -> String {
        let what = what.into();
        if self.is_live() { what } else { format!("on the host, once it runs: {what}") }
    }

    /// Whether the directory that was named is the root of a host.
    ///
    /// # Errors
    /// Where nothing there says what system it is.
    pub fn expect_system(&self) -> Result<(), Error> {
        let says = |path| self.root.exists(path);
        if self.is_live() || says("/etc/os-release") || says("/usr/lib/os-release") {
            return Ok(());
        }
        Err(Error::refused(
            format!(
                "{} is not the root of a host: it has neither etc/os-release nor usr/lib/os-release",
                self.root.shown()
            ),
            "mount the root file system of the host there, or name with --root the directory that has its etc and usr",
        ))
    }

    /// The assigned disks, each with its machine and that machine's name for it.
    ///
    /// # Errors
    /// Where any protection cannot be read: a list that lacks a disk would do harm.
    pub fn assigned(&self) -> Result<BTreeMap<DiskId, (Name, Name)>, Error> {
        let retention = self.root.at(&self.root.real(&self.places.retention_dir)?);
        Store::open(retention).owners().map_err(|error| Error::Protection(Box::new(error)))
    }

    /// Whether there are protections at all: where the retention disk is not mounted there are none.
    pub fn has_protections(&self) -> bool {
        self.root.exists(self.places.retention_dir.join("machines"))
    }

    /// The boot that the host is in; none for a tree.
    pub fn boot(&self) -> Option<String> {
        if self.is_live() { self.root.value("/proc/sys/kernel/random/boot_id") } else { None }
    }

    /// The number of a group of the host's.
    ///
    /// # Errors
    /// Where `/etc/group` cannot be read.
    pub fn group(&self, name: &str) -> Result<Option<u32>, Error> {
        let groups = self.root.text("/etc/group")?.unwrap_or_default();
        Ok(groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
        }))
    }

    /// Who is in a group besides those whose first one it is.
    ///
    /// # Errors
    /// Where `/etc/group` cannot be read.
    pub fn members(&self, group: u32) -> Result<Vec<String>, Error> {
        let groups = self.root.text("/etc/group")?.unwrap_or_default();
        let mut groups = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let found = groups.find(|fields| fields.get(2).is_some_and(|number| number.parse() == Ok(group)));
        let members =
            found.as_ref().and_then(|fields| fields.get(3)).into_iter().flat_map(|list| list.split(','));
        Ok(members.map(|member| member.trim().to_owned()).collect())
    }

    /// The file of a systemd unit.
    pub fn unit(&self, name: &str) -> Option<PathBuf> {
        let dirs = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
        dirs.iter().map(|dir| Path::new(dir).join(name)).find(|path| {
            self.root.exists(path) && self.root.real(path).is_ok_and(|real| real != Path::new("/dev/null"))
        })
    }

    /// Whether a unit must not run: its name is a link to `/dev/null`.
    pub fn masked(&self, unit: &str) -> bool {
        self.root
            .real(&Path::new("/etc/systemd/system").join(unit))
            .is_ok_and(|real| real == Path::new("/dev/null"))
    }

    /// Whether a unit is wanted by any target.
    pub fn enabled(&self, unit: &str) -> bool {
        let dir = Path::new("/etc/systemd/system");
        let mut targets = self.root.names(dir).into_iter().filter(|name| name.ends_with(".wants"));
        !self.masked(unit) && targets.any(|target| self.root.link(dir.join(target).join(unit)).is_some())
    }

    /// The link by which systemd starts a unit with a target, as `systemctl enable` makes it; as it is, where it is there.
    pub fn enable(&self, unit: &str, target: &str) -> Option<File> {
        let path = Path::new("/etc/systemd/system").join(format!("{target}.wants")).join(unit);
        let to = self.root.link(&path).or_else(|| self.unit(unit))?;
        Some(File::link(path, to))
    }

    /// Whether a program is there.
    pub fn program(&self, name: &str) -> bool {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|dir| self.root.exists(Path::new(dir).join(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enterprise_linux_is_known_by_its_family() {
        let stream = Os::parse(
            "NAME=\"CentOS Stream\"\nVERSION=\"9\"\nID=\"centos\"\nID_LIKE=\"rhel fedora\"\nVERSION_ID=\"9\"\n",
        );
        assert_eq!(stream.el(), Some(9));
        assert_eq!(Os::parse("ID=almalinux\nVERSION_ID='8.10'\n").el(), Some(8));
        assert_eq!(Os::parse("ID=x\nID_LIKE=\"a rhel\"\nVERSION_ID=10.0").el(), Some(10));
        assert_eq!(Os::parse("ID=debian\nVERSION_ID=\"12\"\n").el(), None);
        assert_eq!(Os::parse("ID=debian\nVERSION_ID=\"12\"\n").major, Some(12));
        assert_eq!(Os::parse(""), Os::default());
    }
}
