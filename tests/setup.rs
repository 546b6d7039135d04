//! `mt-agent setup` on the trees of hosts, and on this host in a namespace of its own.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Loop, MIB, Outcome, run, wait_for};
use tempfile::TempDir;

/// The tree of a minimal host of Enterprise Linux, as far as the changes look at it.
fn host(release: u32) -> TempDir {
    let dir = support::directory();
    let kernel = match release {
        8 => "4.18.0-553.el8_10.x86_64",
        9 => "5.14.0-503.el9.x86_64",
        _ => "6.12.0-55.el10.x86_64",
    };
    let drivers: &[&str] = match release {
        8 => &["message/fusion/mptspi", "scsi/vmw_pvscsi", "scsi/virtio_scsi", "scsi/sg"],
        _ => &["scsi/vmw_pvscsi", "scsi/sg"],
    };
    let dep: String = drivers.iter().map(|driver| format!("kernel/drivers/{driver}.ko.xz:\n")).collect();
    let builtin = if release == 8 { "" } else { "kernel/drivers/scsi/virtio_scsi.ko\n" };
    let modules = format!("lib/modules/{kernel}");
    let os = format!(
        "NAME=\"CentOS Stream\"\nVERSION=\"{release}\"\nID=\"centos\"\nID_LIKE=\"rhel fedora\"\nVERSION_ID=\"{release}\"\n"
    );
    let zone = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<zone>\n  <short>Public</short>\n  <service name=\"ssh\"/>\n  \
                <service name=\"cockpit\"/>\n</zone>\n";
    let unit = |name: &str| {
        (format!("usr/lib/systemd/system/{name}"), "[Service]\nExecStart=/usr/sbin/x\n".to_owned())
    };
    let mut files = vec![
        ("usr/lib/os-release".to_owned(), os),
        ("etc/group".to_owned(), "root:x:0:\ndisk:x:6:\nmt-agent:x:985:\n".to_owned()),
        (
            "etc/fstab".to_owned(),
            "/dev/mapper/cs-root / xfs defaults 0 0\n/dev/mapper/cs-swap none swap defaults 0 0\n".to_owned(),
        ),
        (
            "etc/default/grub".to_owned(),
            "GRUB_CMDLINE_LINUX=\"crashkernel=1G-4G:192M rhgb quiet\"\n".to_owned(),
        ),
        ("etc/kdump.conf".to_owned(), "auto_reset_crashkernel yes\npath /var/crash\n".to_owned()),
        ("etc/selinux/config".to_owned(), "SELINUX=enforcing\nSELINUXTYPE=targeted\n".to_owned()),
        ("etc/firewalld/firewalld.conf".to_owned(), "# comment\nDefaultZone=public\n".to_owned()),
        ("usr/lib/firewalld/zones/public.xml".to_owned(), zone.to_owned()),
        (format!("{modules}/modules.dep"), dep),
        (format!("{modules}/modules.builtin"), builtin.to_owned()),
        unit("firewalld.service"),
        unit("chronyd.service"),
        unit("kdump.service"),
        unit("mt-agent.service"),
    ];
    let programs = ["mkfs.xfs", "mkfs.ext4", "lvm", "rsync", "kexec", "dnf"];
    files.extend(programs.iter().map(|program| (format!("usr/sbin/{program}"), String::new())));
    for (path, text) in files {
        write(dir.path(), &path, &text);
    }
    fs::create_dir_all(dir.path().join("var/lib/mt-agent")).unwrap();
    fs::create_dir_all(dir.path().join("var/crash")).unwrap();
    fs::create_dir_all(dir.path().join("etc/systemd/system/multi-user.target.wants")).unwrap();
    symlink("../usr/lib/os-release", dir.path().join("etc/os-release")).unwrap();
    dir
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn assign(root: &Path, machine: &str, disks: &[(&str, &str)]) {
    let mut text =
        format!("schema_version = 1\nmachine = \"{machine}\"\ncreated = \"2026-03-01T10:00:00Z\"\n");
    for (name, id) in disks {
        text.push_str(&format!(
            "\n[[disk]]\nname = \"{name}\"\nid = \"{id}\"\nsize = 10737418240\nlogical_sector = 512\noverwrite = false\n\
             assigned_at = \"2026-03-01T10:00:00Z\"\nstate = \"empty\"\n"
        ));
    }
    write(root, &format!("var/lib/mt-agent/retention/machines/{machine}.toml"), &text);
}

type Snapshot = BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)>;

/// All but the records, with owner, permissions and content.
fn snapshot(root: &Path) -> Snapshot {
    let mut all = Snapshot::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let short = path.strip_prefix(root).unwrap().to_owned();
            if short == Path::new("var/lib/mt-agent-setup") {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_file() {
                fs::read(&path).unwrap()
            } else {
                dirs.push(path);
                Vec::new()
            };
            all.insert(short, (meta.mode(), meta.uid(), meta.gid(), content));
        }
    }
    all
}

fn setup(root: &Path, command: &str, more: &[&str]) -> Outcome {
    let mut args = vec!["setup", command, "--root", root.to_str().unwrap()];
    args.extend(more);
    run(&args)
}

