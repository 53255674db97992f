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
N_POSE, N_OBJECT, TEXT = 8, 3, 96
N_STATE = N_POSE + 3 * N_OBJECT
OBJECTS = ["eggplant", "carrot", "cucumber"]
METRES = 0.21  # that half of the picture shows, on the table
N_KIND = N_OBJECT + 2  # with the gripper and the receptacle


class Data:
    """What `tabletop record` wrote beside the pictures: tokenizer and ranges of the actions."""

    flags = []  # of `tabletop stream` and `gym`

    def __init__(self, folder, sizes):
        self.sizes, self.known = sizes, {}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.space = self.tokenizer.token_to_id("▁")
        self.objects = {self.tokenizer.token_to_id("▁" + name) for name in OBJECTS}
        assert None not in self.objects, "a word for each object is one piece"
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
        # An action is learnt from picture and words alone: tokens that tell of each other would be
        # copied from each other instead, one mistake with the next.
        tokens = np.random.randint(self.sizes.n_piece - N_BIN, self.sizes.n_piece, tokens.shape)
        ids = torch.zeros(len(prompts), int(length.max()) + N_ACTION - 1, dtype=torch.long)
        for row, prompt, own in zip(ids, prompts, tokens):
            row[: len(prompt) + N_ACTION - 1] = torch.tensor(prompt + list(own[:-1]))
        word = [next(i for i, t in enumerate(prompt) if t in self.objects) for prompt in prompts]
        return dict(
            image=image,
            word=torch.tensor(word),
            ids=ids,
            length=length,
            bins=torch.from_numpy(bins),
            action=torch.from_numpy(normalised).float(),
            state=torch.from_numpy(steps["state"].copy()),
        )


def stream(program, data, size, seed):
    """Steps without end, `size` at a time."""
    command = [program, "stream", *data.flags, "--seed", str(seed), "--size", str(data.sizes.image)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=1 << 20)
    while True:
        yield np.frombuffer(process.stdout.read(size * data.step.itemsize), data.step)


def huber(x, y):
    return F.smooth_l1_loss(x, y, beta=0.1, reduction="none")


