//! The machine, on changes of the tests' own, ended at each of its steps.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::record::Records;
use super::{Change, Content, Error, File, Host, Level, Places, Setup, Wanted, Wishes};
use crate::error::IoError;

thread_local! {
    /// How many steps are left before the power fails; none where it does not.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Called at each step.
pub(super) fn moment() -> Result<(), Error> {
    match LEFT.get() {
        Some(0) => Err(IoError::new("go on", "power", std::io::Error::other("cut by the test")).into()),
        left => {
            LEFT.set(left.map(|left| left - 1));
            Ok(())
        }
    }
}

/// Runs something with the power failing after so many steps; false where it failed.
fn with_power_for(steps: u32, run: impl FnOnce() -> Result<(), Error>) -> bool {
    LEFT.set(Some(steps));
    let done = run();
    LEFT.set(None);
    match done {
        Ok(()) => true,
        Err(Error::Io(error)) if error.target == "power" => false,
        Err(error) => panic!("{error}"),
    }
}

/// A change with one of everything. `/wish` in the tree says which of its shapes is wanted.
const ALL: Change = Change { name: "all", about: "one of everything", follows_disks: false, wanted };

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let wish = host.root.text("/wish")?.unwrap_or_default();
    wanted.files.push(File::own("/etc/new/deep/own.conf", format!("own {wish}\n")));
    // A directory that is a link.
    wanted.files.push(File::own("/etc/linked/there.conf", "ours\n"));
    let theirs = host.root.text("/etc/theirs.conf")?.unwrap_or_default();
    let theirs: String =
        theirs.lines().filter(|line| !line.starts_with("ours")).map(|line| format!("{line}\n")).collect();
    wanted.files.push(File::shared("/etc/theirs.conf", format!("{theirs}ours {wish}\n")));
    if wish != "2" {
        wanted.files.push(File::link("/etc/mask", "/dev/null"));
        wanted.files.push(File::link("/etc/was-a-file", "/dev/null"));
    }
    Ok(wanted)
}

