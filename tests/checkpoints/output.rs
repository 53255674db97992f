//! Where the file goes: it is there whole, or as it was before.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::folder::{Checkpoint, contents, convert};

#[test]
fn a_file_replaces_another_and_can_be_read_by_all() {
    let (checkpoint, dir) = (Checkpoint::plain(), tempfile::tempdir().unwrap());
    let out = dir.path().join("model.gguf");
    fs::write(&out, b"before").unwrap();
    convert(&checkpoint.path(), &out).unwrap();
    let left = contents(dir.path());
    assert_eq!(left.keys().collect::<Vec<_>>(), ["model.gguf"]);
    assert!(left["model.gguf"].starts_with(b"GGUF"));
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o644);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let (checkpoint, dir) = (Checkpoint::plain(), tempfile::tempdir().unwrap());
    let [folder, file] = ["folder", "file"].map(|name| dir.path().join(name));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, b"before").unwrap();
    for (out, wanted) in [
        (folder.clone(), format!("{} is a folder; name a file with -o", folder.display())),
        (dir.path().join("none/model.gguf"), "cannot write into ".to_owned()),
        // As good as a folder that is read-only, and so for every user.
        (file.join("model.gguf"), format!("cannot write into {}", file.display())),
        ("/proc/model.gguf".into(), "cannot write into /proc".to_owned()),
    ] {
        let why = convert(&checkpoint.path(), &out).unwrap_err();
        assert!(why.starts_with(&wanted), "{why}\nwanted: {wanted}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"before");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Moving a file to /dev/null would replace it for everybody.
#[test]
fn what_is_no_file_is_not_replaced() {
    let (checkpoint, dir) = (Checkpoint::plain(), tempfile::tempdir().unwrap());
    let out = dir.path().join("socket");
    let _socket = UnixListener::bind(&out).unwrap();
    let why = convert(&checkpoint.path(), &out).unwrap_err();
    assert!(why.contains("is not a regular file; name another with -o"), "{why}");
    assert!(fs::metadata(&out).unwrap().file_type().is_socket());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A file system of so many bytes, for as long as this lives.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path, size: &str) -> Option<Self> {
        let size = format!("size={size}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Self(at)) // never dropped else
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "umount {}", self.0.display());
    }
}

#[test]
fn a_disk_that_is_too_small_is_named_and_left_as_it_was() {
    let (checkpoint, dir) = (Checkpoint::plain(), tempfile::tempdir().unwrap());
    let Some(_disk) = Disk::mount(dir.path(), "64k") else {
        eprintln!("SKIPPED: a full disk, since mounting a small one takes root");
        return;
    };
    let out = dir.path().join("model.gguf");
    fs::write(&out, b"before").unwrap();
    let why = convert(&checkpoint.path(), &out).unwrap_err();
    assert!(why.starts_with(&format!("{} needs ", out.display())), "{why}");
    assert!(why.contains(" bytes, and its disk has ") && why.contains("-o"), "{why}");
    assert_eq!(fs::read(&out).unwrap(), b"before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary file is gone");
}
