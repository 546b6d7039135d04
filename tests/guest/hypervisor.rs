//! The hypervisor of the full guest, asked by the guest itself: the guest has a port that is QEMU's own monitor
//! (QMP). So a test says in one place what it does to the hardware and what must come of it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{cold_disk, read_directories};
use crate::support::{tool, wait_for};

/// QEMU, whose kernel is given `words`.
pub fn machine(command: &mut Command, root: &Path, share: &Path, memory: u64, words: &str) {
    // With its own libraries, whatever the host has.
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command.arg(root.join("lib64/ld-linux-x86-64.so.2")).arg("--library-path").arg(&libraries);
    command.arg(root.join("usr/bin/qemu-system-x86_64"));
    for firmware in ["qemu", "seabios"] {
        command.arg("-L").arg(root.join("usr/share").join(firmware));
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.args(["-machine", "pc,accel=tcg", "-cpu", "max", "-m", &memory.to_string()]);
    command.arg("-kernel").arg(root.join("vmlinux")).arg("-initrd").arg(root.join("initramfs"));
    // Much that a kernel checks and tunes at boot is slow where the processor is emulated. Its clock was once wrong by far
    // on a busy host: 100 seconds inside were 17 outside. That the kernel had measured the speed of the processor's
    // counter wrongly is a guess (in 18 boots beside six busy loops it was right to 0.1%); the HPET's is not measured.
    let quick =
        "mitigations=off tsc=reliable no_timer_check nokaslr rcupdate.rcu_expedited=1 cryptomgr.notests";
    // What systemd and udevd wait for takes longer there, too.
    let patient = "systemd.default_timeout_start_sec=900 udev.event_timeout=900";
    command.args([
        "-append",
        &format!("console=ttyS0 quiet panic=-1 clocksource=hpet {quick} {patient} {words}"),
    ]);

    // QEMU takes a comma for the end of a path.
    let escaped = |path: &Path| path.display().to_string().replace(',', ",,");
    let mut directory = |tag: &str, path: &Path, access: &str| {
        let path = escaped(path);
        let shown = format!("local,id={tag},path={path},security_model=none,multidevs=remap{access}");
        command.args(["-fsdev", &shown, "-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
    };
    directory("root", root, ",readonly=on");
    directory("host0", share, "");
    for (path, tag) in read_directories().iter().zip(["host1", "host2"]) {
        directory(tag, path, ",readonly=on");
    }

    for adapter in
        ["virtio-scsi-pci,id=virtio", "pvscsi,id=pvscsi", "am53c974,id=parallel", "mptsas1068,id=mptsas"]
    {
        command.args(["-device", adapter]);
    }
    // The monitor listens, and the port, which is in the same process, calls.
    let socket = escaped(&share.join("qmp"));
    command.args(["-chardev", &format!("socket,id=qmp,path={socket},server=on,wait=off")]);
    command.args(["-mon", "chardev=qmp,mode=control", "-chardev", &format!("socket,id=port,path={socket}")]);
    command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=qmp"]);
}

/// Disk `number` of a host, which is there when it boots.
pub fn cold(command: &mut Command, share: &Path, number: usize) {
    let (id, image) = cold_disk(share, number);
    let (name, image) = (format!("cold{number}"), image.display().to_string().replace(',', ",,"));
    let wwn = id.trim_start_matches("naa.");
    command.args(["-blockdev", &format!("driver=file,node-name={name},filename={image}")]);
    let device = format!("scsi-hd,bus=virtio.0,scsi-id={number},drive={name},serial={name},wwn=0x{wwn}");
    command.args(["-device", &device]);
}

/// A disk that can be plugged in, over a sparse file in the directory that guest and host share.
pub struct VirtualDisk {
    /// What QEMU calls it.
    name: String,
    image: PathBuf,
    properties: Value,
}

impl VirtualDisk {
    /// With the properties of QEMU's `scsi-hd` that make its identity: `serial`, `wwn`, `vendor`, `product`.
    pub fn new(directory: &Path, name: &str, size: u64, properties: Value) -> VirtualDisk {
        let image = directory.join(format!("{name}.img"));
        // It may be there, in a guest that was kept and is looked into.
        File::create(&image).unwrap().set_len(size).unwrap();
        VirtualDisk { name: name.to_owned(), image, properties }
    }

    /// What was written to it, also while it is plugged in nowhere.
    pub fn image(&self) -> &Path {
        &self.image
    }
}

/// The guest's hypervisor.
pub struct Hypervisor {
    orders: File,
    answers: BufReader<File>,
    /// The disks that it said were unplugged, and that nobody asked for yet.
    unplugged: Vec<String>,
}

impl Hypervisor {
    pub fn connect() -> Hypervisor {
        tool("modprobe", &["virtio_console"]);
        let port = wait_for("the port to the hypervisor", || {
            let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
            let names = ports.map(|port| port.unwrap().path());
            let named =
                |port: &PathBuf| fs::read_to_string(port.join("name")).is_ok_and(|name| name.trim() == "qmp");
            Some(Path::new("/dev").join(names.into_iter().find(named)?.file_name()?))
        });
        let orders = OpenOptions::new().read(true).write(true).open(port).unwrap();
        let answers = BufReader::new(orders.try_clone().unwrap());
        let mut hypervisor = Hypervisor { orders, answers, unplugged: Vec::new() };
        assert!(hypervisor.hear().get("QMP").is_some(), "it greets");
        hypervisor.order("qmp_capabilities", json!({}));
        hypervisor
    }

    fn hear(&mut self) -> Value {
        // Until the driver has heard that the other end is there, there is nothing to read.
        let line = wait_for("an answer of the hypervisor", || {
            let mut line = String::new();
            (self.answers.read_line(&mut line).unwrap() > 0).then_some(line)
        });
        serde_json::from_str(&line).unwrap()
    }

    /// Gives an order that must be obeyed, and returns the answer.
    pub fn order(&mut self, command: &str, arguments: Value) -> Value {
        let order = json!({ "execute": command, "arguments": arguments });
        writeln!(self.orders, "{order}").unwrap();
        loop {
            let mut answer = self.hear();
            if let Some(answer) = answer.get_mut("return") {
                return answer.take();
            }
            assert!(answer.get("error").is_none(), "{order}: {answer}");
            self.notice(&answer);
        }
    }

    fn notice(&mut self, event: &Value) {
        if event["event"] == "DEVICE_DELETED"
            && let Some(device) = event["data"]["device"].as_str()
        {
            self.unplugged.push(device.to_owned());
        }
    }

    /// Plugs a disk in as a target of one of the guest's adapters.
    pub fn plug(&mut self, disk: &VirtualDisk, adapter: &str, target: u8) {
        let VirtualDisk { name, image, properties } = disk;
        // Not `-drive`, whose name would show in VPD page 0x83.
        self.order("blockdev-add", json!({ "driver": "file", "node-name": name, "filename": image }));
        let mut device = properties.clone();
        for (key, value) in [
            ("driver", json!("scsi-hd")),
            ("id", json!(name)),
            ("drive", json!(name)),
            ("bus", json!(format!("{adapter}.0"))),
            ("scsi-id", json!(target)),
        ] {
            device[key] = value;
        }
        self.order("device_add", device);
    }

    /// Unplugs a disk; that the guest has let go of it is another matter.
    pub fn unplug(&mut self, disk: &VirtualDisk) {
        self.order("device_del", json!({ "id": disk.name }));
        while !self.unplugged.contains(&disk.name) {
            let event = self.hear();
            self.notice(&event);
        }
        self.unplugged.retain(|name| *name != disk.name);
        self.order("blockdev-del", json!({ "node-name": disk.name }));
    }

    /// Makes a disk larger or smaller while it is plugged in.
    pub fn resize(&mut self, disk: &VirtualDisk, size: u64) {
        self.order("block_resize", json!({ "node-name": disk.name, "size": size }));
    }
}
