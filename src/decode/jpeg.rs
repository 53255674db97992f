//! JPEG, through libjpeg-turbo, which Pillow uses too: other decoders are off by some levels.
//!
//! libjpeg goes on after whatever is wrong without being fatal, says so in a warning, and Pillow
//! does not listen. TurboJPEG reports the same warnings as errors, and gives up if one comes before
//! the first pixel. So [`Jpeg::read`] walks over the markers first: it corrects what libjpeg would
//! only warn of, and adds up what decoding would cost. Warnings about the coded pixels are left,
//! and those are passed over as Pillow does.

use image::RgbImage;
use turbojpeg::{Colorspace, Decompressor, Image, PixelFormat};

use super::{Header, refused, rgb};
use crate::Result;

/// Scans of a file. Encoders write about ten; each has a cost of its own, however small the picture.
const MAX_SCANS: u32 = 100;
/// How often an encoder's scans pass over a component at most: once for the constant, once to
/// refine it, and four times for the rest.
///
/// ref: libjpeg `jpeg_simple_progression`
const PASSES: u64 = 6;

/// The beginnings of libjpeg's warnings about coded pixels.
///
/// ref: libjpeg-turbo `jerror.h`, the codes `JWRN_`
const WARNINGS: [&str; 2] = ["Corrupt JPEG data: ", "Inconsistent progression sequence"];

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;
const APP0: u8 = 0xE0;
const APP14: u8 = 0xEE;

/// A file without what libjpeg would warn of, and what its markers say.
pub(super) struct Jpeg {
    /// All that matters to the pixels.
    file: Vec<u8>,
    frame: Option<Frame>,
    scans: u32,
    /// Samples that all scans together pass over.
    samples: u64,
    /// Whether the mark of the end is there.
    ended: bool,
    /// Where in `file` the Adobe marker has its color transform.
    transform: Option<usize>,
}

struct Frame {
    sequential: bool,
    width: u32,
    height: u32,
    components: Vec<Component>,
}

struct Component {
    id: u8,
    samples: u64,
}

impl Jpeg {
    /// Walks over the markers of a file.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut jpeg = Self {
            file: Vec::with_capacity(bytes.len()),
            frame: None,
            scans: 0,
            samples: 0,
            ended: false,
            transform: None,
        };
        jpeg.file.extend([0xFF, SOI]);
        let mut rest = bytes.get(2..).unwrap_or_default();
        while let Some((marker, after)) = next_marker(rest) {
            rest = after;
            match marker {
                EOI => {
                    jpeg.file.extend([0xFF, EOI]);
                    jpeg.ended = true;
                    break;
                }
                0x01 | 0xD0..=SOI => jpeg.file.extend([0xFF, marker]), // has no content
                _ => {
                    let Some((content, after)) = split_content(rest) else { break };
                    rest = after;
                    jpeg.segment(marker, content);
                    if marker == SOS {
                        let (coded, after) = rest.split_at(coded_length(rest));
                        jpeg.file.extend_from_slice(coded);
                        rest = after;
                    }
                }
            }
        }
        jpeg.correct_transform();
        jpeg
    }

    /// Takes a marker with its content.
    fn segment(&mut self, marker: u8, content: &[u8]) {
        // Comments, and what applications add, say nothing of the pixels.
        if matches!(marker, 0xE1..=0xED | 0xEF | 0xFE) {
            return;
        }
        let length = content.len() as u16 + 2; // it was read from 16 bits
        self.file.extend([0xFF, marker]);
        self.file.extend(length.to_be_bytes());
        let start = self.file.len();
        self.file.extend_from_slice(content);
        match marker {
            0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF if self.frame.is_none() => {
                self.frame = Frame::read(marker, content);
            }
            SOS => {
                self.scan(content);
                let sequential = self.frame.as_ref().is_some_and(|frame| frame.sequential);
                if sequential && content.len() > 3 {
                    let spectrum = self.file.len() - 3;
                    self.file[spectrum..].copy_from_slice(&[0, 63, 0]);
                }
            }
            APP0 if content.starts_with(b"JFIF\0") && content.len() >= 14 => {
                self.file[start + 5] = 1; // the version
            }
            APP14 if content.starts_with(b"Adobe") && content.len() >= 12 => {
                self.transform = Some(start + 11);
            }
            _ => {}
        }
    }

    fn scan(&mut self, content: &[u8]) {
        self.scans += 1;
        let Some((&n, content)) = content.split_first() else { return };
        let components = self.frame.iter().flat_map(|frame| &frame.components);
        let named = |id| content.chunks_exact(2).take(n.into()).any(|pair| pair[0] == id);
        self.samples += components.filter(|c| named(c.id)).map(|c| c.samples).sum::<u64>();
    }

    /// A color transform that is not known means the usual one.
    ///
    /// ref: libjpeg `jdapimin.c` `default_decompress_parms`
    fn correct_transform(&mut self) {
        let (Some(at), Some(frame)) = (self.transform, &self.frame) else { return };
        match (frame.components.len(), self.file[at]) {
            (3, 2..) => self.file[at] = 1,
            (4, 1 | 3..) => self.file[at] = 2,
            _ => {}
        }
    }

    /// Its sides, and what decoding costs.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Image`] if there is no frame, if the file is cut off, or if it has too many scans.
    pub(super) fn header(&self) -> Result<Header> {
        let Some(frame) = self.frame.as_ref().filter(|_| self.scans > 0) else {
            return Err(refused("it is a JPEG without pixels"));
        };
        if !self.ended {
            return Err(refused("it is a JPEG that is cut off"));
        }
        if self.scans > MAX_SCANS {
            let scans = self.scans;
            return Err(refused(format!("it is a JPEG of {scans} scans; {MAX_SCANS} may be read")));
        }
        let Frame { width, height, ref components, .. } = *frame;
        let passes = PASSES * components.len() as u64;
        Ok(Header { width, height, samples: self.samples, passes })
    }

    /// Its pixels, with the accurate inverse DCT and smooth upsampling, as Pillow has libjpeg-turbo
    /// do it.
    pub(super) fn decode(&self) -> Result<RgbImage> {
        let failed = |error| refused(format!("decoding it as JPEG failed: {error}"));
        let mut decoder = Decompressor::new().map_err(failed)?;
        decoder.set_scan_limit(self.scans).map_err(failed)?;
        let header = decoder.read_header(&self.file).map_err(failed)?;
        let (width, height) = (header.width, header.height);
        let format = match header.colorspace {
            Colorspace::CMYK | Colorspace::YCCK => PixelFormat::CMYK,
            _ => PixelFormat::RGB,
        };
        let pitch = width * format.size();
        let mut samples = vec![0; pitch * height];
        let image = Image { pixels: samples.as_mut_slice(), width, pitch, height, format };
        match decoder.decompress(&self.file, image) {
            Err(turbojpeg::Error::TurboJpegError(why))
                if WARNINGS.iter().any(|warning| why.starts_with(warning)) => {}
            decoded => decoded.map_err(failed)?,
        }
        let sides = (width as u32, height as u32); // JPEG has 16 bits for each
        Ok(rgb(sides.0, sides.1, &samples, format.size(), |pixel| match *pixel {
            [c, m, y, k] => [c, m, y].map(|ink| over_black(ink, k)),
            _ => [pixel[0], pixel[1], pixel[2]],
        }))
    }
}

