//! The settings of an OpenVLA-OFT run that no file states: the chunk, the cameras and the bounds.
//!
//! Its `config.json` is the base model's, so they come from the user, or from the platform that the sizes tell.
//!
//! ref: openvla-oft `prismatic/vla/constants.py`

use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use openvla::{Bounds, OftConfig};

use crate::checkpoint::StatisticsText;
use crate::mapping::RunTensors;

/// What a user says of a run. What is left out comes from its platform.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RunOptions {
    /// The platform that it was trained for, by openvla-oft's names.
    pub platform: Option<Platform>,
    /// Actions of one pass.
    pub chunk: Option<usize>,
    /// Cameras: the third-person one, then those on wrists.
    pub n_camera: Option<usize>,
    /// What -1 and 1 correspond to.
    pub bounds: Option<Bounds>,
}

impl RunOptions {
    /// Whether something was said that only an OpenVLA-OFT has.
    pub fn are_given(&self) -> bool {
        *self != Self::default()
    }
}

/// A platform that openvla-oft has constants for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are names")]
pub enum Platform {
    Libero,
    Aloha,
    Bridge,
}

/// A platform's row of openvla-oft's table of constants.
struct Constants {
    name: &'static str,
    chunk: usize,
    n_action: usize,
    n_state: usize,
    bounds: Bounds,
    /// Of its evaluation; nothing is published for Bridge, whose data have one camera.
    n_camera: usize,
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|platform| platform.name() == name);
        found.ok_or_else(|| "libero, aloha or bridge is needed".to_owned())
    }
}

impl Platform {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Libero, Self::Aloha, Self::Bridge];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        self.constants().name
    }

    /// Numbers of an action, and of the arm's state.
    pub fn lengths(self) -> [usize; 2] {
        let Constants { n_action, n_state, .. } = self.constants();
        [n_action, n_state]
    }

    fn constants(self) -> Constants {
        let (name, [chunk, n_action, n_state, n_camera], bounds) = match self {
            Self::Libero => ("libero", [8, 7, 8, 2], Bounds::Quantiles),
            Self::Aloha => ("aloha", [25, 14, 14, 3], Bounds::Extremes),
            Self::Bridge => ("bridge", [5, 7, 7, 1], Bounds::Quantiles),
        };
        Constants { name, chunk, n_action, n_state, bounds, n_camera }
    }
}

/// [`configure`], with what the statistics tell where there is no head.
///
/// # Errors
/// As [`configure`], or if the statistics cannot be used.
pub fn configure_with(
    run: RunTensors,
    statistics: &StatisticsText,
    options: &RunOptions,
) -> Result<OftConfig> {
    let n_action = match run.n_action {
        Some(n) => n,
        None => {
            let of_platform = options.platform.map(|platform| platform.constants().bounds);
            let bounds = options.bounds.or(of_platform).unwrap_or_default();
            statistics.parse_with(bounds, false)?.longest()
        }
    };
    configure(run, n_action, options)
}

/// What no file says, from the user or, where all platforms that the sizes allow agree, from those.
///
/// # Errors
/// Names what is ambiguous, and the options that say it.
pub fn configure(run: RunTensors, n_action: usize, options: &RunOptions) -> Result<OftConfig> {
    let RunTensors { head, n_state, film, .. } = run;
    if let Some(platform) = options.platform.map(Platform::constants) {
        ensure!(
            platform.n_action == n_action,
            "--platform {} has actions of {} numbers, this model of {n_action}; say --chunk, --cameras and --bounds \
             instead",
            platform.name,
            platform.n_action
        );
    }
    let possible: Vec<Constants> = match options.platform {
        Some(platform) => vec![platform.constants()],
        None => {
            let fits = |platform: &Constants| {
                platform.n_action == n_action && (n_state == 0 || platform.n_state == n_state)
            };
            Platform::ALL.map(Platform::constants).into_iter().filter(fits).collect()
        }
    };
    let unknown = |what: &str, option: &str| {
        format!(
            "no file of an OpenVLA-OFT run says {what}, and actions of {n_action} numbers with {} do not tell; say \
             {option}, or --platform libero, aloha or bridge",
            state_words(n_state)
        )
    };
    let chunk = agreed(options.chunk, &possible, |platform| platform.chunk)
        .with_context(|| unknown("how many actions it gives", "--chunk N"))?;
    let n_camera = agreed(options.n_camera, &possible, |platform| platform.n_camera)
        .with_context(|| unknown("how many cameras it sees", "--cameras N"))?;
    let bounds = agreed(options.bounds, &possible, |platform| platform.bounds)
        .with_context(|| unknown("what -1 and 1 stand for", "--bounds q99|min-max"))?;
    // Checked before each gets a name.
    let most = OftConfig::MAX_CAMERAS;
    ensure!((1..=most).contains(&n_camera), "--cameras is {n_camera}; 1 to {most} can be");
    let cameras = camera_names(n_camera);
    Ok(OftConfig { chunk, n_action, n_state, cameras, bounds, head, film })
}

/// What was said, else what all platforms have in common.
fn agreed<T: Copy + PartialEq>(
    said: Option<T>,
    possible: &[Constants],
    of: impl Fn(&Constants) -> T,
) -> Option<T> {
    let mut values = possible.iter().map(of);
    said.or_else(|| values.next().filter(|first| values.all(|other| other == *first)))
}