fn tree() -> TempDir {
    // In memory where that can be: hundreds of trees are written, and flushed.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let at = |path: &str| dir.path().join(path);
    fs::create_dir_all(at("etc/real")).unwrap();
    symlink("/etc/real", at("etc/linked")).unwrap();
    fs::write(at("etc/real/there.conf"), "the administrator's\n").unwrap();
    fs::set_permissions(at("etc/real/there.conf"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::write(at("etc/theirs.conf"), "# a comment\nkey = value\n").unwrap();
    fs::set_permissions(at("etc/theirs.conf"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(at("etc/was-a-file"), "generator").unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(at("etc/theirs.conf"), Some(12), Some(34)).unwrap();
    }
    fs::write(at("wish"), "1").unwrap();
    dir
}

fn setup(dir: &Path) -> Setup {
    let places =
        Places { state_dir: "/var/lib/mt-agent".into(), retention_dir: "/retention".into(), port: 9443 };
    Setup::open(Host::open(dir, places, Wishes::default()).unwrap()).unwrap()
}

fn apply(dir: &Path) -> Result<(), Error> {
    setup(dir).apply_one(&ALL).map(drop)
}

fn revert(dir: &Path) -> Result<(), Error> {
    setup(dir).revert_one(&ALL).map(drop)
}

/// What a test does to a tree.
type Run = fn(&Path) -> Result<(), Error>;

type Snapshot = BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)>;

/// All there is, with owner, permissions and content; of the state, which files there are.
fn snapshot(dir: &Path) -> Snapshot {
    fn add(dir: &Path, at: &Path, into: &mut Snapshot) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let short = path.strip_prefix(dir).unwrap().to_owned();
            let content = if meta.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_file() && path.file_name().unwrap() != "record.json" {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            into.insert(short, (meta.mode(), meta.uid(), meta.gid(), content));
            if meta.is_dir() {
                add(dir, &path, into);
            }
        }
    }
    let mut all = Snapshot::new();
    add(dir, dir, &mut all);
    all
}

/// Without the state directory, which the first command makes.
fn host_files(all: &Snapshot) -> Snapshot {
    all.iter()
        .filter(|(path, _)| !path.starts_with("var"))
        .map(|(path, what)| (path.clone(), what.clone()))
        .collect()
}

fn wish(dir: &Path, wish: &str) {
    fs::write(dir.join("wish"), wish).unwrap();
}

#[test]
fn applying_twice_changes_nothing_and_reverting_gives_back_all() {
    let dir = tree();
    let start = snapshot(dir.path());
    apply(dir.path()).unwrap();
    let applied = snapshot(dir.path());
    let text = |path: &str| fs::read_to_string(dir.path().join(path)).unwrap();
    assert_eq!(text("etc/real/there.conf"), "ours\n");
    assert_eq!(text("etc/theirs.conf"), "# a comment\nkey = value\nours 1\n");
    assert_eq!(text("etc/new/deep/own.conf"), "own 1\n");
    for path in ["etc/real/there.conf", "etc/theirs.conf"] {
        let (before, after) = (&start[Path::new(path)], &applied[Path::new(path)]);
        assert_eq!((before.0, before.1, before.2), (after.0, after.1, after.2), "{path}");
    }
    assert_eq!(fs::read_link(dir.path().join("etc/was-a-file")).unwrap(), Path::new("/dev/null"));
    let written = fs::metadata(dir.path().join("etc/theirs.conf")).unwrap().ino();
    let record = fs::read(dir.path().join("var/lib/mt-agent-setup/all/record.json")).unwrap();
    apply(dir.path()).unwrap();
    assert_eq!(snapshot(dir.path()), applied);
    assert_eq!(
        fs::metadata(dir.path().join("etc/theirs.conf")).unwrap().ino(),
        written,
        "it was written again"
    );
    assert_eq!(fs::read(dir.path().join("var/lib/mt-agent-setup/all/record.json")).unwrap(), record);
    revert(dir.path()).unwrap();
    let back = snapshot(dir.path());
    assert_eq!(host_files(&back), start);
    assert!(!back.keys().any(|path| path.ends_with("all")), "{:?}", back.keys());
    revert(dir.path()).unwrap();
    assert_eq!(host_files(&snapshot(dir.path())), start);
}

/// A change of what is wanted: one file with another content, one link not any more.
#[test]
fn what_is_not_wanted_any_more_is_what_it_was_before() {
    let dir = tree();
    let start = snapshot(dir.path());
    apply(dir.path()).unwrap();
    wish(dir.path(), "2");
    apply(dir.path()).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("etc/was-a-file")).unwrap(), "generator");
    assert!(!dir.path().join("etc/mask").is_symlink());
    assert_eq!(
        fs::read_to_string(dir.path().join("etc/theirs.conf")).unwrap(),
        "# a comment\nkey = value\nours 2\n"
    );
    revert(dir.path()).unwrap();
    wish(dir.path(), "1");
    assert_eq!(host_files(&snapshot(dir.path())), start);
}

/// Runs `first` to its end and takes what it leaves as what must come of it; then, on a new tree each time, ends it at
/// each of its steps, and runs each of `next`, which must come to what is beside it.
fn at_each_step(prepare: impl Fn(&Path), first: Run, next: &[Run], expected: &[&Snapshot]) {
    let mut steps = 0;
    loop {
        let mut ended = false;
        for (run, expected) in next.iter().zip(expected) {
            let dir = tree();
            prepare(dir.path());
            ended = with_power_for(steps, || first(dir.path()));
            // Before a directory has its permissions they are what the umask left.
            for made in ["etc/new", "etc/new/deep"].map(|made| dir.path().join(made)) {
                if fs::read_dir(&made).is_ok_and(|mut entries| entries.next().is_none()) {
                    fs::set_permissions(&made, fs::Permissions::from_mode(0o700)).unwrap();
                }
            }
            run(dir.path()).unwrap_or_else(|error| panic!("after {steps} steps: {error}"));
            let now = snapshot(dir.path());
            let state = now.keys().any(|path| path.ends_with("record.json"));
            if state {
                assert_eq!(&now, *expected, "after {steps} steps");
            } else {
                assert_eq!(&host_files(&now), *expected, "after {steps} steps");
                assert!(
                    !now.keys().any(|path| path.starts_with("var/lib/mt-agent-setup/all")),
                    "{:?}",
                    now.keys()
                );
            }
            // And what was there first is not lost.
            revert(dir.path()).unwrap();
            let mut start = snapshot(tree().path());
            let wish = Path::new("wish");
            start.insert(wish.to_owned(), snapshot(dir.path())[wish].clone());
            assert_eq!(host_files(&snapshot(dir.path())), start, "reverted after {steps} steps");
        }
        if ended {
            assert!(steps > 10, "only {steps} steps");
            return;
        }
        steps += 1;
        assert!(steps < 1000);
    }
}

