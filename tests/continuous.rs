//! A day of continuous protection, compressed: a file system that somebody works on, frozen for each point; senders and
//! receivers that are killed; and every point of it a file system with whole files.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::{Loop, MACHINE, MIB, Mount, Rig, run, tool};

const SIZE: u64 = 48 * MIB;
const FILES: u64 = 40;

/// Somebody who works on the file system: each file is written beside its place, made durable, and renamed into it.
struct Work {
    stop: Arc<AtomicBool>,
    /// Up to this number all files are durable under their names.
    durable: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// A file's content tells its number and its checksum.
fn content(number: u64) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(number);
    let mut bytes = vec![0; 16 + random.random_range(0..200_000)];
    random.fill(&mut bytes[16..]);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    let crc = mt_agent::checksum::crc32c(&bytes[16..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

impl Work {
    fn start(dir: &Path) -> Work {
        let (stop, durable) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (dir, stopped, done) = (dir.to_owned(), stop.clone(), durable.clone());
        let thread = thread::spawn(move || {
            let parent = File::open(&dir).unwrap();
            for number in 1.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (new, name) = (dir.join("new"), dir.join(format!("file{}", number % FILES)));
                let mut file = File::create(&new).unwrap();
                file.write_all(&content(number)).unwrap();
                file.sync_all().unwrap();
                fs::rename(&new, &name).unwrap();
                parent.sync_all().unwrap();
                done.store(number, Ordering::Release);
                thread::sleep(Duration::from_millis(5));
            }
        });
        Work { stop, durable, thread: Some(thread) }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap_or_default();
    }
}

/// Mounts a point, and looks at every file. `durable` is the number that was durable before the point was begun.
fn look_at(image: &Path, place: &Path, durable: u64) {
    let disk = Loop::attach(image, 512);
    let mount = Mount::with(disk.node(), place, "ro");
    let mut newest = 0;
    for entry in fs::read_dir(place).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let Some(slot) = name.strip_prefix("file") else { continue };
        let bytes = fs::read(entry.path()).unwrap();
        let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(number % FILES, slot.parse::<u64>().unwrap());
        assert!(bytes == content(number), "{name} is not whole");
        newest = newest.max(number);
    }
    assert!(newest >= durable, "{newest} is the newest file, and {durable} was durable before the point");
    drop(mount);
    drop(disk);
    // With its journal replayed by nobody: a frozen file system has nothing to replay.
    tool("e2fsck", &["-fn", image.to_str().unwrap()]);
}

/// `MT_AGENT_PASSES` for a whole day; `MT_AGENT_SEED` for the same kills again.
#[test]
fn every_point_of_a_day_is_whole() {
    require_root!();
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let passes = number("MT_AGENT_PASSES").unwrap_or(12);
    let seed = number("MT_AGENT_SEED").unwrap_or_else(|| rand::rng().random());
    println!("{passes} passes, MT_AGENT_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut rig = Rig::new(&[SIZE]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    let port = rig.service.address().port();
    let config = config.replace("127.0.0.1:0", &format!("127.0.0.1:{port}"));
    rig.service.restart_with_config(&(config + "allow_root_retention = true\nretention_size = \"200M\"\n"));
    let source = Loop::create(&rig.path("source.img"), SIZE);
    tool("mkfs.ext4", &["-q", source.node().to_str().unwrap()]);
    let mounted = Mount::new(source.node(), &rig.path("mnt"));
    let work = Work::start(&rig.path("mnt"));
    let config = rig.service.config();
    let disks: [(&str, &Path); 1] = [("d0", source.node())];
    rig.send(&disks, &[]).ok();
    let (mut kills, mut sent) = (0, 0);
    for pass in 0..passes {
        let name = format!("p{pass}");
        let args = ["--freeze", "--point-name", &name, "--json", "--retry-for", "30s"];
        let mut before = work.durable.load(Ordering::Acquire);
        if random.random_bool(0.3) {
            // A pass that does not reach its end; and whoever was killed is started again.
            kills += 1;
            let mut sender =
                rig.start(&disks, &[&args[..2], &["interrupted", "--retry-for", "30s"]].concat());
            thread::sleep(Duration::from_millis(random.random_range(1..700)));
            if random.random_bool(0.5) {
                sender.kill();
            } else {
                rig.service.process().kill();
                thread::sleep(Duration::from_millis(random.random_range(1..400)));
                rig.service.spawn();
                sender.finish();
            }
            // The watchdog thaws, whoever died.
            let mark = work.durable.load(Ordering::Acquire);
            support::wait_for("the thaw", || (work.durable.load(Ordering::Acquire) > mark + 1).then_some(()));
            rig.service.wait_until_idle();
            before = work.durable.load(Ordering::Acquire);
        }
        let outcome = rig.send(&disks, &args).ok().json();
        sent += outcome["disks"][0]["sent_bytes"].as_u64().unwrap();
        let list = run(&["points", MACHINE, "--json", "--config", &config]).ok().json();
        let point = list["points"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(
            (&point["name"], &point["kind"], &point["fuzzy"]),
            (&name.clone().into(), &"filesystem".into(), &false.into())
        );
        let out = rig.path("out");
        fs::create_dir(&out).unwrap();
        let what = format!("{MACHINE}@{}", point["id"].as_str().unwrap());
        run(&["export", &what, "--dir", out.to_str().unwrap(), "--config", &config]).ok();
        look_at(&out.join("d0.img"), &rig.path("looked"), before);
        fs::remove_dir_all(&out).unwrap();
    }
    println!("{kills} kills; {} MiB in all passes", sent / MIB);
    let checked = run(&["check", MACHINE, "--config", &config]).ok();
    assert!(checked.stdout.contains(" 0 not sound"), "{}", checked.stdout);
    drop(work);
    drop(mounted);
}
