"""Computes expected-oft.json: what `openvla-tabletop-oft` gives, and what it would give with one thing done wrong, by an
implementation of OpenVLA-OFT that shares no code with this project.

    python expected_oft.py ORACLE

ORACLE is the path of `oracle_oft.py`, a float64 implementation in numpy. Run with Python 3.11, numpy 2.4.6, Pillow 13.0.0,
tokenizers 0.23.2 and sentencepiece 0.2.3. It is written for openvla-7b and for statistics of the state without a mask:
the picture's side, the id of `▁` and the line that scales the state are replaced.

Pictures are squares of the model's size cut out of the example's, so that nothing resizes them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from expected import lines, rounded

HERE = Path(__file__).resolve().parent
RUN = HERE / "openvla-tabletop-oft"
SIDE, PATCHES, SPACE = 84, 6, 448
CHANGES = [
    ("224", str(SIDE)),
    ("f(223)", f"f({SIDE - 1})"),
    ("reshape(3, 16, 14, 16, 14)", f"reshape(3, {PATCHES}, 14, {PATCHES}, 14)"),
    ("reshape(256, 588)", f"reshape({PATCHES**2}, 588)"),
    ("ids[-1] != 29871", f"ids[-1] != {SPACE}"),
    ("ids.append(29871)", f"ids.append({SPACE})"),
    ("x = 2 * (np.array(state) - lo) / (hi - lo + 1e-8) - 1",
     "x = np.where(p['mask'], 2 * (np.array(state) - lo) / (hi - lo + 1e-8) - 1, state)"),
]
VARIANT = {"action_dim": 7, "chunk": 8, "head": "l1", "normalization": "bounds_q99"}
STATE = [-0.0236131438985467, 0.06795822200365365, 0.0922598893661052, 0.1, -0.2, 0.3, 0.055, -0.02]
# The upper left corner of the cut-outs, front and wrist; whether the center is cropped out of these once more.
CASES = [
    ("put eggplant into pot", [(80, 60), (70, 90)], STATE, False),
    ("Move the RED block to the left", [(30, 100), (120, 40)], [2 * x - 0.05 for x in STATE], True),
]
TRAPS = [
    "images_swapped", "no_center_crop", "unrounded_mean_std", "proprio_unclipped", "other_bounds", "proprio_first",
    "patches_after_prompt", "causal", "actions_only_bidirectional", "stop_hidden", "no_stop", "placeholders_kept",
    "same_position_for_placeholders", "no_29871", "first_placeholder", "before_final_norm", "rms_eps_1e-5", "head_gelu",
    "relu_after_sum", "no_residual", "dims_before_steps", "clip_actions", "projector_tanh_gelu", "keep_f32",
    "mask_ignored", "head_ln_eps_1e-6", "no_1e-8",
]


def load(path):
    source = Path(path).read_text()
    for old, new in CHANGES:
        assert old in source, old
        source = source.replace(old, new)
    module = type(sys)("oracle")
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def act(oracle, trap, case):
    instruction, corners, state, is_cropped = case
    oracle.S = trap
    files = {path.name: path.name for path in RUN.iterdir()}
    policy = oracle.Policy(RUN, {**VARIANT, "files": files})
    planes = []
    for name, (x, y) in zip(["tabletop.png", "tabletop-wrist.png"], corners):
        picture = np.array(Image.open(HERE / name).crop((x, y, x + SIDE, y + SIDE)))
        if is_cropped and trap != "no_center_crop":
            picture = oracle.center_crop(picture)
        planes.append(oracle.pixels(picture, policy.pp))
    prompt = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    ids = policy.tok.encode(prompt).ids
    return ids + [SPACE], policy.act(planes, ids, state, "tabletop")


def expect(oracle, case):
    instruction, corners, state, is_cropped = case
    ids, taps = act(oracle, "", case)
    right = taps["normalized_actions"].astype(np.float64)
    wrong, moved = {}, {}
    for trap in TRAPS:
        taps_of = act(oracle, trap, case)[1]
        distance = abs(taps_of["actions"] - taps["actions"]).max()
        wrong[trap] = taps_of["actions"].ravel()
        print(f"{trap:32} {distance:.2e}", file=sys.stderr)
    at = np.arange(64) * 7919 % taps["projected"].size
    return {
        "instruction": instruction,
        "corners": [list(corner) for corner in corners],
        "state": state,
        "center_crop": is_cropped,
        "prompt_ids": ids,
        "projected_at": at,
        "projected": taps["projected"].ravel()[at],
        "normalized_state": taps["proprio_normalized"],
        "normalized": right.ravel(),
        "actions": taps["actions"].ravel(),
        "wrong": wrong,
    }


def main():
    oracle = load(sys.argv[1])
    expected = {"cases": [expect(oracle, case) for case in CASES]}
    (HERE / "expected-oft.json").write_text(lines(rounded(expected)) + "\n")


if __name__ == "__main__":
    main()
