//! As many disks as a master target has at most: 60, on four controllers in VMware's virtual machines.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::harness::small;
use crate::lio::{Identity, Store, Target, discovered};
use crate::mapped::Mapped;
use crate::support::{KIB, Loop, MACHINE, MIB, Rig, run, tool, wait_for, write_random};

const COUNT: u32 = 60;
/// A window is full before a disk is.
const SIZE: u64 = 10 * MIB + 4 * KIB;
const WINDOW: u64 = 8 * MIB;
/// What the service may take: a base, and so much for each volume that is open.
const BOUND: u64 = 64 * MIB + COUNT as u64 * 16 * MIB;

/// All are received at once, and stand still until every window is full.
#[test]
fn sixty_disks_are_discovered_assigned_and_received_at_once() {
    // udevd takes most of a second for each disk here, and adds nothing to what this is about.
    small().memory(3072).without_udev().run(|_| {
        let start = Instant::now();
        let mut rig = Rig::new(&[]);
        let under = Loop::create(&rig.path("under.img"), u64::from(COUNT) * SIZE);
        // They hold something, which may go: else they would be looked at again when they are opened, and stand still.
        for number in 0..u64::from(COUNT) {
            write_random(under.backing(), number * SIZE, 4096);
        }
        // All of them lie on this one, and stand still with it.
        let slow = Mapped::new("slow", under.node(), 0, u64::from(COUNT) * SIZE);
        let sectors = SIZE / 512;
        let line = |number| {
            format!(
                "d{number},,,,0 {sectors} linear {} {}",
                slow.node().display(),
                u64::from(number) * sectors
            )
        };
        let table: Vec<String> = (0..COUNT).map(line).collect();
        tool("dmsetup", &["create", "--concise", &table.join(";")]);
        let targets: Vec<Target> = (0..4).map(|_| Target::new()).collect();
        for number in 0..COUNT {
            let node = format!("/dev/mapper/d{number}");
            let store = Store::block(Path::new(&node), &Identity::vmware(number));
            let lun = targets[number as usize % 4].attach(number / 4, &store);
            // Nobody gives a disk up because it stands still for a while.
            std::fs::write(lun.device().join("timeout"), "3000").unwrap();
        }
        println!("{COUNT} disks after {:?}", start.elapsed());
        let looked = Instant::now();
        let disks = discovered();
        println!("listed in {:?}", looked.elapsed());
        for number in 0..COUNT {
            let id = Identity::vmware(number).canonical();
            let found: Vec<_> = disks.iter().filter(|disk| disk["id"] == id.as_str()).collect();
            assert_eq!(found.len(), 1, "{id}");
            assert_eq!(
                (&found[0]["role"], &found[0]["size"]),
                (&"free".into(), &SIZE.into()),
                "{:#}",
                found[0]
            );
        }
        assert_eq!(disks.len(), COUNT as usize);

        let all: Vec<String> =
            (0..COUNT).map(|number| format!("d{number}={}", Identity::vmware(number).canonical())).collect();
        let config = rig.service.config();
        run(&["protect", "add", MACHINE, "--config", &config, "--overwrite", "--disk", &all.join(",")]).ok();
        let listed = run(&["discover-disks", "--json", "--config", &config]).ok().json();
        let listed = listed["disks"].as_array().unwrap();
        assert!(listed.iter().all(|disk| disk["role"] == "assigned"), "{listed:#?}");

        // Neighbours have different sources: what went to the wrong disk would be seen.
        let sources: Vec<PathBuf> = (0..COUNT).map(|number| rig.path(&format!("s{number}"))).collect();
        for (number, source) in sources.iter().enumerate() {
            match number.checked_sub(7) {
                None => write_random(source, 0, SIZE),
                Some(same) => std::fs::hard_link(&sources[same], source).unwrap(),
            }
        }
        let names: Vec<String> = (0..COUNT).map(|number| format!("d{number}")).collect();
        let disks: Vec<(&str, &Path)> =
            names.iter().zip(&sources).map(|(name, path)| (name.as_str(), path.as_path())).collect();
        let start = Instant::now();
        slow.stands_still();
        // As many connections as a long way has by itself: they must not crowd each other out.
        let mut send = rig.start(&disks, &["--compression", "off", "--connections", "4"]);
        // However slow this machine is: given up is only where nothing more arrives.
        let mut received = 0;
        while received < u64::from(COUNT) * WINDOW {
            received = wait_for("more of the windows", || {
                if let Some(status) = send.has_ended() {
                    panic!("it ended too soon ({status}): {}{}", send.stdout(), send.stderr());
                }
                let volumes = rig.service.status().machines.remove(0).volumes;
                let now = volumes.iter().filter_map(|volume| volume.received_bytes).sum();
                (now > received).then_some(now)
            });
        }
        let volumes = rig.service.status().machines.remove(0).volumes;
        assert!(volumes.iter().all(|volume| volume.connections == Some(4)), "{volumes:#?}");
        println!("all windows are full after {:?}", start.elapsed());
        slow.goes_on();
        send.finish().ok();
        let peak = rig.service.peak_memory();
        println!("all are received after {:?}, with {} MiB of memory", start.elapsed(), peak / MIB);
        assert!(peak > u64::from(COUNT) * WINDOW, "{} MiB: were they all open?", peak / MIB);
        assert!(peak < BOUND, "{} MiB", peak / MIB);
        let list = run(&["protect", "list", MACHINE, "--json", "--config", &config]).ok().json();
        let list = list["machines"][0]["disks"].as_array().unwrap();
        assert!(list.iter().all(|disk| disk["state"] == "synchronized"), "{list:#?}");
        let backing = File::open(under.backing()).unwrap();
        for (number, (name, source)) in disks.iter().enumerate() {
            let mut arrived = vec![0; SIZE as usize];
            backing.read_exact_at(&mut arrived, number as u64 * SIZE).unwrap();
            assert!(arrived == std::fs::read(source).unwrap(), "{name} is not as its source");
        }
        rig.service.wait_until_idle();
    });
}
