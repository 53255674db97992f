//! What a WebP file says of itself: the canvas, and the bitstreams in it.
//!
//! A decoder learns a bitstream's size from the bitstream. It must be the canvas's, or that of the
//! frame of an animation, and is looked at before anything is decoded.
//!
//! ref: <https://developers.google.com/speed/webp/docs/riff_container>; what differs from it libwebp
//! refuses, and with it Pillow

use super::{Header, refused};
use crate::Result;

/// Width and height in pixels.
type Size = (u32, u32);

/// The canvas of a WebP file.
///
/// # Errors
///
/// [`crate::Error::Image`] if there is none, or if a bitstream is of another size than its frame.
pub(super) fn header(bytes: &[u8]) -> Result<Header> {
    let mut canvas = None;
    for (name, content) in chunks(bytes.get(12..).unwrap_or_default()) {
        match (&name, canvas) {
            (b"VP8X", None) => canvas = content.get(4..10).map(size24),
            (b"ANMF", Some(_)) => frame(content)?,
            (b"VP8 " | b"VP8L", Some(canvas)) => check(&name, content, canvas)?,
            (b"VP8 " | b"VP8L", None) => {
                canvas = bitstream(&name, content);
                break; // nothing after it is looked at
            }
            _ => {}
        }
    }
    let (width, height) = canvas.ok_or_else(|| refused("it is a WebP without pixels"))?;
    Ok(Header::of_pixels(width, height))
}

/// A frame of an animation: where it is, and a bitstream, which alpha may precede.
fn frame(content: &[u8]) -> Result<()> {
    let size = content.get(6..12).map(size24);
    let mut chunks = chunks(content.get(16..).unwrap_or_default());
    let first = chunks.next();
    let bitstream = match first {
        Some((name, _)) if name == *b"ALPH" => chunks.next().filter(|(name, _)| name == b"VP8 "),
        first => first.filter(|(name, _)| [b"VP8 ", b"VP8L"].contains(&name)),
    };
    let (Some(size), Some((name, content))) = (size, bitstream) else {
        return Err(refused("it is a WebP with a frame without pixels"));
    };
    check(&name, content, size)
}

fn check(name: &[u8; 4], content: &[u8], (width, height): Size) -> Result<()> {
    match bitstream(name, content) {
        Some(size) if size == (width, height) => Ok(()),
        Some((w, h)) => Err(refused(format!(
            "it is a WebP whose bitstream of {w} x {h} pixels is in a frame of {width} x {height}"
        ))),
        None => Err(refused("it is a WebP whose bitstream is cut off")),
    }
}

/// The size of a bitstream, lossy or lossless.
fn bitstream(name: &[u8; 4], content: &[u8]) -> Option<Size> {
    if name == b"VP8 " {
        let &[w0, w1, h0, h1] = content.get(6..10)?.first_chunk()?;
        let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3FFF);
        return Some((side(w0, w1), side(h0, h1)));
    }
    let bits = u32::from_le_bytes(*content.get(1..5)?.first_chunk()?);
    Some(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
}

/// Two numbers of 24 bits, each one less than a side.
fn size24(bytes: &[u8]) -> Size {
    let side = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], 0]) + 1;
    (side(0), side(3))
}

/// The chunks of a container. The last one may be cut off.
fn chunks(mut bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    std::iter::from_fn(move || {
        let (name, after) = bytes.split_first_chunk::<4>()?;
        let (length, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let content = &after[..length.min(after.len())];
        bytes = after.get(length.saturating_add(length % 2)..).unwrap_or_default();
        Some((*name, content))
    })
}
