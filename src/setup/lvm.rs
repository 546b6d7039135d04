//! LVM looks at the host's own physical volumes only, so that no volume group of a replicated disk is ever activated, not
//! even one that has the name of the host's own.
//!
//! On Enterprise Linux 9 and later that is what LVM's devices file is for. Where there is one it is the administrator's, and
//! only loses the assigned disks. On 8 and older there is a filter, put into `lvmlocal.conf`.
//!
//! The host's own are the physical volumes of the volume groups that are active now, the root's among them, unless they lie
//! on an assigned disk. They are found by what sysfs says of active volumes and what stands in their metadata, and each
//! volume that the metadata names must have been found: otherwise nothing is written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::devices::Devices;
use super::{Call, Change, Error, File, Host, Level, Wanted};
use crate::disk::id::DiskId;
use crate::error::chain;
use crate::layout::lvm::text::{self, Section};
use crate::layout::lvm::{self, group};
use crate::layout::view::View;
use crate::storage::file::ReadFile;

pub(super) const CHANGE: Change = Change {
    name: "lvm",
    about: "LVM looks at the host's own physical volumes only",
    follows_disks: true,
    wanted,
};

const DEVICES_FILE: &str = "/etc/lvm/devices/system.devices";
const LOCAL: &str = "/etc/lvm/lvmlocal.conf";
const BEGIN: &str = "# BEGIN mt-agent";
const END: &str = "# END mt-agent";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if !host.program("lvm") {
        wanted.find(Level::Pass, "LVM is not installed", "");
        return Ok(wanted);
    }
    let has_devices_file = host.os.el().map_or_else(|| host.program("lvmdevices"), |release| release >= 9);
    let own = match Devices::read(host)? {
        Some(devices) => Some((own_volumes(host, &devices, &mut wanted)?, devices)),
        None => None,
    };
    if let Some((volumes, _)) = &own {
        if volumes.is_empty() {
            wanted.evidence("no volume group of this host is active: no physical volume stays");
        }
        for volume in volumes {
            let is_root = if volume.root { ", which carries /" } else { "" };
            wanted.evidence(format!(
                "stays: physical volume {} ({}) of volume group {}{is_root}",
                Devices::node(&volume.name),
                volume.uuid,
                volume.group
            ));
        }
    }
    if has_devices_file {
        devices_file(host, own, &mut wanted)?
    } else {
        filter(host, own, &mut wanted)?
    }
    // What the initial RAM disk has of these files is what it was made with; there a volume group with the name of the
    // root's would be taken for it.
    let dracut =
        Call::new("dracut", &["--force", "--regenerate-all"], "the initial RAM disks have a copy of it");
    wanted.calls.push(dracut.only_if("/usr/bin/dracut"));
    Ok(wanted)
}

/// A physical volume of the host's own.
struct Volume {
    /// The kernel's name of the device.
    name: String,
    uuid: String,
    group: String,
    /// Whether the root file system lies in its group.
    root: bool,
}

/// A physical volume that was found.
struct Found {
    name: String,
    uuid: String,
    /// The name and the identifier of its group, and the identifiers of all that belong to it.
    group: Option<(String, String, Vec<String>)>,
}

