//! House rules, so that reviews can be about ideas.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of the workspace, with its text.
fn sources() -> Vec<(PathBuf, String)> {
    let mut folders: Vec<_> = [
        "src", "examples", "convert", "kernels", "example", "tabletop", "serve", "doctor", "tests",
        "benches",
    ]
    .iter()
    .map(|name| root().join(name))
    .collect();
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().unwrap() != "target" {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                sources.push((path, text));
            }
        }
    }
    assert!(sources.len() > 30, "found the sources");
    sources
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for (path, text) in sources() {
        let n = text.lines().count();
        assert!(n <= 450, "{}: {n} lines; split it or delete something", path.display());
        let first = text.lines().next().unwrap_or("");
        assert!(first.starts_with("//!"), "{}: says first what it is", path.display());
    }
}

#[test]
fn unsafe_code_is_in_kernels_and_each_block_says_why_it_is_sound() {
    let block = ["unsafe", "{"].join(" ");
    let implementation = ["unsafe", "impl"].join(" ");
    for (path, text) in sources() {
        let lines: Vec<_> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            if !line.contains(&block) && !line.contains(&implementation) {
                continue;
            }
            let at = format!("{}:{}", path.display(), n + 1);
            assert!(path.starts_with(root().join("kernels")), "{at}: unsafe outside kernels");
            let before = lines[n.saturating_sub(8)..=n].join("\n");
            assert!(before.contains("SAFETY:"), "{at}: say why it is sound");
        }
    }
}

/// `eprintln!` panics where stderr cannot be written to; `openvla::cli::say` does not.
#[test]
fn programs_survive_a_log_that_cannot_be_written() {
    for (path, text) in sources() {
        let inside = path.strip_prefix(root()).unwrap();
        let program = text.split("#[cfg(test)]").next().unwrap();
        if inside.iter().any(|part| part == "src") {
            let prints = ["eprint!(", "eprintln!("].map(|print| program.matches(print).count());
            let skips = program.matches("eprintln!(\"SKIPPED").count(); // a module of tests
            assert_eq!(prints.iter().sum::<usize>(), skips, "{}", inside.display());
        }
    }
}

/// Shapes, backends and devices are values: model code reads the same whatever it runs on. Only what programs
/// share is there or not.
#[test]
fn model_code_does_not_know_the_device() {
    for (path, text) in sources() {
        if path.starts_with(root().join("src")) {
            let text = text.replace("#[cfg(feature = \"cli\")]", "");
            assert!(!text.contains("cfg(feature"), "{}", path.display());
        }
    }
}

/// Of what SECURITY.md promises, each has a test that is there.
#[test]
fn every_test_that_security_is_said_to_rest_on_exists() {
    let text = std::fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let sources: String = sources().into_iter().map(|(_, text)| text).collect();
    let rows = text.lines().skip_while(|line| !line.starts_with("| way in |")).skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 15, "found the table");
    for row in rows {
        let tests = row.trim_end_matches([' ', '|']).rsplit('|').next().unwrap();
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test holds this: {row}");
        for name in names {
            let is_there = sources.contains(&format!("fn {name}("));
            assert!(is_there, "there is no test {name}: {row}");
        }
    }
}

#[test]
fn links_of_documents_lead_somewhere() {
    let folders =
        ["", "convert", "kernels", "serve", "doctor", "tabletop", "benches", "example", "release"];
    let mut n_link = 0;
    for folder in folders.map(|folder| root().join(folder)) {
        for entry in folder.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_none_or(|ending| ending != "md") {
                continue;
            }
            let text = std::fs::read_to_string(&entry).unwrap();
            let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
            for file in links.filter(|link| !link.starts_with("http") && !link.is_empty()) {
                assert!(folder.join(file).exists(), "{} links to {file}", entry.display());
                n_link += 1;
            }
        }
    }
    assert!(n_link > 40, "found the links");
}
