//! Writes a made tree of `sys`, `proc` and `run/udev` with many disks, for benchmarks of `discover-disks --sysroot`
//! and `lsblk --sysroot`: `cargo run --example sysroot_tree -- DIR [DISKS]`.

#[path = "../tests/sysroot/tree.rs"]
mod tree;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(dir), count) = (args.next(), args.next()) else {
        eprintln!("usage: sysroot_tree DIR [DISKS]");
        std::process::exit(2);
    };
    let count = count.map_or(Ok(256), |count| count.parse());
    let Ok(count) = count else {
        eprintln!("sysroot_tree: DISKS is no number");
        std::process::exit(2);
    };
    tree::many(dir.as_ref(), count);
    println!("{count} disks under {dir}");
}
