//! Plane geometry: vectors, angles, rods and convex hulls.

use std::f64::consts::PI;

/// Meters on the table: x to the right, y away from the camera.
pub type Point = [f64; 2];

pub fn add(a: Point, b: Point) -> Point {
    [a[0] + b[0], a[1] + b[1]]
}

pub fn sub(a: Point, b: Point) -> Point {
    [a[0] - b[0], a[1] - b[1]]
}

pub fn scale(a: Point, s: f64) -> Point {
    [a[0] * s, a[1] * s]
}

pub fn dot(a: Point, b: Point) -> f64 {
    a[0] * b[0] + a[1] * b[1]
}

pub fn length(a: Point) -> f64 {
    dot(a, a).sqrt()
}

/// The unit vector at `angle` from the x axis. `libm`, because the platform's own last bit differs.
pub fn direction(angle: f64) -> Point {
    [libm::cos(angle), libm::sin(angle)]
}

pub fn turn(a: Point, angle: f64) -> Point {
    let [c, s] = direction(angle);
    [c * a[0] - s * a[1], s * a[0] + c * a[1]]
}

/// An angle of something that looks the same from behind, in -π/2 … π/2.
pub fn half_turn(angle: f64) -> f64 {
    angle - PI * (angle / PI).round()
}

/// All points within `radius` of a segment: the footprint of things. A disk if `half` is zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rod {
    /// The segment's middle.
    pub at: Point,
    /// From `at` to one end of the segment.
    pub half: Point,
    /// Meters.
    pub radius: f64,
}

impl Rod {
    /// All points within `radius` of one.
    pub fn disk(at: Point, radius: f64) -> Self {
        Self { at, half: [0.0; 2], radius }
    }

    fn ends(&self) -> [Point; 2] {
        [sub(self.at, self.half), add(self.at, self.half)]
    }

    /// The point of the segment that is nearest to `p`.
    fn nearest(&self, p: Point) -> Point {
        let square = dot(self.half, self.half);
        if square == 0.0 {
            return self.at;
        }
        let t = (dot(sub(p, self.at), self.half) / square).clamp(-1.0, 1.0);
        add(self.at, scale(self.half, t))
    }

    /// Least and greatest distance of its points from `p`; the least is negative inside.
    pub fn distances(&self, p: Point) -> [f64; 2] {
        let far = self.ends().map(|end| length(sub(end, p)));
        [length(sub(self.nearest(p), p)) - self.radius, far[0].max(far[1]) + self.radius]
    }

    /// How far this must move, and whereto, to be clear of a disk; `None` if it is.
    pub fn clearance(&self, disk: Point, radius: f64) -> Option<Point> {
        let away = sub(self.nearest(disk), disk);
        let (distance, wanted) = (length(away), self.radius + radius);
        let unit = if distance > 1e-9 { scale(away, 1.0 / distance) } else { [0.0, 1.0] };
        (distance < wanted).then(|| scale(unit, wanted - distance))
    }

    /// Whether two rods overlap. Two segments that do not cross are nearest at an end of one.
    pub fn overlaps(&self, other: &Self) -> bool {
        let wanted = self.radius + other.radius;
        let near = |a: &Self, b: &Self| {
            a.ends().iter().any(|end| length(sub(b.nearest(*end), *end)) < wanted)
        };
        near(self, other) || near(other, self) || self.crosses(other)
    }

    fn crosses(&self, other: &Self) -> bool {
        let side = |rod: &Self, p: Point| {
            let d = sub(p, rod.at);
            rod.half[0] * d[1] - rod.half[1] * d[0]
        };
        let apart = |a: &Self, b: &Self| {
            let [p, q] = b.ends().map(|end| side(a, end));
            p * q < 0.0
        };
        apart(self, other) && apart(other, self)
    }

    /// Where the line through `p` along the unit vector `u` is inside, as distances from `p`.
    pub fn chord(&self, p: Point, u: Point) -> Option<[f64; 2]> {
        let disks = self.ends().map(|end| {
            let d = sub(end, p);
            let across = d[1] * u[0] - d[0] * u[1];
            let half = (self.radius * self.radius - across * across).max(0.0).sqrt();
            (across.abs() < self.radius).then(|| [dot(d, u) - half, dot(d, u) + half])
        });
        let spans = disks.into_iter().flatten().chain(self.middle(p, u));
        spans.reduce(|a, b| [a[0].min(b[0]), a[1].max(b[1])])
    }

