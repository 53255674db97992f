"""Trains the miniature on the expert's steps, which `tabletop stream` makes as they are needed."""

import argparse
import copy
import json
import math
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from model import N_ACTION, N_BIN, OpenVla, Sizes

PROMPT = "In: What action should the robot take to {}?\nOut:"
# What a step holds beside its picture and action: see ../src/steps.rs.
N_POSE, N_OBJECT, TEXT = 12, 5, 96
N_STATE = N_POSE + 3 * N_OBJECT
# Of the pose, the target's part depends on the instruction, so soft tokens do not know it.
SEEN = [0, 1, 2, 3, 4, 5, 10, 11]


class Data:
    """What `tabletop record` wrote beside the pictures: tokenizer and ranges of the actions."""

    def __init__(self, folder, sizes):
        self.sizes, self.known = sizes, {}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.space = self.tokenizer.token_to_id("▁")
        action = json.loads((folder / "dataset_statistics.json").read_text())["tabletop"]["action"]
        self.low, self.high = np.array(action["q01"]), np.array(action["q99"])
        self.mask = np.array(action["mask"])
        side = sizes.image
        self.step = np.dtype([
            ("image", np.uint8, (side, side, 3)),
            ("action", "<f4", N_ACTION),
            ("state", "<f4", N_STATE),
            ("text", f"S{TEXT}"),
        ])

    def prompt(self, instruction):
        """Ids from BOS to the space that ends a prompt."""
        if instruction not in self.known:
            ids = self.tokenizer.encode(PROMPT.format(instruction.lower())).ids
            self.known[instruction] = ids + [self.space] * (ids[-1] != self.space)
        return self.known[instruction]

    def normalise(self, action):
        scaled = 2.0 * (action - self.low) / (self.high - self.low + 1e-8) - 1.0
        return np.where(self.mask, scaled, action).clip(-1.0, 1.0)

    def unnormalise(self, normalised):
        scaled = 0.5 * (normalised + 1.0) * (self.high - self.low) + self.low
        return np.where(self.mask, scaled, normalised)

    def batch(self, steps):
        image = torch.from_numpy(steps["image"].copy()).permute(0, 3, 1, 2).float() / 255.0
        normalised = self.normalise(steps["action"])
        # 0 … 255, one less than OpenVLA's ActionTokenizer counts; the highest id is bin 0.
        bins = np.digitize(normalised, np.linspace(-1.0, 1.0, N_BIN)) - 1
        tokens = self.sizes.n_piece - 1 - bins
        prompts = [self.prompt(text.decode()) for text in steps["text"]]
        length = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(length.max()) + N_ACTION - 1, dtype=torch.long)
        for row, prompt, own in zip(ids, prompts, tokens):
            row[: len(prompt) + N_ACTION - 1] = torch.tensor(prompt + list(own[:-1]))
        return dict(
            image=image,
            ids=ids,
            length=length,
            bins=torch.from_numpy(bins),
            action=torch.from_numpy(normalised).float(),
            state=torch.from_numpy(steps["state"].copy()),
        )


def stream(program, data, size, seed):
    """Batches without end."""
    command = [program, "stream", "--seed", str(seed), "--size", str(data.sizes.image)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=1 << 20)
    while True:
        raw = process.stdout.read(size * data.step.itemsize)
        yield data.batch(np.frombuffer(raw, data.step))


class Training(nn.Module):
    """The model, and two readouts that only help it learn where things are."""

    def __init__(self, sizes):
        super().__init__()
        self.vla = OpenVla(sizes)
        self.from_hidden = nn.Linear(sizes.llama, N_ACTION + N_POSE)
        self.from_soft = nn.Linear(sizes.n_patch * sizes.llama, len(SEEN) + 3 * N_OBJECT)
        self.actions = slice(sizes.n_piece - N_BIN, sizes.n_piece)

    def seeing(self, batch):
        """How wrong the soft tokens' readout is, and the soft tokens."""
        soft = self.vla.see(batch["image"])
        pose, objects = batch["state"].split([N_POSE, 3 * N_OBJECT], 1)
        there = objects.view(-1, N_OBJECT, 3)[..., :1]  # where a thing is counts if it is there
        counts = torch.cat([torch.ones_like(there), there, there], 2).flatten(1)
        counts = torch.cat([torch.ones(len(pose), len(SEEN)), counts], 1)
        known = torch.cat([pose[:, SEEN], objects], 1)
        off = F.smooth_l1_loss(self.from_soft(soft.flatten(1)), known, beta=0.1, reduction="none")
        return (off * counts).sum() / counts.sum(), soft

    def acting(self, batch, soft, width):
        """How wrong the action tokens are, each, and the readout after the prompt."""
        hidden = self.vla(soft, batch["ids"], batch["length"])
        logits = self.vla.language_model.lm_head(hidden)
        log_p = logits.log_softmax(-1)[..., self.actions].flip(-1)  # by bin
        # Bins near the right one are nearly right; the gripper has two, far from each other.
        distance = torch.arange(N_BIN) - batch["bins"][..., None]
        target = torch.exp(-0.5 * (distance / width) ** 2)
        target[:, -1] = (distance[:, -1] == 0).float()
        target = target / target.sum(-1, keepdim=True)
        tokens = F.kl_div(log_p, target, reduction="none").sum(-1).mean(0)
        known = torch.cat([batch["action"], batch["state"][:, :N_POSE]], 1)
        return tokens, F.smooth_l1_loss(self.from_hidden(hidden[:, 0]), known, beta=0.1)