fn own_volumes(host: &Host, devices: &Devices<'_>, wanted: &mut Wanted) -> Result<Vec<Volume>, Error> {
    // Active groups by identifier, each with one of its volumes.
    let mut active: BTreeMap<String, String> = BTreeMap::new();
    for name in &devices.names {
        if let Some(group) = group_of(devices, name) {
            active.entry(group).or_insert_with(|| name.clone());
        }
    }
    let root = devices.mounted("/").map(|name| devices.below(name)).unwrap_or_default();
    let root: BTreeSet<String> = root.iter().filter_map(|name| group_of(devices, name)).collect();
    let found = found(host, devices, wanted)?;

    let mut own = Vec::new();
    for (group, volume) in &active {
        let is_root = root.contains(group);
        let described = found.iter().find_map(|found| found.group.as_ref().filter(|(_, id, _)| id == group));
        let Some((name, _, members)) = described else {
            let foreign = devices.assigned_below(volume);
            if let (Some(id), false) = (foreign, is_root) {
                wanted.find(
                    Level::Warn,
                    format!(
                        "the volume group of {} is active, and lies on the assigned disk {id}",
                        dm_name(devices, volume)
                    ),
                    "deactivate it: vgchange --activate n, with its name",
                );
                continue;
            }
            return Err(Error::refused(
                format!(
                    "the physical volumes of {} were not found{}: LVM would not find its volume group after the next boot",
                    dm_name(devices, volume),
                    foreign.map(|id| format!(" beside those on the assigned disk {id}")).unwrap_or_default()
                ),
                "see with `pvs` and `mt-agent protect list` that none of its disks is damaged or assigned, then apply this again",
            ));
        };
        for uuid in members {
            own.push(Volume {
                name: only_one(devices, &found, uuid, group).ok_or_else(|| {
                    Error::refused(
                        format!(
                            "the physical volume {uuid} of the active volume group {name} was not found once on the disks that \
                             are not assigned: LVM would not find the volume group after the next boot"
                        ),
                        "run `pvs -o +pv_uuid`, and see that none of its disks is assigned or there twice",
                    )
                })?,
                uuid: uuid.clone(),
                group: name.clone(),
                root: is_root,
            });
        }
    }
    let foreign = found.iter().filter_map(|found| {
        let (name, group, _) = found.group.as_ref()?;
        (!active.contains_key(group)).then_some((found, name))
    });
    for (found, name) in foreign {
        wanted.evidence(format!(
            "does not stay: {} of volume group {name}, which is not active; if it is this host's own, activate it, then apply \
             this again",
            Devices::node(&found.name)
        ));
    }
    Ok(own)
}

/// The identifier of the volume group that a device is a volume of, without dashes.
fn group_of(devices: &Devices<'_>, name: &str) -> Option<String> {
    let uuid = devices.dm_uuid(name)?;
    Some(uuid.strip_prefix("LVM-")?.get(..32)?.to_owned())
}

fn dm_name(devices: &Devices<'_>, name: &str) -> String {
    devices.value(name, "dm/name").map_or_else(|| name.to_owned(), |title| format!("{title} ({name})"))
}