impl Frame {
    /// The content of a frame's marker; `None` if it is too short.
    fn read(marker: u8, content: &[u8]) -> Option<Self> {
        let [_, h1, h0, w1, w0, n, ref components @ ..] = *content else { return None };
        let (width, height) = (u16::from_be_bytes([w1, w0]), u16::from_be_bytes([h1, h0]));
        let components = components.chunks_exact(3).take(n.into());
        let factors = components.map(|c| (c[0], u64::from(c[1] >> 4), u64::from(c[1] & 15)));
        let factors: Vec<_> = factors.collect();
        let most = |factor: fn(&(u8, u64, u64)) -> u64| factors.iter().map(factor).max();
        let (across, down) = (most(|c| c.1)?.max(1), most(|c| c.2)?.max(1));
        let side = |side: u16, factor: u64, most: u64| (u64::from(side) * factor).div_ceil(most);
        let component = |&(id, h, v): &(u8, u64, u64)| Component {
            id,
            samples: side(width, h, across) * side(height, v, down),
        };
        Some(Self {
            sequential: matches!(marker, 0xC0 | 0xC1 | 0xC9),
            width: width.into(),
            height: height.into(),
            components: factors.iter().map(component).collect(),
        })
    }
}

/// The next marker's code, and what follows it. Bytes between markers are passed over.
fn next_marker(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let is_marker = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xFF);
    let at = bytes.windows(2).position(is_marker)?;
    Some((bytes[at + 1], &bytes[at + 2..]))
}

/// A marker's content, and what follows it.
fn split_content(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u16::from_be_bytes(*bytes.first_chunk()?);
    bytes.split_at_checked(length.into()).filter(|_| length >= 2).map(|(a, b)| (&a[2..], b))
}

/// Bytes of coded pixels, which end before a marker other than those that are among them.
fn coded_length(bytes: &[u8]) -> usize {
    let ends = |pair: &[u8]| pair[0] == 0xFF && matches!(pair[1], 0xC0..=0xCF | SOI..=0xFE);
    bytes.windows(2).position(ends).unwrap_or(bytes.len())
}

/// One channel of a CMYK pixel. Ink is stored inverted, as Adobe does: 255 is none.
///
/// ref: Pillow `Convert.c` `cmyk2rgb`, whose division by 255 rounds
fn over_black(ink: u8, black: u8) -> u8 {
    let product = u32::from(255 - ink) * u32::from(black) + 128;
    black - (((product >> 8) + product) >> 8) as u8
}