#[test]
fn an_apply_that_is_ended_at_any_step_is_completed_or_taken_back() {
    let dir = tree();
    let start = snapshot(dir.path());
    apply(dir.path()).unwrap();
    let applied = snapshot(dir.path());
    at_each_step(|_| {}, apply, &[apply, revert], &[&applied, &start]);
}

#[test]
fn an_apply_of_another_content_that_is_ended_at_any_step_is_completed_or_taken_back() {
    let dir = tree();
    apply(dir.path()).unwrap();
    wish(dir.path(), "2");
    apply(dir.path()).unwrap();
    let applied = snapshot(dir.path());
    revert(dir.path()).unwrap();
    let start = host_files(&snapshot(dir.path()));
    let prepare = |dir: &Path| {
        apply(dir).unwrap();
        wish(dir, "2");
    };
    at_each_step(prepare, apply, &[apply, revert], &[&applied, &start]);
}

#[test]
fn a_revert_that_is_ended_at_any_step_is_completed_or_applied_again() {
    let dir = tree();
    let start = snapshot(dir.path());
    apply(dir.path()).unwrap();
    let applied = snapshot(dir.path());
    at_each_step(|dir| apply(dir).unwrap(), revert, &[revert, apply], &[&start, &applied]);
}

/// The rules of a firewall, ended at each step: they are the administrator's, or those and our line.
#[test]
fn rules_for_nftables_that_are_ended_at_any_step_are_completed_or_taken_back() {
    let network = super::network::CHANGE;
    let rules = "table inet f {\n chain i { type filter hook input priority 0; policy drop; }\n}\n";
    let prepared = || {
        let dir = tree();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("etc/systemd/system/x.target.wants")).unwrap();
        symlink("/x", at("etc/systemd/system/x.target.wants/nftables.service")).unwrap();
        fs::write(at("etc/systemd/system/nftables.service"), "ExecStart=nft -f /etc/nftables.conf\n")
            .unwrap();
        fs::write(at("etc/nftables.conf"), "include \"/etc/rules\"\n").unwrap();
        fs::write(at("etc/rules"), rules).unwrap();
        dir
    };
    let apply = |dir: &Path| setup(dir).apply_one(&network).map(drop);
    let revert = |dir: &Path| setup(dir).revert_one(&network).map(drop);
    let start = snapshot(prepared().path());
    let done = prepared();
    apply(done.path()).unwrap();
    let applied = host_files(&snapshot(done.path()));
    let rules = Path::new("etc/rules");
    assert_ne!(applied[rules], start[rules], "{applied:#?}");
    for is_applied in [false, true] {
        let mut steps = 0;
        let mut ended = false;
        while !ended {
            for (next, expected) in [(&apply as &dyn Fn(&Path) -> _, &applied), (&revert, &start)] {
                let dir = prepared();
                let first: &dyn Fn(&Path) -> Result<(), Error> = if is_applied { &revert } else { &apply };
                if is_applied {
                    apply(dir.path()).unwrap();
                }
                ended = with_power_for(steps, || first(dir.path()));
                let now = snapshot(dir.path());
                assert!([&start, &applied].iter().any(|all| all[rules] == now[rules]));
                next(dir.path()).unwrap_or_else(|error| panic!("after {steps} steps: {error}"));
                assert_eq!(host_files(&snapshot(dir.path())), *expected, "after {steps} steps");
            }
            steps += 1;
        }
        assert!(steps > 10, "only {steps} steps");
    }
}

