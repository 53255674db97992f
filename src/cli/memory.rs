//! How much memory the machine can still give.

use std::path::Path;

/// How a version of Linux's control groups says what it allows.
struct Version {
    /// Of the hierarchy that memory is counted in.
    folder: &'static str,
    limit: &'static str,
    taken: &'static str,
    /// Lines of `memory.stat` that count pages of files: those are given back when others need them.
    files: [&'static str; 2],
}

const FIRST: Version = Version {
    folder: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    taken: "memory.usage_in_bytes",
    files: ["total_active_file", "total_inactive_file"],
};

const SECOND: Version = Version {
    folder: "sys/fs/cgroup",
    limit: "memory.max",
    taken: "memory.current",
    files: ["active_file", "inactive_file"],
};

/// Bytes that the system could give without swapping, as far as the control groups that this process is in let it; `None`
/// where it does not say.
pub fn free() -> Option<usize> {
    free_in(Path::new("/"))
}

fn free_in(root: &Path) -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let mut free = 1024 * number(&read("proc/meminfo")?, "MemAvailable:")?;
    for line in read("proc/self/cgroup").unwrap_or_default().lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let version = match controllers {
            "" => SECOND,
            _ if controllers.split(',').any(|controller| controller == "memory") => FIRST,
            _ => continue,
        };
        // A container sees its own group as the root, though it may be called by the name that the host knows.
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            let folder = Path::new(version.folder).join(group);
            let read = |file: &str| std::fs::read_to_string(root.join(&folder).join(file)).ok();
            let bytes = |file| read(file).and_then(|text| text.trim().parse::<usize>().ok());
            let (Some(limit), Some(taken)) = (bytes(version.limit), bytes(version.taken)) else {
                continue;
            };
            let stat = read("memory.stat").unwrap_or_default();
            let files: usize = version.files.iter().filter_map(|key| number(&stat, key)).sum();
            free = free.min(limit.saturating_sub(taken.saturating_sub(files)));
        }
    }
    Some(free)
}

/// The number after a key, in a text that has a line for each.
fn number(text: &str, key: &str) -> Option<usize> {
    let words = |line: &'_ str| {
        let mut words = line.split_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().find_map(words)
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
        let free = || free_in(dir.path());
        assert_eq!(free(), None);
        write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n");
        assert_eq!(free(), Some(4_096_000));
        write("proc/self/cgroup", "0::/pod/server\n");
        write("sys/fs/cgroup/pod/server/memory.max", "max\n");
        write("sys/fs/cgroup/pod/server/memory.current", "1000\n");
        assert_eq!(free(), Some(4_096_000), "no limit of its own");
        write("sys/fs/cgroup/pod/memory.max", "3000000\n");
        write("sys/fs/cgroup/pod/memory.current", "2900000\n");
        assert_eq!(free(), Some(100_000));
        write("sys/fs/cgroup/pod/memory.stat", "anon 7\ninactive_file 50000\nactive_file 1000\n");
        assert_eq!(free(), Some(151_000));
        write("sys/fs/cgroup/pod/memory.current", "9000000\n");
        assert_eq!(free(), Some(0));

        write("proc/self/cgroup", "9:pids:/pod\n4:hugetlb,memory:/docker/1\n0::/\n");
        assert_eq!(free(), Some(4_096_000), "of another name inside the container");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n");
        write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n");
        assert_eq!(free(), Some(500_000));
        let stat = "inactive_file 1\ntotal_inactive_file 3000\ntotal_active_file 40\n";
        write("sys/fs/cgroup/memory/memory.stat", stat);
        assert_eq!(free(), Some(503_040));
        write("sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "9223372036854771712\n");
        write("sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", "1400000\n");
        assert_eq!(free(), Some(503_040), "no limit of its own");
    }
}
