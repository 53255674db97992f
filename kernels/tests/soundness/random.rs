//! Numbers and sizes that tell a program what to do.

use openvla_kernels::{DType, Shape};

/// A linear congruence, its high bits.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        for _ in 0..2 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        }
        (self.0 >> 33) as usize % n
    }

    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Small, and often at the edge of what a kernel takes at once.
    pub fn size(&mut self) -> usize {
        self.of(&[1, 1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 256])
    }

    /// Of no more than some thousand elements, in whole blocks; or absurd.
    pub fn shape(&mut self, dtype: DType) -> Shape {
        if self.once_in(50) {
            return [(); 4].map(|()| self.of(&[0, 1, 4, 256, (1 << 42) + 1, 1 << 62, usize::MAX]));
        }
        let mut dims = [self.size(), self.size(), 1, 1];
        if self.once_in(3) {
            dims = [self.size(), self.size(), self.of(&[1, 2, 3]), self.of(&[1, 1, 2])];
        }
        if !self.once_in(30) {
            dims[0] = dims[0].next_multiple_of(dtype.block());
        }
        dims
    }

    /// In -1..1.
    pub fn number(&mut self) -> f32 {
        self.below(2001) as f32 / 1000.0 - 1.0
    }

    /// A number, as a rule.
    pub fn float(&mut self) -> f32 {
        match self.below(40) {
            0 => self.of(&[f32::NAN, f32::INFINITY, -f32::INFINITY, 0.0, f32::MAX, 1e-40]),
            _ => self.number(),
        }
    }
}
