//! What Python calls an image, to pixels: an array of numpy, a PIL image, or an image file by its path or its bytes.

use std::path::PathBuf;

use numpy::{PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods};
use openvla::image::RgbImage;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyString};

use crate::errors::{self, input};

/// What an image may be, for messages.
const WANTED: &str = "an image is a numpy array [height, width, 3] of uint8 in the order red, green, blue, a PIL image, \
                      or an image file as a path or its bytes";

/// The pixels of an image.
///
/// # Errors
/// `InputError` for an array or a file that cannot be used, `TypeError` for anything that is not an image.
pub fn pixels(image: &Bound<'_, PyAny>) -> PyResult<RgbImage> {
    let py = image.py();
    if let Ok(bytes) = image.cast::<PyBytes>() {
        return decode(py, bytes.as_bytes());
    }
    if let Ok(bytes) = image.cast::<PyByteArray>() {
        return decode(py, &bytes.to_vec());
    }
    if let Ok(array) = image.cast::<PyUntypedArray>() {
        return array_pixels(array);
    }
    let is_path = image.is_instance_of::<PyString>() || image.hasattr("__fspath__")?;
    if is_path {
        let path: PathBuf = image.extract()?;
        errors::check_file(&path)?;
        return decode(py, &std::fs::read(path)?);
    }
    if image.hasattr("mode")? && image.hasattr("convert")? {
        return pil_pixels(image);
    }
    let found = image.get_type().qualname()?;
    Err(PyTypeError::new_err(format!("{found} is not an image; {WANTED}")))
}

fn decode(py: Python<'_>, file: &[u8]) -> PyResult<RgbImage> {
    py.detach(|| openvla::decode(file)).map_err(|error| errors::exception(py, &error))
}

fn array_pixels(array: &Bound<'_, PyUntypedArray>) -> PyResult<RgbImage> {
    let py = array.py();
    let (shape, dtype) = (array.shape(), array.dtype().to_string());
    let refuse = |hint: &str| {
        Err(input(
            py,
            &format!("an array of {dtype} with shape {shape:?} is not an image"),
            Some(hint),
        ))
    };
    if dtype != "uint8" {
        return refuse(
            "uint8 from 0 to 255 is wanted; of floats in 0..1: (image * 255).round().astype(numpy.uint8)",
        );
    }
    let [height, width, 3] = *shape else {
        return refuse(match shape {
            [_, _, 4] => "leave out the transparency: image[:, :, :3]",
            [3, _, _] => "the channels come last: image.transpose(1, 2, 0)",
            [_, _] => {
                "a gray image has three channels too: numpy.repeat(image[:, :, None], 3, axis=2)"
            }
            [1, _, _, _] => "one image at a time: image[0]",
            _ => "[height, width, 3] is wanted",
        });
    };
    let [Ok(width), Ok(height)] = [width, height].map(u32::try_from) else {
        return refuse("its sides are too long");
    };
    // Whatever its strides, in the order of rows; one copy.
    let array: PyReadonlyArrayDyn<'_, u8> = array.extract()?;
    let pixels = array.as_array().iter().copied().collect();
    RgbImage::from_raw(width, height, pixels).map_or_else(|| refuse("it is empty"), Ok)
}

/// A PIL image as the reference's processor takes it: converted to RGB.
fn pil_pixels(image: &Bound<'_, PyAny>) -> PyResult<RgbImage> {
    let py = image.py();
    let mode: String = image.getattr("mode")?.extract()?;
    if !["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"].contains(&&*mode)
    {
        let message = format!("a PIL image of mode {mode} is not a picture of 8 bits");
        return Err(input(
            py,
            &message,
            Some("convert it to RGB with the range that its numbers have"),
        ));
    }
    let rgb =
        if mode == "RGB" { image.clone() } else { image.call_method1("convert", ("RGB",))? };
    let array = py.import("numpy")?.call_method1("asarray", (rgb,))?;
    array_pixels(array.cast::<PyUntypedArray>()?)
}