#[test]
fn what_someone_changed_since_is_left_alone() {
    let dir = tree();
    apply(dir.path()).unwrap();
    let own = dir.path().join("etc/new/deep/own.conf");
    fs::write(&own, "edited\n").unwrap();
    let before = snapshot(dir.path());
    let refused = revert(dir.path()).unwrap_err();
    assert!(
        refused.is_refusal() && refused.to_string().contains("/etc/new/deep/own.conf was changed since"),
        "{refused}"
    );
    assert_eq!(snapshot(dir.path()), before);
    assert_eq!(
        setup(dir.path()).status(&[&ALL]).unwrap()[0].applied.as_ref().unwrap().edited,
        [Path::new("/etc/new/deep/own.conf")]
    );
    let refused = apply(dir.path()).unwrap_err();
    assert!(refused.is_refusal() && refused.to_string().contains("move it away"), "{refused}");
    assert_eq!(snapshot(dir.path()), before);
    assert_eq!(setup(dir.path()).check(&[&ALL])[0].level, Level::Fail);
    // As it says.
    fs::rename(&own, dir.path().join("etc/mine")).unwrap();
    apply(dir.path()).unwrap();
    assert_eq!(fs::read_to_string(&own).unwrap(), "own 1\n");
    fs::remove_file(dir.path().join("etc/mine")).unwrap();
    // Permissions are a change, too.
    fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(revert(dir.path()).unwrap_err().is_refusal());
    fs::set_permissions(&own, fs::Permissions::from_mode(0o644)).unwrap();
    revert(dir.path()).unwrap();
    assert_eq!(host_files(&snapshot(dir.path())), snapshot(tree().path()));
}

#[test]
fn a_file_that_others_change_too_is_applied_over_their_edits_and_not_reverted_over_them() {
    let dir = tree();
    apply(dir.path()).unwrap();
    let theirs = dir.path().join("etc/theirs.conf");
    fs::write(&theirs, "# a comment\nkey = another\nours 1\n").unwrap();
    wish(dir.path(), "3");
    apply(dir.path()).unwrap();
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "# a comment\nkey = another\nours 3\n");
    let refused = revert(dir.path()).unwrap_err();
    assert!(refused.to_string().contains("/etc/theirs.conf was changed since"), "{refused}");
    // As it says: what it was before is kept.
    let kept = refused.to_string().split("is kept in ").nth(1).unwrap().split(';').next().unwrap().to_owned();
    fs::write(&theirs, fs::read(&kept).unwrap()).unwrap();
    revert(dir.path()).unwrap();
    wish(dir.path(), "1");
    assert_eq!(host_files(&snapshot(dir.path())), snapshot(tree().path()));
}

