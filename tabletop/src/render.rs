//! Pictures: a world to what a camera sees, RGB of any size, in perspective, with shadows.
//!
//! Everything is an upright prism. Its silhouette is the convex hull of its two ends as the camera
//! sees them, its shadow the hull of both ends' shadows on the table. Far things are drawn first.

use openvla::image::RgbImage;
use tiny_skia::{Color, FillRule, Paint, PathBuilder, Pixmap, Transform};

use crate::camera::Camera;
use crate::geometry::{Point, Rod, add, direction, hull, scale};
use crate::scene::{Item, Look};
use crate::world::{FINGER, Gripper, TABLE, World};

/// Points of a round outline.
const ROUND: usize = 20;

/// Height of the fingers, and the upper ends of palm and wrist over the fingertips.
const FINGERS: f64 = 0.055;
const PALM: f64 = 0.07;
const WRIST: f64 = 0.11;

const STEEL: [u8; 3] = [215, 217, 222];
const BLUE: [u8; 3] = [20, 70, 230];
const FLOOR: [u8; 3] = [58, 62, 68];

/// What the front camera sees, `size` pixels square.
pub fn picture(world: &World, size: u32) -> RgbImage {
    draw(world, Camera::Front, size)
}

/// What the wrist camera sees, `size` pixels square.
pub fn wrist_picture(world: &World, size: u32) -> RgbImage {
    draw(world, Camera::Wrist(world.gripper), size)
}

fn draw(world: &World, camera: Camera, size: u32) -> RgbImage {
    let mut canvas = Canvas::new(&world.scene.look, camera, size);
    let scene = &world.scene;
    let corner = |x: f64, y: f64| [x * TABLE, y * TABLE];
    let table = [corner(-1.0, -1.0), corner(1.0, -1.0), corner(1.0, 1.0), corner(-1.0, 1.0)];
    canvas.prism(&table, [-0.02, 0.0], scene.look.table);

    let bin = Rod::disk(scene.receptacle_at, scene.receptacle.outer).outline(ROUND);
    canvas.shadow(&bin, [0.0, scene.receptacle.height]);
    for item in &scene.items {
        canvas.shadow(&item.rod().outline(ROUND), [item.z, item.top()]);
    }
    canvas.gripper_shadow(&world.gripper);

    let held = world.held.map(|held| held.item);
    // What lies in the receptacle is drawn after it.
    let far_side = camera.distance(scene.receptacle_at) + scene.receptacle.inner;
    let mut order: Vec<(f64, Option<&Item>)> = vec![(far_side, None)];
    let lying = scene.items.iter().enumerate().filter(|(i, _)| Some(*i) != held);
    order.extend(lying.map(|(_, item)| (camera.distance(item.at), Some(item))));
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (_, item) in order {
        match item {
            Some(item) => canvas.item(item),
            None => canvas.receptacle(world),
        }
    }
    if let Some(held) = held {
        canvas.item(&scene.items[held]);
    }
    canvas.gripper(&world.gripper);
    canvas.into_image()
}

struct Canvas {
    pixmap: Pixmap,
    camera: Camera,
    brightness: f64,
    light: Point,
}

/// A color, times `factor`.
fn shade(color: [u8; 3], factor: f64) -> [u8; 3] {
    color.map(|level| (f64::from(level) * factor).clamp(0.0, 255.0) as u8)
}

impl Canvas {
    fn new(look: &Look, camera: Camera, size: u32) -> Self {
        let mut pixmap = Pixmap::new(size, size).expect("a size that is not zero");
        let [r, g, b] = shade(FLOOR, look.brightness);
        pixmap.fill(Color::from_rgba8(r, g, b, 255));
        Self { pixmap, camera, brightness: look.brightness, light: look.light }
    }

    /// Where the camera sees a point, in pixels.
    fn project(&self, at: Point, z: f64) -> Point {
        let half = f64::from(self.pixmap.width()) / 2.0;
        self.camera.seen(at, z).map(|x| half + half * x)
    }

    fn seen(&self, outline: &[Point], z: f64) -> Vec<Point> {
        outline.iter().map(|p| self.project(*p, z)).collect()
    }

