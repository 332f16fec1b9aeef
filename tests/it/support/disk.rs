//! A small disk of its own for a folder, which can be full.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory, gone when this is dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Over an empty folder; nothing where nobody lets us mount, which only root may.
    pub fn mount(folder: &Path, size: &str) -> Option<Self> {
        let disk = Self(folder.to_owned());
        disk.run_mount(&format!("size={size}")).then_some(disk)
    }

    /// # Panics
    ///
    /// When more than that is on it.
    pub fn resize(&self, size: &str) {
        assert!(self.run_mount(&format!("remount,size={size}")), "the disk takes the size {size}");
    }

    /// Leaves no room but what the last pages have.
    pub fn fill(&self) {
        // What writes meanwhile may need one more look.
        let full = (0..50).any(|_| {
            let mut df = Command::new("df");
            let output = df.args(["--output=used", "-k"]).arg(&self.0).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let used: u64 = text.lines().nth(1).and_then(|line| line.trim().parse().ok()).unwrap();
            self.run_mount(&format!("remount,size={}k", used.max(4)))
        });
        assert!(full, "the disk cannot be made full");
    }

    fn run_mount(&self, options: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "sluicebox-it"]).arg(&self.0);
        mount.output().is_ok_and(|output| output.status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).output());
    }
}