/// What is not of ours among the records is left, and keeps nothing from being taken back.
#[test]
fn a_directory_among_what_is_kept_is_left_alone() {
    let dir = tree();
    apply(dir.path()).unwrap();
    let theirs = dir.path().join("var/lib/mt-agent-setup/all/theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("file"), "theirs").unwrap();
    wish(dir.path(), "2");
    apply(dir.path()).unwrap();
    revert(dir.path()).unwrap();
    revert(dir.path()).unwrap();
    wish(dir.path(), "1");
    assert_eq!(host_files(&snapshot(dir.path())), snapshot(tree().path()));
    let left: Vec<_> =
        fs::read_dir(theirs.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!((left, fs::read(theirs.join("file")).unwrap()), (vec![theirs], b"theirs".to_vec()));
}

#[test]
fn records_that_others_could_have_written_are_not_believed() {
    let dir = tree();
    apply(dir.path()).unwrap();
    let records = dir.path().join("var/lib/mt-agent-setup");
    fs::set_permissions(records.join("all"), fs::Permissions::from_mode(0o770)).unwrap();
    assert!(revert(dir.path()).unwrap_err().is_refusal());
    fs::set_permissions(records.join("all"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::rename(&records, dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), &records).unwrap();
    assert!(revert(dir.path()).unwrap_err().is_refusal());
    fs::remove_file(&records).unwrap();
    fs::rename(dir.path().join("elsewhere"), &records).unwrap();
    // A damaged one, and a damaged original.
    let record = records.join("all/record.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"schema_version\": 1", "\"schema_version\": 2")).unwrap();
    assert!(revert(dir.path()).unwrap_err().to_string().contains("update mt-agent"));
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    assert!(matches!(revert(dir.path()), Err(Error::Corrupt { .. })));
    fs::write(&record, &text).unwrap();
    let before = snapshot(dir.path());
    let kept = fs::read_dir(records.join("all")).unwrap().map(|entry| entry.unwrap().path());
    let kept = kept.into_iter().find(|path| fs::read(path).unwrap() == b"generator").unwrap();
    fs::write(&kept, "another").unwrap();
    assert!(matches!(revert(dir.path()), Err(Error::Corrupt { .. })));
    fs::write(&kept, "generator").unwrap();
    assert_eq!(snapshot(dir.path()), before, "something was touched");
    revert(dir.path()).unwrap();
}

/// Whoever owns the directory of an image can put a link into the place of any directory that is in it, at any moment.
#[test]
fn records_are_not_looked_for_where_a_link_leads() {
    let (dir, other) = (tree(), tempfile::tempdir().unwrap());
    apply(dir.path()).unwrap();
    let all = setup(dir.path());
    let records = Records::open(&all.host().root, "/var/lib/mt-agent-setup".into());
    let record = records.load("all").unwrap().unwrap();
    let theirs = other.path().join("lib/mt-agent-setup/all");
    fs::create_dir_all(&theirs).unwrap();
    fs::write(theirs.join("theirs"), "theirs").unwrap();
    let before = snapshot(other.path());
    let (var, away) = (dir.path().join("var"), dir.path().join("away"));
    fs::rename(&var, &away).unwrap();
    symlink(other.path(), &var).unwrap();
    for done in [
        records.lock().map(drop),
        records.load("all").map(drop),
        records.keep("all", b"x"),
        records.save("all", &record),
        records.sweep("all", Some(&record)),
        records.sweep("all", None),
        records.remove("all"),
    ] {
        assert!(done.unwrap_err().is_refusal());
        assert_eq!(snapshot(other.path()), before);
    }
    fs::remove_file(&var).unwrap();
    fs::rename(&away, &var).unwrap();
    revert(dir.path()).unwrap();
    assert_eq!(host_files(&snapshot(dir.path())), snapshot(tree().path()));
}

#[test]
fn a_device_in_the_place_of_a_file_is_not_written() {
    let dir = tree();
    fs::create_dir_all(dir.path().join("etc/new/deep")).unwrap();
    fs::create_dir_all(dir.path().join("dev")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("dev/null"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/dev/null", dir.path().join("etc/new/deep/own.conf")).unwrap();
    let before = snapshot_of_links(dir.path());
    assert!(apply(dir.path()).unwrap_err().is_refusal());
    assert_eq!(snapshot_of_links(dir.path()), before);
}

#[test]
fn what_a_killed_run_left_is_removed_and_never_followed() {
    let elsewhere = tempfile::tempdir().unwrap();
    let victim = elsewhere.path().join("theirs");
    fs::write(&victim, "theirs").unwrap();
    let dir = tree();
    let start = snapshot(dir.path());
    apply(dir.path()).unwrap();
    let applied = snapshot(dir.path());
    let left =
        ["etc/real/.there.conf", "etc/.theirs.conf", "etc/.mask"].map(|path| format!("{path}.mt-agent-new"));
    let leave = || left.iter().for_each(|path| symlink(&victim, dir.path().join(path)).unwrap());
    // Where nothing else is to be done, where something is, and where all is taken back.
    leave();
    apply(dir.path()).unwrap();
    assert_eq!(snapshot(dir.path()), applied);
    leave();
    wish(dir.path(), "3");
    apply(dir.path()).unwrap();
    assert!(left.iter().all(|path| !dir.path().join(path).is_symlink()));
    leave();
    revert(dir.path()).unwrap();
    wish(dir.path(), "1");
    assert_eq!(host_files(&snapshot(dir.path())), start);
    assert_eq!(fs::read(&victim).unwrap(), b"theirs");
}

/// The names and kinds: a pipe is not read.
fn snapshot_of_links(dir: &Path) -> Vec<(PathBuf, bool)> {
    let mut names: Vec<(PathBuf, bool)> = ["etc", "etc/new/deep"]
        .iter()
        .flat_map(|at| fs::read_dir(dir.join(at)).unwrap())
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.path(), entry.file_type().unwrap().is_symlink()))
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_in_place_without_us_is_nobody_s_to_take_back() {
    let dir = tree();
    const QUIET: Change = Change { name: "quiet", about: "", follows_disks: false, wanted: quiet };
    fn quiet(_: &Host) -> Result<Wanted, Error> {
        Ok(Wanted { files: vec![File::own("/etc/was-a-file", "generator")], ..Wanted::default() })
    }
    let Wanted { files, .. } = quiet(setup(dir.path()).host()).unwrap();
    assert_eq!(files[0].content, Content::Bytes(b"generator".to_vec()));
    let before = snapshot(dir.path());
    assert!(setup(dir.path()).apply_one(&QUIET).unwrap().files.is_empty());
    assert!(!setup(dir.path()).revert_one(&QUIET).unwrap().applied);
    assert_eq!(snapshot(dir.path()), before);
}