class Training(nn.Module):
    """The model, and readouts that only help it learn where things are: from each soft token, from
    the object's word after the first layer, and from the end of the prompt."""

    def __init__(self, vla, sizes):
        super().__init__()
        self.vla = vla
        self.from_soft = nn.Linear(sizes.llama, 3 * N_KIND + 2)
        self.from_word = nn.Linear(sizes.llama, 2)
        self.from_hidden = nn.Linear(sizes.llama, N_ACTION + N_POSE)
        self.actions = slice(sizes.n_piece - N_BIN, sizes.n_piece)
        side = sizes.image // sizes.patch
        self.patch = 2.0 / side
        middle = (torch.arange(side) + 0.5) * self.patch - 1.0
        places = torch.stack([middle.expand(side, -1), middle[:, None].expand(-1, side)], -1)
        self.register_buffer("places", places.reshape(-1, 1, 2), persistent=False)

    def seeing(self, image, state):
        """How wrong each soft token is about what is near it and where; how many millimetres the
        most confident of each kind is off, in each picture; and the soft tokens."""
        soft = self.vla.see(image)
        pose, objects = state.split([N_POSE, 3 * N_OBJECT], 1)
        objects = objects.view(-1, 1, N_OBJECT, 3)
        grippers = torch.stack([pose[:, 2:4], pose[:, 6:8]], 1)[:, None]
        # From the middle of each patch, in patches.
        off = (torch.cat([objects[..., 1:], grippers], 2) - self.places) / self.patch
        there = torch.cat([objects[..., 0], torch.ones(len(pose), 1, 2)], 2)
        near = there * torch.exp(-off.square().sum(-1))  # [B, patch, kind]
        read = self.from_soft(soft)
        heat, place = read[..., :N_KIND], read[..., N_KIND : 3 * N_KIND].unflatten(-1, (N_KIND, 2))
        miss = huber(place, off).sum(-1)
        state = huber(read[..., -2:], pose[:, None, :2].expand(-1, len(self.places), -1))
        loss = (
            5.0 * (heat - near).square().mean() * N_KIND
            + (near * miss).sum() / near.sum()
            + (near[..., N_OBJECT, None] * state).sum() / near[..., N_OBJECT].sum()
        )
        with torch.no_grad():
            best = heat.argmax(1)[:, None, :, None].expand(-1, -1, -1, 2)
            error = (place - off).gather(1, best)[:, 0].norm(dim=-1) * self.patch
            error = torch.where(there[:, 0] > 0, error, torch.nan)
        return loss, METRES * 1e3 * error, soft

    def acting(self, batch, soft, width):
        """How wrong the action tokens are, each, and the readout after the prompt."""
        hidden, first = self.vla(soft, batch["ids"], batch["length"])
        word = first[torch.arange(len(first)), batch["word"] + soft.shape[1]]
        target = batch["state"][:, 4:6]
        asked = huber(self.from_word(word), target).mean()
        logits = self.vla.language_model.lm_head(hidden)
        log_p = logits.log_softmax(-1)[..., self.actions].flip(-1)  # by bin
        # Bins near the right one are nearly right; the gripper has two, far from each other.
        distance = torch.arange(N_BIN) - batch["bins"][..., None]
        target = torch.exp(-0.5 * (distance / width) ** 2)
        target[:, -1] = (distance[:, -1] == 0).float()
        target = target / target.sum(-1, keepdim=True)
        tokens = F.kl_div(log_p, target, reduction="none").sum(-1).mean(0)
        known = torch.cat([batch["action"], batch["state"][:, :N_POSE]], 1)
        after = asked + huber(self.from_hidden(hidden[:, 0]), known).mean()
        with torch.no_grad():
            off = (log_p.argmax(-1) - batch["bins"]).abs().float()
            gripper = (off[:, -1] > 60).float()
        return tokens, after, torch.cat([off[:, :3].mean(0), gripper.mean()[None]])


@torch.no_grad()
def act(vla, data, steps):
    """Greedy decoding among the action ids; gives motions in -1..1, [B, 1, 7]."""
    batch = data.batch(steps)
    end, ids = vla.n_piece, batch["ids"].clone()
    soft, rows, motions = vla.see(batch["image"]), torch.arange(len(ids)), []
    for i in range(N_ACTION):
        hidden = vla(soft, ids, batch["length"])[0][:, i]
        token = vla.language_model.lm_head(hidden)[:, end - N_BIN : end].argmax(-1) + end - N_BIN
        if i + 1 < N_ACTION:
            ids[rows, batch["length"] + i] = token
        bins = (end - 1 - token).clamp(max=N_BIN - 2)
        motions.append((bins + 0.5) * 2.0 / (N_BIN - 1) - 1.0)
    return torch.stack(motions, 1)[:, None].numpy()


def success(act, program, data, suite, n, steps=40):
    """The share of `n` scenes, none of them a training scene, in which the task gets done. All
    motions that `act` makes of what is seen are made before anything is seen again."""
    command = [program, "gym", *data.flags, "--suite", suite, "-n", str(n), "--seed", "1000000"]
    command += ["--size", str(data.sizes.image)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1 << 20)
    kind = np.dtype([("done", np.uint8), ("step", data.step)])
    with subprocess.Popen(command, **pipes) as process:
        coming = []
        for left in reversed(range(steps + 1)):
            worlds = np.frombuffer(process.stdout.read(n * kind.itemsize), kind)
            live = worlds["done"] == 0
            if left == 0 or not live.any():
                break
            if not coming:
                motions = data.unnormalise(act(worlds["step"][live]))
                coming = np.zeros((motions.shape[1], n, N_ACTION), "<f4")
                coming[:, live] = motions.swapaxes(0, 1)
                coming = list(coming)
            process.stdin.write(coming.pop(0).tobytes())
            process.stdin.flush()
    return float(worlds["done"].mean())