/// Of the file and of the snippets: the machine on which this runs has nothing to say to an image.
#[test]
fn the_configuration_of_an_image_is_the_one_inside_of_it() {
    let (dir, here) = (host(9), support::directory());
    let root = dir.path();
    let etc = root.join("etc/mt-agent");
    write(root, "srv/ours.toml", "state_dir = \"/srv/state\"\n");
    write(root, "srv/conf/a.toml", "retention_dir = \"/srv/retention\"\n");
    fs::create_dir_all(&etc).unwrap();
    symlink("/srv/ours.toml", etc.join("mt-agent.toml")).unwrap();
    symlink("/srv/conf", etc.join("conf.d")).unwrap();
    symlink("../../../../../../../srv/deep.toml", root.join("srv/conf/b.toml")).unwrap();
    write(root, "srv/deep.toml", "listen = \"[::]:19443\"\n");
    write(root, "srv/conf/.c.toml", "nonsense");
    setup(root, "apply", &["--only", "limits,network"]).ok();
    assert!(root.join("srv/state-setup").exists());
    let port = "19443";
    let all = snapshot(root);
    assert!(all.values().any(|(.., content)| String::from_utf8_lossy(content).contains(port)));
    // What is not inside is not there, whatever this machine has at that place.
    let secret = here.path().join("secret.toml");
    fs::write(&secret, "state_dir = \"/secret\"\n").unwrap();
    symlink(&secret, root.join("srv/conf/d.toml")).unwrap();
    setup(root, "status", &[]).fails(3, &["conf.d/d.toml", "No such file"]);
    fs::remove_file(root.join("srv/conf/d.toml")).unwrap();
    write(root, "srv/conf/d.toml", "windw = 1\n");
    setup(root, "status", &[]).fails(3, &["etc/mt-agent/conf.d/d.toml:1: there is no key `windw`"]);
}