/// All physical volumes that do not lie on assigned disks.
fn found(host: &Host, devices: &Devices<'_>, wanted: &mut Wanted) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for name in &devices.names {
        let passing = ["sr", "fd", "ram", "zram", "nbd"].iter().any(|prefix| {
            name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let empty = devices.value(name, "size").is_none_or(|size| size == "0");
        // A path of a map, and a member of an array, is not the device that LVM takes.
        let member = devices.list(name, "holders").iter().any(|holder| {
            let map = devices.dm_uuid(holder).is_some_and(|uuid| uuid.contains("mpath-"));
            map || devices.value(holder, "md/level").is_some()
        });
        if passing || empty || member || devices.assigned_below(name).is_some() {
            continue;
        }
        let node = host.root.real(Path::new(&Devices::node(name)))?;
        let carries_own =
            devices.list(name, "holders").iter().any(|holder| group_of(devices, holder).is_some());
        let read = ReadFile::open(&host.root.at(&node)).map_err(crate::layout::Error::Io);
        match read.and_then(|disk| lvm::read(&View::new(&disk))) {
            Ok(None) => {}
            Ok(Some(volume)) => found.push(describe(name, &volume)),
            Err(error) if carries_own => {
                let node = Devices::node(name);
                return Err(Error::refused(
                    format!("{node} carries an active volume group, and cannot be read: {}", chain(&error)),
                    format!("see what `pvck {node}` says and mend that, then apply this again"),
                ));
            }
            Err(error) => {
                wanted.evidence(format!("{} cannot be read: {}", Devices::node(name), chain(&error)))
            }
        }
    }
    Ok(found)
}

fn describe(name: &str, volume: &lvm::PhysicalVolume) -> Found {
    let group = group::own_group(volume).and_then(|(name, section)| {
        let members = section.section("physical_volumes")?.sections();
        let members = members.filter_map(|(_, member)| Some(member.text("id")?.to_owned())).collect();
        Some((name.to_owned(), section.text("id")?.replace('-', ""), members))
    });
    Found { name: name.to_owned(), uuid: volume.uuid.clone(), group }
}

/// The device with this physical volume; of several, the one that the active group stands on.
fn only_one(devices: &Devices<'_>, found: &[Found], uuid: &str, group: &str) -> Option<String> {
    let all: Vec<&Found> = found.iter().filter(|found| found.uuid == uuid).collect();
    let carries = |found: &&&Found| {
        devices
            .list(&found.name, "holders")
            .iter()
            .any(|holder| group_of(devices, holder).as_deref() == Some(group))
    };
    let carrying: Vec<_> = all.iter().filter(carries).collect();
    match (all.as_slice(), carrying.as_slice()) {
        ([one], _) => Some(one.name.clone()),
        (_, [one]) => Some(one.name.clone()),
        _ => None,
    }
}

// The devices file.

/// An entry of the devices file: `IDTYPE=sys_wwid IDNAME=naa.… DEVNAME=/dev/sda2 PVID=… PART=2`.
struct Entry<'a> {
    fields: BTreeMap<&'a str, &'a str>,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Entry<'a>> {
        let fields: BTreeMap<_, _> =
            line.split_whitespace().filter_map(|field| field.split_once('=')).collect();
        (line.trim_start().starts_with("IDTYPE=")).then_some(Entry { fields })
    }

    fn field(&self, name: &str) -> Option<&'a str> {
        // A dot stands for nothing.
        self.fields.get(name).copied().filter(|value| *value != ".")
    }

    /// The identity of its disk.
    fn id(&self, devices: Option<&Devices<'_>>) -> Option<DiskId> {
        let name = self.field("IDNAME")?;
        match self.field("IDTYPE")? {
            "loop_file" => DiskId::loop_file(Path::new(name)),
            "devname" => {
                let devices = devices?;
                let kernel = name.strip_prefix("/dev/")?.replace('/', "!");
                devices.disk(&devices.whole(&kernel))?.id.clone()
            }
            _ => name.parse().ok(),
        }
    }
}

