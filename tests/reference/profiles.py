"""Prepares the pictures of this folder with TensorFlow, as the reference's evaluations do, and writes hashes.

    python3.11 -m venv VENV && VENV/bin/pip install tensorflow-cpu==2.15.0 pillow==10.4.0
    VENV/bin/python tests/reference/profiles.py

The steps are those of OpenVLA's `get_libero_image`, `resize_image` and `crop_and_resize`, and of OpenVLA-OFT's
`resize_image_for_policy` and `prepare_images_for_vla`, which cannot be imported without a simulator.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

HERE = Path(__file__).resolve().parent
SIDE = 224


def resize(image):
    image = tf.io.decode_image(tf.image.encode_jpeg(image), expand_animations=False, dtype=tf.uint8)
    image = tf.image.resize(image, (SIDE, SIDE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def center_crop(image):
    image = tf.image.convert_image_dtype(tf.convert_to_tensor(image), tf.float32)[None]
    side = tf.clip_by_value(tf.sqrt(tf.constant([0.9])), 0, 1)
    start = (1 - side) / 2
    boxes = tf.stack([start, start, start + side, start + side], axis=1)
    image = tf.image.crop_and_resize(image, boxes, [0], (SIDE, SIDE))[0]
    return tf.image.convert_image_dtype(tf.clip_by_value(image, 0, 1), tf.uint8, saturate=True)


def prepare(profile, image):
    if profile == "libero":
        return resize(np.ascontiguousarray(image[::-1, ::-1]))
    if profile == "oft" and image.shape != (SIDE, SIDE, 3):
        return resize(image)
    return image


cases = []
for path in sorted((HERE / "pictures").glob("*.png")):
    image = np.asarray(Image.open(path).convert("RGB"))
    for profile in ["raw", "oft", "libero"]:
        prepared = prepare(profile, image)
        for crop in [False, True]:
            pixels = np.asarray(center_crop(prepared) if crop else prepared)
            cases.append({
                "picture": f"pictures/{path.name}",
                "profile": profile,
                "center_crop": crop,
                "u8_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            })
text = json.dumps({"tensorflow": tf.__version__, "cases": cases}, indent=1)
(HERE / "profiles.json").write_text(text + "\n")
