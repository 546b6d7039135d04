//! That the small guest is what the tests take it for.

use crate::harness::small;
use crate::lio::{Identity, Store, Target, discovered};
use crate::support::{MIB, directory};

#[test]
fn a_guest_has_a_disk_with_an_identity_of_its_own() {
    small().run(|_| {
        let dir = directory();
        let identity = Identity::vmware(1);
        let store = Store::file(&dir.path().join("disk"), 64 * MIB, &identity);
        let lun = Target::new().attach(0, &store);
        let disks = discovered();
        assert_eq!(disks.len(), 1, "{disks:#?}");
        let text = |key: &str| disks[0][key].as_str().unwrap_or_default().to_owned();
        assert_eq!(text("id"), identity.canonical());
        assert_eq!((text("name"), text("hctl")), (lun.name(), lun.hctl.clone()));
        assert_eq!((text("vendor").as_str(), text("model").as_str()), ("VMware", "Virtual disk"));
        assert_eq!((disks[0]["size"].as_u64(), text("role").as_str()), (Some(64 * MIB), "free"));
    });
}