fn devices_file(
    host: &Host,
    own: Option<(Vec<Volume>, Devices<'_>)>,
    wanted: &mut Wanted,
) -> Result<(), Error> {
    let assigned = match &own {
        Some((_, devices)) => devices.assigned().clone(),
        None => host.assigned()?,
    };
    let existing = host.root.read(DEVICES_FILE)?;
    let (volumes, devices) = match &own {
        Some((volumes, devices)) => (volumes.as_slice(), Some(devices)),
        None => (&[][..], None),
    };
    let content = match (existing, devices) {
        (Some(text), devices) => without(&text, volumes, devices, |id| assigned.contains_key(id), wanted)?,
        (None, Some(devices)) => fresh(volumes, devices, wanted).into_bytes(),
        (None, None) => {
            unknown_host(host, wanted)?;
            return Ok(());
        }
    };
    wanted.files.push(File::shared(DEVICES_FILE, content));
    let (settings, local) = settings(host)?;
    let used =
        settings.iter().rev().find_map(|settings| settings.section("devices")?.number("use_devicesfile"));
    // Enterprise Linux 9 and later have it on unless it is turned off.
    let on = used.map_or(host.os.el().is_some(), |used| used == 1);
    let block = if on { None } else { Some("devices {\n    use_devicesfile = 1\n}\n".to_owned()) };
    if !on {
        wanted.evidence("use_devicesfile is off: LVM would not read its devices file");
    }
    with_block(local, block, wanted);
    Ok(())
}

/// In the tree of a host that does not run nothing new is written, and what was written stays.
fn unknown_host(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let is_ours = |text: &Vec<u8>| text.windows(BEGIN.len()).any(|window| window == BEGIN.as_bytes());
    if let Some(text) = host.root.read(LOCAL)?.filter(is_ours) {
        wanted.files.push(File::shared(LOCAL, text));
    } else {
        wanted.find(
            Level::Warn,
            "which physical volumes are the host's own is seen on the running host only: nothing is written",
            host.once_it_runs("mt-agent setup apply --only lvm"),
        );
    }
    Ok(())
}

/// An existing devices file without the assigned disks. What stays is copied as it is.
fn without(
    text: &[u8],
    own: &[Volume],
    devices: Option<&Devices<'_>>,
    is_assigned: impl Fn(&DiskId) -> bool,
    wanted: &mut Wanted,
) -> Result<Vec<u8>, Error> {
    let mut kept: Vec<&[u8]> = text.split_inclusive(|&byte| byte == b'\n').collect();
    let mut gone = Vec::new();
    kept.retain(|&line| {
        let understood = String::from_utf8_lossy(line);
        let assigned = Entry::parse(&understood).and_then(|entry| entry.id(devices)).filter(&is_assigned);
        gone.extend(assigned.clone().map(|id| (line, id)));
        assigned.is_none()
    });
    let lists = |volume: &Volume, lines: &[&[u8]]| {
        let pvid = volume.uuid.replace('-', "");
        let lists = |line: &str| Entry::parse(line).is_some_and(|entry| entry.field("PVID") == Some(&pvid));
        lines.iter().any(|line| lists(&String::from_utf8_lossy(line)))
    };
    for volume in own.iter().filter(|volume| !lists(volume, &kept)) {
        let node = Devices::node(&volume.name);
        if let Some((_, id)) = gone.iter().find(|(line, _)| lists(volume, &[line])) {
            return Err(Error::refused(
                format!(
                    "{DEVICES_FILE} has the physical volume {} of the host's own volume group {} on the assigned disk {id}",
                    volume.uuid, volume.group
                ),
                format!("run `lvmdevices --check`, and `lvmdevices --adddev {node}`, then apply this again"),
            ));
        }
        wanted.find(
            Level::Warn,
            format!("{DEVICES_FILE} does not list {node} of the active volume group {}", volume.group),
            format!("if LVM shall use it: lvmdevices --adddev {node}"),
        );
    }
    if gone.is_empty() {
        wanted.evidence(format!("{DEVICES_FILE} lists no assigned disk"));
        return Ok(text.to_vec());
    }
    for (_, id) in &gone {
        wanted.evidence(format!("{DEVICES_FILE} lists the assigned disk {id}"));
    }
    // It would not hold any more.
    kept.retain(|line| !line.starts_with(b"# HASH="));
    Ok(kept.concat())
}

/// A devices file where there was none.
fn fresh(own: &[Volume], devices: &Devices<'_>, wanted: &mut Wanted) -> String {
    let mut text = "# LVM uses devices listed in this file.\n\
                    # Created by `mt-agent setup apply`; change it by lvmdevices(8).\nVERSION=1.1.1\n"
        .to_owned();
    for volume in own {
        let (kind, id) = device_id(devices, &volume.name);
        let node = Devices::node(&volume.name);
        if kind == "devname" {
            wanted.find(
                Level::Warn,
                format!("{node} has no identity that LVM knows: it is found by its UUID, wherever that is"),
                "set disk.EnableUUID of the virtual machine, or give the disk a serial; then lvmdevices --update",
            );
        }
        let pvid = volume.uuid.replace('-', "");
        text.push_str(&format!("IDTYPE={kind} IDNAME={id} DEVNAME={node} PVID={pvid}"));
        text.push_str(
            &devices.partition(&volume.name).map(|part| format!(" PART={part}")).unwrap_or_default(),
        );
        text.push('\n');
    }
    text
}

/// By what LVM knows a device (lvmdevices(8), "device ID types").
fn device_id(devices: &Devices<'_>, name: &str) -> (&'static str, String) {
    let disk = devices.whole(name);
    // White space is replaced differently by different versions of LVM.
    let plain = |value: &String| value.bytes().all(|byte| byte.is_ascii_graphic());
    let value = |attribute: &str| devices.value(&disk, attribute).filter(plain);
    if let Some(uuid) = value("dm/uuid") {
        let kind = match uuid.split_once('-').map(|(prefix, rest)| (prefix, rest.starts_with("mpath-"))) {
            Some(("mpath", _)) => Some("mpath_uuid"),
            Some((prefix, true)) if prefix.starts_with("part") => Some("mpath_uuid"),
            Some(("CRYPT", _)) => Some("crypt_uuid"),
            Some(("LVM", _)) => Some("lvmlv_uuid"),
            _ => None,
        };
        if let Some(kind) = kind {
            return (kind, uuid);
        }
    } else if let Some(uuid) = value("md/uuid") {
        return ("md_uuid", uuid);
    } else if let Some(file) = value("loop/backing_file") {
        return ("loop_file", file);
    } else if let Some(wwid) =
        value("wwid").or_else(|| value("device/wwid")).filter(|wwid| !wwid.starts_with("t10."))
    {
        return ("sys_wwid", wwid);
    } else if let Some(serial) = value("device/serial") {
        return ("sys_serial", serial);
    }
    ("devname", Devices::node(name))
}

// The filter.

fn filter(host: &Host, own: Option<(Vec<Volume>, Devices<'_>)>, wanted: &mut Wanted) -> Result<(), Error> {
    let Some((volumes, _)) = own else { return unknown_host(host, wanted) };
    let (settings, local) = settings(host)?;
    let set = |section: &str, key: &str| {
        settings.iter().any(|all| all.section(section).is_some_and(|s| s.get(key).is_some()))
    };
    // A device must pass both of them: the administrator's own goes on where there is one.
    let key = match (set("devices", "global_filter"), set("devices", "filter")) {
        (false, _) => "global_filter",
        (true, false) => {
            wanted.evidence("global_filter is the administrator's own and stays; filter is used beside it");
            "filter"
        }
        (true, true) => {
            return Err(Error::refused(
                "LVM's configuration has both a filter and a global_filter of the administrator's own",
                "join them into global_filter, so that filter is free for this, then apply this again",
            ));
        }
    };
    let links = links(host);
    let mut patterns = Vec::new();
    for volume in &volumes {
        let node = Devices::node(&volume.name);
        let Some((names, by_path)) = stable(&links, &volume.name) else {
            return Err(Error::refused(
                format!(
                    "{node}, a physical volume of the host's own volume group {}, has no name that is the same after the next \
                     boot (in /dev/disk/by-id or by-path): LVM might not find it",
                    volume.group
                ),
                "set disk.EnableUUID of the virtual machine, or give the disk a serial; then apply this again",
            ));
        };
        if by_path {
            wanted.find(
                Level::Warn,
                format!("{node} is known by where it is attached only: attached elsewhere, LVM does not find it"),
                "set disk.EnableUUID of the virtual machine, or give the disk a serial; then apply this again",
            );
        }
        patterns.extend(names.iter().map(|name| format!("\"a|^{}$|\"", pattern(name))));
    }
    patterns.push("\"r|.*|\"".to_owned());
    let mut block = format!("devices {{\n    {key} = [\n");
    block.push_str(
        &patterns.iter().map(|pattern| format!("        {pattern}")).collect::<Vec<_>>().join(",\n"),
    );
    block.push_str("\n    ]\n}\n");
    if set("activation", "auto_activation_volume_list") {
        wanted.evidence("auto_activation_volume_list is the administrator's own and stays");
    } else {
        let groups: BTreeSet<String> = volumes.iter().map(|volume| format!("\"{}\"", volume.group)).collect();
        let groups: Vec<String> = groups.into_iter().collect();
        let list =
            format!("activation {{\n    auto_activation_volume_list = [ {} ]\n}}\n", groups.join(", "));
        block.push_str(&list.replace("[  ]", "[ ]"));
    }
    with_block(local, Some(block), wanted);
    Ok(())
}

/// The links in `by-id` and in `by-path`, each with the device that it points to.
fn links(host: &Host) -> Vec<(String, String)> {
    let mut links = Vec::new();
    for dir in ["/dev/disk/by-id", "/dev/disk/by-path"] {
        for name in host.root.names(dir) {
            let path = format!("{dir}/{name}");
            let Ok(real) = host.root.real(Path::new(&path)) else { continue };
            if let Ok(device) = real.strip_prefix("/dev") {
                links.push((path, device.to_string_lossy().replace('/', "!")));
            }
        }
    }
    links
}

/// The names of a device that are the same after the next boot, and whether they are where it is attached.
fn stable(links: &[(String, String)], device: &str) -> Option<(Vec<String>, bool)> {
    let names = |prefix: &str| {
        let own = links.iter().filter(|(path, target)| target == device && path.starts_with(prefix));
        // A copy of the disk has the UUID of its physical volume too, and the name of its volumes.
        let own = own.filter(|(path, _)| !path.contains("/lvm-pv-uuid-") && !path.contains("/dm-name-"));
        own.map(|(path, _)| path.clone()).collect::<Vec<_>>()
    };
    let by_id = names("/dev/disk/by-id/");
    if !by_id.is_empty() {
        return Some((by_id, false));
    }
    let by_path = names("/dev/disk/by-path/");
    (!by_path.is_empty()).then_some((by_path, true))
}

/// A pattern for one name. Whatever might mean something in a pattern, or end the string, may be any character.
fn pattern(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "/-_:".contains(c) { c } else { '.' }).collect()
}

// LVM's configuration.

/// What `lvm.conf` and `lvmlocal.conf` set, the second one without what stands there of ours, and that as text.
fn settings(host: &Host) -> Result<([Section; 2], Local), Error> {
    let parse = |path: &str, text: &[u8]| {
        text::parse(text).map_err(|error| {
            let what = format!("{path} cannot be understood: {}", chain(&error));
            Error::refused(what, "mend it (`lvmconfig --validate` names the place), then apply this again")
        })
    };
    let local = Local::of(&host.root.read(LOCAL)?.unwrap_or_default())?;
    let main = parse("/etc/lvm/lvm.conf", &host.root.read("/etc/lvm/lvm.conf")?.unwrap_or_default())?;
    let own = parse(LOCAL, &local.others)?;
    Ok(([main, own], local))
}

/// `lvmlocal.conf`, which is read after `lvm.conf` and overrides it. Sections may stand there several times.
struct Local {
    /// Everything but the block that is ours.
    others: Vec<u8>,
}

impl Local {
    fn of(text: &[u8]) -> Result<Local, Error> {
        let mut inside = false;
        let mut others = Vec::new();
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            inside |= line.starts_with(BEGIN.as_bytes());
            if !inside {
                others.extend_from_slice(line);
            }
            inside &= !line.starts_with(END.as_bytes());
        }
        if inside {
            // What follows may be the administrator's.
            return Err(Error::refused(
                format!("{LOCAL} has a line `{BEGIN}`, and none with `{END}` behind it"),
                "put that line behind what mt-agent wrote there, then apply this again",
            ));
        }
        Ok(Local { others })
    }
}

fn with_block(local: Local, block: Option<String>, wanted: &mut Wanted) {
    let mut text = local.others;
    if let Some(block) = block {
        if !text.is_empty() && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        let block = format!(
            "{BEGIN}: written by `mt-agent setup apply`. Before another physical volume is made for this host: `mt-agent setup \
             revert --only lvm`.\n{block}{END}\n"
        );
        text.extend_from_slice(block.as_bytes());
    } else if text.is_empty() {
        return;
    }
    wanted.files.push(File::shared(LOCAL, text));
}