def closed_loops(act, data, args):
    """The share of scenes in which the task gets done, by suite."""
    for suite in ("base", "language"):
        yield suite, success(act, args.program, data, suite, args.scenes)


def add_options(parser, steps, rate, every):
    """What every training is told, with its own defaults."""
    parser.add_argument("out", type=Path, help="where state.pt goes; training goes on from it")
    parser.add_argument("--program", default="tabletop")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=every, help="steps between closed loops")
    parser.add_argument("--scenes", type=int, default=50, help="of a closed loop")


class Kept:
    """What training goes on from, in a folder's state.pt: its `step`, and the state of each part."""

    def __init__(self, folder, **parts):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.parts, self.step = folder / "state.pt", parts, 0
        if self.path.exists():
            state = torch.load(self.path)
            self.step = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self, step):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(dict(step=step, **states), self.path)


@torch.no_grad()
def follow(average, training, share):
    """Moves the running mean of the weights by that share of the way to what they are."""
    torch._foreach_lerp_(list(average.parameters()), list(training.parameters()), share)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that `tabletop record` wrote")
    parser.add_argument("--seeing", type=int, default=1000, help="steps without the Llama, at first")
    add_options(parser, steps=11000, rate=1.5e-3, every=2000)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    torch.set_num_threads(args.threads)
    sizes = Sizes()
    data, training = Data(args.data, sizes), Training(OpenVla(sizes), sizes)
    average = copy.deepcopy(training)
    # Filters are as small as they are long: a step of the others' size would undo them.
    filters = [p for name, p in training.named_parameters() if "patch_embed" in name]
    others = [p for name, p in training.named_parameters() if "patch_embed" not in name]
    groups = [dict(params=filters, scale=0.2), dict(params=others, scale=1.0)]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    kept = Kept(args.out, average=average, training=training, optimiser=optimiser)
    step = kept.step
    print(f"{sum(p.numel() for p in training.vla.parameters())} parameters, step {step}")
    print("minutes, step, pictures/s | losses of dx dy dz gripper, after the prompt, of seeing")
    print("| off: bins of dx dy dz, share of gripper; mm of each object, gripper, receptacle")

    batches = stream(args.program, data, args.batch, args.seed + step)
    begin, first, smooth = time.time(), step, None
    while step < args.steps:
        left, acting = 1.0 - step / args.steps, max(0, step - args.seeing)
        rate = args.rate * min((acting or step) / 200 + 0.01, 1.0, 2.0 * left)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        batch = data.batch(next(batches))
        seen, far, soft = training.seeing(batch["image"], batch["state"])
        tokens, after, off = torch.zeros(N_ACTION), torch.zeros(()), torch.zeros(4)
        if acting:
            tokens, after, off = training.acting(batch, soft, 1.5 + 6.5 * left)
        optimiser.zero_grad(set_to_none=True)
        (tokens.mean() + 2 * after + seen).backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimiser.step()
        step += 1
        follow(average, training, max(0.001, 10 / (step + 10)))
        now = [tokens.detach()[[0, 1, 2, 6]], torch.stack([after, seen]).detach(), off, far.nanmean(0)]
        smooth = now if smooth is None else [a.lerp(b, 0.02) for a, b in zip(smooth, now)]
        minutes = (time.time() - begin) / 60
        if step % 100 == 0:
            speed = (step - first) * args.batch / minutes / 60
            words = [" ".join(f"{x:.3g}" for x in part.tolist()) for part in smooth]
            losses, errors = " ".join(words[:2]), " ".join(words[2:])
            print(f"{minutes:.1f} {step} {speed:.0f} | {losses} | {errors}", flush=True)
        if step % args.every == 0 or step == args.steps:
            kept.save(step)
            own = lambda steps: act(average.vla, data, steps)
            for suite, rate in closed_loops(own, data, args) if acting else ():
                print(f"{minutes:.1f} {step} {suite} {100 * rate:.0f} %", flush=True)


if __name__ == "__main__":
    main()
