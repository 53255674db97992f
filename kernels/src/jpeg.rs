//! JPEG with libjpeg's fast inverse DCT, which is TensorFlow's default; the `turbojpeg` crate, which
//! decodes all other pictures, has no setting for it.

use std::ffi::{CStr, c_int};
use std::result::Result;

use turbojpeg_sys as raw;

/// A decoder of libjpeg-turbo.
struct Decoder(raw::tjhandle);

/// Decodes a JPEG file to RGB, `[3, width, height]`, with the fast inverse DCT and the default
/// ("fancy") upsampling. For files of one's own making: what decoding one costs has no limit but its size.
///
/// # Errors
/// If it is not a sound JPEG of that size, in words.
///
/// # Panics
/// If a side has more than 65535 pixels, which no JPEG has.
pub fn decode_jpeg_fast(file: &[u8], width: usize, height: usize) -> Result<Vec<u8>, String> {
    assert!(width.max(height) <= usize::from(u16::MAX), "no JPEG has {width} x {height} pixels");
    let decoder = Decoder::new()?;
    // SAFETY: the handle is a live decompressor's.
    decoder.check(unsafe { raw::tj3Set(decoder.0, raw::TJPARAM_TJPARAM_FASTDCT as c_int, 1) })?;
    // SAFETY: as above, and the pointer and the length are those of `file`.
    decoder.check(unsafe {
        raw::tj3DecompressHeader(decoder.0, file.as_ptr(), file.len() as raw::size_t)
    })?;
    let sides = [raw::TJPARAM_TJPARAM_JPEGWIDTH, raw::TJPARAM_TJPARAM_JPEGHEIGHT]
        // SAFETY: the handle is a live decompressor's.
        .map(|side| unsafe { raw::tj3Get(decoder.0, side as c_int) });
    if sides != [width as c_int, height as c_int] {
        return Err(format!("it has {sides:?} pixels, not {width} x {height}"));
    }
    let mut pixels = vec![0; 3 * width * height];
    // SAFETY: the file's header was read from the same bytes, so that exactly `height` rows of `width`
    // pixels of three bytes are written, without gaps: all of `pixels`, which nothing else refers to.
    decoder.check(unsafe {
        raw::tj3Decompress8(
            decoder.0,
            file.as_ptr(),
            file.len() as raw::size_t,
            pixels.as_mut_ptr(),
            3 * width as c_int,
            raw::TJPF_TJPF_RGB,
        )
    })?;
    Ok(pixels)
}

impl Decoder {
    fn new() -> Result<Self, String> {
        // SAFETY: it takes no pointer; null, for want of memory, is not kept.
        let handle = unsafe { raw::tj3Init(raw::TJINIT_TJINIT_DECOMPRESS as c_int) };
        if handle.is_null() {
            Err("there is no memory for a decoder".into())
        } else {
            Ok(Self(handle))
        }
    }

    /// What libjpeg complained about, if a call failed.
    fn check(&self, status: c_int) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the handle is live, and its message ends in a zero and is copied before the next call.
        let why = unsafe { CStr::from_ptr(raw::tj3GetErrorStr(self.0)) };
        Err(why.to_string_lossy().into_owned())
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: the handle is live, and not used after this.
        unsafe { raw::tj3Destroy(self.0) }
    }
}
