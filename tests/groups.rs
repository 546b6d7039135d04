//! Consistency groups, and failover of machines that are being received: several senders and one service, all of them real.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{
    KIB, Loop, MIB, Outcome, Process, Service, assert_equal, directory, first_difference, mt_agent, run,
    wait_for,
};
use tempfile::TempDir;

const SIZE: u64 = 8 * MIB;

/// Machines of one disk each, enrolled and assigned, whose group is `shop`.
// Dropped in this order.
struct Shop {
    service: Service,
    machines: Vec<Machine>,
    dir: TempDir,
}

struct Machine {
    name: &'static str,
    source: PathBuf,
    target: Loop,
    client: PathBuf,
}

impl Shop {
    /// With one point of each, which is not of the group.
    fn new(names: &[&'static str]) -> Shop {
        let dir = directory();
        let service = Service::start(dir.path(), &[]);
        let machines: Vec<Machine> = names
            .iter()
            .map(|name| {
                let path = |end: &str| dir.path().join(format!("{name}.{end}"));
                let target = Loop::create(&path("target"), SIZE);
                service.protect_add(name, "root", &target).ok();
                service.enroll(name, &path("client"));
                support::write_random(&path("source"), 0, SIZE);
                Machine { name, source: path("source"), target, client: path("client") }
            })
            .collect();
        let shop = Shop { service, machines, dir };
        for machine in &shop.machines {
            shop.start(machine, &[]).finish().ok();
        }
        shop.command(&["protect", "group", "shop", "--machines", &names.join(",")]).ok();
        shop
    }

    fn command(&self, args: &[&str]) -> Outcome {
        run(&[args, &["--config", &self.service.config()]].concat())
    }

    fn start(&self, machine: &Machine, args: &[&str]) -> Process {
        let mut command = mt_agent();
        let to = self.service.address().to_string();
        command.args([
            "send",
            "--machine",
            machine.name,
            "--to",
            &to,
            "--compression",
            "off",
            "--retry-for",
            "0s",
            // However long an answer takes: with several, a slow one has no frame whole in time.
            "--connections",
            "1",
        ]);
        command.arg("--state-dir").arg(&machine.client);
        command.arg("--disk").arg(format!("root={}", machine.source.display())).args(args);
        let mut random = [0; 4];
        getrandom::fill(&mut random).unwrap();
        Process::spawn(command, &self.dir.path().join(format!("send{:08x}", u32::from_ne_bytes(random))))
    }

    /// All machines send for the group, with these arguments.
    fn start_all(&self, args: &[&str]) -> Vec<Process> {
        let args = [&["--group", "shop"], args].concat();
        self.machines.iter().map(|machine| self.start(machine, &args)).collect()
    }

    /// Changes all sources, and keeps what they were.
    fn change(&self, len: u64) -> Vec<PathBuf> {
        let change = |machine: &Machine| {
            let old = machine.source.with_extension("old");
            fs::copy(&machine.source, &old).unwrap();
            support::write_random(&machine.source, 0, len);
            old
        };
        self.machines.iter().map(change).collect()
    }

    fn points(&self, machine: &Machine) -> Vec<Value> {
        let list = self.command(&["points", machine.name, "--json"]).ok().json();
        list["points"].as_array().unwrap().clone()
    }

    /// Waits until bytes of a machine arrived.
    fn wait_for_bytes(&self, machine: &Machine) {
        wait_for("bytes", || {
            (self.service.volume(machine.name, "root").received_bytes > Some(0)).then_some(())
        });
    }

    #[track_caller]
    fn stands_at(&self, machine: &Machine, content: &Path) {
        assert_equal(content, machine.target.backing());
    }
}

#[test]
fn a_group_s_point_is_one_and_there_on_all_of_its_machines() {
    require_root!();
    let shop = Shop::new(&["db01", "web01", "web02"]);
    let listed = shop.command(&["protect", "list"]).ok().stdout;
    assert!(listed.ends_with("group shop: db01, web01, web02\n"), "{listed}");
    shop.change(64 * KIB);
    for send in shop.start_all(&["--point-name", "monday"]) {
        send.finish().ok();
    }
    let points: Vec<Vec<Value>> = shop.machines.iter().map(|machine| shop.points(machine)).collect();
    let id = points[0][1]["id"].as_str().unwrap();
    for (machine, points) in shop.machines.iter().zip(&points) {
        assert_eq!(points.len(), 2, "{points:?}");
        assert_eq!((points[1]["id"].as_str(), points[1]["group"].as_str()), (Some(id), Some("shop")));
        assert_eq!((&points[1]["name"], &points[1]["fuzzy"]), (&"monday".into(), &false.into()));
        assert_ne!(points[0]["id"], points[0]["group"]);
        shop.stands_at(machine, &machine.source);
    }
    // One record, of all of them.
    let log = fs::read_to_string(Path::new(&shop.service.state_dir()).join("retention/points.log")).unwrap();
    let records: Vec<_> = log.lines().filter(|line| line.contains(id)).collect();
    assert!(records.len() == 1 && records[0].matches("\"machine\"").count() == 3, "{records:?}");

    // Each of them has older points of its own, and none that all have.
    let newer = shop.change(64 * KIB);
    for send in shop.start_all(&[]) {
        send.finish().ok();
    }
    let first = points[0][0]["id"].as_str().unwrap();
    shop.command(&["failover", "--group", "shop", "--to", first]).fails(3, &["have no such point together"]);
    let together = shop.command(&["failover", "--group", "shop", "--to", id, "--json"]).ok().json();
    let points: Vec<_> = together["machines"].as_array().unwrap().iter().map(|one| &one["point"]).collect();
    assert_eq!(points, [id, id, id]);
    for (machine, content) in shop.machines.iter().zip(&newer) {
        shop.stands_at(machine, content);
    }
    shop.command(&["failover", "db01,web02", "--undo"]).ok();
    shop.stands_at(&shop.machines[0], &shop.machines[0].source);
    shop.stands_at(&shop.machines[1], &newer[1]);
    shop.stands_at(&shop.machines[2], &shop.machines[2].source);
    // Called again, it does what is missing.
    let again = shop.command(&["failover", "--group", "shop", "--to", id]).ok();
    assert!(again.stderr.contains("web01 is failed over to point"), "{again:#?}");
    assert!(
        again.stdout.contains("db01: failed over") && again.stdout.contains("web02: failed over"),
        "{again:#?}"
    );
    for (machine, content) in shop.machines.iter().zip(&newer) {
        shop.stands_at(machine, content);
    }
}

#[test]
fn who_is_killed_takes_the_group_s_point_with_it_and_all_go_on_later() {
    require_root!();
    let shop = Shop::new(&["db01", "web01"]);
    let old = shop.change(SIZE);
    let (db, web) = (&shop.machines[0], &shop.machines[1]);
    let mut slow = shop.start(db, &["--group", "shop", "--whole", "--bwlimit", "128K"]);
    let quick = shop.start(web, &["--group", "shop"]);
    shop.wait_for_bytes(db);
    // The quick one has sent all, and waits.
    wait_for("its commit", || {
        (shop.service.volume("web01", "root").received_bytes == Some(SIZE)).then_some(())
    });
    wait_for("its first writes", || {
        (shop.service.volume("db01", "root").written_bytes > Some(0)).then_some(())
    });
    slow.kill();
    quick.finish().fails(
        1,
        &["root: ", "disk root of machine db01 of the same point was not received", "(incomplete)"],
    );
    shop.service.wait_until_idle();
    for (machine, old) in shop.machines.iter().zip(&old) {
        assert_eq!(shop.points(machine).len(), 1);
        assert!(first_difference(old, machine.target.backing()).is_some());
        let out = shop.dir.path().join(format!("out-{}", machine.name));
        fs::create_dir(&out).unwrap();
        let what = format!("{}@latest", machine.name);
        shop.command(&["export", &what, "--dir", out.to_str().unwrap()]).ok();
        assert_equal(old, &out.join("root.img"));
    }
    for send in shop.start_all(&[]) {
        send.finish().ok();
    }
    for machine in &shop.machines {
        assert_eq!(shop.points(machine).len(), 2);
        shop.stands_at(machine, &machine.source);
    }
    // And the way back is there, over both passes.
    shop.command(&["check", "db01"]).ok();
    for (machine, old) in shop.machines.iter().zip(&old) {
        let first = shop.points(machine)[0]["id"].as_str().unwrap().to_owned();
        shop.command(&["failover", machine.name, "--to", &first]).ok();
        shop.stands_at(machine, old);
    }
}

#[test]
fn nobody_is_read_before_all_are_there_and_who_leaves_before_can_come_again() {
    require_root!();
    let shop = Shop::new(&["db01", "web01"]);
    shop.change(64 * KIB);
    let (db, web) = (&shop.machines[0], &shop.machines[1]);
    let late = shop.dir.path().join("begun");
    let hook = format!("touch {}", late.display());
    let args = ["--group", "shop", "--pre-hook", &hook];
    let mut first = shop.start(db, &args);
    wait_for("the word of it", || {
        first.stderr().contains("waiting for the other machines of the group: web01").then_some(())
    });
    // Killed while it waits, it is waited for again.
    first.kill();
    shop.service.wait_until_idle();
    let mut first = shop.start(db, &args);
    wait_for("the word of it", || {
        first.stderr().contains("waiting for the other machines of the group: web01").then_some(())
    });
    assert!(first.has_ended().is_none() && !late.exists());
    assert_eq!(shop.service.volume("db01", "root").received_bytes, Some(0));
    // The other one is ready, but does not stand still yet: nobody is read.
    let go = shop.dir.path().join("go");
    let hook = format!("while ! test -e {}; do sleep 0.05; done", go.display());
    let second = shop.start(web, &["--group", "shop", "--pre-hook", &hook]);
    wait_for("the hook", || late.exists().then_some(()));
    wait_for("the word of it", || {
        first.stderr().contains("waiting until all disks of these have begun: web01").then_some(())
    });
    assert_eq!(shop.service.volume("db01", "root").received_bytes, Some(0));
    fs::write(&go, "").unwrap();
    first.finish().ok();
    second.finish().ok();
    assert_eq!(shop.points(db)[1]["id"], shop.points(web)[1]["id"]);
}

#[test]
fn a_group_is_of_those_who_belong_to_it() {
    require_root!();
    let shop = Shop::new(&["db01", "web01"]);
    let send = |group: &str| shop.start(&shop.machines[0], &["--group", group]).finish();
    send("bakery").fails(3, &["no machine belongs to group bakery", "protect group"]);
    shop.command(&["protect", "group", "bakery", "--machines", "web01"])
        .fails(3, &["machine web01 belongs to group shop"]);
    shop.command(&["protect", "group", "shop", "--machines", "web01,web09"]).fails(3, &["machine web09"]);
    shop.command(&["protect", "group", "shop", "--machines", "web01"]).ok();
    send("shop").fails(3, &["machine db01 does not belong to group shop"]);
    // Alone in its group, nobody is waited for.
    shop.start(&shop.machines[1], &["--group", "shop"]).finish().ok();
    assert_eq!(shop.points(&shop.machines[1])[1]["group"], "shop");
    shop.command(&["protect", "group", "shop", "--remove"]).ok();
    shop.command(&["protect", "group", "shop", "--remove"]).fails(3, &["no machine belongs to group shop"]);
    // A machine that was never sent makes the others wait for nothing.
    shop.command(&["protect", "group", "shop", "--machines", "db01,web01"]).ok();
    shop.command(&["protect", "remove", "db01"]).ok();
    shop.service.protect_add("db01", "root", &shop.machines[0].target).ok();
    shop.command(&["protect", "group", "shop", "--machines", "db01,web01"]).ok();
    send("shop").fails(3, &["stands at no point yet: send the machine once without `--group`"]);
}

/// A machine that gives up its disks takes the group's points with it, and the others go on from the points before.
#[test]
fn a_point_without_one_of_its_machines_is_none() {
    require_root!();
    let shop = Shop::new(&["db01", "web01"]);
    let old = shop.change(2 * MIB);
    for send in shop.start_all(&[]) {
        send.finish().ok();
    }
    let removed = shop.command(&["protect", "remove", "web01"]).ok().stdout;
    assert!(removed.contains("db01: those of them that are its own too"), "{removed}");
    let db = &shop.machines[0];
    assert_eq!(shop.points(db).len(), 1);
    let export = |point: &str, content: &Path| {
        let out = shop.dir.path().join("out");
        fs::create_dir(&out).unwrap();
        shop.command(&["export", &format!("db01@{point}"), "--dir", out.to_str().unwrap()]).ok();
        assert_equal(content, &out.join("root.img"));
        fs::remove_dir_all(out).unwrap();
    };
    export("latest", &old[0]);
    support::write_random(&db.source, MIB, 3 * MIB);
    shop.start(db, &[]).finish().ok();
    shop.stands_at(db, &db.source);
    let first = shop.points(db)[0]["id"].as_str().unwrap().to_owned();
    export(&first, &old[0]);
    export("latest", &db.source);
    shop.command(&["check", "db01"]).ok();
    shop.command(&["failover", "db01", "--to", &first]).ok();
    shop.stands_at(db, &old[0]);
}

/// What the service was told to receive no more is not received any more, and the disks are at the point.
#[test]
fn failover_ends_what_is_being_received() {
    require_root!();
    let mut shop = Shop::new(&["db01", "web01"]);
    let old = shop.change(SIZE);
    let (db, web) = (&shop.machines[0], &shop.machines[1]);
    // Neither comes to its end.
    let slow = ["--whole", "--bwlimit", "128K"];
    let send = shop.start(db, &slow);
    let other = shop.start(web, &slow);
    shop.wait_for_bytes(db);
    shop.wait_for_bytes(web);
    wait_for("its first writes", || {
        (shop.service.volume("db01", "root").written_bytes > Some(0)).then_some(())
    });
    // What changes nothing ends nothing.
    shop.command(&["failover", "db01", "--to", "latest", "--dry-run"]).ok();
    let nowhere = "00000000000000000000000000000001";
    shop.command(&["failover", "db01", "--to", nowhere]).fails(3, &["has no point"]);
    let report = shop.command(&["failover", "db01", "--to", "latest", "--json"]).ok().json();
    assert!(report["disks"][0]["rolled_back"].as_u64().unwrap() > 0, "{report}");
    shop.stands_at(db, &old[0]);
    send.finish().fails(3, &["the master target ended the pass", "is being failed over"]);
    // Nobody gets in between, nor afterwards.
    shop.start(db, &[]).finish().fails(3, &["failed over"]);
    shop.stands_at(db, &old[0]);
    // The other machine is not concerned.
    assert_eq!(shop.service.volume("web01", "root").phase, "receiving");
    other.signal(Signal::SIGTERM);
    other.finish().fails(1, &["interrupted"]);
    shop.command(&["failover", "db01", "--undo"]).ok();
    // Where no service runs, nothing is different.
    shop.service.process().kill();
    shop.command(&["failover", "web01", "--to", "latest"]).ok();
    shop.stands_at(&shop.machines[1], &old[1]);
}

/// A sender that comes back again and again never gets hold of the disks of a machine that is being failed over.
#[test]
fn a_sender_that_insists_is_refused() {
    require_root!();
    let shop = Shop::new(&["db01"]);
    let db = &shop.machines[0];
    for _ in 0..5 {
        let old = shop.change(MIB).remove(0);
        let stop = shop.dir.path().join("stop");
        let mut insists = std::process::Command::new("/bin/sh");
        let send = format!(
            "while ! test -e {}; do {} send --machine db01 --to {} --whole --bwlimit 1M --compression off --state-dir {} --disk root={}; done",
            stop.display(),
            env!("CARGO_BIN_EXE_mt-agent"),
            shop.service.address(),
            db.client.display(),
            db.source.display()
        );
        insists.arg("-c").arg(send);
        let insists = Process::spawn(insists, &shop.dir.path().join("insists"));
        shop.wait_for_bytes(db);
        shop.command(&["failover", "db01", "--to", "latest"]).ok();
        std::thread::sleep(Duration::from_millis(300));
        shop.stands_at(db, &old);
        fs::write(&stop, "").unwrap();
        insists.finish();
        fs::remove_file(&stop).unwrap();
        shop.command(&["failover", "db01", "--undo"]).ok();
        shop.start(db, &[]).finish().ok();
        shop.stands_at(db, &db.source);
    }
}
