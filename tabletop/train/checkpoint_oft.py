"""Writes a trained OpenVLA-OFT miniature as openvla-oft leaves a run: merged weights, and PyTorch files
of the head and the state's projector beside them."""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import COPIED
from model import Sizes
from oft import OpenVlaOft

FROM_BASE = {"config.json", "generation_config.json", "preprocessor_config.json", *COPIED}
STATISTICS = "dataset_statistics.json"
# With the types that openvla-oft saves them in.
PARTS = {"action_head": torch.bfloat16, "proprio_projector": torch.float32}


def write(out, model, step, base, data):
    """`base` is the checkpoint that training began with, whose settings stay as they are; `data` the
    folder that `tabletop record --oft` wrote: statistics."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FROM_BASE - {STATISTICS}:
        shutil.copyfile(base / name, out / name)
    shutil.copyfile(data / STATISTICS, out / STATISTICS)
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    for part, kind in PARTS.items():
        own = [name for name in tensors if name.startswith(f"{part}.")]
        # As they are called in a model that is trained on several GPUs.
        saved = {"module" + name[len(part) :]: tensors.pop(name).to(kind) for name in own}
        torch.save(saved, out / f"{part}--{step}_checkpoint.pt")
    tensors = {name: x.to(torch.bfloat16) for name, x in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="what train_oft.py left")
    parser.add_argument("base", type=Path, help="the checkpoint that it began with")
    parser.add_argument("data", type=Path, help="the folder it was trained with")
    parser.add_argument("out", type=Path, help="the checkpoint's folder")
    args = parser.parse_args()
    model, state = OpenVlaOft(Sizes(causal=False)), torch.load(args.state)
    model.load_state_dict({n[4:]: x for n, x in state["average"].items() if n.startswith("vla.")})
    write(args.out, model, state["step"], args.base, args.data)


if __name__ == "__main__":
    main()