fn state_words(n_state: usize) -> String {
    if n_state > 0 { format!("a state of {n_state}") } else { "no state".to_owned() }
}

/// The cameras as openvla-oft's clients call them. The left wrist comes first, as in training.
fn camera_names(n: usize) -> Vec<String> {
    let wrists: Vec<String> = match n {
        0 | 1 => Vec::new(),
        2 => vec!["wrist_image".to_owned()],
        3 => vec!["left_wrist_image".to_owned(), "right_wrist_image".to_owned()],
        _ => (1..n).map(|i| format!("wrist_image_{i}")).collect(),
    };
    [vec!["full_image".to_owned(); n.min(1)], wrists].concat()
}

/// One line on what was taken, for people.
pub fn summary(oft: &OftConfig) -> String {
    let OftConfig { chunk, n_action, n_state, cameras, bounds, head, film } = oft;
    let (state, [low, high]) = (state_words(*n_state), bounds.keys());
    format!(
        "OpenVLA-OFT: {chunk} actions of {n_action} numbers ({} head{}) from {} ({}), {state}; {low} and {high} are -1 \
         and 1",
        head.as_ref(),
        if *film { ", FiLM" } else { "" },
        if cameras.len() == 1 {
            "1 camera".to_owned()
        } else {
            format!("{} cameras", cameras.len())
        },
        cameras.join(", "),
    )
}

/// Where the name of a run contradicts what was taken: the trainer notes some of it there.
pub fn doubt(name: &str, oft: &OftConfig) -> Option<String> {
    let words = name.split("--").flat_map(|part| part.split_once("_acts_chunk"));
    let said = words.filter_map(|(n, _)| n.rsplit(['-', '+']).next()?.parse::<usize>().ok()).next();
    let chunk = said.filter(|n| *n != oft.chunk);
    let has_wrist = name.contains("wrist_img") && oft.cameras.len() == 1;
    let has_state = name.contains("proprio_state") && oft.n_state == 0;
    if let Some(n) = chunk {
        Some(format!("the run's name says chunks of {n}, not of {}", oft.chunk))
    } else if has_wrist {
        Some("the run's name says that it sees a wrist camera, but one camera is taken".to_owned())
    } else if has_state {
        Some(
            "the run's name says that it reads the arm's state, but no projector of it is here"
                .to_owned(),
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use openvla::OftHead;

    use super::*;

    fn configured(n_action: usize, n_state: usize, options: &RunOptions) -> Result<OftConfig> {
        let run = RunTensors { n_action: None, n_state, head: OftHead::L1, film: false };
        configure(run, n_action, options)
    }

    fn taken(
        n_action: usize,
        n_state: usize,
        options: RunOptions,
    ) -> Result<(usize, usize, Bounds)> {
        let oft = configured(n_action, n_state, &options)?;
        Ok((oft.chunk, oft.cameras.len(), oft.bounds))
    }

    #[test]
    fn sizes_tell_the_platform_where_they_can() {
        let none = RunOptions::default();
        assert_eq!(taken(7, 8, none).unwrap(), (8, 2, Bounds::Quantiles));
        assert_eq!(taken(7, 7, none).unwrap(), (5, 1, Bounds::Quantiles));
        assert_eq!(taken(14, 14, none).unwrap(), (25, 3, Bounds::Extremes));
        assert_eq!(taken(14, 0, none).unwrap(), (25, 3, Bounds::Extremes));
    }

    #[test]
    fn what_is_ambiguous_is_asked_for() {
        let error =
            |n_action, n_state, options| taken(n_action, n_state, options).unwrap_err().to_string();
        let chunk = |n| RunOptions { chunk: Some(n), ..RunOptions::default() };
        assert!(error(7, 0, RunOptions::default()).contains("--chunk N"));
        assert!(error(7, 0, chunk(8)).contains("--cameras N"));
        assert!(error(6, 6, chunk(8)).contains("--cameras N"));
        let cameras = RunOptions { n_camera: Some(1), ..chunk(10) };
        assert_eq!(taken(7, 0, cameras).unwrap(), (10, 1, Bounds::Quantiles), "both have q99");
        assert!(error(6, 6, cameras).contains("--bounds"));
        let platform = |platform| RunOptions { platform: Some(platform), ..RunOptions::default() };
        assert_eq!(taken(7, 0, platform(Platform::Libero)).unwrap(), (8, 2, Bounds::Quantiles));
        assert!(error(14, 14, platform(Platform::Libero)).contains("actions of 7"));
    }

    #[test]
    fn no_robot_has_a_billion_cameras() {
        for n in [0, 1_000_000_000] {
            let cameras = RunOptions { n_camera: Some(n), ..RunOptions::default() };
            let error = taken(7, 8, cameras).unwrap_err().to_string();
            assert_eq!(error, format!("--cameras is {n}; 1 to 8 can be"));
        }
    }

    #[test]
    fn a_name_that_contradicts_is_noted() {
        let oft = configured(7, 8, &RunOptions::default()).unwrap();
        let name = "run--parallel_dec--8_acts_chunk--continuous_acts--L1--wrist_img--proprio_state";
        assert_eq!(doubt(name, &oft), None);
        assert!(doubt("run--25_acts_chunk", &oft).unwrap().contains("25"));
        let alone = OftConfig { cameras: camera_names(1), n_state: 0, ..oft };
        assert!(doubt(name, &alone).unwrap().contains("wrist"));
    }
}
