//! Whether the machine's memory suffices for a second model.

use anyhow::{Result, ensure};
use openvla::cli::memory;

/// Whether the machine, and the control groups that this process is in, have so many bytes left. Where the system does
/// not say, it is tried.
///
/// # Errors
/// Says what is needed and what there is.
pub fn check(needed: usize) -> Result<()> {
    enough(needed, memory::free())
}

fn enough(needed: usize, free: Option<usize>) -> Result<()> {
    let free = free.unwrap_or(usize::MAX);
    ensure!(
        needed <= free,
        "both models must be in memory at once: {} are needed for the second, and {} are free; start the server anew \
         with it, or take a file of a smaller type",
        size(needed),
        size(free)
    );
    Ok(())
}

fn size(bytes: usize) -> String {
    match bytes as f64 {
        few if few < 1e9 => format!("{:.1} MB", few / 1e6),
        many => format!("{:.2} GB", many / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        assert!(enough(1 << 30, Some(1 << 30)).is_ok() && enough(1 << 40, None).is_ok());
        let error = enough(4_200_000_000, Some(1_500_000_000)).unwrap_err().to_string();
        assert!(error.contains("4.20 GB are needed") && error.contains("1.50 GB are free"));
        let error = enough(1_100_000, Some(300_000)).unwrap_err().to_string();
        assert!(
            error.contains("1.1 MB are needed") && error.contains("0.3 MB are free"),
            "{error}"
        );
        assert!(check(0).is_ok() && check(usize::MAX).is_err(), "of this machine");
    }
}
