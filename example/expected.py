"""Computes expected.json: what the example checkpoints give, by an implementation of OpenVLA that
shares no code with this project.

    cargo run -p openvla-example
    cargo run -p openvla-example -- V01 --variant v01 --seed 1
    python expected.py ORACLE V01/openvla-example

ORACLE is the path of `oracle.py`, a float64 implementation in numpy. Run with Python 3.11,
numpy 2.4.6, Pillow 10.4.0, tokenizers 0.23.3 and sentencepiece 0.2.3.

Arrays are in C order, one row a patch. `at` are flat indices into them.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
PROMPTS = {
    "llama2": "In: What action should the robot take to {}?\nOut:",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
    "What action should the robot take to {}? ASSISTANT:",
}
TASKS = [
    "put eggplant into pot",
    "Slide the RED block onto the plate",
    "Move  the Jalapeño to Straße №7 – наполовину, s'il te plaît 🍆",
]


def load(path):
    spec = importlib.util.spec_from_file_location("oracle", path)
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    return oracle


def read(folder, name):
    return json.loads((folder / name).read_text())


def planes(oracle, folder, config):
    """Normalised planes, float32 [3 per tower, 224, 224], by the file's `tvf` values."""
    picture = Image.open(HERE / "table.png")
    fused = config["use_fused_vision_backbone"]
    pixels, _ = oracle.prep(picture, config["image_resize_strategy"], fused)
    scaled = (pixels.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)
    column = lambda values: np.float32(values)[:, None, None]
    towers = read(folder, "preprocessor_config.json")["tvf_normalize_params"]
    return np.concatenate([(scaled - column(t["mean"])) / column(t["std"]) for t in towers])


def prompt_ids(folder, config, task):
    """Ids by SentencePiece, which `tokenizer.json` must agree with, and the `▁` after them."""
    prompt = PROMPTS[config["llm_backbone_id"].split("-")[0]].format(task.lower())
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = [1] + pieces.encode(prompt)
    if (folder / "tokenizer.json").exists():
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids == ids
    return ids + [pieces.piece_to_id("▁")]


def see(oracle, weights, config, pixels):
    """Features of each tower, and the projector's output."""
    names = ["vision_backbone.featurizer.", "vision_backbone.fused_featurizer."]
    towers = np.split(pixels, len(pixels) // 3)
    features = [oracle.vit(p, weights, name) for p, name in zip(towers, names)]
    x = oracle.lin(np.concatenate(features, 1), weights, "projector.fc1")
    x = oracle.lin(oracle.gelu(x), weights, "projector.fc2")
    if config["use_fused_vision_backbone"]:
        x = oracle.lin(oracle.gelu(x), weights, "projector.fc3")
    return features, x


def decode(oracle, weights, config, patches, ids, n):
    """First logits, greedy ids, by how much each led, and where the row that it was chosen by
    looked: on each patch, the mean over all heads of the last quarter of the layers."""
    embedding = weights["language_model.model.embed_tokens.weight"].astype(np.float64)
    llama, softmax, seen = oracle.Llama(weights, config), oracle.softmax, []
    oracle.softmax = lambda scores: seen.append(softmax(scores)) or seen[-1]
    logits = llama.step(np.concatenate([embedding[ids[:1]], patches, embedding[ids[1:]]]))
    first, generated, margins, attention = logits, [], [], []
    for _ in range(n):
        last = [heads[:, -1, 1 : 1 + len(patches)] for heads in seen[-(-(-llama.L // 4)) :]]
        attention.append(np.mean(last, axis=(0, 1)))
        second, best = np.argsort(logits, kind="stable")[-2:]
        generated.append(int(best))
        margins.append(logits[best] - logits[second])
        logits = llama.step(embedding[[best]])
    oracle.softmax = softmax
    return first, generated, margins, np.array(attention)


def motion(config, action, ids):
    """Bin centres, then the data set's units."""
    bins = np.linspace(-1, 1, config["n_action_bins"])
    centres = (bins[:-1] + bins[1:]) / 2
    last = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"] - 1
    x = centres[np.clip(last - np.array(ids), 0, len(centres) - 1)]
    low, high = np.array(action["q01"]), np.array(action["q99"])
    mask = np.array(action.get("mask", [True] * len(low)))
    return x, np.where(mask, 0.5 * (x + 1) * (high - low) + low, x)


def probe(array):
    """Mean, deviation and 64 scattered values: 7919 is prime, so no two are the same."""
    at = np.arange(64) * 7919 % array.size
    return {"mean": array.mean(), "std": array.std(), "at": at, "values": array.ravel()[at]}


def logit_probe(logits):
    """The 32 largest, and 32 at even distances."""
    top = np.argsort(-logits, kind="stable")[:32]
    even = np.arange(32) * (len(logits) // 32)
    return {"top": top, "top_values": logits[top], "at": even, "values": logits[even]}


def expect(oracle, folder, seed, keys):
    config, weights = read(folder, "config.json"), oracle.ckpt_load(folder)
    statistics = read(folder, "dataset_statistics.json")
    pixels = planes(oracle, folder, config)
    features, patches = see(oracle, weights, config, pixels)
    cases = []
    for task, key in zip(TASKS, keys):
        action = statistics[key]["action"]
        ids = prompt_ids(folder, config, task)
        first, generated, margins, attention = decode(
            oracle, weights, config, patches, ids, len(action["q01"])
        )
        normalized, scaled = motion(config, action, generated)
        cases.append({
            "instruction": task,
            "unnorm_key": key,
            "prompt_ids": ids,
            "logits_first": logit_probe(first),
            "generated_ids": generated,
            "margins": margins,
            "attention": probe(attention),
            "normalized": normalized,
            "action": scaled,
        })
    towers = {f"vit{i}": probe(f) for i, f in enumerate(features)}
    sha256 = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return {
        "seed": seed, "pixels_sha256": sha256, **towers, "projector": probe(patches), "cases": cases
    }


def rounded(value):
    """JSON values, numbers to nine significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [rounded(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    return float(f"{value:.9g}") if isinstance(value, float) else value


def lines(value, indent=""):
    """JSON with one line per list of numbers."""
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {lines(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and isinstance(value[0], dict):
        items = [lines(item, inner) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{right}"


def main():
    oracle, v01 = load(sys.argv[1]), Path(sys.argv[2])
    expected = {
        "openvla": expect(oracle, HERE / "openvla-example", 33, ["example_tabletop"] * 3),
        "v01": expect(
            oracle, v01, 1, ["example_tabletop", "example_six_axes", "example_bimanual"]
        ),
    }
    (HERE / "expected.json").write_text(lines(rounded(expected)) + "\n")


if __name__ == "__main__":
    main()
