//! Statistics of data sets: words, or scales by which every motion is finite and every state within -1..1.
#![no_main]

use libfuzzer_sys::fuzz_target;
use openvla::{Bounds, Statistics};
use openvla_doctor::file::doubts;

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let Ok(json) = std::str::from_utf8(bytes) else { return };
    let bounds = if which & 1 == 0 { Bounds::Quantiles } else { Bounds::Extremes };
    let Ok(statistics) = Statistics::parse_with(json.to_owned(), bounds, which & 2 != 0) else {
        return;
    };
    let _ = statistics.select(None);
    for (name, dataset) in statistics.datasets() {
        assert!(statistics.select(Some(name)).is_ok());
        doubts(name, dataset);
        for scale in [Some(&dataset.action), dataset.state.as_ref()].into_iter().flatten() {
            assert_eq!(scale.ranges().len(), scale.n());
            for x in [-1.0, 0.0, 0.3, 1.0] {
                let motion = scale.unnormalize(&vec![x; scale.n()]);
                assert!(motion.iter().all(|x| x.is_finite()), "{x}: {motion:?}");
                let scaled = scale.normalize(&motion);
                let ends = scaled.iter().zip(&scale.mask).filter(|(_, scaled)| **scaled);
                assert!(ends.into_iter().all(|(x, _)| (-1.0..=1.0).contains(x)), "{scaled:?}");
            }
        }
    }
});
