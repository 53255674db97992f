"""Trains the OpenVLA-OFT miniature on chunks of the expert's steps, from the weights of the other."""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from model import N_ACTION, Sizes
from oft import CHUNK, N_CAMERA, N_STATE, OpenVlaOft
from train import N_STATE as N_LANDMARK
from train import TEXT, Data, Kept, Training, add_options, closed_loops, follow, huber, stream


class OftData(Data):
    """The same of `tabletop record --oft`, with ranges of the states."""

    flags = ["--oft"]

    def __init__(self, folder, sizes):
        super().__init__(folder, sizes)
        state = json.loads((folder / "dataset_statistics.json").read_text())["tabletop"]["proprio"]
        self.state_low, self.state_high = np.array(state["q01"]), np.array(state["q99"])
        self.state_mask = np.array(state["mask"])
        side = sizes.image
        self.step = np.dtype([
            ("image", np.uint8, (N_CAMERA, side, side, 3)),
            ("action", "<f4", (CHUNK, N_ACTION)),
            ("arm", "<f4", N_STATE),
            ("state", "<f4", (N_CAMERA, N_LANDMARK)),
            ("text", f"S{TEXT}"),
        ])

    def normalise_state(self, arm):
        scaled = 2.0 * (arm - self.state_low) / (self.state_high - self.state_low + 1e-8) - 1.0
        return np.where(self.state_mask, scaled, arm).clip(-1.0, 1.0)

    def batch(self, steps):
        """Of steps whose prompts have one length."""
        ids = torch.tensor([self.prompt(text.decode()) for text in steps["text"]])
        word = [next(i for i, t in enumerate(prompt) if t in self.objects) for prompt in ids.tolist()]
        return dict(
            image=torch.from_numpy(steps["image"].copy()).permute(0, 1, 4, 2, 3).float() / 255.0,
            ids=ids,
            word=torch.tensor(word),
            action=torch.from_numpy(self.normalise(steps["action"])).float(),
            arm=torch.from_numpy(self.normalise_state(steps["arm"])).float(),
            state=torch.from_numpy(steps["state"].copy()),
        )

    def lengths(self, steps):
        return np.array([len(self.prompt(text.decode())) for text in steps["text"]])


def batches(steps, data, size):
    """Batches of one prompt length each, which come as they fill up."""
    waiting = {}
    for some in steps:
        lengths = data.lengths(some)
        for length in set(lengths):
            mine = waiting.get(length, some[:0])
            mine = np.concatenate([mine, some[lengths == length]])
            if len(mine) >= size:
                yield data.batch(mine[:size])
                mine = mine[size:]
            waiting[length] = mine


class OftTraining(Training):
    """The model, and the readouts of the other that help it learn where things are: the object's word
    is to know where both cameras see it."""

    def __init__(self, vla, sizes):
        super().__init__(vla, sizes)
        self.from_word = nn.Linear(sizes.llama, 2 * N_CAMERA)

    def begin_from(self, checkpoint):
        """Takes the towers, projector and Llama of an OpenVLA; returns what it took."""
        weights = {name: x.float() for name, x in load_file(checkpoint / "model.safetensors").items()}
        missing, unexpected = self.vla.load_state_dict(weights, strict=False)
        own = ("action_head.", "proprio_projector.")
        assert not unexpected and all(name.startswith(own) for name in missing)
        return [self.vla.get_parameter(name) for name in weights]

    def losses(self, batch):
        """How wrong the soft tokens are about what is near them; the object's word about where it is;
        and the actions, each. Then how many millimetres the front camera's soft tokens are off."""
        seen, far, soft = self.seeing(batch["image"].flatten(0, 1), batch["state"].flatten(0, 1))
        soft = soft.unflatten(0, (-1, N_CAMERA)).flatten(1, 2)
        actions, first = self.vla(soft, batch["arm"], batch["ids"])
        # The word's row is after all patches and the state's.
        word = first[torch.arange(len(first)), batch["word"] + soft.shape[1] + 1]
        target = batch["state"][..., 4:6].clamp(-2.0, 2.0).flatten(1)
        asked = huber(self.from_word(word), target).mean()
        wrong = (actions - batch["action"]).abs().mean(0)  # [chunk, 7]
        return seen, asked, wrong, far[::N_CAMERA].nanmean(0)


@torch.no_grad()
def act(vla, data, steps):
    """Chunks in -1..1, [B, chunk, 7]."""
    lengths, chunks = data.lengths(steps), np.zeros((len(steps), CHUNK, N_ACTION))
    for length in set(lengths):
        batch = data.batch(steps[lengths == length])
        soft = vla.see(batch["image"].flatten(0, 1)).unflatten(0, (-1, N_CAMERA)).flatten(1, 2)
        chunks[lengths == length] = vla(soft, batch["arm"], batch["ids"])[0].numpy()
    return chunks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that `tabletop record --oft` wrote")
    parser.add_argument("checkpoint", type=Path, help="whose weights it begins with")
    parser.add_argument("--new", type=int, default=150, help="steps of what is new alone, at first")
    add_options(parser, steps=4000, rate=1e-3, every=500)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    sizes = Sizes(causal=False)
    data, training = OftData(args.data, sizes), OftTraining(OpenVlaOft(sizes), sizes)
    taken = training.begin_from(args.checkpoint)
    average = copy.deepcopy(training)
    known = {id(p) for p in taken}
    new = [p for p in training.parameters() if id(p) not in known]
    groups = [dict(params=new), dict(params=taken)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    kept = Kept(args.out, average=average, training=training, optimiser=optimiser)
    step = kept.step
    print(f"{sum(p.numel() for p in training.vla.parameters())} parameters, step {step}")
    print("seconds of processor time, step | losses of seeing, the word, actions")
    print("| off, first and last action: mm of dx dy dz, gripper | mm of each object, gripper, receptacle")

    steps = batches(stream(args.program, data, args.batch, args.seed + step), data, args.batch)
    smooth = None
    while step < args.steps:
        left = 1.0 - step / args.steps
        rate = args.rate * min(1.0, 2.0 * left)
        # What is new learns to use what is known, before that changes.
        for group, begin in zip(optimiser.param_groups, (0, args.new)):
            group["lr"] = rate * min(max(0, step - begin) / 200, 1.0)
        seen, asked, wrong, far = training.losses(next(steps))
        optimiser.zero_grad(set_to_none=True)
        (5 * wrong.mean() + 2 * asked + seen).backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimiser.step()
        step += 1
        follow(average, training, max(0.002, 10 / (step + 10)))
        wrong = wrong.detach()
        losses = torch.stack([seen.detach(), asked.detach(), wrong.mean()])
        now = [losses, wrong[[0, -1]][:, [0, 1, 2, 6]].flatten(), far]
        smooth = now if smooth is None else [a.lerp(b, 0.02) for a, b in zip(smooth, now)]
        if step % 100 == 0:
            milli = torch.tensor([60.0, 60.0, 60.0, 1.0]).repeat(2)
            parts = [smooth[0], smooth[1] * milli, smooth[2]]
            words = " | ".join(" ".join(f"{x:.3g}" for x in part.tolist()) for part in parts)
            print(f"{time.process_time():.0f} {step} | {words}", flush=True)
        if step % args.every == 0 or step == args.steps:
            kept.save(step)
            own = lambda steps: act(average.vla, data, steps)
            for suite, rate in closed_loops(own, data, args):
                print(f"{time.process_time():.0f} {step} {suite} {100 * rate:.0f} %", flush=True)


if __name__ == "__main__":
    main()
