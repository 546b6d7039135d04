use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use time::OffsetDateTime;

use super::assign::{Allowed, Planned, Refused, Request, Why, plan};
use super::file::{self, ParseError};
use super::*;
use crate::disk::discover::{Disk, IdSource, Role};
use crate::layout::signature::Content;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn id(number: u32) -> DiskId {
    format!("naa.6000c29{number:025x}").parse().unwrap()
}

fn assignment(disk: &str, number: u32) -> Assignment {
    Assignment {
        name: name(disk),
        id: id(number),
        size: ByteLen(10 * ByteLen::GIB),
        logical_sector: 512,
        overwrite: false,
        seed: false,
        assigned_at: OffsetDateTime::from_unix_timestamp(1_772_359_200).unwrap(),
        state: State::Empty,
        last_commit: None,
        source: None,
        released: None,
        taken_back: false,
    }
}

fn source() -> Source {
    Source { size: ByteLen(10 * ByteLen::GIB), id: Some(id(99)) }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    (dir, store)
}

const A: PassId = PassId(0xa);
const B: PassId = PassId(0xb);

#[test]
fn a_pass_leads_through_the_states_and_each_is_on_disk() {
    let (dir, store) = store();
    let (web, root) = (name("web01"), name("root"));
    store.assign(&web, &[assignment("root", 1), assignment("data", 2)]).unwrap();
    let state = || Store::open(dir.path()).load(&web).unwrap().disk(&root).unwrap().clone();
    assert_eq!(state(), assignment("root", 1));

    store.begin_pass(&web, &root, A, &source()).unwrap();
    assert!(matches!(state().state, State::Receiving(Pass { id: A, .. })));
    let commit = store.commit_pass(&web, &root, A, 4096, true).unwrap();
    assert_eq!((state().state, state().last_commit), (State::Synchronized, Some(commit)));
    assert_eq!((commit.pass, commit.bytes, commit.point_in_time), (A, 4096, true));
    // A sender that did not hear the answer asks once more.
    assert_eq!(store.commit_pass(&web, &root, A, 4096, true).unwrap(), commit);

    store.begin_pass(&web, &root, B, &source()).unwrap();
    store.fault(&web, &root, B, "write failed: EIO").unwrap();
    store.fault(&web, &root, B, "later and of less interest").unwrap();
    let State::Faulted(Pass { id: B, .. }, fault) = state().state else { panic!("{:?}", state()) };
    assert_eq!(fault.reason, "write failed: EIO");
    assert_eq!(state().last_commit, Some(commit));
    assert_eq!(state().source, Some(source()));
    // What has no identity is no other disk.
    let grown = Source { size: ByteLen(11 * ByteLen::GIB), id: None };
    store.begin_pass(&web, &root, PassId(0xc), &grown).unwrap();
    assert_eq!(state().source, Some(Source { id: source().id, ..grown }));
    assert_eq!(store.load(&web).unwrap().disk(&name("data")).unwrap(), &assignment("data", 2));
}

#[test]
fn what_does_not_follow_is_refused_by_name_and_changes_nothing() {
    let (_dir, store) = store();
    let (web, root) = (name("web01"), name("root"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    let refused = |result: Result<(), Error>, from: &str, step: &str| {
        let before = fs::read(store.file(&web)).unwrap();
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Transition { .. }) && error.is_refusal(), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("disk root of machine web01 is") && text.contains(from), "{text}");
        assert!(text.contains(step), "{text}");
        assert_eq!(fs::read(store.file(&web)).unwrap(), before);
    };
    let commit = |pass| store.commit_pass(&web, &root, pass, 1, false).map(|_| ());
    refused(commit(A), "empty", "commit pass");
    refused(store.fault(&web, &root, A, "x"), "empty", "fault in pass");
    store.begin_pass(&web, &root, A, &source()).unwrap();
    refused(commit(B), "receiving pass", "commit pass");
    refused(store.fault(&web, &root, B, "x"), "receiving pass", "fault in pass");
    store.fault(&web, &root, A, "x").unwrap();
    refused(commit(A), "faulted", "commit pass");
    refused(store.begin_pass(&web, &root, A, &source()), "faulted", "go on with pass");
    store.begin_pass(&web, &root, B, &source()).unwrap();
    commit(B).unwrap();
    refused(commit(A), "synchronized", "commit pass");
    refused(store.begin_pass(&web, &root, B, &source()), "synchronized", "which was committed");
    refused(store.fault(&web, &root, B, "x"), "synchronized", "fault in pass");

    assert!(matches!(store.begin_pass(&web, &name("nope"), A, &source()), Err(Error::NoDisk { .. })));
    assert!(matches!(store.begin_pass(&name("nope"), &root, A, &source()), Err(Error::NoMachine { .. })));
}

