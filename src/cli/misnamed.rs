//! What was named in place of a model file, and what to type instead.

use std::path::Path;

use anyhow::{Result, bail, ensure};

/// Refuses a path that leads to a checkpoint, or that was never meant as a path here. Other paths
/// are as good as their files.
///
/// # Errors
/// Says what it is, and what to do with it.
pub fn check(path: &Path) -> Result<()> {
    let shown = path.display();
    if path.is_dir() {
        bail!("{shown} is a folder, not a model file; {}", instead_of_folder(path));
    }
    if path.is_file() {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        let of_checkpoint = ["safetensors", "bin", "pt", "pth"].iter().any(|e| extension == *e);
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let folder = folder.unwrap_or(Path::new(".")).display();
        ensure!(
            !of_checkpoint || is_gguf(path),
            "{shown} holds weights of a checkpoint, not a model file; convert the checkpoint \
             first: openvla-convert {folder} --q4"
        );
        return Ok(());
    }
    let text = path.to_string_lossy();
    if let Some((_, place)) = text.split_once("://").filter(|_| !path.exists()) {
        bail!("{shown} is a URL, and a file is needed; {}", instead_of_url(&text, place));
    }
    if !path.exists() && text.starts_with(['~', '$']) {
        let what = text.split('/').next().unwrap_or_default();
        bail!("{shown} is not there: the shell did not expand {what}; write the folder out");
    }
    ensure!(
        path.exists() || !is_repository(&text),
        "{shown} is not there; if it is a repository on the Hugging Face Hub, convert it first: \
         openvla-convert {shown} --q4"
    );
    Ok(())
}

fn instead_of_folder(folder: &Path) -> String {
    let shown = folder.display();
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    names.sort_unstable();
    let has_extension =
        |wanted: &str| names.iter().find(|n| Path::new(n).extension().is_some_and(|e| e == wanted));
    if let Some(model) = has_extension("gguf") {
        return format!("name the file in it, such as {}", folder.join(model).display());
    }
    if names.iter().any(|name| name == "adapter_config.json") {
        return format!("convert the adapter first: openvla-convert BASE --lora {shown} --q4");
    }
    if names.iter().any(|name| name == "config.json") || has_extension("safetensors").is_some() {
        return format!("convert the checkpoint first: openvla-convert {shown} --q4");
    }
    "a file that ends in .gguf is needed".to_owned()
}

fn instead_of_url(url: &str, place: &str) -> String {
    let path = place.split(['?', '#']).next().unwrap_or_default();
    if path.ends_with(".gguf") {
        let url = url.replacen("/blob/", "/resolve/", 1);
        return format!("download it first: curl -L -O {url}");
    }
    let parts: Vec<_> = path.trim_end_matches('/').split('/').collect();
    match parts[..] {
        ["huggingface.co" | "hf.co", user, repository, ..] => {
            format!("convert the checkpoint first: openvla-convert {user}/{repository} --q4")
        }
        _ => "download it first".to_owned(),
    }
}

/// Whether a name is `user/repo` or `user/repo@revision`, and no path to a model file.
fn is_repository(text: &str) -> bool {
    let is_name = |name: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(known)
    };
    let names = text.split_once('/');
    names.is_some_and(|(user, repository)| is_name(user) && is_name(repository))
        && !text.to_ascii_lowercase().ends_with(".gguf")
}

/// Whether a file is a model file, whatever it is called.
fn is_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_ok() && start == *b"GGUF"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_model_file_is_named_with_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("checkpoint/config.json", "{}"),
            ("checkpoint/model.safetensors", ""),
            ("adapter/adapter_config.json", "{}"),
            ("models/model.gguf", ""),
            ("models/other.bin", "GGUF"),
            ("other/notes.txt", ""),
        ] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let inside = |name: &str| dir.path().join(name).display().to_string();
        for (path, words) in [
            (inside("checkpoint"), format!("openvla-convert {} --q4", inside("checkpoint"))),
            (
                inside("checkpoint/model.safetensors"),
                format!("openvla-convert {} --q4", inside("checkpoint")),
            ),
            (inside("adapter"), format!("--lora {} --q4", inside("adapter"))),
            (inside("models"), format!("such as {}", inside("models/model.gguf"))),
            (inside("other"), "ends in .gguf".to_owned()),
            ("openvla/openvla-7b".to_owned(), "openvla-convert openvla/openvla-7b --q4".to_owned()),
            (
                "https://huggingface.co/me/x/blob/main/y.gguf".to_owned(),
                "curl -L -O https://huggingface.co/me/x/resolve/main/y.gguf".to_owned(),
            ),
            (
                "https://huggingface.co/openvla/openvla-7b/tree/main".to_owned(),
                "openvla-convert openvla/openvla-7b --q4".to_owned(),
            ),
            ("~/model.gguf".to_owned(), "the shell did not expand ~;".to_owned()),
            ("$HOME/model.gguf".to_owned(), "the shell did not expand $HOME;".to_owned()),
        ] {
            let error = check(Path::new(&path)).unwrap_err().to_string();
            assert!(error.starts_with(&path) && error.contains(&words), "{error}");
        }
        for path in [inside("models/model.gguf"), inside("models/other.bin"), inside("missing")] {
            check(Path::new(&path)).unwrap();
        }
        check(Path::new("models/missing.gguf")).unwrap();
    }
}