    fn fill(&mut self, polygon: &[Point], color: [u8; 3], opacity: u8) {
        let mut path = PathBuilder::new();
        for (i, [x, y]) in polygon.iter().enumerate() {
            match i {
                0 => path.move_to(*x as f32, *y as f32),
                _ => path.line_to(*x as f32, *y as f32),
            }
        }
        path.close();
        let Some(path) = path.finish() else { return };
        let mut paint = Paint::default();
        let [r, g, b] = shade(color, self.brightness);
        paint.set_color_rgba8(r, g, b, opacity);
        self.pixmap.fill_path(&path, &paint, FillRule::Winding, Transform::identity(), None);
    }

    /// An upright prism between two heights: its sides in shade, its upper end in light.
    fn prism(&mut self, outline: &[Point], [low, high]: [f64; 2], color: [u8; 3]) {
        let top = self.seen(outline, high);
        let both = [self.seen(outline, low), top.clone()].concat();
        self.fill(&hull(both), shade(color, 0.72), 255);
        self.fill(&top, color, 255);
    }

    fn shadow(&mut self, outline: &[Point], heights: [f64; 2]) {
        let cast = |height: f64| {
            let reach = scale(self.light, height);
            outline.iter().map(|p| self.project(add(*p, reach), 0.0)).collect::<Vec<_>>()
        };
        let both = heights.map(&cast).concat();
        self.fill(&hull(both), [20, 16, 14], 80);
    }

    fn item(&mut self, item: &Item) {
        let rod = item.rod();
        let middle = item.z + 0.55 * (item.top() - item.z);
        self.prism(&rod.outline(ROUND), [item.z, middle], shade(item.object.color, 0.85));
        let crown = Rod { radius: 0.7 * rod.radius, ..rod };
        self.prism(&crown.outline(ROUND), [middle, item.top()], item.object.color);
    }

    /// The wall from outside, and the inside in its shade: the deeper, the darker.
    fn receptacle(&mut self, world: &World) {
        let (bin, at) = (world.scene.receptacle, world.scene.receptacle_at);
        self.prism(&Rod::disk(at, bin.outer).outline(ROUND), [0.0, bin.height], bin.color);
        let inside = self.seen(&Rod::disk(at, bin.inner).outline(ROUND), bin.height);
        self.fill(&inside, shade(bin.color, (0.95 - 8.0 * bin.height).max(0.6)), 255);
    }

    fn gripper_parts(gripper: &Gripper) -> [(Rod, [f64; 2], [u8; 3]); 4] {
        let z = gripper.z;
        let [left, right] = gripper.fingers().map(|finger| Rod::disk(finger, FINGER));
        // The palm is as wide as the fingers are open, so that this is seen from above.
        let half = scale(direction(gripper.yaw), gripper.opening / 2.0);
        let palm = Rod { at: gripper.at, half, radius: 0.011 };
        let wrist = Rod::disk(gripper.at, 0.013);
        [
            (left, [z, z + FINGERS], STEEL),
            (right, [z, z + FINGERS], STEEL),
            (palm, [z + FINGERS, z + PALM], BLUE),
            (wrist, [z + PALM, z + WRIST], BLUE),
        ]
    }

    fn gripper_shadow(&mut self, gripper: &Gripper) {
        for (rod, heights, _) in &Self::gripper_parts(gripper)[..3] {
            self.shadow(&rod.outline(12), *heights);
        }
    }

    fn gripper(&mut self, gripper: &Gripper) {
        let mut parts = Self::gripper_parts(gripper);
        let distance = |part: &(Rod, _, _)| self.camera.distance(part.0.at);
        parts[..2].sort_by(|a, b| distance(b).total_cmp(&distance(a))); // the far finger first
        for (rod, heights, color) in parts {
            self.prism(&rod.outline(12), heights, color);
        }
    }

    fn into_image(self) -> RgbImage {
        let pixels = self.pixmap.pixels().iter().flat_map(|p| [p.red(), p.green(), p.blue()]);
        let (width, height) = (self.pixmap.width(), self.pixmap.height());
        RgbImage::from_raw(width, height, pixels.collect()).expect("three bytes a pixel")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{Scene, Suite};

    #[test]
    fn what_is_asked_for_can_be_told_from_the_table() {
        let mut world = World::new(Scene::new(Suite::Base, 0));
        let with = picture(&world, 84);
        world.scene.items.clear();
        let without = picture(&world, 84);
        let differing = with.pixels().zip(without.pixels()).filter(|(a, b)| a != b);
        assert!(differing.count() > 20, "pixels of what lies there");
    }
}