#[test]
fn a_reason_is_cut_where_a_character_ends() {
    let (_dir, store) = store();
    let (web, root) = (name("web01"), name("root"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    store.begin_pass(&web, &root, A, &source()).unwrap();
    store.fault(&web, &root, A, &format!("x{}", "ä".repeat(10_000))).unwrap();
    let State::Faulted(_, fault) = &store.load(&web).unwrap().disks[0].state else { panic!() };
    assert_eq!(fault.reason.len(), file::MAX_REASON - 1);
}

#[test]
fn a_disk_belongs_to_one_machine_and_a_command_is_done_whole_or_not_at_all() {
    let (_dir, store) = store();
    let (web, db) = (name("web01"), name("db01"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    let reasons = |result: Result<Protection, Error>| match result {
        Err(Error::Refused(Refused { refused, .. })) => {
            refused.into_iter().map(|refusal| refusal.why).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let taken = Why::Assigned { machine: web.clone(), disk: name("root") };
    assert_eq!(
        reasons(store.assign(&db, &[assignment("root", 2), assignment("x", 1)])),
        std::slice::from_ref(&taken)
    );
    assert!(!store.file(&db).exists(), "half of a refused command was done");
    assert_eq!(reasons(store.assign(&web, &[assignment("again", 1)])), [taken]);
    let why = reasons(store.assign(&web, &[assignment("root", 3)]));
    assert_eq!(why, [Why::NameTaken { machine: web.clone(), id: id(1) }]);
    let why = reasons(store.assign(&db, &[assignment("a", 5), assignment("b", 5)]));
    assert_eq!(why, [Why::Twice { other: name("a") }]);
    let many: Vec<_> = (0..257).map(|n| assignment(&format!("d{n}"), 100 + n)).collect();
    assert_eq!(reasons(store.assign(&db, &many)), [Why::TooMany { most: 256 }]);
    store.assign(&db, &many[..256]).unwrap();
    assert_eq!(store.load(&db).unwrap().disks.len(), 256);

    // Once more the same: its state stays.
    store.begin_pass(&web, &name("root"), A, &source()).unwrap();
    let again = store.assign(&web, &[assignment("root", 1)]).unwrap();
    assert!(matches!(again.disks[0].state, State::Receiving(_)));
    let assigned = store.assigned().unwrap();
    assert_eq!((assigned.len(), assigned[&id(1)].as_str()), (257, "web01"));
}

#[test]
fn looking_and_dry_runs_write_nothing() {
    let (dir, store) = store();
    let web = name("web01");
    store.assign_dry(&web, &[assignment("root", 1)]).unwrap();
    assert!(store.all().unwrap().is_empty() && store.assigned().unwrap().is_empty());
    assert!(matches!(store.load(&web), Err(Error::NoMachine { .. })));
    assert!(matches!(store.remove(&web, None), Err(Error::NoMachine { .. })));
    assert!(matches!(store.hold(&web), Err(Error::NoMachine { .. })));
    assert!(matches!(store.begin_pass(&web, &name("root"), A, &source()), Err(Error::NoMachine { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_machine_that_receives_keeps_its_disks() {
    let (dir, store) = store();
    let (web, root) = (name("web01"), name("root"));
    store.assign(&web, &[assignment("root", 1), assignment("data", 2)]).unwrap();
    let first = store.hold(&web).unwrap();
    let second = Store::open(dir.path()).hold(&web).unwrap();
    for disk in [None, Some(&root)] {
        let error = store.remove(&web, disk).unwrap_err();
        assert!(matches!(error, Error::Receiving { .. }) && error.is_refusal(), "{error:?}");
        assert!(error.to_string().contains("machine web01 is receiving"), "{error}");
    }
    drop(first);
    assert!(store.remove(&web, None).is_err());
    drop(second);
    assert_eq!(store.remove(&web, Some(&root)).unwrap(), [assignment("root", 1)]);
    assert!(matches!(store.remove(&web, Some(&root)), Err(Error::NoDisk { .. })));
    assert_eq!(store.remove(&web, Some(&name("data"))).unwrap(), [assignment("data", 2)]);
    // The last one takes the file with it.
    let left: Vec<_> =
        fs::read_dir(dir.path().join("machines")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn a_broken_file_says_where_and_leaves_the_others_alone() {
    let (_dir, store) = store();
    let (web, db) = (name("web01"), name("db01"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    store.assign(&db, &[assignment("root", 2)]).unwrap();
    let good = fs::read_to_string(store.file(&db)).unwrap();
    fs::write(store.file(&db), good.replace("state = \"empty\"", "state = \"full\"")).unwrap();
    let line = good.lines().position(|line| line.starts_with("state")).unwrap() + 1;

    let all = store.all().unwrap();
    assert_eq!(all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["db01", "web01"]);
    let error = all[0].1.as_ref().unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:{line}: ", store.file(&db).display())), "{error}");
    assert!(error.contains("full") && error.contains("protect add"), "{error}");
    assert!(error.contains("`mt-agent protect remove db01`"), "{error}");
    assert!(all[1].1.is_ok());
    // The other machine goes on receiving, but nobody knows any more which disks are free.
    store.begin_pass(&web, &name("root"), A, &source()).unwrap();
    assert!(matches!(store.assigned(), Err(Error::Corrupt { .. })));
    assert!(matches!(store.assign(&web, &[assignment("data", 2)]), Err(Error::Corrupt { .. })));
    assert!(matches!(store.remove(&db, Some(&name("root"))), Err(Error::Corrupt { .. })));
    assert!(store.remove(&db, None).unwrap().is_empty());
    store.assign(&web, &[assignment("data", 2)]).unwrap();
}

#[test]
fn where_there_is_no_directory_nothing_is_known() {
    let (dir, store) = store();
    assert_eq!(store.known(), None);
    store.assign(&name("web01"), &[assignment("root", 1)]).unwrap();
    let known = Some((BTreeMap::from([(id(1), "web01".to_owned())]), Vec::new()));
    assert_eq!(store.known(), known);
    fs::rename(dir.path().join("machines"), dir.path().join("away")).unwrap();
    assert_eq!(store.known(), None);
    fs::rename(dir.path().join("away"), dir.path().join("machines")).unwrap();
    assert_eq!(store.known(), known);
    store.remove(&name("web01"), None).unwrap();
    assert_eq!(store.known(), Some(Default::default()));
}

/// Its error alone says what is wrong and the way out, and that is one.
#[test]
fn a_file_with_an_identity_that_names_no_disk_is_told_and_taken_away() {
    let (_dir, store) = store();
    let db = name("db01");
    for given in ["virtio.0", "eui.ffffffffffffffff", "naa.5000c50000000000"] {
        store.assign(&db, &[assignment("root", 2)]).unwrap();
        let good = fs::read_to_string(store.file(&db)).unwrap();
        fs::write(store.file(&db), good.replace(&id(2).to_string(), given)).unwrap();
        let line = good.lines().position(|line| line.starts_with("id = ")).unwrap() + 1;
        let error = store.assigned().unwrap_err().to_string();
        let told = format!("{}:{line}: `{given}` is no disk identity: ", store.file(&db).display());
        assert!(error.starts_with(&told), "{error}");
        assert!(
            error
                .contains(", or take it away, with its recovery points, with `mt-agent protect remove db01`"),
            "{error}"
        );
        assert!(store.remove(&db, None).unwrap().is_empty());
        assert!(store.assigned().unwrap().is_empty());
    }
}

#[test]
fn a_file_under_another_name_gives_nobody_the_disks() {
    let (dir, store) = store();
    let (web, db) = (name("web01"), name("db01"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    let text = fs::read_to_string(store.file(&web)).unwrap();
    fs::write(store.file(&db), &text).unwrap();
    let error = store.load(&db).unwrap_err().to_string();
    assert!(error.contains("db01.toml:3: ") && error.contains("machine web01, not of db01"), "{error}");
    // And a copy that someone made fit is noticed before a byte is written.
    fs::write(store.file(&db), text.replace("machine = \"web01\"", "machine = \"db01\"")).unwrap();
    assert!(matches!(store.assigned(), Err(Error::Shared { .. })));
    match store.begin_pass(&web, &name("root"), A, &source()) {
        Err(Error::Shared { machine, disk, .. }) => assert_eq!((machine, disk), (db, name("root"))),
        other => panic!("{other:?}"),
    }
    // What is not ours to read.
    for other in [".hidden.toml", "notes.txt", "web01.toml~", "a b.toml", ".web02.toml.0123"] {
        fs::write(dir.path().join("machines").join(other), "garbage").unwrap();
    }
    assert_eq!(store.all().unwrap().len(), 2);
}

/// The states in which a crash can leave the directory, in the order of `Store::write`.
#[test]
fn every_crash_of_a_change_leaves_the_old_file_or_the_new_one() {
    let (dir, store) = store();
    let web = name("web01");
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    let old = fs::read(store.file(&web)).unwrap();
    store.assign(&web, &[assignment("data", 2)]).unwrap();
    let new = fs::read(store.file(&web)).unwrap();
    let directory = dir.path().join("machines");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "more than the file and the lock");
    // Created; torn at every length; whole.
    for written in 0..=new.len() {
        fs::write(store.file(&web), &old).unwrap();
        fs::write(directory.join(".web01.toml.0123456789abcdef"), &new[..written]).unwrap();
        assert_eq!(store.load(&web).unwrap().disks.len(), 1);
        assert_eq!(store.all().unwrap().len(), 1);
    }
    // The next change is not disturbed by what was left.
    store.begin_pass(&web, &name("root"), A, &source()).unwrap();
    assert!(matches!(store.load(&web).unwrap().disks[0].state, State::Receiving(_)));
    // A file that was created and never written is not taken for an empty protection.
    fs::write(store.file(&web), "").unwrap();
    assert!(matches!(store.load(&web), Err(Error::Corrupt { .. })));
}

#[test]
fn changes_at_once_are_all_kept_and_a_disk_is_given_once() {
    let (dir, _) = store();
    let machines: Vec<Name> = (0..4).map(|n| name(&format!("m{n}"))).collect();
    // Every machine wants disk 1, and each has disks of its own besides.
    let won: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = machines
            .iter()
            .enumerate()
            .map(|(n, machine)| {
                let store = Store::open(dir.path());
                scope.spawn(move || {
                    for disk in 0..8u32 {
                        let own = assignment(&format!("d{disk}"), 100 * (n as u32 + 1) + disk);
                        store.assign(machine, &[own]).unwrap();
                    }
                    usize::from(store.assign(machine, &[assignment("shared", 1)]).is_ok())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    let store = Store::open(dir.path());
    assert_eq!(store.assigned().unwrap().len(), 33);

    // The disks of one machine, each its own thread, while its sessions come and go.
    let machine = &machines[0];
    std::thread::scope(|scope| {
        for disk in 0..8u128 {
            let store = store.clone();
            scope.spawn(move || {
                let hold = store.hold(machine).unwrap();
                let disk_name = name(&format!("d{disk}"));
                for pass in 0..5u128 {
                    let pass = PassId(disk << 64 | pass);
                    store.begin_pass(machine, &disk_name, pass, &source()).unwrap();
                    store.commit_pass(machine, &disk_name, pass, 1, true).unwrap();
                }
                drop(hold);
            });
        }
    });
    for disk in &store.load(machine).unwrap().disks {
        let last = disk.last_commit.map(|commit| commit.pass.0 & 0xff);
        assert_eq!(last, disk.name.as_str().starts_with('d').then_some(4), "{disk:?}");
    }
}

#[test]
fn removing_and_holding_at_once_never_leaves_a_hold_of_nothing() {
    let (dir, store) = store();
    let web = name("web01");
    for _ in 0..50 {
        store.assign(&web, &[assignment("root", 1)]).unwrap();
        let held = std::thread::scope(|scope| {
            let holder = scope.spawn(|| Store::open(dir.path()).hold(&web));
            let removed = store.remove(&web, None);
            let held = holder.join().unwrap();
            assert_ne!(held.is_ok(), removed.is_ok(), "{held:?} {removed:?}");
            held
        });
        if held.is_ok() {
            assert!(matches!(store.remove(&web, None), Err(Error::Receiving { .. })));
            drop(held);
            store.remove(&web, None).unwrap();
        }
    }
}

/// A file system of its own, unmounted when this is dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(options: &str) -> Option<Tmpfs> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root to mount a tmpfs");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some(options)).unwrap();
        Some(Tmpfs(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_full_file_system_leaves_the_old_file_as_it_was() {
    let Some(tmpfs) = Tmpfs::new("size=64k") else { return };
    let store = Store::open(tmpfs.0.path());
    let (web, root) = (name("web01"), name("root"));
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    let filler = tmpfs.0.path().join("filler");
    let full = fs::write(&filler, vec![0; 1 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let before = fs::read(store.file(&web)).unwrap();
    for error in [
        store.begin_pass(&web, &root, A, &source()).unwrap_err(),
        store.assign(&web, &[assignment("data", 2)]).unwrap_err(),
    ] {
        let Error::Io(error) = error else { panic!("{error:?}") };
        assert_eq!(error.source.kind(), std::io::ErrorKind::StorageFull, "{error:?}");
    }
    assert_eq!(fs::read(store.file(&web)).unwrap(), before);
    let left = fs::read_dir(tmpfs.0.path().join("machines")).unwrap().count();
    assert_eq!(left, 2, "a torn file keeps the space taken");
    assert_eq!(store.load(&web).unwrap().disks, [assignment("root", 1)]);
    // Taking away what is no longer needed is the way out.
    store.remove(&web, None).unwrap();
    fs::remove_file(filler).unwrap();
    store.assign(&web, &[assignment("root", 1)]).unwrap();
    store.begin_pass(&web, &root, A, &source()).unwrap();
}

#[test]
fn a_directory_that_may_not_be_read_is_an_error_and_no_empty_list() {
    let (dir, store) = store();
    fs::write(dir.path().join("machines"), "no directory").unwrap();
    assert!(matches!(store.all(), Err(Error::Io(_))));
    assert!(matches!(store.assign(&name("a"), &[assignment("b", 1)]), Err(Error::Io(_))));
}

#[test]
fn the_file_is_readable_by_its_group_at_most() {
    let (_dir, store) = store();
    store.assign(&name("a"), &[assignment("b", 1)]).unwrap();
    let mode = fs::metadata(store.file(&name("a"))).unwrap().permissions().mode();
    assert_eq!(mode & 0o137, 0, "{mode:o}");
}

const GOOD: &str = r#"schema_version = 1
machine = "web01"
created = "2026-03-01T10:00:00Z"
group = "shop"
[[disk]]
name = "root"
id = "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90"
size = 10737418240
logical_sector = 512
overwrite = false
assigned_at = "2026-03-01T10:00:00Z"
state = "receiving"
[disk.pass]
id = "000102030405060708090a0b0c0d0e0f"
started = "2026-03-01T11:00:00Z"
[disk.last_commit]
pass = "0f0e0d0c0b0a09080706050403020100"
time = "2026-03-01T10:30:00Z"
bytes = 10737418240
point_in_time = true
[disk.source]
size = 10737418240
id = "naa.6000c29b7d3e5f1a2b4c6d8e0f102132"
"#;

#[test]
fn the_documented_file_is_read_and_written_back() {
    let protection = file::parse(GOOD.as_bytes()).unwrap();
    assert_eq!(protection.disks[0].last_commit.unwrap().bytes, 10737418240);
    let text = file::encode(&protection).unwrap();
    assert_eq!(file::parse(text.as_bytes()).unwrap(), protection);
    let keys = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(keys(&text), keys(GOOD));
    // The example in the module's documentation is this file.
    let documented: Vec<String> = include_str!("../protection.rs")
        .lines()
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| {
            line.trim_start_matches("//!").trim_start().split(" #").next().unwrap().trim_end().to_owned()
        })
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(documented, keys(GOOD));
}

#[test]
fn each_thing_that_may_be_wrong_is_named_with_its_line() {
    let cases = [
        ("machine = \"web01\"", "machine = \"../etc\"", 2, "is no name"),
        ("machine = \"web01\"", "machine = \"web01\"\nmachine = \"web01\"", 3, "duplicate key"),
        ("machine = \"web01\"\n", "", 1, "missing field `machine`"),
        ("machine = \"web01\"", "machine = 7", 2, "invalid type"),
        ("created = \"2026", "created = \"yesterday", 3, ""),
        ("group = \"shop\"", "group = \"../shop\"", 4, "is no name"),
        ("name = \"root\"", "name = \"\"", 6, "is no name"),
        ("id = \"naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90\"", "id = \"naa.6000\"", 7, ""),
        ("id = \"naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90\"", "id = \"/dev/sda\"", 7, ""),
        ("size = 10737418240\n", "size = 0\n", 8, "no size of a disk"),
        ("size = 10737418240\n", "size = 513\n", 8, "no size of a disk"),
        ("size = 10737418240\n", "size = -512\n", 8, "invalid value"),
        ("size = 10737418240\n", "size = 99999999999999999999999\n", 8, ""),
        ("logical_sector = 512", "logical_sector = 0", 9, "no size of a sector"),
        ("logical_sector = 512", "logical_sector = 520", 9, "no size of a sector"),
        ("logical_sector = 512", "logical_sector = 4294967296", 9, "invalid value"),
        ("overwrite = false", "overwrite = \"no\"", 10, "invalid type"),
        ("overwrite = false", "overwrite = false\nowner = \"x\"", 11, "unknown field `owner`"),
        ("state = \"receiving\"", "state = \"empty\"", 5, "neither a pass nor a fault"),
        ("state = \"receiving\"", "state = \"synchronized\"", 5, "neither a pass nor a fault"),
        ("state = \"receiving\"", "state = \"faulted\"", 5, "a pass and a fault"),
        ("state = \"receiving\"", "state = \"Receiving\"", 12, "unknown variant"),
        ("id = \"000102030405060708090a0b0c0d0e0f\"", "id = \"00\"", 14, "32 lower-case hexadecimal digits"),
        ("id = \"000102030405060708090a0b0c0d0e0f\"", "id = \"+00102030405060708090a0b0c0d0e0f\"", 14, "32"),
        ("bytes = 10737418240", "bytes = -1", 19, "invalid value"),
        ("[disk.last_commit]", "[disk.last_comit]", 16, "unknown field `last_comit`"),
        ("[disk.pass]", "[disk.pass", 13, ""),
        ("[disk.pass]", "\0", 13, ""),
    ];
    for (from, to, line, what) in cases {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD);
        match file::parse(text.as_bytes()) {
            Err(ParseError::Corrupt { line: found, what: said }) => {
                assert_eq!(found, line, "{to}: {said}");
                assert!(said.contains(what) && !said.contains('\n'), "{to}: {said}");
            }
            other => panic!("{to}: {other:?}"),
        }
    }
    // Without a pass, the states that need a commit or must not have one.
    let (start, end) = (GOOD.find("[disk.pass]").unwrap(), GOOD.find("[disk.last_commit]").unwrap());
    let idle = format!("{}{}", &GOOD[..start], &GOOD[end..]);
    let state = |text: &str, state: &str| file::parse(text.replace("receiving", state).as_bytes());
    assert!(state(&idle, "synchronized").is_ok());
    assert_eq!(
        state(&idle, "empty").unwrap_err().to_string(),
        "line 5: a disk that is empty has no last_commit"
    );
    assert!(state(&GOOD[..start], "empty").is_ok());
    let source = format!("{}{}", &GOOD[..start], &GOOD[GOOD.find("[disk.source]").unwrap()..]);
    assert_eq!(
        state(&source, "empty").unwrap_err().to_string(),
        "line 5: a disk that is empty has no source"
    );
    assert_eq!(
        state(&GOOD[..start], "synchronized").unwrap_err().to_string(),
        "line 5: a disk that is synchronized has a last_commit"
    );
    assert!(state(&GOOD[..start], "receiving").is_err());
    let disk = &GOOD[GOOD.find("[[disk]]").unwrap()..];
    let twice = format!("{GOOD}{disk}");
    let message = |text: &str| file::parse(text.as_bytes()).unwrap_err().to_string();
    assert_eq!(message(&twice), "line 25: a second disk is named root");
    let again = format!("{GOOD}{}", disk.replace("\"root\"", "\"data\""));
    assert!(message(&again).starts_with("line 26: a second disk has the identity naa.6000c2939d"));
    let none = &GOOD[..GOOD.find("[[disk]]").unwrap()];
    assert!(message(none).contains("missing field `disk`"));
    assert!(message(&format!("{none}disk = []\n")).contains("1 to 256 disks"));
    assert_eq!(
        file::parse(GOOD.replace("= 1\n", "= 2\nnew = true\n").as_bytes()),
        Err(ParseError::Version(2))
    );
    let mut bytes = GOOD.as_bytes().to_vec();
    bytes[20] = 0xff;
    assert!(file::parse(&bytes).unwrap_err().to_string().starts_with("line 2: this is not UTF-8"));
    // Nested deeply enough to end the stack of a careless parser.
    assert!(file::parse(format!("a = {}", "[".repeat(100_000)).as_bytes()).is_err());
}

#[test]
fn a_file_that_never_ends_is_not_read_to_its_end() {
    let (dir, store) = store();
    fs::create_dir(dir.path().join("machines")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", store.file(&name("web01"))).unwrap();
    let error = store.load(&name("web01")).unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error:?}");
}

fn any_state() -> impl Strategy<Value = (State, Option<Commit>)> {
    let time = || (0i64..4_000_000_000).prop_map(|s| OffsetDateTime::from_unix_timestamp(s).unwrap());
    let pass = || (any::<u128>(), time()).prop_map(|(id, started)| Pass { id: PassId(id), started });
    let commit = || {
        (any::<u128>(), time(), 0..i64::MAX as u64, any::<bool>()).prop_map(
            |(pass, time, bytes, point_in_time)| Commit { pass: PassId(pass), time, bytes, point_in_time },
        )
    };
    let fault = (time(), any::<String>()).prop_map(|(time, reason)| Fault { time, reason });
    prop_oneof![
        Just((State::Empty, None)),
        (pass(), proptest::option::of(commit())).prop_map(|(pass, commit)| (State::Receiving(pass), commit)),
        commit().prop_map(|commit| (State::Synchronized, Some(commit))),
        (pass(), fault, proptest::option::of(commit()))
            .prop_map(|(pass, fault, commit)| (State::Faulted(pass, fault), commit)),
    ]
}

proptest! {
    #[test]
    fn every_protection_comes_back(states in proptest::collection::vec(any_state(), 1..5), grouped: bool) {
        let disks = states.into_iter().enumerate().map(|(n, (state, last_commit))| {
            let source = match (&state, n % 3) {
                (State::Empty, _) | (_, 0) => None,
                (_, 1) => Some(source()),
                _ => Some(Source { id: None, ..source() }),
            };
            let released = grouped.then_some(PointId(n as u128));
            Assignment { state, last_commit, source, released, taken_back: !grouped, ..assignment(&format!("d{n}"), n as u32) }
        });
        let protection = Protection {
            machine: name("web01"),
            created: OffsetDateTime::from_unix_timestamp(0).unwrap(),
            group: grouped.then(|| name("shop")),
            disks: disks.collect(),
        };
        let text = file::encode(&protection).unwrap();
        prop_assert_eq!(file::parse(text.as_bytes()), Ok(protection));
    }

    #[test]
    fn no_bytes_bring_the_parser_down(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(file::parse(&bytes).is_err());
    }

    #[test]
    fn a_flipped_byte_is_an_error_or_a_sound_protection(at in 0..GOOD.len(), to in any::<u8>()) {
        let mut bytes = GOOD.as_bytes().to_vec();
        bytes[at] = to;
        if let Ok(protection) = file::parse(&bytes) {
            let text = file::encode(&protection).unwrap();
            prop_assert_eq!(file::parse(text.as_bytes()), Ok(protection));
        }
    }
}

// The rules.

fn disk(kernel_name: &str, id: Option<DiskId>) -> Disk {
    Disk {
        id,
        id_source: Some(IdSource::Sysfs),
        name: kernel_name.to_owned(),
        node: PathBuf::from("/dev").join(kernel_name),
        devno: "8:0".to_owned(),
        hctl: None,
        size: ByteLen(ByteLen::GIB),
        logical_sector: 512,
        physical_sector: 4096,
        sequence: None,
        vendor: None,
        model: None,
        serial: None,
        read_only: false,
        paths: vec![kernel_name.to_owned()],
        role: Role::Free,
        evidence: Vec::new(),
        problems: Vec::new(),
    }
}

fn blank(_: &Disk) -> Result<Content, crate::disk::device::Error> {
    Ok(Content { signatures: Vec::new(), first_data: None, places: Some(512) })
}

fn only(result: Result<Vec<Planned<'_>>, Refused>) -> Why {
    match result {
        Err(refused) if refused.refused.len() == 1 => refused.refused[0].why.clone(),
        other => panic!("{other:?}"),
    }
}

fn requests(texts: &[&str]) -> Vec<Request> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn each_rule_refuses_its_disk_with_the_reason() {
    let web = name("web01");
    let ask = |disk: Disk, allowed: Allowed| {
        let wanted = Request {
            name: name("root"),
            target: assign::Target::Id(disk.id.clone().unwrap_or_else(|| id(99))),
        };
        only(plan(&web, &[wanted], &[disk], &BTreeMap::new(), allowed, blank))
    };
    let none = Allowed::default();
    let plain = || disk("sdx", Some(id(1)));
    let evidence = || vec!["sdx1 is mounted on /boot".to_owned(), "and more".to_owned()];
    let said = "sdx1 is mounted on /boot; and more".to_owned();
    let with = |role| Disk { role, evidence: evidence(), ..plain() };
    let system = ask(with(Role::System), none);
    assert_eq!(system, Why::System { evidence: said.clone() });
    assert!(system.to_string().contains("unmount it, or choose another disk"), "{system}");
    assert_eq!(ask(with(Role::InUse), none), Why::InUse { evidence: said.clone() });
    assert_eq!(ask(with(Role::Clone), none), Why::Clone { evidence: said });
    assert_eq!(ask(with(Role::Retention), none), Why::Retention);
    assert_eq!(ask(Disk { read_only: true, ..plain() }, none), Why::ReadOnly);
    assert_eq!(ask(Disk { size: ByteLen(0), ..plain() }, none), Why::Geometry { size: 0, sector: 512 });
    assert_eq!(ask(Disk { logical_sector: 0, ..plain() }, none), Why::Geometry { size: 1 << 30, sector: 0 });
    assert_eq!(ask(disk("sdx", None), none), Why::Absent);
    let image: DiskId = "loop:/images/web01.img".parse().unwrap();
    assert_eq!(ask(disk("loop0", Some(image.clone())), none), Why::Loop);

    let disks = [disk("loop0", Some(image))];
    let allowed = Allowed { loops: true, ..none };
    let planned =
        plan(&web, &requests(&["root=loop:/images/web01.img"]), &disks, &BTreeMap::new(), allowed, blank);
    assert_eq!(planned.unwrap()[0].id.to_string(), "loop:/images/web01.img");
}

#[test]
fn a_disk_that_is_not_empty_needs_overwrite_and_the_assignment_says_so() {
    let web = name("web01");
    let disks = [disk("sdx", Some(id(1)))];
    let wanted = requests(&[&format!("root={}", id(1))]);
    let used = |_: &Disk| Ok(Content { signatures: Vec::new(), first_data: Some(1 << 20), places: Some(0) });
    let why = only(plan(&web, &wanted, &disks, &BTreeMap::new(), Allowed::default(), used));
    assert!(matches!(&why, Why::NotEmpty { content } if !content.is_empty()), "{why:?}");
    assert!(why.to_string().contains("--overwrite"), "{why}");
    let allowed = Allowed { overwrite: true, ..Allowed::default() };
    let now = OffsetDateTime::from_unix_timestamp(0).unwrap();
    let planned = plan(&web, &wanted, &disks, &BTreeMap::new(), allowed, used).unwrap();
    assert!(planned[0].assignment(allowed, now).overwrite);
    let planned = plan(&web, &wanted, &disks, &BTreeMap::new(), allowed, blank).unwrap();
    assert!(!planned[0].assignment(allowed, now).overwrite, "there was nothing to overwrite");
    let broken = |disk: &Disk| {
        Err(IoError::new("read", disk.name.clone(), std::io::Error::from_raw_os_error(libc::EIO)).into())
    };
    let why = only(plan(&web, &wanted, &disks, &BTreeMap::new(), allowed, broken));
    assert!(why.to_string().contains("read sdx: Input/output error"), "{why}");
}

#[test]
fn one_disk_is_not_planned_twice_nor_for_two_machines() {
    let web = name("web01");
    let disks = [disk("sdx", Some(id(1))), disk("sdy", Some(id(2)))];
    let wanted = requests(&[&format!("a={}", id(1)), &format!("b={}", id(1).to_string().to_uppercase())]);
    let allowed = Allowed::default();
    let why = only(plan(&web, &wanted, &disks, &BTreeMap::new(), allowed, blank));
    assert_eq!(why, Why::Twice { other: name("a") });
    let wanted = requests(&[&format!("a={}", id(1)), &format!("a={}", id(2))]);
    assert_eq!(only(plan(&web, &wanted, &disks, &BTreeMap::new(), allowed, blank)), Why::NameTwice);

    let owned = |machine: &str, disk: &str| BTreeMap::from([(id(1), (name(machine), name(disk)))]);
    let wanted = requests(&[&format!("a={}", id(1))]);
    for (machine, disk) in [("db01", "a"), ("web01", "b")] {
        let why = only(plan(&web, &wanted, &disks, &owned(machine, disk), allowed, blank));
        assert_eq!(why, Why::Assigned { machine: name(machine), disk: name(disk) });
    }
    let planned = plan(&web, &wanted, &disks, &owned("web01", "a"), allowed, blank).unwrap();
    assert_eq!(planned[0].content, None, "assigned in just this way already");
}

#[test]
fn all_that_is_wrong_with_a_command_is_said_at_once() {
    let disks = [disk("sdx", Some(id(1)))];
    let wanted = requests(&[&format!("a={}", id(1)), &format!("b={}", id(2)), &format!("c={}", id(3))]);
    let refused =
        plan(&name("web01"), &wanted, &disks, &BTreeMap::new(), Allowed::default(), blank).unwrap_err();
    let text = refused.to_string();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.starts_with("nothing was assigned to machine web01:\n  b=naa.6000c29"), "{text}");
}

#[test]
fn a_node_is_resolved_and_a_weak_identity_must_be_spelled_out() {
    // A node that is there on every machine stands for a disk.
    let web = name("web01");
    let weak: DiskId = "serial.QEMU_QEMU_HARDDISK_vol-1".parse().unwrap();
    assert!(weak.is_weak());
    let at_null = |id: &DiskId| Disk { node: PathBuf::from("/dev/null"), ..disk("null", Some(id.clone())) };
    let node = requests(&["root=/dev/null"]);
    let allowed = Allowed::default();
    let disks = [at_null(&id(1))];
    let planned = plan(&web, &node, &disks, &BTreeMap::new(), allowed, blank).unwrap();
    assert_eq!((planned[0].id.clone(), planned[0].given.as_str()), (id(1), "/dev/null"));
    let disks = [at_null(&weak)];
    let why = only(plan(&web, &node, &disks, &BTreeMap::new(), allowed, blank));
    assert_eq!(why, Why::Weak { name: name("root"), id: weak.clone() });
    let spelled = requests(&[&format!("root={weak}")]);
    assert!(plan(&web, &spelled, &disks, &BTreeMap::new(), allowed, blank).is_ok());
    assert_eq!(only(plan(&web, &node, &[], &BTreeMap::new(), allowed, blank)), Why::NotADisk);
    let gone = requests(&["root=/dev/there-is-no-such-disk"]);
    assert_eq!(only(plan(&web, &gone, &disks, &BTreeMap::new(), allowed, blank)), Why::Absent);
    let nameless =
        [Disk { role: Role::NoUuid, problems: vec!["no UUID: do this".to_owned()], ..at_null(&id(1)) }];
    let nameless = nameless.map(|disk| Disk { id: None, ..disk });
    let why = only(plan(&web, &node, &nameless, &BTreeMap::new(), allowed, blank));
    assert!(why.to_string().ends_with("; no UUID: do this"), "{why}");
}

#[test]
fn a_request_is_a_name_and_a_disk() {
    assert!(matches!(requests(&["a=/dev/sdb"])[0].target, assign::Target::Node(_)));
    let by_id = "a=/dev/disk/by-id/wwn-0x6000c2939d1a4b6f0e8c2d7a5b1f3e90";
    assert!(matches!(requests(&[by_id])[0].target, assign::Target::Id(_)));
    for bad in [
        "",
        "root",
        "=naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90",
        "ro ot=/dev/sdb",
        "a=",
        "a=sdb",
        "a=/etc/passwd",
    ] {
        assert!(bad.parse::<Request>().is_err(), "{bad}");
    }
    assert!(Path::new("/dev/disk/by-id/nonsense").starts_with("/dev"));
    assert!(
        "a=/dev/disk/by-id/nonsense".parse::<Request>().is_err(),
        "a name that nobody knows became a place"
    );
}
