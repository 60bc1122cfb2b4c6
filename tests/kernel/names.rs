//! Namespaces by path and by name.

use std::path::Path;

use netctl::kernel::{Error, Netns, Sandbox, boot_id, delete_sandbox};
use netctl::model::NetworkId;
use netctl::model::object::sandbox_name;

use crate::world::{Space, sh, unique};

pub fn what_is_no_network_namespace_is_refused() {
    let space = Space::new("t");
    let directory = format!("/run/{}", unique("paths"));
    sh(&format!(
        "mkdir {directory} && cd {directory} && touch file && mkfifo pipe && mkdir dir && ln -s {} link && ln -s /dev/null dev",
        space.path().display()
    ));
    for (name, what) in [
        ("file", "a regular file"),
        ("pipe", "a pipe"),
        ("dir", "a directory"),
        ("link", "a symbolic link"),
        ("dev", "a symbolic link"),
    ] {
        let path = Path::new(&directory).join(name);
        let error = Netns::open(&path).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NotNetns { .. }), "{name}: {text}");
        assert!(text.contains(what) && text.contains(path.to_str().unwrap()), "{text}");
    }
    for (path, what) in [
        ("/dev/zero", "a device"),
        ("/proc/self/ns/mnt", "a mount namespace"),
        ("/proc/self/ns/user", "a user namespace"),
        ("/proc/self/exe", "a link to something else"),
    ] {
        let text = Netns::open(Path::new(path)).unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    }
    let missing = Netns::open(Path::new("/run/netns/missing")).unwrap_err();
    assert!(matches!(missing, Error::Path { .. }), "{missing}");
    let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    assert_eq!(own.inode(), Netns::current().unwrap().inode());
    assert_ne!(own.inode(), space.netns().inode());
}

pub fn a_leftover_file_is_no_obstacle() {
    let name = sandbox_name(NetworkId::random(&mut rand::rng()));
    sh(&format!("mkdir -p /run/netns && touch /run/netns/{name}"));
    assert!(Netns::sandboxes().unwrap().contains(&name));
    assert!(Sandbox::open(&name).is_err());
    let sandbox = Sandbox::create(&name).unwrap();
    assert_ne!(sandbox.netns().inode(), Netns::current().unwrap().inode());
    drop(sandbox);
    delete_sandbox(&name).unwrap();
    sh(&format!("touch /run/netns/{name}"));
    delete_sandbox(&name).unwrap();
    assert!(!Netns::sandboxes().unwrap().contains(&name));
}

pub fn a_name_is_made_once_and_removed_for_good() {
    let name = sandbox_name(NetworkId::random(&mut rand::rng()));
    let first = Sandbox::create(&name).unwrap().netns().inode();
    assert_eq!(Sandbox::create(&name).unwrap().netns().inode(), first);
    assert_eq!(Sandbox::open(&name).unwrap().netns().inode(), first);
    assert!(sh("ip netns list").contains(&name));
    assert!(sh(&format!("ip -n {name} -o link show lo")).contains("UP"));
    // A mount on top of the mount is no obstacle.
    sh(&format!("mount --bind /run/netns/{name} /run/netns/{name}"));
    for _ in 0..2 {
        delete_sandbox(&name).unwrap();
        assert!(!sh("ls /run/netns").contains(&name) && !sh("cat /proc/mounts").contains(&name));
    }
}

pub fn entering_comes_back() {
    let space = Space::new("t");
    let home = Netns::current().unwrap().inode();
    let inside = space.netns().enter(|| Netns::current().unwrap().inode()).unwrap();
    assert_eq!(inside, space.netns().inode());
    assert_eq!(Netns::current().unwrap().inode(), home);
    let netns = space.netns();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = netns.enter(|| panic!("on purpose"));
    }));
    assert!(panicked.is_err());
    assert_eq!(Netns::current().unwrap().inode(), home);
    assert_eq!(boot_id().unwrap().len(), 36);
}
