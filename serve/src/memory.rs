//! How much memory the machine can still give.

use std::path::Path;

use anyhow::{Result, ensure};

/// Whether the machine, and the control groups that this process is in, have so many bytes left. Where the system does
/// not say, it is tried.
///
/// # Errors
/// Says what is needed and what there is.
pub fn check(needed: usize) -> Result<()> {
    enough(needed, free(Path::new("/")))
}

fn enough(needed: usize, free: Option<usize>) -> Result<()> {
    let free = free.unwrap_or(usize::MAX);
    ensure!(
        needed <= free,
        "both models must be in memory at once: {} are needed for the second, and {} are free; start the server anew \
         with it, or take a file of a smaller type",
        gigabytes(needed),
        gigabytes(free)
    );
    Ok(())
}

/// What the system could give without swapping, as far as control groups (version 2) let it.
fn free(root: &Path) -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let lines = |text: &str, key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next());
        value.and_then(|number| number.parse::<usize>().ok())
    };
    let mut free = 1024 * lines(&read("proc/meminfo")?, "MemAvailable:")?;
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    for group in Path::new(own).ancestors() {
        let number = |file: &str| read(&format!("sys/fs/cgroup/{}/{file}", group.display()));
        let limit = number("memory.max").and_then(|text| text.trim().parse::<usize>().ok());
        let taken = number("memory.current").and_then(|text| text.trim().parse::<usize>().ok());
        let (Some(limit), Some(taken)) = (limit, taken) else { continue };
        // Pages of files are given back when others need them.
        let files = number("memory.stat").unwrap_or_default();
        let files: usize = ["active_file ", "inactive_file "]
            .map(|key| lines(&files, key).unwrap_or(0))
            .iter()
            .sum();
        free = free.min(limit.saturating_sub(taken.saturating_sub(files)));
    }
    Some(free)
}

fn gigabytes(bytes: usize) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_and_its_control_groups_say_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(free(dir.path()), None);
        write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n");
        assert_eq!(free(dir.path()), Some(4_096_000));
        write("proc/self/cgroup", "0::/pod/server\n");
        write("sys/fs/cgroup/pod/server/memory.max", "max\n");
        write("sys/fs/cgroup/pod/server/memory.current", "1000\n");
        assert_eq!(free(dir.path()), Some(4_096_000), "no limit of its own");
        write("sys/fs/cgroup/pod/memory.max", "3000000\n");
        write("sys/fs/cgroup/pod/memory.current", "2900000\n");
        assert_eq!(free(dir.path()), Some(100_000));
        write("sys/fs/cgroup/pod/memory.stat", "anon 7\ninactive_file 50000\nactive_file 1000\n");
        assert_eq!(free(dir.path()), Some(151_000));
        write("sys/fs/cgroup/pod/memory.current", "9000000\n");
        assert_eq!(free(dir.path()), Some(0));
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        assert!(enough(1 << 30, Some(1 << 30)).is_ok() && enough(1 << 40, None).is_ok());
        let error = enough(4_200_000_000, Some(1_500_000_000)).unwrap_err().to_string();
        assert!(error.contains("4.20 GB are needed") && error.contains("1.50 GB are free"));
        assert!(check(0).is_ok() && check(usize::MAX).is_err(), "of this machine");
    }
}