@torch.no_grad()
def act(vla, batch):
    """Greedy decoding among the action ids; gives motions in -1..1."""
    end, ids = vla.n_piece, batch["ids"].clone()
    soft, rows, motions = vla.see(batch["image"]), torch.arange(len(ids)), []
    for i in range(N_ACTION):
        hidden = vla(soft, ids, batch["length"])[:, i]
        token = vla.language_model.lm_head(hidden)[:, end - N_BIN : end].argmax(-1) + end - N_BIN
        if i + 1 < N_ACTION:
            ids[rows, batch["length"] + i] = token
        bins = (end - 1 - token).clamp(max=N_BIN - 2)
        motions.append((bins + 0.5) * 2.0 / (N_BIN - 1) - 1.0)
    return torch.stack(motions, 1).numpy()


def success(vla, program, data, suite, n, steps=40):
    """The share of `n` scenes, none of them a training scene, in which the task gets done."""
    side = str(data.sizes.image)
    command = [program, "gym", "--suite", suite, "-n", str(n), "--seed", "1000000", "--size", side]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1 << 20)
    kind = np.dtype([("done", np.uint8), ("step", data.step)])
    with subprocess.Popen(command, **pipes) as process:
        for left in reversed(range(steps + 1)):
            worlds = np.frombuffer(process.stdout.read(n * kind.itemsize), kind)
            live = worlds["done"] == 0
            if left == 0 or not live.any():
                break
            actions = np.zeros((n, N_ACTION), "<f4")
            actions[live] = data.unnormalise(act(vla, data.batch(worlds["step"][live])))
            process.stdin.write(actions.tobytes())
            process.stdin.flush()
    return float(worlds["done"].mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that `tabletop record` wrote")
    parser.add_argument("out", type=Path, help="where state.pt goes; training goes on from it")
    parser.add_argument("--program", default="tabletop")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seeing", type=int, default=4000, help="steps without the Llama, at first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=10, help="minutes between closed loops")
    parser.add_argument("--scenes", type=int, default=50, help="of a closed loop")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = Sizes()
    data, training = Data(args.data, sizes), Training(sizes)
    average = copy.deepcopy(training)
    shapes = [[p for p in training.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    groups = [dict(params=p, weight_decay=decay) for p, decay in zip(shapes, (0.05, 0.0))]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    step = 0
    kept = dict(average=average, training=training, optimiser=optimiser)
    path = args.out / "state.pt"
    if path.exists():
        state = torch.load(path)
        step = state["step"]
        for name, part in kept.items():
            part.load_state_dict(state[name])
    print(f"{sum(p.numel() for p in training.vla.parameters())} parameters, step {step}", flush=True)

    def report(minutes):
        torch.save(dict(step=step, **{name: part.state_dict() for name, part in kept.items()}), path)
        for suite in ("base", "language") if step > args.seeing else ():
            rate = success(average.vla, args.program, data, suite, args.scenes)
            print(f"{minutes:.1f} min, step {step}, {suite} {100 * rate:.0f} %", flush=True)

    batches = stream(args.program, data, args.batch, args.seed + step)
    begin, first, minutes, reported, smooth = time.time(), step, 0.0, 0.0, None
    while minutes < args.minutes:
        acting = max(0, step - args.seeing)
        since = acting if acting else step
        rate = args.rate * min((since + 1) / 300, 1.0, math.sqrt(8000 / (since + 1)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = next(batches)
        seen, soft = training.seeing(batch)
        tokens, after = torch.zeros(N_ACTION), torch.zeros(())
        if acting:
            tokens, after = training.acting(batch, soft, 1.0 + 5.0 * math.exp(-acting / 5000))
        optimiser.zero_grad(set_to_none=True)
        (tokens.mean() + 5 * (after + seen)).backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            for mean, value in zip(average.parameters(), training.parameters()):
                mean.lerp_(value, max(0.001, 10 / (step + 10)))
        losses = torch.cat([tokens.detach(), after.detach()[None], seen.detach()[None]])
        smooth = losses if smooth is None else smooth.lerp(losses, 0.02)
        minutes = (time.time() - begin) / 60
        if step % 100 == 0:
            speed = (step - first) * args.batch / minutes / 60
            words = " ".join(f"{x:.3f}" for x in smooth.tolist())
            print(f"{minutes:.1f} min, step {step}, {speed:.0f}/s, losses {words}", flush=True)
        if minutes - reported > args.every:
            reported = minutes
            report(minutes)
    report(minutes)


if __name__ == "__main__":
    main()
