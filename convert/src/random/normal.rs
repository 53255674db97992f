//! Normal deviates that are equal on every machine: from a seeded generator, with those operations of
//! floating-point numbers that IEEE 754 defines to the last bit.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Bytes of the random stream for one deviate: twelve numbers of 16 bits.
const UNIFORM: usize = 24;

/// `n` normal deviates of a seed's stream from index `start` on, with mean 0 and deviation 1.
///
/// ChaCha8: its crate promises to keep its output on every machine and in later versions.
pub fn deviates(seed: u64, start: usize, n: usize) -> Vec<f32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    random.set_word_pos((start * UNIFORM / 4) as u128);
    let mut bytes = vec![0; n * UNIFORM];
    random.fill_bytes(&mut bytes);
    bytes.as_chunks().0.iter().map(normal).collect()
}

/// A deviate that is nearly normal: the sum of twelve uniform ones, less its mean. The textbook
/// methods need `ln` or `cos`, whose last bit differs between platforms.
fn normal(uniform: &[u8; UNIFORM]) -> f32 {
    let numbers = uniform.as_chunks().0.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes)));
    numbers.sum::<u32>() as f32 / 65536.0 - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviates_are_normal() {
        let n = 20_000;
        let draws = deviates(7, 0, n);
        let mean = draws.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
        let variance = draws.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.03, "variance {variance}");
        assert_eq!(draws[5..9], deviates(7, 5, 4), "any part of the stream can be drawn");
    }
}