/// Each release, with and without an administrator's own files where ours would be.
#[test]
fn a_host_is_set_up_once_and_taken_back_whole() {
    for release in [8, 9, 10] {
        for edited in [false, true] {
            let dir = host(release);
            let root = dir.path();
            if edited {
                write(
                    root,
                    "etc/firewalld/zones/public.xml",
                    "<zone>\n  <!-- mine -->\n  <port protocol=\"tcp\" port=\"8080\"/>\n</zone>\n",
                );
                write(root, "etc/udev/rules.d/59-mt-agent.rules", "# mine\n");
                fs::set_permissions(
                    root.join("etc/udev/rules.d/59-mt-agent.rules"),
                    fs::Permissions::from_mode(0o600),
                )
                .unwrap();
                symlink(
                    "/lib/systemd/system/chronyd.service",
                    root.join("etc/systemd/system/multi-user.target.wants/chronyd.service"),
                )
                .unwrap();
            }
            assign(root, "web01", &[("root", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90")]);
            let start = snapshot(root);
            for looks in ["check", "plan", "status"] {
                setup(root, looks, &[]);
                assert_eq!(snapshot(root), start, "{looks} wrote something");
                assert!(!root.join("var/lib/mt-agent-setup").exists(), "{looks} wrote something");
            }
            setup(root, "apply", &["--skip", "retention"]).ok();
            let applied = snapshot(root);
            assert_ne!(applied, start);
            let rules = fs::read_to_string(root.join("etc/udev/rules.d/59-mt-agent.rules")).unwrap();
            assert!(
                rules.contains("ATTRS{wwid}==\"naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90\", ENV{MT_AGENT}=\"1\""),
                "{rules}"
            );
            assert_eq!(root.join("etc/sysctl.d/60-mt-agent-io-uring.conf").exists(), release > 8);
            let zone = fs::read_to_string(root.join("etc/firewalld/zones/public.xml")).unwrap();
            assert!(zone.contains("<service name=\"mt-agent\"/>"), "{zone}");
            assert_eq!(zone.contains("<!-- mine -->"), edited);

            let again = setup(root, "apply", &["--skip", "retention"]).ok();
            assert!(!again.stdout.contains("wrote"), "{}", again.stdout);
            assert_eq!(snapshot(root), applied, "EL {release}");
            let checked = setup(root, "check", &["--skip", "retention", "--json"]).ok().json();
            for change in checked["changes"].as_array().unwrap() {
                assert_ne!(change["level"], "fail", "{change}");
            }
            let status = setup(root, "status", &["--json"]).ok().json();
            let udev =
                status["changes"].as_array().unwrap().iter().find(|change| change["name"] == "udev").unwrap();
            assert_eq!(udev["applied"]["state"], "applied");
            assert_eq!(udev["applied"]["version"], env!("CARGO_PKG_VERSION"));
            setup(root, "revert", &[]).ok();
            assert_eq!(snapshot(root), start, "EL {release}");
        }
    }
}

#[test]
fn a_plan_is_what_is_applied() {
    let dir = host(9);
    let root = dir.path();
    assign(root, "web01", &[("root", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90"), ("old", "t10.ATA_X_1")]);
    let plan = setup(root, "plan", &["--only", "udev,io-uring,network,time,limits,crash"]).ok();
    let expected = include_str!("fixtures/setup-plan-el9.txt");
    if plan.stdout != expected {
        // So that a change on purpose is a copy.
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("setup-plan-el9.txt");
        fs::write(&kept, &plan.stdout).unwrap();
        assert_eq!(plan.stdout, expected, "the plan is in {}", kept.display());
    }
    setup(root, "apply", &["--skip", "retention"]).ok();
    let plan = setup(root, "plan", &["--only", "udev,io-uring,network,time,limits,crash"]).ok();
    let left = ["+++", "on a running host:"].into_iter().filter(|sign| plan.stdout.contains(sign)).count();
    assert_eq!(left, 0, "{}", plan.stdout);
}

#[test]
fn what_cannot_be_done_is_said_and_ends_with_3() {
    let dir = host(9);
    let root = dir.path();
    setup(root, "check", &[]).fails(3, &["retention", "udev"]);
    setup(root, "apply", &["--only", "retention"]).fails(3, &["not as it must be: retention"]);
    setup(
        root,
        "apply",
        &["--only", "retention", "--retention-disk", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90"],
    )
    .fails(3, &["refused"]);
    setup(root, "apply", &["--only", "no-such"]).fails(2, &["io-uring"]);
    // Someone edited a file since.
    setup(root, "apply", &["--only", "udev"]).ok();
    let rules = root.join("etc/udev/rules.d/59-mt-agent.rules");
    fs::write(&rules, "# mine\n").unwrap();
    let before = snapshot(root);
    let refused = setup(root, "revert", &["--only", "udev"]).fails(3, &["refused: udev"]);
    assert!(refused.stdout.contains("was changed since"), "{}", refused.stdout);
    setup(root, "apply", &["--only", "udev"]).fails(3, &["refused: udev"]);
    assert_eq!(snapshot(root), before);
    let status = setup(root, "status", &[]).ok();
    assert!(
        status.stdout.contains("/etc/udev/rules.d/59-mt-agent.rules was changed since"),
        "{}",
        status.stdout
    );
    // Without a group there is nobody to give io_uring to.
    write(root, "etc/group", "root:x:0:\n");
    let refused = setup(root, "apply", &["--only", "io-uring"]).fails(3, &["refused: io-uring"]);
    assert!(refused.stdout.contains("install the RPM"), "{}", refused.stdout);
}

#[test]
fn rules_for_assigned_disks_do_not_go_with_a_retention_that_is_not_mounted() {
    let dir = host(10);
    let root = dir.path();
    assign(root, "web01", &[("root", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90")]);
    setup(root, "apply", &["--only", "udev"]).ok();
    let applied = snapshot(root);
    let retention = root.join("var/lib/mt-agent/retention");
    fs::rename(&retention, root.join("unmounted")).unwrap();
    let refused = setup(root, "apply", &["--only", "udev"]).fails(3, &["refused: udev"]);
    assert!(refused.stdout.contains("mount the retention file system"), "{}", refused.stdout);
    fs::rename(root.join("unmounted"), &retention).unwrap();
    assert_eq!(snapshot(root), applied);
    // One that cannot be read is no reason to forget the disks of all.
    assign(root, "db01", &[("root", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e91")]);
    write(root, "var/lib/mt-agent/retention/machines/web01.toml", "damaged");
    setup(root, "apply", &["--only", "udev"]).fails(1, &["failed: udev"]);
    assert_eq!(
        fs::read(root.join("etc/udev/rules.d/59-mt-agent.rules")).unwrap(),
        applied[Path::new("etc/udev/rules.d/59-mt-agent.rules")].3
    );
}

/// Whatever the encoding is, and whoever reads it.
#[test]
fn files_of_others_keep_their_bytes() {
    let dir = host(9);
    let root = dir.path();
    let head = &b"<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\r\n<zone>\n  <short>B\xfcro</short>\n"[..];
    let unit = &b"# f\xfcr uns\r\n[Mount]\nWhat=/dev/disk/by-uuid/1"[..];
    let zone_path = root.join("etc/firewalld/zones/public.xml");
    let unit_path = root.join("etc/systemd/system/var-lib-mt\\x2dagent-retention.mount");
    fs::create_dir_all(zone_path.parent().unwrap()).unwrap();
    fs::write(&zone_path, [head, b"</zone>\n"].concat()).unwrap();
    fs::write(&unit_path, unit).unwrap();
    let start = snapshot(root);
    setup(root, "apply", &["--only", "network,retention"]).ok();
    let with = [head, b"  <service name=\"mt-agent\"/>\n</zone>\n"].concat();
    assert_eq!(fs::read(&zone_path).unwrap().escape_ascii().to_string(), with.escape_ascii().to_string());
    assert_eq!(fs::read(&unit_path).unwrap().escape_ascii().to_string(), unit.escape_ascii().to_string());
    setup(root, "revert", &[]).ok();
    assert_eq!(snapshot(root), start);
}

/// The port is opened in the default zone; of others that are in use it is told.
#[test]
fn a_zone_that_does_not_let_the_port_in_is_told() {
    let dir = host(9);
    let root = dir.path();
    setup(root, "apply", &["--only", "network"]).ok();
    let told = || {
        let network = setup(root, "check", &["--only", "network", "--json"]).ok().json()["changes"][0].take();
        let findings = network["findings"].as_array().unwrap().clone();
        let warnings = findings.into_iter().filter(|found| found["level"] == "warn");
        warnings.map(|found| found["fix"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let zones = "etc/firewalld/zones";
    write(root, &format!("{zones}/dmz.xml"), "<zone>\n  <!-- <interface name=\"a\"/> -->\n</zone>\n");
    write(root, "etc/NetworkManager/system-connections/public.nmconnection", "[connection]\nzone=public\n");
    assert_eq!(told(), [""; 0]);
    write(root, &format!("{zones}/internal.xml"), "<zone>\n  <interface name=\"ens224\"/>\n</zone>\n");
    write(root, "etc/NetworkManager/system-connections/backup.nmconnection", "[connection]\nzone=work\n");
    let fixes = told();
    assert!(
        fixes.len() == 2 && fixes[0].contains("--zone=internal ") && fixes[1].contains("--zone=work "),
        "{fixes:?}"
    );
    let open = "<zone>\n  <interface name=\"ens224\"/>\n  <service name=\"mt-agent\"/>\n</zone>\n";
    write(root, &format!("{zones}/internal.xml"), open);
    assert_eq!(told().len(), 1);
}

/// In each state that is not as it must be: a fix for everything, in lines that a terminal shows whole.
#[test]
fn whatever_is_wrong_has_a_fix() {
    type Make = fn(&Path);
    let states: [(&str, Make); 6] = [
        ("fresh", |_| {}),
        ("no group", |root| write(root, "etc/group", "root:x:0:\n")),
        ("no zone", |root| write(root, "etc/firewalld/firewalld.conf", "DefaultZone=../x\n")),
        ("no root in fstab", |root| {
            write(root, "usr/lib/systemd/system-generators/systemd-gpt-auto-generator", "");
            write(root, "etc/fstab", "");
        }),
        ("edited since, and the retention away", |root| {
            setup(root, "apply", &["--skip", "retention"]).ok();
            write(root, "etc/sysctl.d/60-mt-agent-network.conf", "# mine\n");
            fs::remove_dir_all(root.join("var/lib/mt-agent/retention")).unwrap();
        }),
        ("a directory in the place of a file", |root| {
            fs::create_dir_all(root.join("etc/udev/rules.d/59-mt-agent.rules")).unwrap();
        }),
    ];
    for release in [8, 9, 10] {
        for (what, make) in states {
            let dir = host(release);
            let root = dir.path();
            assign(
                root,
                "web01",
                &[("root", "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90"), ("old", "t10.ATA_X_1")],
            );
            make(root);
            let checked = setup(root, "check", &["--json"]).fails(3, &[]).json();
            for change in checked["changes"].as_array().unwrap() {
                for finding in change["findings"].as_array().unwrap() {
                    let is_well = finding["level"] == "pass";
                    assert_eq!(finding["fix"] == "", is_well, "EL {release}, {what}: {change:#}");
                }
            }
            let names_kdump = checked.to_string().contains("kdump-utils is missing");
            assert_eq!(names_kdump, release == 10, "EL {release}, {what}");
            let text = setup(root, "check", &[]).fails(3, &[]).stdout;
            // The path of a root may be as long as it likes: there is nothing to break in it.
            let is_long = |line: &&str| line.chars().count() > 80 && line.trim().contains(' ');
            let long: Vec<&str> = text.lines().filter(is_long).collect();
            assert!(long.is_empty(), "EL {release}, {what}: {long:#?}");
            assert!(text.contains("\n        fix: ") && text.contains("\n        seen: "), "{text}");
        }
    }
}

#[test]
fn a_file_is_put_back_or_removed_and_called_so() {
    let dir = host(9);
    let root = dir.path();
    write(root, "etc/udev/rules.d/59-mt-agent.rules", "# mine\n");
    setup(root, "apply", &["--only", "udev,io-uring"]).ok();
    // Not wanted any more.
    write(root, "usr/lib/os-release", "ID=debian\n");
    let applied = setup(root, "apply", &["--only", "udev,io-uring", "--json"]).ok().json();
    let removed = "/etc/sysctl.d/60-mt-agent-io-uring.conf";
    assert_eq!(applied["changes"][1]["done"]["removed"], serde_json::json!([removed]), "{applied:#}");
    write(root, "usr/lib/os-release", "ID=centos\nVERSION_ID=9\n");
    setup(root, "apply", &["--only", "io-uring"]).ok();
    let reverted = setup(root, "revert", &["--only", "udev,io-uring"]).ok().stdout;
    for line in [
        "udev: put back /etc/udev/rules.d/59-mt-agent.rules".to_owned(),
        format!("io-uring: removed {removed}"),
    ] {
        assert!(reverted.lines().any(|said| said == line), "{line}: {reverted}");
    }
}

#[test]
fn a_status_says_the_same_in_both_forms() {
    let dir = host(9);
    let root = dir.path();
    setup(root, "apply", &["--only", "udev,limits,network"]).ok();
    write(root, "etc/udev/rules.d/59-mt-agent.rules", "# mine\n");
    fs::remove_file(root.join("etc/sysctl.d/60-mt-agent-network.conf")).unwrap();
    let only = ["--only", "udev,limits,network"];
    let states: Vec<String> =
        setup(root, "status", &[&only[..], &["--json"]].concat()).ok().json()["changes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|change| change["applied"]["state"].as_str().unwrap().replace('-', " "))
            .collect();
    // In the order in which they are applied.
    assert_eq!(states, ["changed since", "changed since", "applied"]);
    let text = setup(root, "status", &only).ok().stdout;
    for (line, state) in text.lines().skip(1).zip(&states) {
        assert!(line.contains(&format!("  {state}  ")), "{state}: {text}");
    }
}

#[test]
fn what_cannot_be_meant_is_wrong_usage_or_refused() {
    let dir = host(9);
    let root = dir.path();
    let start = snapshot(root);
    for command in ["check", "plan", "apply", "revert", "status"] {
        setup(root, command, &["--only", "udev,md", "--skip", "md,udev"])
            .fails(2, &["no change is left", "--skip"]);
    }
    for (only, wish) in
        [("udev,md", "--install"), ("udev", "--retention-disk=naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90")]
    {
        for command in ["plan", "apply"] {
            let named = wish.split('=').next().unwrap();
            setup(root, command, &["--only", only, wish]).fails(2, &[named, "leave out"]);
        }
    }
    assert_eq!(snapshot(root), start);
    // The directory above it, for example.
    setup(root, "apply", &["--only", "udev"]).ok();
    fs::remove_file(root.join("usr/lib/os-release")).unwrap();
    let before = snapshot(root);
    for command in ["check", "plan", "apply"] {
        setup(root, command, &[]).fails(3, &["is not the root of a host", "usr/lib/os-release", "--root"]);
    }
    assert_eq!(snapshot(root), before);
    setup(root, "revert", &[]).ok();
    let empty = support::directory();
    setup(empty.path(), "apply", &[]).fails(3, &["is not the root of a host"]);
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0);
}

/// What is true of the host on which the program runs is not said of an image.
#[test]
fn an_image_is_judged_by_what_is_in_it() {
    for (release, way) in [(8, "grubby"), (9, "kdumpctl")] {
        let dir = host(release);
        let root = dir.path();
        write(root, "etc/default/grub", "GRUB_CMDLINE_LINUX=\"rhgb quiet\"\n");
        fs::remove_dir(root.join("var/crash")).unwrap();
        let crash = setup(root, "check", &["--only", "crash", "--json"]).ok().json()["changes"][0].take();
        let findings = crash["findings"].as_array().unwrap();
        assert_eq!(findings.len(), 2, "{crash:#}");
        for finding in findings {
            let fix = finding["fix"].as_str().unwrap();
            assert!(fix.starts_with("on the host, once it runs: "), "{crash:#}");
        }
        assert!(findings[0]["what"].as_str().unwrap().starts_with("nothing in this image"), "{crash:#}");
        assert!(findings[0]["fix"].as_str().unwrap().contains(way), "{crash:#}");
        // With a place of its own the directory is one there.
        write(root, "etc/kdump.conf", "# x\nxfs /dev/vg/crash\npath /dumps\n");
        write(root, "boot/loader/entries/a.conf", "title A\noptions root=/dev/x crashkernel=auto\n");
        let crash = setup(root, "check", &["--only", "crash", "--json"]).fails(3, &["crash"]).json();
        let text = crash.to_string();
        assert!(text.contains("crashkernel=auto") && text.contains("`xfs /dev/vg/crash`"), "{text}");
        assert!(!text.contains("is not there: no dump"), "{text}");
    }
}

/// Nor where the running system is mounted into it, as who changes its root does.
#[test]
fn an_image_is_not_judged_by_what_is_mounted_into_it() {
    require_root!();
    let dir = host(9);
    let root = dir.path();
    for at in ["sys", "proc", "run"] {
        fs::create_dir(root.join(at)).unwrap();
    }
    let script = "for d in sys proc run; do mount --bind /$d \"$0/$d\"; done; exec \"$@\" --root \"$0\"";
    let checked = in_a_namespace(script, root, &["setup", "check", "--only", "lvm,udev", "--json"]);
    let text = checked.stdout;
    assert!(text.contains("is seen on the running host only"), "{text}");
}

/// A file system that is full, and one that is not any more.
#[test]
fn nothing_is_left_beside_a_file_that_could_not_be_written() {
    require_root!();
    let dir = host(9);
    let rules = dir.path().join("etc/udev/rules.d");
    fs::create_dir_all(&rules).unwrap();
    let script = "d=\"$0/etc/udev/rules.d\"; mount -t tmpfs -o size=4k none \"$d\"; head -c 4096 /dev/zero >\"$d/full\"; \
                  if \"$@\" --root \"$0\"; then exit 9; fi; ls -A \"$d\" >&2; rm \"$d/full\"; \"$@\" --root \"$0\"; ls -A \"$d\" >&2";
    let done = in_a_namespace(script, dir.path(), &["setup", "apply", "--only", "udev"]).ok();
    assert!(done.stdout.contains("No space left on device"), "{}", done.stdout);
    let left: Vec<&str> = done.stderr.lines().filter(|line| !line.starts_with("mt-agent: ")).collect();
    assert_eq!(left, ["full", "59-mt-agent.rules"]);
}

/// Runs the program, or what the script makes of it, with mounts of its own. `$0` is `at`.
fn in_a_namespace(script: &str, at: &Path, args: &[&str]) -> Outcome {
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", script])
        .arg(at)
        .arg(env!("CARGO_BIN_EXE_mt-agent"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Outcome {
        code: output.status.code(),
        signal: None,
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs the program on this host, but with another `/etc`, and as if neither systemd nor udev ran; `more` is mounted besides.
fn on_this_host_with(more: &str, etc: &Path, args: &[&str]) -> Outcome {
    let script = "mount --bind \"$0\" /etc; for d in /run/systemd /run/udev; do if [ -d $d ]; then mount -t tmpfs none $d; fi; done";
    in_a_namespace(&format!("{script}; {more} exec \"$@\""), etc, args)
}

fn on_this_host(etc: &Path, args: &[&str]) -> Outcome {
    on_this_host_with("", etc, args)
}

/// This host's own, in which others may be at work.
fn copy_etc(to: &Path) {
    wait_for("a copy of /etc during which nothing went away", || {
        fs::remove_dir_all(to).ok();
        Command::new("cp").arg("-a").args([Path::new("/etc"), to]).status().unwrap().success().then_some(())
    });
}

/// Where the kernel keeps memory for it: the directory is made, and the service is there from the next boot on.
#[test]
fn kdump_is_ready_after_a_reboot_and_not_before() {
    require_root!();
    let dir = support::directory();
    let (etc, crash) = (dir.path().join("etc"), dir.path().join("var/crash"));
    copy_etc(&etc);
    fs::remove_file(etc.join("systemd/system/multi-user.target.wants/kdump.service")).ok();
    write(&etc, "systemd/system/kdump.service", "[Service]\nExecStart=/bin/true\n");
    write(&etc, "kdump.conf", &format!("path {}\n", crash.display()));
    write(dir.path(), "cmdline", "root=/dev/x crashkernel=256M\n");
    write(dir.path(), "boot", "0c5b1c1e-0000-4000-8000-000000000000\n");
    let state = dir.path().join("state");
    let agent = |boot: &str, args: &[&str]| {
        let more = format!(
            "mount --bind {0}/cmdline /proc/cmdline; {1}",
            dir.path().display(),
            boot.replace("DIR", dir.path().to_str().unwrap())
        );
        let places = ["--only", "crash", "--state-dir", state.to_str().unwrap()];
        on_this_host_with(&more, &etc, &[args, &places].concat())
    };
    let planned = agent("", &["setup", "plan"]).ok().stdout;
    assert!(planned.contains("\nthen reboot: ") && !crash.exists(), "{planned}");
    let applied = agent("", &["setup", "apply"]).ok().stdout;
    assert!(
        applied.contains("crash: all of it is in effect only after a reboot") && crash.is_dir(),
        "{applied}"
    );
    let due = |boot: &str| {
        let status = agent(boot, &["setup", "status", "--json"]).ok().json();
        status["changes"][0]["applied"]["reboot_due"].as_bool().unwrap()
    };
    assert!(due(""));
    let another = "mount --bind DIR/boot /proc/sys/kernel/random/boot_id;";
    assert!(!due(another));
    assert_eq!(agent(another, &["setup", "apply"]).ok().stdout, "crash: nothing to do\n");
}

/// The kernel lets in one group: it is not taken away from those who have it.
#[test]
fn io_uring_is_not_taken_away_from_another_group() {
    require_root!();
    let dir = support::directory();
    let etc = dir.path().join("etc");
    let ours = etc.join("sysctl.d/60-mt-agent-io-uring.conf");
    write(dir.path(), "disabled", "1\n");
    let checked = |groups: &str, set: &str| {
        write(&etc, "group", groups);
        write(dir.path(), "group", set);
        let more = format!(
            "cd {}; mount --bind disabled /proc/sys/kernel/io_uring_disabled; mount --bind group /proc/sys/kernel/io_uring_group;",
            dir.path().display()
        );
        let checked =
            on_this_host_with(&more, &etc, &["setup", "check", "--only", "io-uring", "--json"]).json();
        checked["changes"][0].to_string()
    };
    let groups = "mt-agent:x:985:\ndatabase:x:900:postgres";
    let refused = checked(groups, "900\n");
    assert!(
        refused.contains("usermod --append --groups 900 mt-agent") && !refused.contains("is not there"),
        "{refused}"
    );
    let member = checked(&format!("{groups},mt-agent\n"), "900\n");
    assert!(member.contains("\"level\":\"pass\"") && !member.contains("\"fail\""), "{member}");
    for (ours_now, set) in [("", "-1\n"), ("", "985\n"), ("kernel.io_uring_group = 900\n", "900\n")] {
        write(&etc, ours.strip_prefix(&etc).unwrap().to_str().unwrap(), ours_now);
        let free = checked(groups, set);
        assert!(free.contains("60-mt-agent-io-uring.conf does not say what it must"), "{set}: {free}");
    }
}

/// Also where the run that made a file was ended before it could give it its label.
#[test]
fn what_is_made_anew_gets_the_label_of_its_place() {
    require_root!();
    let dir = support::directory();
    let (etc, state, log) = (dir.path().join("etc"), dir.path().join("state"), dir.path().join("log"));
    write(&etc, "systemd/system/mt-agent.service", "[Service]\n");
    let more = format!(
        "mount -t tmpfs none /sys/fs; mkdir /sys/fs/selinux; echo 1 >/sys/fs/selinux/enforce; mount -t tmpfs none /usr/sbin; \
         printf '#!/bin/sh\\necho \"$@\" >>{}\\n' >/usr/sbin/restorecon; chmod +x /usr/sbin/restorecon;",
        log.display()
    );
    let labelled = || {
        let args = ["setup", "apply", "--only", "limits", "--state-dir", state.to_str().unwrap()];
        on_this_host_with(&more, &etc, &args).ok();
        let lines = fs::read_to_string(&log).unwrap_or_default();
        fs::remove_file(&log).ok();
        lines.lines().map(|line| line.trim_start_matches("-F ").to_owned()).collect::<Vec<_>>()
    };
    let (made, file) =
        ("/etc/systemd/system/mt-agent.service.d", "/etc/systemd/system/mt-agent.service.d/50-limits.conf");
    assert_eq!(labelled(), [made, file]);
    assert_eq!(labelled(), [""; 0]);
    let record = dir.path().join("state-setup/limits/record.json");
    let applied = fs::read_to_string(&record).unwrap();
    fs::write(&record, applied.replace("\"state\": \"applied\"", "\"state\": \"applying\"")).unwrap();
    assert_eq!(labelled(), [file]);
    assert_eq!(labelled(), [""; 0]);
}

#[test]
fn a_clock_that_is_to_be_kept_right_and_is_not_is_told() {
    require_root!();
    let dir = support::directory();
    let etc = dir.path().join("etc");
    write(&etc, "systemd/system/chronyd.service", "[Service]\nExecStart=/bin/true\n");
    fs::create_dir_all(etc.join("systemd/system/multi-user.target.wants")).unwrap();
    symlink(
        "/etc/systemd/system/chronyd.service",
        etc.join("systemd/system/multi-user.target.wants/chronyd.service"),
    )
    .unwrap();
    for (group, level) in [("", "warn"), ("/chronyd.service", "pass")] {
        let more =
            format!("mount -t tmpfs none /sys/fs/cgroup; mkdir -p /sys/fs/cgroup/system.slice{group};");
        let checked =
            on_this_host_with(&more, &etc, &["setup", "check", "--only", "time", "--json"]).ok().json();
        assert_eq!(checked["changes"][0]["level"], level, "{checked:#}");
    }
}

#[test]
fn the_rules_follow_the_assignments_where_they_were_applied() {
    require_root!();
    let dir = support::directory();
    let (etc, state) = (dir.path().join("etc"), dir.path().join("state"));
    copy_etc(&etc);
    fs::create_dir(&state).unwrap();
    let config = dir.path().join("mt-agent.toml");
    fs::write(&config, format!("state_dir = {state:?}\nallow_loop = true\n")).unwrap();
    let disk = Loop::create(&dir.path().join("disk"), 8 * MIB);
    let agent = |args: &[&str]| {
        let mut args = args.to_vec();
        args.extend(["--config", config.to_str().unwrap()]);
        on_this_host(&etc, &args)
    };
    let rules = etc.join("udev/rules.d/59-mt-agent.rules");
    // Not applied: nothing is written.
    let assigned = format!("root={}", disk.id());
    agent(&["protect", "add", "web01", "--disk", &assigned]).ok();
    agent(&["protect", "remove", "web01"]).ok();
    assert!(!rules.exists() && !dir.path().join("state-setup").exists());
    agent(&["setup", "apply", "--only", "udev"]).ok();
    assert!(fs::read_to_string(&rules).unwrap().contains("# No disk is assigned."));
    agent(&["protect", "add", "web01", "--disk", &assigned, "--dry-run"]).ok();
    assert!(fs::read_to_string(&rules).unwrap().contains("# No disk is assigned."));
    let added = agent(&["protect", "add", "web01", "--disk", &assigned]).ok();
    assert!(
        added.stdout.contains("setup udev: wrote /etc/udev/rules.d/59-mt-agent.rules"),
        "{}",
        added.stdout
    );
    assert!(fs::read_to_string(&rules).unwrap().contains("# web01: root, a loop device"));
    // Someone else's edits are not overwritten, and that is a failure: the disks are not treated as they must be.
    let ours = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, "# mine\n").unwrap();
    agent(&["protect", "remove", "web01"]).fails(1, &["was changed since", "mt-agent setup apply"]);
    assert_eq!(fs::read_to_string(&rules).unwrap(), "# mine\n");
    fs::write(&rules, ours).unwrap();
    agent(&["setup", "apply", "--only", "udev"]).ok();
    assert!(fs::read_to_string(&rules).unwrap().contains("# No disk is assigned."));
    agent(&["setup", "revert", "--only", "udev"]).ok();
    assert!(!rules.exists());
}

#[test]
fn a_retention_disk_is_made_once_and_never_over_data() {
    require_root!();
    let dir = support::directory();
    let (etc, state) = (dir.path().join("etc"), dir.path().join("state"));
    copy_etc(&etc);
    let config = dir.path().join("mt-agent.toml");
    fs::write(&config, format!("state_dir = {state:?}\nallow_loop = true\n")).unwrap();
    let disk = Loop::create(&dir.path().join("disk"), 400 * MIB);
    let agent = |more: &[&str]| {
        let mut args = vec!["setup", "apply", "--only", "retention", "--config", config.to_str().unwrap()];
        args.extend(more);
        on_this_host(&etc, &args)
    };
    let id = disk.id();
    // Nor over what came onto it by another way, which whoever had read it before does not see.
    let (other, mut head) = (dir.path().join("other"), vec![0; 64 << 10]);
    File::create(&other).unwrap().set_len(8 * MIB).unwrap();
    support::tool("mkfs.ext4", &["-q", "-F", other.to_str().unwrap()]);
    File::open(disk.node()).unwrap().read_exact_at(&mut head, 0).unwrap();
    let behind = File::options().write(true).open(disk.backing()).unwrap();
    behind.write_all_at(&fs::read(&other).unwrap()[..head.len()], 0).unwrap();
    let refused = agent(&["--retention-disk", &id]).fails(3, &["refused: retention"]);
    assert!(refused.stdout.contains("is not empty: ext4"), "{}", refused.stdout);
    behind.write_all_at(&head, 0).unwrap();
    let made = agent(&["--retention-disk", &id]).ok();
    assert!(made.stdout.contains("called mkfs."), "{}", made.stdout);
    let node = disk.node().to_str().unwrap();
    let uuid = support::tool("blkid", &["-p", "-o", "value", "-s", "UUID", node]);
    assert_eq!(support::tool("blkid", &["-p", "-o", "value", "-s", "LABEL", node]), "mt-retention");
    let kind = support::tool("blkid", &["-p", "-o", "value", "-s", "TYPE", node]);
    let name = support::tool(
        "systemd-escape",
        &["--path", "--suffix=mount", state.join("retention").to_str().unwrap()],
    );
    let unit = etc.join("systemd/system").join(&name);
    let text = fs::read_to_string(&unit).unwrap();
    for line in [
        format!("What=/dev/disk/by-uuid/{uuid}"),
        format!("Where={}", state.join("retention").display()),
        format!("Type={kind}"),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in {text}");
    }
    assert!(etc.join("systemd/system/local-fs.target.wants").join(&name).is_symlink());
    // It is taken as it is from then on, also with --overwrite, and without being named.
    let head = || fs::read(disk.backing()).unwrap();
    let before = head();
    for more in [&["--retention-disk", &id][..], &["--retention-disk", &id, "--overwrite"], &[]] {
        let again = agent(more).ok();
        assert_eq!(again.stdout, "retention: nothing to do\n");
    }
    assert!(head() == before, "the disk was written to");
    // Another host takes it over.
    fs::remove_dir_all(dir.path().join("state-setup")).unwrap();
    fs::remove_file(&unit).unwrap();
    let adopted = agent(&["--retention-disk", &id]).ok();
    assert!(!adopted.stdout.contains("called") && head() == before, "{}", adopted.stdout);
    assert_eq!(fs::read_to_string(&unit).unwrap(), text);
    on_this_host(&etc, &["setup", "revert", "--config", config.to_str().unwrap()]).ok();
    assert!(!unit.exists());
    // Anything else on it is in the way.
    fs::remove_dir_all(dir.path().join("state-setup")).ok();
    support::tool("mkfs.ext4", &["-q", "-F", node]);
    let before = head();
    let refused = agent(&["--retention-disk", &id]).fails(3, &["refused: retention"]);
    assert!(
        refused.stdout.contains("--overwrite") && head() == before && !unit.exists(),
        "{}",
        refused.stdout
    );
    agent(&["--retention-disk", &id, "--overwrite"]).ok();
    assert_eq!(support::tool("blkid", &["-p", "-o", "value", "-s", "LABEL", node]), "mt-retention");
    // Nor is one that is assigned.
    let run = |args: &[&str]| on_this_host(&etc, &[args, &["--config", config.to_str().unwrap()]].concat());
    fs::remove_file(&unit).unwrap();
    fs::remove_dir_all(dir.path().join("state-setup")).unwrap();
    run(&["protect", "add", "web01", "--disk", &format!("root={id}"), "--overwrite"]).ok();
    let refused = agent(&["--retention-disk", &id, "--overwrite"]).fails(3, &["refused: retention"]);
    assert!(refused.stdout.contains("its role is assigned"), "{}", refused.stdout);
}
