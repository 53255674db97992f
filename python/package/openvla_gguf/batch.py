"""Open-loop evaluation on Ray Data: what a policy does on recorded frames, beside what was done.

    python -m openvla_gguf.batch -m openvla-7b.gguf --unnorm-key bridge_orig FOLDER -o results.jsonl --workers 2

`FOLDER` holds `steps.jsonl`, as `tabletop record` writes it, `actions.jsonl` or `actions.csv`, with a line for every frame:
`image` (a file in the folder), `instruction` and `action` (in CSV a JSON list); for an OpenVLA-OFT also `state` and, with
`wrist` in their names, its other cameras.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import numpy as np
import ray.data

from . import OpenVLA
from ._errors import InputError, OpenVLAError

__all__ = ["Policy", "evaluate", "frames"]

INDEXES = ["steps.jsonl", "actions.jsonl", "actions.csv"]
NEEDED = ["frame", "image", "instruction", "action"]


def frames(folder: Union[str, "os.PathLike[str]"]) -> ray.data.Dataset:
    """The frames of a folder: `frame`, which names it, `image`, `instruction`, `action`, and what else its index has.

    Raises InputError that names the file and the line.
    """
    folder = Path(folder)
    found = [folder / name for name in INDEXES if (folder / name).exists()]
    if len(found) != 1:
        has = " and ".join(path.name for path in found) or "none"
        raise InputError(f"{folder} has {has} of {', '.join(INDEXES)}", "one of them is wanted, with a line for every frame")
    rows = [_frame(row, folder, f"{found[0]}, line {n}") for n, row in _lines(found[0])]
    if not rows:
        raise InputError(f"{found[0]} holds no frames")
    return ray.data.from_items(rows)


def _lines(path: Path) -> Any:
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            for n, row in enumerate(csv.DictReader(file), 2):
                yield n, {name: _json(row[name], path, n) if name in ("action", "state") else row[name] for name in row}
        else:
            for n, line in enumerate(file, 1):
                yield n, _json(line, path, n)


def _json(text: Optional[str], path: Path, n: int) -> Any:
    try:
        return json.loads(text or "")
    except ValueError as error:
        raise InputError(f"{path}, line {n}: {error}", "JSON is wanted") from None


def _frame(row: Any, folder: Path, where: str) -> Dict[str, Any]:
    missing = [name for name in NEEDED[1:] if not isinstance(row, dict) or row.get(name) is None]
    if missing:
        raise InputError(f"{where} has no {' and no '.join(missing)}")
    action = row["action"]
    if not isinstance(action, list) or not all(isinstance(x, (int, float)) and np.isfinite(x) for x in action):
        raise InputError(f"{where}: the action is {str(action)[:60]}", "a list of finite numbers is wanted")
    row = {name: value for name, value in row.items() if value is not None}
    pictures = {name: str((folder / row[name]).resolve()) for name in row if name == "image" or "wrist" in name}
    return {**row, **pictures, "frame": str(row["image"])}


class Policy:
    """The stage itself, for a pipeline of one's own: `dataset.map(Policy, fn_constructor_kwargs={"model": …}, concurrency=2)`.

    Of a row with `frame`, `image` (a path, a file's bytes, or `[height, width, 3]` of uint8), `instruction` and `action` it
    makes one with `frame`; `predicted` `[n]`, the motion, of an OpenVLA-OFT the first of its chunk; `error` `[n]`, it less
    the recorded one, in the data set's units; `tokens`, if the model chooses tokens; `all_actions`, whether the best tokens
    of all were actions; and `failure`, why there is no motion, else None.
    """

    def __init__(self, model: Union[str, "os.PathLike[str]"], unnorm_key: Optional[str] = None, **options: Any):
        self.policy = OpenVLA(model, unnorm_key, **options)

    def __call__(self, row: Dict[str, Any]) -> Dict[str, Any]:
        result = {"frame": row["frame"], "predicted": None, "error": None, "tokens": None, "all_actions": None, "failure": None}
        try:
            result.update(self.act(row))
        except (OpenVLAError, OSError, TypeError) as error:
            result["failure"] = str(error)
        return result

    def act(self, row: Dict[str, Any]) -> Dict[str, Any]:
        more = {}
        wrists = [row[name] for name in sorted(row) if "wrist" in name]
        if wrists:
            more["wrist"] = wrists
        if row.get("state") is not None:
            more["state"] = np.asarray(row["state"], float).tolist()
        done = self.policy.act(row["image"], str(row["instruction"]), **more)
        predicted = done.actions[0] if hasattr(done, "actions") else done.action
        recorded = np.asarray(row["action"], float)
        if recorded.shape != predicted.shape:
            raise InputError(f"the recorded action has the shape {recorded.shape}, the model's {predicted.shape}")
        result = {"predicted": predicted.tolist(), "error": (predicted - recorded).tolist()}
        if done.tokens is not None:
            result["tokens"] = np.asarray(done.tokens).tolist()
        if hasattr(done, "unconstrained"):
            result["all_actions"] = bool(done.unconstrained["all_actions"])
        return result


def evaluate(
    dataset: ray.data.Dataset,
    model: Union[str, "os.PathLike[str]"],
    output: Union[str, "os.PathLike[str]"],
    *,
    unnorm_key: Optional[str] = None,
    workers: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    **options: Any,
) -> Dict[str, Any]:
    """Runs a policy over all frames and gives a summary; a line of `output` has what `Policy` makes of each.

    A run that was broken off goes on where it ended: frames that `output` has are not computed again. `workers` is the
    number of models that are open, each on so many `cpus` and `gpus`; `options` are those of `OpenVLA`.

    Raises InputError if a column is missing, OpenVLAError if `output` is of another model.
    """
    missing = [name for name in NEEDED if name not in dataset.columns()]
    if missing:
        raise InputError(f"the data set has no column {' and no '.join(missing)}", f"wanted are {', '.join(NEEDED)}")
    OpenVLA(model, unnorm_key, **options).close()  # what is wrong with it is said here, not by a worker
    about = {"model": str(model), "bytes": os.path.getsize(model), "unnorm_key": unnorm_key}
    output = Path(output)
    done = {row["frame"] for row in _begin(output, about)}
    todo = dataset.filter(lambda row: row["frame"] not in done) if done else dataset
    kwargs = {"model": os.path.abspath(model), "unnorm_key": unnorm_key, "threads": max(1, int(cpus)), **options}
    results = todo.map(Policy, fn_constructor_kwargs=kwargs, concurrency=workers, num_cpus=cpus, num_gpus=gpus)
    with output.open("a") as file:
        for row in results.iter_rows():
            line = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
            file.write(json.dumps(line) + "\n")
            file.flush()
    return _summary(_begin(output, about))


def _begin(output: Path, about: Dict[str, Any]) -> List[Dict[str, Any]]:
    """What the file has already, without a last line that was broken off; a new file says first what it is of."""
    text = output.read_text() if output.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != about:
        raise OpenVLAError(f"{output} is of {lines[0]}, not of {about}", "name another output")
    if not lines or whole != text:
        beside = output.with_name(output.name + ".new")
        beside.write_text(whole or json.dumps(about) + "\n")
        beside.replace(output)
    return lines[1:]


def _summary(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    errors = [row["error"] for row in rows if row["failure"] is None]
    summary: Dict[str, Any] = {"frames": len(rows), "failed": len(rows) - len(errors)}
    if errors:
        summary["mean_absolute_error"] = np.abs(errors).mean(axis=0).tolist()
    judged = [row["all_actions"] for row in rows if row["all_actions"] is not None]
    if judged:
        summary["all_actions"] = sum(judged) / len(judged)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser("openvla_gguf.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--unnorm-key")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="cores of a worker")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a worker")
    args = vars(parser.parse_args())
    try:
        print(json.dumps(evaluate(frames(args.pop("folder")), args.pop("model"), args.pop("output"), **args)))
    except OpenVLAError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