    /// The same for the rectangle between the ends.
    fn middle(&self, p: Point, u: Point) -> Option<[f64; 2]> {
        let long = length(self.half);
        if long == 0.0 {
            return None;
        }
        let axis = scale(self.half, 1.0 / long);
        let normal = [-axis[1], axis[0]];
        let d = sub(p, self.at);
        let slab = |axis: Point, half: f64| {
            let (from, speed) = (dot(d, axis), dot(u, axis));
            if speed.abs() < 1e-12 {
                return (from.abs() < half).then_some([f64::NEG_INFINITY, f64::INFINITY]);
            }
            let [a, b] = [(-half - from) / speed, (half - from) / speed];
            Some([a.min(b), a.max(b)])
        };
        let ([a, b], [c, d]) = (slab(axis, long)?, slab(normal, self.radius)?);
        (a.max(c) < b.min(d)).then(|| [a.max(c), b.min(d)])
    }

    /// Points around it, counter-clockwise.
    pub fn outline(&self, n: usize) -> Vec<Point> {
        let start = libm::atan2(self.half[1], self.half[0]) - PI / 2.0;
        let arc = |(end, from): (Point, f64)| {
            (0..=n / 2).map(move |i| {
                let angle = from + PI * i as f64 / (n / 2) as f64;
                add(end, scale(direction(angle), self.radius))
            })
        };
        let [back, front] = self.ends();
        [(front, start), (back, start + PI)].into_iter().flat_map(arc).collect()
    }
}

/// The convex hull, by Andrew's monotone chain.
pub fn hull(mut points: Vec<Point>) -> Vec<Point> {
    points.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let chain = |points: &mut dyn Iterator<Item = Point>| {
        let mut chain: Vec<Point> = Vec::new();
        for p in points {
            while let [.., a, b] = chain[..] {
                let (ab, ap) = (sub(b, a), sub(p, a));
                if ab[0] * ap[1] - ab[1] * ap[0] > 0.0 {
                    break;
                }
                chain.pop();
            }
            chain.push(p);
        }
        chain.pop();
        chain
    };
    let mut hull = chain(&mut points.iter().copied());
    hull.extend(chain(&mut points.iter().rev().copied()));
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROD: Rod = Rod { at: [1.0, 2.0], half: [3.0, 0.0], radius: 1.0 };

    #[test]
    fn a_chord_is_what_lies_inside() {
        assert_eq!(ROD.chord([1.0, 0.0], [0.0, 1.0]), Some([1.0, 3.0]));
        assert_eq!(ROD.chord([1.0, 2.0], [1.0, 0.0]), Some([-4.0, 4.0]));
        assert_eq!(ROD.chord([6.0, 0.0], [0.0, 1.0]), None);
        let slanted = ROD.chord([1.0, 2.0], direction(PI / 4.0)).unwrap();
        assert!((slanted[1] - 2.0_f64.sqrt()).abs() < 1e-12, "{slanted:?}");
    }

    #[test]
    fn clearance_moves_just_out_of_the_disk() {
        let out = ROD.clearance([2.0, 3.5], 1.0).unwrap();
        assert_eq!(out, [0.0, -0.5]);
        let moved = Rod { at: add(ROD.at, out), ..ROD };
        assert_eq!(moved.clearance([2.0, 3.5], 1.0), None);
    }

    #[test]
    fn crossed_rods_overlap_though_their_ends_are_far() {
        let other = Rod { at: ROD.at, half: [0.0, 3.0], radius: 0.1 };
        assert!(ROD.overlaps(&other));
        assert!(!ROD.overlaps(&Rod { at: [1.0, 6.2], ..other }));
    }

    #[test]
    fn a_hull_holds_the_corners_alone() {
        let square = vec![[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]];
        assert_eq!(hull(square), [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]);
    }
}
